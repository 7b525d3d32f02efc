"""
The adapter that a training starts from: whether it fits the base, how it is loaded and in which number type it is
trained, and the reference that it leaves.

With `beta` above 0 `GRPOTrainer` keeps a copy of the adapter under the name `ref`: the KL term then pulls to the
policy as it was at the start, and not to the bare base.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig
from trl import ModelConfig, get_peft_config
from trl.trainer.utils import create_model_from_path

from treepo_trl.treepo_config import TreePOConfig


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel


_ADAPTER = "default"
"""The name under which `GRPOTrainer` looks for the adapter that it copies."""
_REFERENCE = "ref"
_SHOWN = 3


def new_adapter_config(model_args: ModelConfig) -> "PeftConfig | None":
    """
    What TRL's options for a new adapter ask for; `None` without LoRA.

    TRL takes a list with one name for that name alone, and PEFT takes that for a pattern of whole paths, which no
    module has.
    """
    config: Any = get_peft_config(model_args)
    modules: object = getattr(config, "target_modules", None)
    if config is not None and isinstance(modules, str) and re.fullmatch(r"[\w.]+", modules):
        config.target_modules = {modules}
    return config


def read_adapter_config(adapter: str) -> "PeftConfig":
    """
    The config of an adapter of the hub or of a folder.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ImportError("Adapters need PEFT. Run `pip install treepo-trl[peft]`.") from error
    folder = Path(adapter)
    if (adapter.startswith(("/", ".", "~")) or folder.exists()) and not (folder / "adapter_config.json").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        advice = f" It has {', '.join(inside)}: name one of these." if inside else " Name the folder that holds one."
        raise ValueError(f"`{adapter}` holds no adapter: no `adapter_config.json` is in it.{advice}")
    try:
        return PeftConfig.from_pretrained(adapter)
    except (TypeError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"The adapter `{adapter}` cannot be read: {error}") from error


def check_fits(
    adapter: str, peft_config: "PeftConfig", base: str, config: PreTrainedConfig, trust_remote_code: bool = False
) -> None:
    """
    Raise if the weights of an adapter do not fit a base. Loads the adapter, and of the base its config alone.

    Args:
        adapter (`str`), peft_config ([`~peft.PeftConfig`]):
            Name or folder of the adapter, and its config.
        base (`str`), config ([`~transformers.PreTrainedConfig`]):
            Name or folder of the base, and its config.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the base may run.

    Raises:
        ValueError: naming layers that do not fit, and the base that the adapter was for.
    """
    from peft import load_peft_weights

    was_for = f"It was for `{peft_config.base_model_name_or_path or 'an unnamed base'}`."
    try:
        expected, in_base = _expected_shapes(peft_config, config, trust_remote_code)
    except ValueError as error:  # PEFT: its target modules are not in this model
        raise ValueError(f"The adapter `{adapter}` does not fit the base `{base}`: {error} {was_for}") from error
    try:
        given = {name: tuple(weight.shape) for name, weight in load_peft_weights(adapter, device="cpu").items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"The weights of the adapter `{adapter}` cannot be read: {error}") from error
    problems = _differences(expected, given, in_base)
    if problems:
        shown = "; ".join(problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"The adapter `{adapter}` does not fit the base `{base}`: {shown}{more}. {was_for} Name that base, or "
            "another adapter."
        )


Shapes = Mapping[str, tuple[int, ...]]


def _expected_shapes(
    peft_config: "PeftConfig", config: PreTrainedConfig, trust_remote_code: bool
) -> tuple[Shapes, Shapes]:
    """Shapes of the adapter's weights on this base, by their names in its file, and of the base's own."""
    from peft import get_peft_model, get_peft_model_state_dict

    config, peft_config = copy.deepcopy(config), copy.deepcopy(peft_config)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    peft_config.base_model_name_or_path = None  # PEFT warns of another name, which is this function's to judge
    if hasattr(peft_config, "init_lora_weights"):
        cast(Any, peft_config).init_lora_weights = False  # some kinds decompose the base, which has no numbers here
    name = (config.architectures or [""])[0]
    architecture = getattr(transformers, name, None)  # as TRL picks the class
    with torch.device("meta"):
        if architecture is None:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        else:
            model = architecture._from_config(config)
        in_base = {f"base_model.model.{key}": tuple(value.shape) for key, value in model.state_dict().items()}
        wrapped = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
    state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {key: tuple(value.shape) for key, value in state.items()}, in_base


