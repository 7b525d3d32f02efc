"""
Segments from a vLLM engine in this process, driven request by request.

vLLM's prefix cache makes a child reuse its parent's keys and values. Results are handed out in bursts. Segments end at
different times, and submitting each child at once would add a prefill to almost every engine step, which costs more
than it saves.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, cast

import numpy as np

from .base import SamplingOptions, SegmentEngine, SegmentEngineError, SegmentRequest, SegmentResult
from .vllm_sampling import NUM_TOP_LOGPROBS, entropies_of, sampling_fields


if TYPE_CHECKING:
    from vllm import LLM, RequestOutput
    from vllm.config import CacheConfig
    from vllm.logprobs import FlatLogprobs
    from vllm.lora.request import LoRARequest

_STEPS_PER_BURST = 16  # at most; a sixteenth of a segment where segments are short


class VLLMEngine(SegmentEngine):
    """
    [`SegmentEngine`] over a [`vllm.LLM`] in this process.

    Args:
        llm ([`vllm.LLM`]):
            Engine with prefix caching, and with `logprobs_mode="processed_logprobs"` if the log-probabilities are to
            be those of the sampling distribution.
        eos_token_ids (`list[int]`):
            Tokens that end a segment.
        options ([`SamplingOptions`], *optional*):
            How tokens are drawn.
        generation_kwargs (`dict`, *optional*):
            Further fields of [`vllm.SamplingParams`]; they win over `options`.
        lora_request ([`vllm.lora.request.LoRARequest`], *optional*):
            Adapter to sample with.
        with_entropies (`bool`, *optional*, defaults to `False`):
            Whether results carry the entropy of each token's distribution, from vLLM's 20 largest log-probabilities.
    """

    def __init__(
        self,
        llm: "LLM",
        eos_token_ids: list[int],
        options: SamplingOptions | None = None,
        generation_kwargs: dict[str, object] | None = None,
        lora_request: "LoRARequest | None" = None,
        with_entropies: bool = False,
    ) -> None:
        self.llm = llm
        self.eos_token_ids = frozenset(eos_token_ids)
        self.options = options or SamplingOptions()
        self.generation_kwargs = generation_kwargs or {}
        self.lora_request = lora_request
        self.reports_entropies = with_entropies
        config = llm.llm_engine.vllm_config
        self.context_length: int | None = config.model_config.max_model_len
        self.num_cache_tokens: int | None = _num_cache_tokens(config.cache_config)
        self.block_size: int | None = _block_size(llm)
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._max_num_seqs: int = config.scheduler_config.max_num_seqs
        self._in_flight: dict[str, int] = {}  # vLLM's request id -> longest segment

    def num_slots(self, length: int) -> int | None:
        """
        Requests that vLLM runs at once, whatever their length.

        More requests than that would keep every slot busy within a burst, but add a prefill to almost every step.
        """
        return self._max_num_seqs

    def submit(self, requests: list[SegmentRequest]) -> None:
        """
        Queue requests. Returns at once.

        Raises:
            SegmentEngineError: for a request that vLLM refuses.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        shared = sampling_fields(self.options, self.eos_token_ids, self.generation_kwargs, self.reports_entropies)
        own = {"flat_logprobs": True, "output_kind": RequestOutputKind.FINAL_ONLY}
        for request in requests:
            fields = {**own, **shared, "max_tokens": request.max_tokens}
            request_id = str(request.request_id)
            try:
                self.llm.llm_engine.add_request(
                    request_id,
                    {"prompt_token_ids": request.token_ids},
                    SamplingParams(**fields),
                    lora_request=self.lora_request,
                )
            except Exception as error:  # vLLM's own classes differ between its versions
                raise SegmentEngineError(request.request_id, f"vLLM refuses a request: {error}") from error
            self._in_flight[request_id] = request.max_tokens

    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
        """
        Step the engine until at least one segment is done and either a burst of steps has passed or nothing runs.

        With `wake` also until that is true at the end of a burst.
        """
        results: list[SegmentResult] = []
        longest = max(self._in_flight.values(), default=0)
        burst = min(max(longest // 16, 1), _STEPS_PER_BURST)
        steps = 0
        while self._in_flight and not (results and steps >= burst):
            if wake is not None and steps >= burst and steps % burst == 0 and wake():
                break
            steps += 1
            for output in self.llm.llm_engine.step():
                results.append(self._read(cast("RequestOutput", output)))
        return results

    def abort(self) -> None:
        """Drop everything that is queued or running."""
        if self._in_flight:
            self.llm.llm_engine.abort_request(sorted(self._in_flight))
            self.reset_prefix_cache()  # blocks are freed in an order that differs between tensor parallel ranks
        self._in_flight.clear()

    def reset_prefix_cache(self) -> None:
        """Forget all keys and values. Needed after a change of the weights."""
        self.llm.reset_prefix_cache()

    def _read(self, output: "RequestOutput") -> SegmentResult:
        self._in_flight.pop(output.request_id)
        self.num_prompt_tokens += len(output.prompt_token_ids or ())
        self.num_cached_tokens += output.num_cached_tokens or 0
        (completion,) = output.outputs
        token_ids = list(completion.token_ids)
        logprobs = np.array(cast("FlatLogprobs", completion.logprobs).logprobs, dtype=np.float64)
        width = 1 + (NUM_TOP_LOGPROBS if self.reports_entropies else 0)  # the sampled token, then the most likely
        if (
            completion.finish_reason not in ("stop", "length")
            or not token_ids
            or len(logprobs) != width * len(token_ids)
        ):
            raise SegmentEngineError(
                int(output.request_id),
                f"vLLM ended request {output.request_id} with reason {completion.finish_reason!r}, {len(token_ids)} "
                f"tokens and {len(logprobs)} log-probabilities; expected {width} per token and 'stop' or 'length'.",
            )
        table = logprobs.reshape(len(token_ids), width)
        return SegmentResult(
            int(output.request_id),
            token_ids,
            table[:, 0].tolist(),
            "stop" if token_ids[-1] in self.eos_token_ids else "length",
            entropies_of(table[:, 1:]).tolist() if self.reports_entropies else None,
        )


def cache_options(on_processor: bool) -> dict[str, object]:
    """
    Options of `vllm.LLM` with which children find their parents in the prefix cache in all kinds of layers.

    Of window and recurrent layers vLLM keeps only what a prompt has left, and children follow what was decoded. A
    cache keeps whole blocks, and vLLM's default on a processor, 128 tokens, is longer than many segments.
    """
    own: dict[str, object] = {"block_size": 32} if on_processor else {}
    try:
        from vllm import EngineArgs
    except ImportError:
        return own  # TRL says what is missing

    name = "prefix_cache_retention_interval"  # older versions have none, and keep everything
    return own | ({name: None} if name in {each.name for each in fields(EngineArgs)} else {})


def _block_size(llm: "LLM") -> int | None:
    """
    Tokens of a block of the prefix cache.

    Kinds of layers may have blocks of different sizes, and a prefix is found again where blocks of all of them end.
    The config holds the smallest size, and the scheduler their common multiple.
    """
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)  # it may run in another process
    return llm.llm_engine.vllm_config.cache_config.block_size if core is None else core.scheduler.block_size


def _num_cache_tokens(config: "CacheConfig") -> int | None:
    """Tokens that the cache holds. Kinds of layers take blocks of their own out of it."""
    counted = getattr(config, "kv_cache_size_tokens", None)  # not in vLLM's older versions
    if counted is not None:
        return counted
    num_blocks, block_size = config.num_gpu_blocks, config.block_size
    return num_blocks * block_size if num_blocks and block_size else None
