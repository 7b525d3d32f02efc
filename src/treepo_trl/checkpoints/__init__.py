"""
What a checkpoint keeps, and whether it can be gone on from: which is intact, whose folder it is in, where a batch was.

transformers writes most of it; here is what it leaves out, or writes over.
"""

from .folders import STATE_FILE, checkpoint_to_resume, newest_checkpoint, saved_values
from .one_training import only_training_in


__all__ = [
    "STATE_FILE",
    "checkpoint_to_resume",
    "newest_checkpoint",
    "only_training_in",
    "saved_values",
]