def _differences(expected: Shapes, given: Shapes, in_base: Shapes) -> list[str]:
    """What does not fit, a layer each. Embeddings of the base that lie beside an adapter may be given too."""
    problems = []
    for name in sorted({*expected, *given}):
        here = expected.get(name) or in_base.get(name.replace(".base_layer.", "."))
        layer = name.removeprefix("base_model.model.")
        if name not in given:
            problems.append(f"{layer} is missing in it")
        elif here is None:
            problems.append(f"the base has no layer for {layer}")
        elif here != given[name]:
            problems.append(f"{layer} has shape {list(given[name])} and the base needs {list(here)}")
    return problems


def load_with_adapter(
    base: str,
    adapter: str,
    args: TreePOConfig,
    model_init_kwargs: Mapping[str, Any],
    quantization_config: "BitsAndBytesConfig | None" = None,
) -> "PeftModel":
    """
    The base as `GRPOTrainer` loads it, with an adapter that is trained on.

    Args:
        base (`str`), adapter (`str`):
            Names of the hub or folders.
        args ([`TreePOConfig`]):
            Settings of the training.
        model_init_kwargs (`Mapping[str, Any]`):
            As `GRPOConfig` has them.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of the base.
    """
    from peft import PeftModel

    options = dict(model_init_kwargs)
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.distributed_state is not None and args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    model = create_model_from_path(base, **options)
    plugin = args.deepspeed_plugin
    # As TRL wraps a model: ZeRO-3 wants one precision, and 4-bit weights an adapter in float32.
    is_zero3 = plugin is not None and plugin.zero_stage == 3 and quantization_config is None
    return PeftModel.from_pretrained(
        cast("PreTrainedModel", model), adapter, is_trainable=True, autocast_adapter_dtype=not is_zero3
    )


def check_given_adapter(model: "PeftModel", beta: float) -> None:
    """
    Raise for a PEFT model that `GRPOTrainer` would not train, or whose reference it could not make.

    Raises:
        ValueError: with what to do instead.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The model's adapter is frozen, so nothing would be trained. Load it with "
            "`PeftModel.from_pretrained(base, adapter, is_trainable=True)`."
        )
    if beta != 0 and model.active_adapter != _ADAPTER:
        raise ValueError(
            f"`beta` is {beta}, and the model's adapter is called {model.active_adapter!r}: the reference is a copy "
            f"of the one called {_ADAPTER!r}. Leave out `adapter_name` where it is loaded, or set `beta=0`."
        )


def match_reference(model: torch.nn.Module) -> None:
    """
    Make the reference what the policy is now, number for number.

    `GRPOTrainer` rounds the adapter of a quantized base to bfloat16 after it has copied it, so its KL term would not
    start at 0.
    """
    if not is_peft_model(model) or _REFERENCE not in cast("PeftModel", model).peft_config:
        return
    for name, parameter in model.named_parameters():
        if f".{_ADAPTER}." in name:
            reference = model.get_parameter(name.replace(f".{_ADAPTER}.", f".{_REFERENCE}."))
            reference.data = parameter.data.clone()


def keep_master_weights(model: "PreTrainedModel | PeftModel") -> None:
    """
    Put an adapter's weights into float32, in place.

    TRL puts those of a 4-bit model into bfloat16, which old cards do not have. The gradient scaler takes no gradients
    in 16 bits: small steps would be lost in such weights, and the scaled gradients are out of their range.

    Raises:
        ValueError: if the model itself is trained in 16 bits.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    halves = [parameter for parameter in trained if parameter.dtype in (torch.float16, torch.bfloat16)]
    if halves and not is_peft_model(model):
        raise ValueError(
            f"`fp16=True` trains weights of a model in {halves[0].dtype}, whose gradients the scaler does not take. "
            "Load it in float32 (`--dtype float32`), or train an adapter (`--use_peft`)."
        )
    for parameter in halves:
        parameter.data = parameter.data.float()


@contextmanager
def adapter_resumed_too(model: torch.nn.Module, checkpoint: str) -> Iterator[None]:
    """
    Context in which transformers loads a checkpoint: the policy's adapter is loaded too, in the precision that it has.

    From a checkpoint with several adapters transformers loads those in folders of their own, and leaves out the one
    beside them, which is the policy's.
    """
    if not is_peft_model(model):
        yield
        return
    wrapped = cast("PeftModel", model)
    precisions = {name: parameter.dtype for name, parameter in wrapped.named_parameters()}
    yield
    files = [Path(checkpoint, f"adapter_model.{ending}") for ending in ("safetensors", "bin")]
    if _REFERENCE in wrapped.peft_config and any(file.is_file() for file in files):
        wrapped.load_adapter(checkpoint, str(wrapped.active_adapter), is_trainable=True)
    for name, parameter in wrapped.named_parameters():
        if name in precisions:
            parameter.data = parameter.data.to(precisions[name])
