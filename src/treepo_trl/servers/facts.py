"""What a vLLM server says about itself, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """How a server was started."""

    version: str
    """Of vLLM."""
    model: str
    """Folder or hub id of the base."""
    model_name: str
    """Name to ask for the base: the folder or hub id, if no other was given."""
    context_length: int
    """Tokens of the longest sequence."""
    dtype: str
    """Such as `bfloat16`."""
    quantization: str | None
    """Such as `bitsandbytes`."""
    logprobs_mode: str
    """`processed_logprobs` are those of the sampling distribution."""
    max_logprobs: int
    """Most log-probabilities per token; -1 without a limit."""
    prefix_caching: bool
    """Whether the server finds prefixes again."""
    block_size: int | None
    """Tokens per block of the prefix cache."""
    num_cache_tokens: int | None
    """Tokens that all of its ranks can keep."""
    num_slots: int
    """Requests that all of its ranks run at once."""
    data_parallel_size: int
    """Ranks, each with a cache of its own."""
    max_loras: int
    """Adapters that it holds at once; 0 without LoRA."""
    max_lora_rank: int
    """Highest rank of an adapter; 0 without LoRA."""

    @property
    def number_type(self) -> str:
        """What it computes in, in words."""
        return " with ".join(filter(None, (self.dtype, self.quantization)))


def facts_from(version: str, config: Mapping[str, Any]) -> ServerFacts:
    """
    Facts from the `vllm_config` of `/server_info?config_format=json`.

    Raises:
        KeyError, TypeError: for something else.
    """
    model, cache, lora = config["model_config"], config["cache_config"], config["lora_config"] or {}
    names = model["served_model_name"]
    num_blocks, block_size = cache["num_gpu_blocks"], cache["block_size"]
    num_ranks = config["parallel_config"]["data_parallel_size"]
    return ServerFacts(
        version=version,
        model=model["model"],
        model_name=names if isinstance(names, str) else names[0],
        context_length=model["max_model_len"],
        dtype=str(model["dtype"]).removeprefix("torch."),
        quantization=model["quantization"],
        logprobs_mode=model["logprobs_mode"],
        max_logprobs=model["max_logprobs"],
        prefix_caching=bool(cache["enable_prefix_caching"]),
        block_size=block_size,
        num_cache_tokens=num_blocks * block_size if num_blocks and block_size else None,  # the sum of all ranks
        num_slots=config["scheduler_config"]["max_num_seqs"] * num_ranks,  # of each rank
        data_parallel_size=num_ranks,
        max_loras=lora.get("max_loras", 0),
        max_lora_rank=lora.get("max_lora_rank", 0),
    )
