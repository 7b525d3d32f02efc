"""TreePOConfig in tests: one on a processor that logs to nobody, and its own fields."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from treepo_trl import TreePOConfig


NEW_FIELDS = {f.name: f for f in fields(TreePOConfig) if f.name not in {g.name for g in fields(GRPOConfig)}}


def make(folder: Path, **changes: Any) -> TreePOConfig:
    return TreePOConfig(output_dir=str(folder), **{"use_cpu": True, "bf16": False, "report_to": [], **changes})
