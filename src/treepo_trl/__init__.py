"""Fine-tune reasoning models with segment trees: a `GRPOTrainer` whose completions share their prefixes."""

import importlib
import os
from typing import TYPE_CHECKING

from .preflight.versions import warn_of_versions


__version__ = "0.1.0"

__all__ = ["SegmentTree", "TreePOConfig", "TreePOTrainer", "TreeSampler", "TreeSamplingConfig", "__version__"]

_MODULES = {
    "SegmentTree": "sampling",
    "TreePOConfig": "treepo_config",
    "TreePOTrainer": "treepo_trainer",
    "TreeSampler": "sampling",
    "TreeSamplingConfig": "sampling",
}

if TYPE_CHECKING:
    from .sampling import SegmentTree, TreeSampler, TreeSamplingConfig
    from .treepo_config import TreePOConfig
    from .treepo_trainer import TreePOTrainer


# Kernels of the hub are code of others, downloaded while a model loads: only for whoever asks for them.
os.environ.setdefault("USE_HUB_KERNELS", "NO")
warn_of_versions()


def __getattr__(name: str) -> object:
    # Names are loaded on first use: the trainer imports TRL and, where it is installed, vLLM.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
