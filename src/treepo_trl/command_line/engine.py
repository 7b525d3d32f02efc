"""Engines without a trainer: the model, its tokenizer and EOS tokens, and vLLM or transformers around it."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from treepo_trl.engines import SamplingOptions, SegmentEngine
from treepo_trl.preflight import require_model
from treepo_trl.settings import server_urls

from .engine_arguments import EngineArguments


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(arguments: EngineArguments) -> "PreTrainedTokenizerBase":
    """
    Tokenizer of the model.

    Raises:
        ValueError: if no model is given, or an adapter instead of one.
    """
    from transformers import AutoTokenizer

    name = require_model(arguments.model_name_or_path)
    return AutoTokenizer.from_pretrained(
        name, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code
    )


def eos_token_ids(arguments: EngineArguments, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """
    Every token that ends a completion: the tokenizer's and those that the model generates with, as in `GRPOTrainer`.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoConfig, GenerationConfig

    name, revision = require_model(arguments.model_name_or_path), arguments.model_revision
    try:
        config = GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:  # many models come without one; then transformers makes it from the model's config
        model_config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=arguments.trust_remote_code
        )
        config = GenerationConfig.from_model_config(model_config)
    listed = cast(int | list[int] | None, config.eos_token_id)
    candidates = [*(listed if isinstance(listed, list) else [listed]), cast(int | None, tokenizer.eos_token_id)]
    ids = {token_id for token_id in candidates if token_id is not None}
    if not ids:
        raise ValueError(
            f"{arguments.model_name_or_path} names no EOS token, in its tokenizer or its generation config: "
            "completions would never end. Set `eos_token` in the tokenizer's files."
        )
    return sorted(ids)


def uses_vllm(arguments: EngineArguments) -> bool:
    """
    Whether the engine is vLLM.

    Raises:
        ImportError: if vLLM is asked for and not installed.
    """
    from trl.import_utils import is_vllm_available

    if arguments.engine == "vllm" and not is_vllm_available():
        raise ImportError(
            "`engine='vllm'`, but vLLM is not installed. Run `pip install treepo-trl[vllm]`, or choose "
            "`engine='transformers'`."
        )
    return arguments.engine != "transformers" and is_vllm_available()


def build_engine(
    arguments: EngineArguments,
    eos_ids: list[int],
    options: SamplingOptions,
    with_entropies: bool = False,
    seed: int = 0,
    adapters: Sequence[str] = (),
) -> SegmentEngine:
    """
    The engine that `arguments` describe, with the model loaded. It samples with the first adapter, if there is one.

    Args:
        arguments ([`EngineArguments`]):
            Model and engine.
        eos_ids (`list[int]`):
            Tokens that end a segment.
        options ([`SamplingOptions`]):
            How tokens are drawn.
        with_entropies (`bool`, *optional*):
            Whether results carry entropies.
        seed (`int`, *optional*):
            Seed of the engine's own draws.
        adapters (sequence of `str`, *optional*):
            Adapters between which `use_adapter` changes. Default: the one of `arguments`.

    Raises:
        ImportError: if vLLM is asked for and not installed.
    """
    if not adapters and arguments.adapter_name_or_path is not None:
        adapters = [arguments.adapter_name_or_path]
    if arguments.vllm_mode == "server":
        return _server_engine(arguments, eos_ids, options, with_entropies, adapters)
    if uses_vllm(arguments):
        return _vllm_engine(arguments, eos_ids, options, with_entropies, seed, adapters)
    return _transformers_engine(arguments, eos_ids, options, with_entropies, seed, adapters)


def _server_engine(
    arguments: EngineArguments,
    eos_ids: list[int],
    options: SamplingOptions,
    with_entropies: bool,
    adapters: Sequence[str],
) -> SegmentEngine:
    from treepo_trl.servers.checks import ServerNeeds
    from treepo_trl.servers.fixed_adapters import server_engine

    model, tokenizer = require_model(arguments.model_name_or_path), load_tokenizer(arguments)
    needs = ServerNeeds(model, tokenizer, with_entropies=with_entropies)
    urls = server_urls(arguments.vllm_server_base_url, "", 0)
    return server_engine(urls, arguments.vllm_server_timeout, needs, eos_ids, options, adapters)


