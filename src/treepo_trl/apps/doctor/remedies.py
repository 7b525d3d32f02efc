"""What to do about an engine that does not start or a step that fails, by its words and by where they come from."""

import re
import traceback

from .findings import CHANGE_SETTING, BrokenError, in_words
from .recipe import Recipe
from .versions import how_to_install, vllm_window


_MEMORY_WORDS = ("out of memory", "free memory", "kv cache", "available memory", "cache blocks", "not enough memory")
_SAY_WHAT_TO_SET = ("treepo_trl", "peft")
"""Packages whose errors about values name the setting, and what it may be."""
_ADAPTER_REMEDY = (
    "Set `lora_target_modules` to modules that the engine serves, or `vllm_lora_sync: merge`, or leave `use_vllm` out."
)
_READ_MODELS = {"transformers", "huggingface_hub"}
_CALL_OF_ANOTHER_VERSION = re.compile(r"\(\) (got|missing|takes) ")


def engine_error(error: Exception, recipe: Recipe) -> BrokenError:
    """The finding about an engine, or the trainer that builds it and makes a step, that fails."""
    packages = _packages(error)
    if isinstance(error, OSError) and _READ_MODELS.intersection(packages):  # else of the system, or of a library
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        return BrokenError(
            f"The model `{recipe.step_model}` cannot be read: {type(error).__name__}: {first}",
            "Check `--model_name_or_path`: a folder with a model, or a name of the hub, which must be reached or have "
            "been loaded before.",
        )
    if isinstance(error, RuntimeError) and packages[-1:] == ["treepo_trl"]:  # engine and policy, packed and plain rows
        is_of_adapter = "A probe with a moved adapter" in str(error)
        return BrokenError(str(error), _ADAPTER_REMEDY if is_of_adapter else CHANGE_SETTING)
    return BrokenError(in_words(error), remedy_for(error, recipe))


def remedy_for(error: Exception, recipe: Recipe) -> str:
    """What to set or install after this error of an engine, or of the trainer that builds it."""
    text = f"{type(error).__name__} {error}".lower()
    if isinstance(error, ImportError) and "vllm" in text:
        return how_to_install("vllm")
    origin = next(iter(_packages(error)[-1:]), None)
    is_about_a_value = isinstance(error, ValueError | TypeError) and not _CALL_OF_ANOTHER_VERSION.search(str(error))
    if is_about_a_value and origin in _SAY_WHAT_TO_SET:
        return CHANGE_SETTING
    if any(words in text for words in _MEMORY_WORDS):
        return (
            "End other processes that hold memory (`nvidia-smi` lists a card's), or change "
            "`vllm_gpu_memory_utilization`: it is the engine's share of all the card's memory. A lower "
            "`vllm_max_model_length` needs less."
        )
    if "bitsandbytes" in (origin, *text.split()):
        return f"{how_to_install('bitsandbytes')} Or leave `load_in_4bit` out."
    if origin == "transformers":
        return "Look for this error in the issues of `transformers`, which loads the model."
    if not recipe.uses_vllm:
        return "Load the model with `attn_implementation='sdpa'`, or sample with vLLM (`use_vllm: true`)."
    return f'Install a vLLM that TRL supports (`pip install "{vllm_window()}"`), or leave `use_vllm` out.'


def _packages(error: Exception) -> list[str]:
    """The packages that an error has come through, the one that has raised it last."""
    frames = traceback.walk_tb(error.__traceback__)
    return [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames]
