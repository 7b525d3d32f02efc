"""What is refused of the settings around vLLM: in this process, and on servers."""

import math
from dataclasses import fields
from typing import Any, ClassVar, Protocol

from .addresses import server_urls


class VLLMSettings(Protocol):
    """What is read of [`~treepo_trl.TreePOConfig`], which stands on this package."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    use_vllm: bool
    vllm_mode: str
    vllm_lora_sync: Any
    vllm_server_adapter_dir: str | None
    vllm_server_base_url: str | None
    vllm_server_host: str
    vllm_server_port: int
    vllm_server_timeout: float
    vllm_gpu_memory_utilization: Any
    vllm_sleep_keeps_weights: bool
    vllm_enable_sleep_mode: bool
    vllm_share_base_weights: bool
    vllm_base_weights: Any
    vllm_tensor_parallel_size: int
    vllm_engine_kwargs: Any
    vllm_importance_sampling_correction: bool
    rollout_ahead: int
    steps_per_generation: int
    num_iterations: int
    gradient_accumulation_steps: int

    @property
    def chooses_prompts(self) -> str: ...

    @property
    def micro_steps_per_batch(self) -> int: ...


_OWN_PROCESS = (
    "vllm_share_base_weights",
    "vllm_sleep_keeps_weights",
    "vllm_enable_sleep_mode",
    "vllm_engine_kwargs",
    "vllm_base_weights",
    "vllm_tensor_parallel_size",
    "vllm_model_impl",
)
"""Settings of an engine in this process."""


def check_vllm_fields(settings: VLLMSettings) -> None:
    """
    Raise for settings of vLLM that exclude each other, or that the mode does not have.

    Raises:
        ValueError, TypeError: naming the setting and what to do.
    """
    _check_shared_base(settings)
    _check_sleep(settings)
    _check_engine_kwargs(settings)
    _check_rollout_ahead(settings)
    if settings.use_vllm and settings.vllm_mode == "server":
        _check_servers(settings)
    elif settings.vllm_server_adapter_dir is not None:
        raise ValueError(
            "`vllm_server_adapter_dir` is where servers find the policy, but no server samples. Set `use_vllm=True` "
            "and `vllm_mode='server'`, or leave it out."
        )


def _check_servers(settings: VLLMSettings) -> None:
    if settings.vllm_server_base_url is None and "@" in settings.vllm_server_host:
        raise ValueError(
            "`vllm_server_host` must be a name or an address alone. A user and a password stand in "
            "`vllm_server_base_url`, such as 'http://user:password@host:8000'."
        )
    server_urls(settings.vllm_server_base_url, settings.vllm_server_host, settings.vllm_server_port)
    if not 0 < settings.vllm_server_timeout < math.inf:
        raise ValueError(
            f"`vllm_server_timeout` is {settings.vllm_server_timeout}; it must be a number of seconds above 0, after "
            "which a server that is silent counts as lost."
        )
    defaults = {each.name: each.default for each in fields(settings)}
    for name in _OWN_PROCESS:
        value = getattr(settings, name)
        if value != defaults[name] and value != {}:
            raise ValueError(
                f"`{name}={value!r}` is about an engine in this process, but `vllm_mode` is 'server'. Leave it out, "
                "and give the servers flags of their own (`vllm serve --help`)."
            )
    if settings.vllm_gpu_memory_utilization == "auto":
        raise ValueError(
            "`vllm_gpu_memory_utilization='auto'` plans a card that training and engine share, but `vllm_mode` is "
            "'server'. Leave it out, and give the servers `--gpu-memory-utilization`."
        )


def _check_adapter_engine(settings: VLLMSettings, name: str) -> None:
    if not (settings.use_vllm and settings.vllm_lora_sync == "adapter"):
        raise ValueError(
            f"`{name}=True` is about the vLLM engine of a LoRA policy. It needs `use_vllm=True` and "
            "`vllm_lora_sync='adapter'`."
        )


def _check_sleep(settings: VLLMSettings) -> None:
    if not settings.vllm_sleep_keeps_weights:
        return
    _check_adapter_engine(settings, "vllm_sleep_keeps_weights")
    if not settings.vllm_enable_sleep_mode:
        raise ValueError(
            "`vllm_sleep_keeps_weights=True` says how the engine sleeps, but it does not sleep. Set "
            "`vllm_enable_sleep_mode=True`, or leave it out."
        )


def _check_shared_base(settings: VLLMSettings) -> None:
    if not settings.vllm_share_base_weights:
        return
    _check_adapter_engine(settings, "vllm_share_base_weights")
    if settings.vllm_base_weights == "dequantized":
        raise ValueError(
            "`vllm_share_base_weights=True` needs the same weights in policy and engine, but "
            "`vllm_base_weights='dequantized'` has them in 4 and in 16 bits. Set `vllm_base_weights='quantized'`, "
            "or unset one of the two."
        )
    if settings.vllm_tensor_parallel_size > 1:
        raise ValueError(
            "`vllm_share_base_weights=True` needs an engine that holds whole weights, but "
            f"`vllm_tensor_parallel_size` is {settings.vllm_tensor_parallel_size}. Unset one of the two."
        )


def _check_engine_kwargs(settings: VLLMSettings) -> None:
    if isinstance(settings.vllm_gpu_memory_utilization, str) and settings.vllm_gpu_memory_utilization != "auto":
        share = settings.vllm_gpu_memory_utilization
        raise TypeError(f"`vllm_gpu_memory_utilization` is {share!r}; it must be a number, or 'auto'.")
    if not isinstance(settings.vllm_engine_kwargs, dict | None):
        raise TypeError(
            f"`vllm_engine_kwargs` is {settings.vllm_engine_kwargs!r}; give a dictionary, on the command line a JSON "
            """object such as '{"attention_backend": "TRITON_ATTN"}'."""
        )


def _check_rollout_ahead(settings: VLLMSettings) -> None:
    if settings.rollout_ahead == 0:
        return
    reason = ""
    if not (settings.use_vllm and settings.vllm_mode == "server"):
        reason = (
            "an engine in this process shares its memory and its main thread with the update. Set `use_vllm=True` "
            "and `vllm_mode='server'`"
        )
    elif not settings.vllm_importance_sampling_correction:
        reason = (
            "its trees are one update old, and `vllm_importance_sampling_correction=False` leaves that "
            "uncorrected. Set it"
        )
    elif settings.chooses_prompts:
        reason = (
            f"`{settings.chooses_prompts}` chooses prompts by their rewards, which are known when a batch is used. "
            "Leave it out"
        )
    elif settings.micro_steps_per_batch % settings.gradient_accumulation_steps:
        reason = (
            f"a batch (`steps_per_generation` {settings.steps_per_generation} x `num_iterations` "
            f"{settings.num_iterations}) must end with an optimizer step of {settings.gradient_accumulation_steps} "
            "micro-batches. Make it a multiple of `gradient_accumulation_steps`"
        )
    if reason:
        raise ValueError(f"`rollout_ahead={settings.rollout_ahead}`, but {reason}, or leave it out.")
