"""vLLM servers on this machine against the engine in process, and how the policy reaches them."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.cases import Case, Record, Stage
from treepo_trl.apps.doctor.findings import CannotRunError


WAYS = {"in-process": "in process", "one": "one server", "two": "two servers"}
"""The ways of `benchmarks.servers`, in words."""
SEGMENTS = (16, 64, 256)


def sample(record: Record, model: str, way: str, options: list[str]) -> None:
    """Every repeat of a way with each segment length."""
    from benchmarks import servers

    if servers.SERVERS[way] > max(found(), 1):
        raise CannotRunError(f"two servers need two cards, this machine has {found()}")
    args = servers.parse_options(options)
    for each in servers.measure_way(way, args, model):
        name = f"{WAYS[way]}, segments of {each['segment']}"
        record(f"{name}: segments/s", each["rate"])
        record(f"{name}: share of the prompts' tokens from the cache", each["cached"])
        for process, milliseconds in each["cpu"].items():
            record(f"{name}, {process}: ms of processor/segment", milliseconds)


def synchronize(record: Record, model: str, ways: Sequence[str], repeats: int) -> None:
    """Time from an optimizer step to a server that has the policy: the adapter, or all weights in a folder."""
    import torch

    from benchmarks import servers, weight_sync
    from tests.support.vllm_servers import LORA_FLAGS, vllm_servers

    cards = servers.cards()
    if cards[0] is not None:  # before CUDA begins: TRL refuses a process that sees several cards
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[0]
    options = weight_sync.parse_options(
        ["--repeats", str(repeats), "--rank", "16" if torch.cuda.is_available() else "4"]
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        vllm_servers(1, model, Path(folder), [*servers.server_flags(), *LORA_FLAGS], cards[-1:]) as (server,),
    ):
        for way in ways:
            sync = "adapter" if way == "the adapter" else "merge"
            place = {"vllm_mode": "server", "vllm_server_base_url": server.url}
            trainer = weight_sync.build(model, sync, options, **place)
            for value in weight_sync.measure_syncs(trainer, options):
                record(f"{way}: ms per synchronization", 1000 * value)


def found() -> int:
    """How many cards this machine has."""
    import torch

    return torch.cuda.device_count()


def cases(smoke: bool) -> list[Case]:
    """Each way, in a process of its own."""
    if smoke:
        options = ["--segments", "4", "--trees", "2", "--repeats", "1"]
    else:
        options = ["--segments", *map(str, SEGMENTS), "--trees", "12", "--repeats", "3"]
    architecture = "tiny" if smoke else "qwen2.5-1.5b"
    given = {"repeats": 1 if smoke else 5}
    return [
        *(Case(name, sample, {"way": way, "options": options}, architecture) for way, name in WAYS.items()),
        Case("policy", synchronize, {"ways": ["the adapter", "all weights in a folder"], **given}, architecture),
    ]


SERVERS = Stage(
    name="servers",
    title="Servers against the engine in process, and how the policy reaches them",
    about="""\
Twelve trees of 8 paths and 6 segments on a 1.5B model (`benchmarks.servers`). Servers and the engine in process get
0.4 of a card's memory. *Client* is the process that grows the trees; in process it is the engine too. Two servers
have a card each. The policy is a LoRA adapter of rank 16 (`benchmarks.weight_sync`), merged where all weights travel.
With two cards it has one and the server the other.""",
    cases=cases,
    ratios=tuple(
        (
            f"{server} / in process, segments of {length}",
            f"{server}, segments of {length}: segments/s",
            f"in process, segments of {length}: segments/s",
        )
        for server in ("one server", "two servers")
        for length in SEGMENTS
    ),
)
