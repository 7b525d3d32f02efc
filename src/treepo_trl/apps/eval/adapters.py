"""Adapters that a command is given, looked at before any model is loaded."""

import sys
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from treepo_trl.apps.train.adapter import has_tokenizer
from treepo_trl.command_line.engine import uses_vllm
from treepo_trl.command_line.engine_arguments import EngineArguments


def labels_of(adapters: Sequence[str]) -> list[str]:
    """
    A name for each adapter: the last part of its path, or all of it where that is not enough, else with a number.

    No two are the same, and none is `base`, which is the column of the model itself.

    Raises:
        ValueError: if an adapter is given twice.
    """
    paths = [Path(name) for name in adapters]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"`--adapters` has {twice} twice. Give each adapter once.")
    short = [path.name for path in paths]
    if len(set(short)) == len(short) and not {"", "base"} & set(short):
        return short
    labels: list[str] = []
    for path in paths:
        whole = path.as_posix().strip("/").replace("/", "-")
        names = chain([whole], (f"{whole}-{number}" for number in count(2)))
        labels.append(next(name for name in names if name not in {"base", *labels}))
    return labels


def tell_of_tokenizers(arguments: EngineArguments, adapters: Sequence[str], used: PreTrainedTokenizerBase) -> None:
    """Say on standard error which adapters have another tokenizer or chat template of their own than is used."""
    for name in adapters:
        if not has_tokenizer(name):
            continue
        own = AutoTokenizer.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
        pairs = {
            "chat template": (own.chat_template, used.chat_template),
            "vocabulary": (own.get_vocab(), used.get_vocab()),
        }
        other = [what for what, (first, second) in pairs.items() if first != second]
        if other:
            print(
                f"The adapter `{name}` has a {' and a '.join(other)} of its own, and is evaluated with the tokenizer "
                f"of `{arguments.model_name_or_path}`: its column may be too low.",
                file=sys.stderr,
            )


def check_adapters(arguments: EngineArguments, adapters: Sequence[str]) -> None:
    """
    Raise unless each adapter is one, fits the layers of the model, and can be served by the engine.

    An adapter that names another base of the same shapes is told on standard error: a base is often moved.

    Raises:
        ValueError: naming the adapter, its base and the layers that do not fit.
    """
    if not adapters:
        return
    from transformers import AutoConfig

    from treepo_trl.policy.adapter_sync import check_adapter
    from treepo_trl.policy.starting_adapter import check_fits, read_adapter_config

    model = cast(str, arguments.model_name_or_path)
    model_config = AutoConfig.from_pretrained(
        model, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code
    )
    for name in adapters:
        adapter_config = read_adapter_config(name)
        check_fits(name, adapter_config, model, model_config, arguments.trust_remote_code)
        base = cast("str | None", adapter_config.base_model_name_or_path)
        if base and Path(base).name.lower() != Path(model).name.lower():
            print(f"The adapter {name} names {base} as its base, and is evaluated on {model}.", file=sys.stderr)
        if uses_vllm(arguments):
            try:
                check_adapter(adapter_config, advice="Use `--engine transformers`.")
            except ValueError as error:
                raise ValueError(f"`--adapters {name}`: {error}") from error
