"""
From the policy to the vLLM engine: the adapter alone for LoRA and QLoRA, TRL's push of all weights otherwise.

Stock TRL merges the adapter into the base model and pushes every weight before each generation. A merge into 4-bit
weights is lossy. In bfloat16 the weights drift with each merge and unmerge. Here the base model is never changed: the
engine loads the same base with LoRA enabled, and the adapter's files travel through memory-backed storage.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from trl.generation.vllm_generation import empty_cache

from treepo_trl.treepo_config import BaseWeights
from treepo_trl.trl.generation import OwnGeneration
from treepo_trl.trl.seams import engine_class

from .four_bit_base import base_checkpoint, base_of, choose_base_weights, is_4bit
from .gathered_adapter import check_whole_adapter, gathered_adapter, num_bytes, write_adapter
from .shared_base import SHARDED, check_sharing, different_weights, parked, report_sharing, share_weights
from .temporary_folder import TemporaryFolder, place_for


if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel

    from .vllm_classes import LoraLLM, PolicyLLM


logger = get_logger(__name__)

_ADAPTER_NAME = "policy"
_ADAPTER_ID = 1
_KEEPS_WEIGHTS = "treepo_trl.policy.vllm_classes.KeepWeightsWorker"
_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


def check_adapter(
    peft_config: "PeftConfig", advice: str = "Change the adapter, or set `vllm_lora_sync='merge'`."
) -> None:
    """
    Raise unless vLLM can serve an adapter with this [`~peft.PeftConfig`].

    Raises:
        ValueError: naming the setting and, with `advice`, what to do.
    """
    if peft_config.peft_type != "LORA":
        kind = getattr(peft_config.peft_type, "value", peft_config.peft_type)
        raise ValueError(f"vLLM serves LoRA adapters, this one is {kind}. {advice}")
    for name, allowed in (("use_dora", (False, None)), ("bias", ("none",)), ("modules_to_save", (None, []))):
        value = getattr(peft_config, name)
        if value not in allowed:
            raise ValueError(f"vLLM serves no adapters with `{name}={value!r}`. {advice}")
    lora = cast("LoraConfig", peft_config)
    if getattr(lora, "lora_bias", False):
        raise ValueError(f"vLLM serves no adapters with `lora_bias=True`. {advice}")
    if lora.init_lora_weights not in _INITS_THAT_KEEP_THE_BASE:
        raise ValueError(
            f"`init_lora_weights={lora.init_lora_weights!r}` changes the base weights, which the engine loads "
            f"unchanged. {advice}"
        )
    for name in ("rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices"):
        value = getattr(peft_config, name, None)
        if value:
            raise ValueError(f"vLLM serves no adapters with `{name}` ({value!r}). {advice}")


def lora_engine_options(rank: int) -> dict[str, int]:
    """
    Options of `vllm.LLM` for one adapter of this rank.

    Raises:
        ValueError: if the rank is above vLLM's largest.
    """
    from vllm.config.lora import MaxLoRARanks

    ranks = sorted(get_args(MaxLoRARanks))
    fitting = [allowed for allowed in ranks if rank <= allowed]
    if not fitting:
        raise ValueError(f"vLLM serves adapters up to rank {ranks[-1]}, this one has {rank}. Lower `r`.")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": fitting[0]}


class AdapterVLLMGeneration(OwnGeneration):
    """
    [`~trl.generation.vllm_generation.VLLMGeneration`] that gives the engine the adapter instead of merged weights.

    Only for `mode="colocate"` and a model with one LoRA adapter. A request is answered by the policy if it carries
    `llm.lora_request`. `llm.generate` adds it by itself.

    Args:
        base_weights (`str`):
            `vllm_base_weights` of [`TreePOConfig`].
        share_base_weights (`bool`):
            Let the policy compute with the engine's copy of the frozen base.
        sleep_keeps_weights (`bool`):
            Whether a sleeping engine frees its cache alone. Shared weights always stay.
        engine_options (`dict`, *optional*):
            Further options of `vllm.LLM`.
    """

    model: "PeftModel"
    llm: "LoraLLM"

    def __init__(
        self,
        *args: Any,
        base_weights: BaseWeights = "auto",
        share_base_weights: bool = False,
        sleep_keeps_weights: bool = False,
        engine_options: dict[str, object] | None = None,
        **kwargs: Any,
    ) -> None:
        self.engine_options = engine_options or {}
        self.base_weights: BaseWeights = base_weights
        self.share_base_weights = share_base_weights
        self.sleep_keeps_weights = sleep_keeps_weights or share_base_weights
        super().__init__(*args, **kwargs)

    # What the engine is given

    def start(self) -> None:
        check_whole_adapter(self.accelerator)
        if self.share_base_weights:
            check_sharing(self.model, self.accelerator, self.tensor_parallel_size)
        self._adapter_folder = TemporaryFolder("adapter", place_for(num_bytes(self.model)))
        with ExitStack() as stack:
            options = self._engine_options() | stack.enter_context(self._base_options())
            stack.enter_context(engine_class(_lora_llm_class(options)))
            if self.share_base_weights:  # the device never holds the base twice, even while the engine is built
                stack.enter_context(parked(base_of(self.model)))
                empty_cache()
            super().start()  # ends when all processes have loaded the checkpoint: it may be deleted
            if self.share_base_weights:
                dtypes = base_of(self.model).dtype, cast(torch.dtype, self.llm.llm_engine.model_config.dtype)
                report_sharing(*self._share_base_weights(), *dtypes)
        self._try_adapter()

    def _engine_options(self) -> dict[str, object]:
        """Options of `vllm.LLM` that go before those of TRL."""
        peft_config = cast("LoraConfig", self.model.active_peft_config)
        # The commit that the policy was loaded from. TRL gives the engine the name alone.
        revision = getattr(base_of(self.model).config, "_commit_hash", None)
        return {
            **self.engine_options,
            **lora_engine_options(peft_config.r),
            "enable_prefix_caching": True,
            "revision": revision,
            "tokenizer_revision": revision,
            **self._worker_options(),
        }

    def _worker_options(self) -> dict[str, object]:
        device = self.accelerator.device.type
        if not (self.enable_sleep_mode and self.sleep_keeps_weights) or device == "cpu":  # vLLM never sleeps there
            return {}
        if device != "cuda":
            raise ValueError(
                f"`vllm_sleep_keeps_weights` and `vllm_share_base_weights` with `vllm_enable_sleep_mode=True` are for "
                f"CUDA, this is {device!r}. Unset `vllm_enable_sleep_mode`."
            )
        return {"worker_cls": _KEEPS_WEIGHTS}

    @contextmanager
    def _base_options(self) -> Iterator[dict[str, object]]:
        """Options for a 4-bit policy's base, whose checkpoint is there inside of the block; else none."""
        if not is_4bit(self.model):
            yield {}
            return
        self.base_weights = choose_base_weights(
            "quantized" if self.share_base_weights else self.base_weights,
            self.model,
            self.accelerator.device,
            self.gpu_memory_utilization,
            self.tensor_parallel_size,
        )
        with self._shared_checkpoint(self.base_weights) as folder:
            yield {
                "model": folder,
                "revision": None,
                "tokenizer": self.model.name_or_path,
                "quantization": "bitsandbytes" if self.base_weights == "quantized" else None,
            }

    @contextmanager
    def _shared_checkpoint(self, base_weights: Literal["quantized", "dequantized"]) -> Iterator[str]:
        """Folder with the policy's 4-bit base for the engine, written by one process of each machine."""
        accelerator = self.accelerator
        with ExitStack() as stack:
            folder = None
            if accelerator.is_local_main_process:
                folder = stack.enter_context(base_checkpoint(self.model, base_weights))
            folders = cast(list[str], gather_object([folder]))
            yield folders[accelerator.process_index - accelerator.local_process_index]

    # Its base against the policy's

    @property
    def _engine_model(self) -> torch.nn.Module:
        executor: Any = self.llm.llm_engine.model_executor  # of a type that depends on the platform
        return executor.driver_worker.model_runner.model

    def _share_base_weights(self) -> tuple[int, dict[str, int]]:
        return share_weights(base_of(self.model), self._engine_model, self.accelerator.device)

    def _compare_base_weights(self) -> None:
        """Warn if the policy's base is not what the engine has loaded. The engine must be awake."""
        if self.tensor_parallel_size > 1 or self.accelerator.distributed_type in SHARDED:
            return  # one of the two has no whole weights
        different = different_weights(base_of(self.model), self._engine_model)
        if different:
            logger.warning(
                f"Weights of the policy's base ({len(different)}, {different[0]} for example) differ from those that "
                f"vLLM has loaded from {self.model.name_or_path!r}: it samples from another model. If the base "
                "was changed in memory (a merged adapter, resized embeddings), save it and load it from there, or set "
                "`vllm_lora_sync='merge'`."
            )

    # How the adapter travels

    def _try_adapter(self) -> None:
        """Load the untrained adapter, so that what vLLM cannot serve is an error before the first step."""
        try:
            self.sync_weights()
        except ValueError as error:
            raise ValueError(
                f"vLLM cannot serve this adapter: {error} Change its `target_modules`, or set "
                "`vllm_lora_sync='merge'`."
            ) from error
        self._compare_base_weights()
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)
            self.is_asleep = True

    def sync_weights(self) -> None:
        """Load the policy's adapter into the engine and forget what its predecessor computed."""
        from vllm.lora.request import LoRARequest

        if self.share_base_weights:
            self._share_base_weights()  # again: preparing the policy for training may have copied it
        weights = gathered_adapter(self.model, self.accelerator)  # each process has an engine, or a part of one
        directory = write_adapter(self.model, weights, self._adapter_folder.path)
        if self.enable_sleep_mode:
            empty_cache()
            self.llm.wake_up(tags=["weights"])
            self.is_asleep = False
        # Without `load_inplace` the engine silently keeps the adapter that it has under this id.
        self.llm.llm_engine.add_lora(LoRARequest(_ADAPTER_NAME, _ADAPTER_ID, directory, load_inplace=True))
        self.llm.lora_request = LoRARequest(_ADAPTER_NAME, _ADAPTER_ID, directory)
        # The prefix cache is keyed by the adapter's name: the old adapter's states would be reused.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not reset its prefix cache after an adapter was loaded: requests are running."
            )


def _lora_llm_class(engine_options: dict[str, object]) -> "type[PolicyLLM]":
    """`LoraLLM` with these options, to stand in where TRL builds its engine."""
    from .vllm_classes import LoraLLM, with_options

    return with_options(LoraLLM, engine_options)
