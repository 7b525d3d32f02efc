"""`treepo-trl sample`: trees of prompts, without a training, and what they cost."""
