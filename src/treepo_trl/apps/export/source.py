"""Which adapter a user means by the name of a run, a checkpoint or an adapter, and what lies beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState

from treepo_trl.checkpoints import newest_checkpoint
from treepo_trl.policy.four_bit_base import BaseQuantization, read_quantization
from treepo_trl.policy.starting_adapter import read_adapter_config


if TYPE_CHECKING:
    from peft import PeftConfig


_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdapterSource:
    """An adapter, and what it belongs to."""

    folder: Path
    """Where its files are."""
    peft_config: "PeftConfig"
    base: str
    """Name or folder of the model that it is merged into."""
    tokenizer: str
    """Folder or name of the tokenizer that it was trained with."""
    quantization: BaseQuantization | None
    """How its base was quantized in training, where the training has said so."""


def find_adapter(name: str, base: str | None = None) -> AdapterSource:
    """
    The adapter in a run's folder, else in its newest checkpoint that is intact, or in the folder itself.

    Args:
        name (`str`):
            A run's `output_dir`, a checkpoint, or a folder with an adapter.
        base (`str`, *optional*):
            The model to merge into, instead of the one that the adapter names.

    Raises:
        ValueError: if there is no adapter, with what is there instead; if it names no base; if it cannot be merged.
    """
    folder = _adapter_folder(name)
    peft_config = read_adapter_config(str(folder))
    _check_kind(folder, peft_config)
    named = base or peft_config.base_model_name_or_path
    if not named:
        raise ValueError(f"The adapter in `{folder}` names no base. Give it as `--model_name_or_path`.")
    beside = [place for place in (folder, folder.parent) if (place / "tokenizer_config.json").is_file()]
    tokenizer = str(beside[0]) if beside else named
    return AdapterSource(folder, peft_config, named, tokenizer, read_quantization(folder))


def _adapter_folder(name: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        raise ValueError(f"`{name}` is no folder. Name a run's `output_dir`, a checkpoint, or an adapter's folder.")
    if (path / _CONFIG).is_file():
        return path
    PartialState()  # accelerate's loggers need it, and a checkpoint that is passed over is told
    checkpoint = newest_checkpoint(name)
    if checkpoint is not None and (Path(checkpoint) / _CONFIG).is_file():
        return Path(checkpoint)
    if (path / "config.json").is_file() or checkpoint is not None:
        raise ValueError(
            f"`{name}` holds a whole model and no adapter: there is nothing to merge. transformers and vLLM load "
            f"`{path if (path / 'config.json').is_file() else checkpoint}` as it is."
        )
    raise ValueError(
        f"`{name}` holds no adapter: neither `{_CONFIG}` nor an intact checkpoint with one is in it. Name a run's "
        "`output_dir`, a checkpoint, or an adapter's folder."
    )


def _check_kind(folder: Path, peft_config: "PeftConfig") -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(peft_config.peft_type))
    if peft_config.is_prompt_learning or not hasattr(tuner, "merge_and_unload"):
        kind = getattr(peft_config.peft_type, "value", peft_config.peft_type)
        raise ValueError(
            f"The adapter in `{folder}` is {kind}, which cannot be merged into a base. Load it with PEFT instead."
        )
