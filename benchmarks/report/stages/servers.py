"""vLLM servers on this machine against the engine in process."""

from benchmarks.report.cases import Case, Record, Stage
from treepo_trl.doctor.findings import CannotRunError


WAYS = {"in-process": "in process", "one": "one server", "two": "two servers"}
"""The ways of `benchmarks.servers`, in words."""
SEGMENTS = (16, 64, 256)


def sample(record: Record, model: str, way: str, options: list[str]) -> None:
    """Every repeat of a way with each segment length."""
    import torch

    from benchmarks import servers

    found = torch.cuda.device_count()
    if servers.SERVERS[way] > max(found, 1):
        raise CannotRunError(f"two servers need two cards, this machine has {found}")
    args = servers.parse_options(options)
    for each in servers.measure_way(way, args, model):
        name = f"{WAYS[way]}, segments of {each['segment']}"
        record(f"{name}: segments/s", each["rate"])
        record(f"{name}: share of the prompts' tokens from the cache", each["cached"])
        for process, milliseconds in each["cpu"].items():
            record(f"{name}, {process}: ms of processor/segment", milliseconds)


def cases(smoke: bool) -> list[Case]:
    """Each way, in a process of its own."""
    if smoke:
        options = ["--segments", "4", "--trees", "2", "--repeats", "1"]
    else:
        options = ["--segments", *map(str, SEGMENTS), "--trees", "12", "--repeats", "3"]
    architecture = "tiny" if smoke else "qwen2.5-1.5b"
    return [Case(name, sample, {"way": way, "options": options}, architecture) for way, name in WAYS.items()]


SERVERS = Stage(
    name="servers",
    title="Servers against the engine in process",
    about="""\
Twelve trees of 8 paths and 6 segments on a 1.5B model (`benchmarks.servers`). Servers and the engine in process get
0.4 of a card's memory. *Client* is the process that grows the trees; in process it is the engine too. Two servers
have a card each.""",
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
