"""
The merged model: written, loaded again, and compared with its base and adapter on a few texts.

What is compared is what was written: a merge that loses the adapter, weights that are tied, and files that lack a
weight all show in the log-probabilities.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from treepo_trl.policy.four_bit_base import BaseQuantization, base_checkpoint, base_of, is_4bit
from treepo_trl.policy.starting_adapter import check_fits

from .card import model_card
from .exported import Difference, Export
from .folder import new_folder
from .modelfile import modelfile
from .source import AdapterSource


if TYPE_CHECKING:
    from peft import PeftModel


BOUNDS = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Mean distance in nats per token that rounded weights may make; a fifth and less was seen (docs/export.md)."""

_TEXTS = (
    "The river rises in the mountains and flows two hundred kilometres to the sea. In spring its water is cold.",
    "Ann has 12 apples. She gives 5 to Ben and buys 8 more. How many does she have? 12 - 5 = 7, and 7 + 8 = 15.",
    "def mean(values):\n    if not values:\n        raise ValueError('none')\n    return sum(values) / len(values)\n",
)
_CHAT = ({"role": "user", "content": "What is 17 + 25?"}, {"role": "assistant", "content": "17 + 25 = 42. So 42."})


def export_model(
    source: AdapterSource,
    out: Path,
    dtype: str = "auto",
    quantization: BaseQuantization | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> Export:
    """
    Merge an adapter into its base, write the model, and check it.

    Args:
        source ([`AdapterSource`]):
            The adapter and its base.
        out (`Path`):
            Folder to write; it must not exist.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the weights; that of the training's base by default.
        quantization ([`~treepo_trl.policy.four_bit_base.BaseQuantization`], *optional*):
            How the base was quantized in training, where the adapter's folder does not say it.
        revision (`str`, *optional*), trust_remote_code (`bool`, *optional*):
            As transformers takes them for the base.

    Raises:
        ValueError: if the folder exists, if the adapter does not fit the base, or if the merged model's
            log-probabilities are further from the adapter's than rounding explains. Then nothing is written.
    """
    config = AutoConfig.from_pretrained(source.base, revision=revision, trust_remote_code=trust_remote_code)
    check_fits(str(source.folder), source.peft_config, source.base, config, trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(  # of the base, or in a folder, which has no revisions
        source.tokenizer, revision=revision, trust_remote_code=trust_remote_code
    )
    texts = _token_ids(tokenizer, source.tokenizer)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": dtype}
    with new_folder(out) as folder:
        policy = _load_policy(source, quantization or source.quantization, options)
        was_4bit = is_4bit(policy)
        expected = log_probs(policy, texts)
        with policy.disable_adapter():
            without = log_probs(policy, texts)
        merged = _merged(_written_out(policy, source, dtype) if was_4bit else policy)
        del policy
        merged.generation_config = _generation_config(merged, tokenizer)
        merged.save_pretrained(folder)
        del merged
        written = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
        export = Export(out, written.dtype, was_4bit, _difference(log_probs(written, texts), expected, without))
        _check(export, source)
        tokenizer.save_pretrained(folder)
        (folder / "Modelfile").write_text(modelfile(tokenizer, written.generation_config), encoding="utf-8")
        model_card(source, export).save(folder / "README.md")
    return export


def _load_policy(source: AdapterSource, quantization: BaseQuantization | None, options: dict[str, Any]) -> "PeftModel":
    """The base with its adapter, in 4 bits where it was trained so."""
    from peft import PeftModel

    if quantization is not None:
        options = {**options, "quantization_config": quantization.config()}
        if torch.cuda.is_available():
            options["device_map"] = {"": 0}  # quantized where the policy was
        if options["dtype"] == "auto":
            options["dtype"] = quantization.dtype
    base = AutoModelForCausalLM.from_pretrained(source.base, **options)
    return PeftModel.from_pretrained(base, str(source.folder))


def _token_ids(tokenizer: PreTrainedTokenizerBase, name: str) -> list[list[int]]:
    """Token ids of the texts that are compared, a conversation among them if the tokenizer knows how to write one."""
    texts = [cast("list[int]", tokenizer(text)["input_ids"]) for text in _TEXTS]
    if tokenizer.chat_template:
        text = str(tokenizer.apply_chat_template(list(_CHAT), tokenize=False))
        texts.append(cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"]))
    if min(map(len, texts)) < 2:  # transformers makes an empty one of a folder without its files
        raise ValueError(
            f"The tokenizer of `{name}` makes no tokens of a text. Put the files of the base's tokenizer there, or "
            "name a base that has them (`--model_name_or_path`)."
        )
    return texts


@torch.no_grad()
def log_probs(model: torch.nn.Module, texts: list[list[int]]) -> torch.Tensor:
    """
    Log-probability of each token of the texts but their first ones, `(tokens,)`.

    Computed in float32 whatever the weights are in: what differs between two models is then their weights alone.
    """
    found = []
    with _computing_in_float32(model):
        for text in texts:
            ids = torch.tensor([text], device=next(model.parameters()).device)
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            found.append(scores.gather(1, ids[0, 1:, None])[:, 0].cpu())
    return torch.cat(found)


@contextmanager
def _computing_in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Context in which each module's own weights are in float32 while it computes, so that no second model is held."""
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(module: torch.nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                kept[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: torch.nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in kept:
                parameter.data = kept.pop(parameter)

    model.eval()
    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__ == "Linear4bit":
                cast(Any, module).compute_dtype = torch.float32
                module.training = True  # in evaluation bitsandbytes computes in bfloat16 on some CPUs
            elif any(True for _ in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(widen).remove)
                stack.callback(module.register_forward_hook(restore).remove)
        yield


def _written_out(policy: "PeftModel", source: AdapterSource, dtype: str) -> "PeftModel":
    """The policy on the numbers that its 4-bit weights stand for."""
    from peft import PeftModel

    with base_checkpoint(policy, "dequantized") as folder:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=base_of(policy).dtype if dtype == "auto" else dtype)
    return PeftModel.from_pretrained(base, str(source.folder))


def _merged(policy: "PeftModel") -> PreTrainedModel:
    return cast(PreTrainedModel, cast(Any, policy).merge_and_unload(safe_merge=True))


def _generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The base's own, with every token that ended a completion in training, and the tokenizer's padding."""
    config = cast(GenerationConfig, model.generation_config)
    own = config.eos_token_id
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    unique = list(dict.fromkeys(cast("list[int]", [end for end in ends if end is not None])))
    config.eos_token_id = cast(Any, unique[0] if len(unique) == 1 else unique)
    config.pad_token_id = cast(Any, tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id)
    if config.temperature is not None or config.top_p is not None or config.top_k is not None:
        config.do_sample = True  # transformers saves no settings that greedy decoding would not use
    return config


def _difference(merged: torch.Tensor, expected: torch.Tensor, without: torch.Tensor) -> Difference:
    distances = (merged - expected).abs()
    return Difference(
        mean=float(distances.mean()),
        largest=float(distances.max()),
        of_adapter=float((expected - without).abs().mean()),
    )


def _check(export: Export, source: AdapterSource) -> None:
    bound, difference = BOUNDS.get(export.dtype, BOUNDS[torch.bfloat16]), export.difference.mean
    if difference <= bound:  # NaN is not
        return
    raise ValueError(
        f"The merged model is not the base with its adapter: log-probabilities differ by {difference:.4f} nats per "
        f"token, and rounding to {str(export.dtype).removeprefix('torch.')} explains at most {bound}. Nothing was "
        "written. An adapter on embeddings that the output head shares cannot be merged. Else name the base that was "
        f"trained on (`--model_name_or_path`, now `{source.base}`), or another `--dtype`."
    )
