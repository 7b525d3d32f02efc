"""Adapters that a command is given, looked at before any model is loaded."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from .engine import EngineArguments, uses_vllm


if TYPE_CHECKING:
    import torch


def labels_of(adapters: Sequence[str]) -> list[str]:
    """
    A short name for each adapter: the last part of its path, or all of it where that is not enough.

    Raises:
        ValueError: if an adapter is given twice.
    """
    paths = [Path(name) for name in adapters]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"`--adapters` has {twice} twice. Give each adapter once.")
    short = [path.name for path in paths]
    is_plain = len(set(short)) == len(short) and not {"", "base"} & set(short)
    return short if is_plain else [path.as_posix().strip("/").replace("/", "-") for path in paths]


def check_adapters(arguments: EngineArguments, adapters: Sequence[str]) -> None:
    """
    Raise unless each adapter is one, was trained for a model of these layers, and can be served by the engine.

    Compares the shapes of the adapter's weights with those of the model's layers, which are not loaded for it. An
    adapter that names another base of the same shapes is told on standard error: a base is often moved.

    Raises:
        ValueError: naming the adapter, its base and the first layer that does not fit.
    """
    if not adapters:
        return
    from peft import PeftConfig

    from treepo_trl.policy.adapter_sync import check_adapter

    shapes = layer_shapes(arguments)
    for name in adapters:
        if Path(name).is_dir() and not (Path(name) / "adapter_config.json").is_file():
            raise ValueError(f"`--adapters {name}` holds no adapter: the folder has no adapter_config.json.")
        if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
            raise ValueError(f"`--adapters {name}` looks like a folder, but there is none.")
        config = PeftConfig.from_pretrained(name)
        _check_fit(name, cast("str | None", config.base_model_name_or_path), arguments, shapes)
        if uses_vllm(arguments):
            try:
                check_adapter(config, advice="Use `--engine transformers`.")
            except ValueError as error:
                raise ValueError(f"`--adapters {name}`: {error}") from error


def layer_shapes(arguments: EngineArguments) -> "dict[str, torch.Size]":
    """Shape of the weight of each layer of the model, by the layer's name; nothing is loaded but its configuration."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    remote = {"trust_remote_code": arguments.trust_remote_code}
    config = AutoConfig.from_pretrained(
        cast(str, arguments.model_name_or_path), revision=arguments.model_revision, **remote
    )
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, **remote)
    return {
        name.removesuffix(".weight"): parameter.shape
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.endswith(".weight")
    }


def _check_fit(name: str, base: str | None, arguments: EngineArguments, shapes: "dict[str, torch.Size]") -> None:
    from peft import load_peft_weights

    weights = load_peft_weights(name, device="cpu")
    problems: list[str] = []
    for key, down in weights.items():
        layer, is_down, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
        up = weights.get(key.replace("lora_A", "lora_B"))
        if not is_down or up is None:
            continue
        adapted = up.shape[0], down.shape[1]
        if layer not in shapes:
            problems.append(f"its layer {layer} is not there")
        elif sorted(adapted) != sorted(shapes[layer]):  # some models have their weights transposed
            own = " x ".join(map(str, shapes[layer]))
            problems.append(f"its layer {layer} is {adapted[0]} x {adapted[1]}, that of the model {own}")
    model = cast(str, arguments.model_name_or_path)
    if problems:
        more = f" ({len(problems)} layers in all)" if len(problems) > 1 else ""
        raise ValueError(
            f"`--adapters {name}` is for another base than {model}: {problems[0]}{more}. It was trained on {base}. "
            "Name that as `--model_name_or_path`, or another adapter."
        )
    if base and Path(base).name.lower() != Path(model).name.lower():
        print(f"The adapter {name} names {base} as its base, and is evaluated on {model}.", file=sys.stderr)
