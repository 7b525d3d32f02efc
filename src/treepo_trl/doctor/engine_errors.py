"""What to do about an engine that does not start, from its own words."""

from .needs import Needs
from .versions import how_to_install, vllm_window


_MEMORY_WORDS = ("out of memory", "free memory", "kv cache", "available memory", "cache blocks", "not enough memory")


def remedy_for(error: Exception, needs: Needs) -> str:
    """What to set or install after this error of an engine, or of the trainer that builds it."""
    text = f"{type(error).__name__} {error}".lower()
    if isinstance(error, ImportError) and "vllm" in text:
        return how_to_install("vllm")
    if any(words in text for words in _MEMORY_WORDS):
        return (
            "End other processes that hold memory (`nvidia-smi` lists a card's), or change "
            "`vllm_gpu_memory_utilization`: it is the engine's share of all the card's memory. A lower "
            "`vllm_max_model_length` needs less."
        )
    if "address already in use" in text:
        return (
            "Another training on this machine has this port: set the environment variable MASTER_PORT to a free one."
        )
    if not needs.uses_vllm:
        return "Load the model with `attn_implementation='sdpa'`, or sample with vLLM (`use_vllm: true`)."
    return f'Install a vLLM that TRL supports (`pip install "{vllm_window()}"`), or leave `use_vllm` out.'
