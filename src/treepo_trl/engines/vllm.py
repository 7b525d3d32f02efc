"""
Segments from a vLLM engine in this process, driven request by request.

The prefix cache makes a child reuse its parent's keys and values. Results are handed out in bursts: when segments end
at all different times, submitting every child at once mixes a prefill into almost every engine step, which costs more
than it wins.
"""

from typing import TYPE_CHECKING, Any

from .base import SamplingOptions, SegmentRequest, SegmentResult


if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

_STEPS_PER_BURST = 16


class VLLMEngine:
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

    Attributes:
        num_prompt_tokens (`int`), num_cached_tokens (`int`):
            Tokens of the requests so far, and how many of them came from the prefix cache.
    """

    def __init__(
        self,
        llm: "LLM",
        eos_token_ids: list[int],
        options: SamplingOptions | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        lora_request: "LoRARequest | None" = None,
    ) -> None:
        self.llm = llm
        self.eos_token_ids = frozenset(eos_token_ids)
        self.options = options or SamplingOptions()
        self.generation_kwargs = generation_kwargs or {}
        self.lora_request = lora_request
        self.context_length: int | None = llm.llm_engine.vllm_config.model_config.max_model_len
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._in_flight: set[str] = set()
        self._steps = 0

    def submit(self, requests: list[SegmentRequest]) -> None:
        """Queue requests. Returns at once."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options = self.options
        for request in requests:
            fields = {
                "temperature": options.temperature,
                "top_p": options.top_p,
                "top_k": options.top_k,
                "min_p": options.min_p or 0.0,
                "repetition_penalty": options.repetition_penalty,
                "logprobs": 0,  # the sampled token's alone
                "flat_logprobs": True,
                "stop_token_ids": sorted(self.eos_token_ids),
                "detokenize": False,
                "output_kind": RequestOutputKind.FINAL_ONLY,
                **self.generation_kwargs,
                "max_tokens": request.max_tokens,
            }
            request_id = str(request.request_id)
            self.llm.llm_engine.add_request(
                request_id,
                {"prompt_token_ids": request.token_ids},
                SamplingParams(**fields),
                lora_request=self.lora_request,
            )
            self._in_flight.add(request_id)

    def collect(self) -> list[SegmentResult]:
        """
        Step the engine until at least one segment is done and either a burst of steps has passed or nothing runs.
        """
        results: list[SegmentResult] = []
        while self._in_flight and not (results and self._steps >= _STEPS_PER_BURST):
            self._steps += 1
            for output in self.llm.llm_engine.step():
                results.append(self._read(output))
        self._steps = 0
        return results

    def abort(self) -> None:
        """Drop everything that is queued or running."""
        if self._in_flight:
            self.llm.llm_engine.abort_request(sorted(self._in_flight))
        self._in_flight.clear()
        self._steps = 0

    def _read(self, output: Any) -> SegmentResult:
        self._in_flight.remove(output.request_id)
        self.num_prompt_tokens += len(output.prompt_token_ids)
        self.num_cached_tokens += output.num_cached_tokens or 0
        (completion,) = output.outputs
        token_ids = list(completion.token_ids)
        logprobs = list(completion.logprobs.logprobs)
        if completion.finish_reason not in ("stop", "length") or not token_ids or len(logprobs) != len(token_ids):
            raise RuntimeError(
                f"vLLM ended request {output.request_id} with reason {completion.finish_reason!r}, {len(token_ids)} "
                f"tokens and {len(logprobs)} log-probabilities; expected one per token and 'stop' or 'length'."
            )
        is_eos = token_ids[-1] in self.eos_token_ids
        return SegmentResult(int(output.request_id), token_ids, logprobs, "stop" if is_eos else "length")
