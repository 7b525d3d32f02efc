"""The adapter that a training goes on from: its options beside those of a new one, its base and its tokenizer."""

import sys
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file
from trl import ModelConfig

from treepo_trl.command_line.arguments import TreePOScriptArguments
from treepo_trl.policy.starting_adapter import check_fits, read_adapter_config
from treepo_trl.preflight import require_model
from treepo_trl.treepo_config import TreePOConfig


if TYPE_CHECKING:
    from peft import PeftConfig


# Options of TRL's `ModelConfig` for a new adapter, and what they are called in an adapter's config.
_OPTIONS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def starting_adapter(script_args: TreePOScriptArguments, model_args: ModelConfig) -> "PeftConfig | None":
    """
    The config of the adapter that a training goes on from; `None` without one.

    Without `--model_name_or_path` the base is the adapter's own.

    Raises:
        ValueError: if it cannot be read, or if options of a new adapter differ from it.
    """
    adapter = script_args.adapter_name_or_path
    if adapter is None:
        return None
    peft_config = read_adapter_config(adapter)
    _check_options(adapter, peft_config, model_args)
    model_args.model_name_or_path = model_args.model_name_or_path or peft_config.base_model_name_or_path
    return peft_config


def _check_options(adapter: str, peft_config: "PeftConfig", model_args: ModelConfig) -> None:
    """Raise for an option that was set and is not what the adapter has."""
    for option, name in _OPTIONS.items():
        given, own = getattr(model_args, option), getattr(peft_config, name, None)
        if option == "lora_target_modules" and given in ("all-linear", ["all-linear"]):
            continue  # PEFT has written names in its place, and which are all of them only the model knows
        if given != getattr(ModelConfig, option, None) and not _is_same(given, own):
            shown = sorted(own) if isinstance(own, set) else own
            raise ValueError(
                f"`--{option} {given}`, but the adapter `{adapter}` has `{name}={shown!r}`, and the training goes on "
                f"with that. Leave `--{option}` out, or leave out `--adapter_name_or_path` to train a new adapter."
            )


def _is_same(given: object, own: object) -> bool:
    values = [set(each) if isinstance(each, list | set | tuple) else {each} for each in (given, own)]
    return values[0] == values[1]


def check_starting_adapter(
    adapter: str, peft_config: "PeftConfig", training_args: TreePOConfig, model_args: ModelConfig
) -> None:
    """
    Raise for an adapter that does not fit the base or that no engine serves, before the base is loaded.

    Raises:
        ValueError: naming layers and the adapter's base, or the setting.
    """
    from treepo_trl.engine_choice import policy_engine_for  # with vLLM behind it

    base = require_model(model_args.model_name_or_path)
    policy_engine_for(training_args, base, peft_config)
    trust = bool(training_args.trust_remote_code)
    config = AutoConfig.from_pretrained(base, revision=model_args.model_revision, trust_remote_code=trust)
    check_fits(adapter, peft_config, base, config, trust)
    own = peft_config.base_model_name_or_path
    if own and own.rstrip("/").rpartition("/")[2] != base.rstrip("/").rpartition("/")[2]:
        print(f"The adapter `{adapter}` was trained on `{own}`. Its layers fit `{base}`, which it goes on from here.")


def has_tokenizer(adapter: str) -> bool:
    """Whether a tokenizer lies beside an adapter of the hub or of a folder."""
    found = cached_file(
        adapter,
        "tokenizer_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def load_tokenizer_of(adapter: str, training_args: TreePOConfig, model_args: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside an adapter, with the chat template that it was trained with; else that of the base."""
    options: dict[str, Any] = {"truncation_side": "left", "padding_side": "left"}  # as TRL loads it
    options["trust_remote_code"] = training_args.trust_remote_code
    if has_tokenizer(adapter):
        print(f"The tokenizer and its chat template are those beside the adapter `{adapter}`.", file=sys.stderr)
        return AutoTokenizer.from_pretrained(adapter, **options)
    base = require_model(model_args.model_name_or_path)
    return AutoTokenizer.from_pretrained(base, revision=model_args.model_revision, **options)
