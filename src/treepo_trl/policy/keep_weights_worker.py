"""A worker of vLLM that sleeps without its cache only; vLLM imports it by name, in the process of its engine."""

from contextlib import AbstractContextManager, nullcontext

from vllm.v1.worker.gpu_worker import Worker  # noqa: TID253 - only vLLM imports this module


class KeepWeightsWorker(Worker):
    """
    [`~vllm.v1.worker.gpu_worker.Worker`] with its weights in ordinary memory of the card.

    Sleep mode frees what lies in a memory pool of its own: the weights, which vLLM moves to the processor's memory or
    drops, and the cache. With the weights outside, sleeping frees the cache, and waking up copies nothing.
    """

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        return nullcontext() if tag == "weights" else super()._maybe_get_memory_pool_context(tag)