def _vllm_engine(
    arguments: EngineArguments,
    eos_ids: list[int],
    options: SamplingOptions,
    with_entropies: bool,
    seed: int,
    adapters: Sequence[str],
) -> SegmentEngine:
    # The engine's steps run in this process, as in training; standard output is for results.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from vllm import LLM
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    from treepo_trl.engines.vllm import VLLMEngine, cache_options
    from treepo_trl.policy.adapter_sync import lora_engine_options

    on_cpu = current_platform.is_cpu()
    settings: dict[str, Any] = {
        "revision": arguments.model_revision,
        "dtype": arguments.dtype,
        "trust_remote_code": arguments.trust_remote_code,
        "gpu_memory_utilization": arguments.vllm_gpu_memory_utilization or (0.3 if on_cpu else 0.9),
        "max_model_len": arguments.vllm_max_model_length,
        "tensor_parallel_size": arguments.vllm_tensor_parallel_size,
        "quantization": arguments.vllm_quantization,
        "enforce_eager": arguments.vllm_enforce_eager,
        "enable_prefix_caching": True,
        **cache_options(on_cpu),
        "logprobs_mode": "processed_logprobs",
        "seed": seed,
    }
    if adapters:
        from peft import LoraConfig, PeftConfig

        ranks = [cast(LoraConfig, PeftConfig.from_pretrained(name)).r for name in adapters]
        settings |= lora_engine_options(max(ranks))
    if arguments.vllm_max_num_seqs is not None:
        settings["max_num_seqs"] = arguments.vllm_max_num_seqs
    llm = LLM(model=require_model(arguments.model_name_or_path), **settings)
    request = LoRARequest(_name_of(0), 1, adapters[0]) if adapters else None
    return VLLMEngine(llm, eos_ids, options, lora_request=request, with_entropies=with_entropies)


def _transformers_engine(
    arguments: EngineArguments,
    eos_ids: list[int],
    options: SamplingOptions,
    with_entropies: bool,
    seed: int,
    adapters: Sequence[str],
) -> SegmentEngine:
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    from treepo_trl.engines.for_model import engine_for_model

    extra = {} if arguments.attn_implementation is None else {"attn_implementation": arguments.attn_implementation}
    loaded = AutoModelForCausalLM.from_pretrained(
        require_model(arguments.model_name_or_path),
        revision=arguments.model_revision,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        **extra,
    )
    model = cast(torch.nn.Module, loaded)
    if adapters:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapters[0], adapter_name=_name_of(0))
        for position, name in enumerate(adapters[1:], start=1):
            model.load_adapter(name, adapter_name=_name_of(position))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    set_seed(seed)
    # A model with an adapter is called as the model that it wraps.
    return engine_for_model(cast("PreTrainedModel", model), eos_ids, options, with_entropies=with_entropies)


def _name_of(position: int) -> str:
    return f"adapter-{position}"


def use_adapter(engine: SegmentEngine, adapters: Sequence[str], position: int | None) -> None:
    """
    Sample with one of the adapters that an engine was built with, or without any.

    Args:
        engine ([`SegmentEngine`]):
            From `build_engine` with these adapters. Nothing may be in flight.
        adapters (sequence of `str`):
            The same ones.
        position (`int`, *optional*):
            Which of them; `None` for the model alone.
    """
    from treepo_trl.engines.own_model import OwnModelEngine
    from treepo_trl.engines.vllm import VLLMEngine
    from treepo_trl.servers.fixed_adapters import ServedAdapters

    if isinstance(engine, ServedAdapters):
        engine.use(position)
    elif isinstance(engine, VLLMEngine):
        from vllm.lora.request import LoRARequest

        request = None if position is None else LoRARequest(_name_of(position), position + 1, adapters[position])
        engine.lora_request = request
    elif adapters:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTuner

        model = cast(PeftModel, cast(OwnModelEngine, engine).model)
        layers = cast(BaseTuner, model.base_model)
        if position is None:
            layers.disable_adapter_layers()
        else:
            layers.enable_adapter_layers()
            model.set_adapter(_name_of(position))
    engine.reset_prefix_cache()  # the states of another adapter
