"""
Segments from vLLM servers: against the engine in this process, and how far one client reaches.

    python -m benchmarks.servers --reach                      # servers without a model, that answer at once
    python -m benchmarks.servers                              # SmolLM2-135M: in process, one server, two servers
    python -m benchmarks.servers --segments 16 --trees 2 --repeats 1 --ways in-process one  # a quick look

`--reach` prints, for 1, 8 and 64 servers, trees and segments per second and the processor time that the client spends
on a segment. The inverse of that time is the most segments per second of one client, whatever the servers do. The
servers have processes of their own.

Without it, the same trees are grown in each of the ways and with each segment length. Prints wall time per segment,
processor time per segment of the client and of the servers' processes by their names, and the cached share. On
machines with cards each server has a card of its own as far as there are some, and 0.4 of its memory, as the engine
in process. Neither side compiles on a processor.
"""

import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from benchmarks.common import (
    RESULT,
    make_parser,
    number_type,
    option_arguments,
    print_result,
    result_of,
    small_model_folder,
    table_head,
    table_row,
)
from treepo_trl import TreeSampler, TreeSamplingConfig
from treepo_trl.engines import SegmentEngine
from treepo_trl.servers.engine import VLLMServerEngine
from treepo_trl.servers.fleet import Fleet


SEGMENTS_PER_PATH = 6
PROMPT_TOKENS = 64
NEVER = 49151  # a token that SmolLM2 does not draw: every tree has the same shape
SERVERS = {"in-process": 0, "one": 1, "two": 2}
"""The ways, and how many servers each has."""


class Measured(TypedDict):
    """What one repeat took."""

    segment: int
    rate: float
    """Segments per second."""
    wall: float
    """Milliseconds per segment."""
    cached: float
    """Share of the prompts' tokens."""
    cpu: dict[str, float]
    """Milliseconds of processor per segment, of the client and of the servers' processes by their names."""


def config_of(segment_length: int) -> TreeSamplingConfig:
    """Trees of eight paths."""
    return TreeSamplingConfig(
        num_generations=8,
        segment_length=segment_length,
        max_completion_length=SEGMENTS_PER_PATH * segment_length,
        stop_repetition=False,
    )


def prompts_of(count: int) -> list[list[int]]:
    """Prompts without a common prefix."""
    return [list(range(1000 + 50 * i, 1000 + 50 * i + PROMPT_TOKENS)) for i in range(count)]


# How far one client reaches


@contextmanager
def servers_without_a_model(count: int) -> Iterator[list[str]]:
    """Addresses of servers that answer at once, in two processes if there are several."""
    shares = [count] if count == 1 else [count - count // 2, count // 2]
    command = [sys.executable, "-m", "tests.support.fake_vllm"]
    processes = [
        subprocess.Popen([*command, str(share)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for share in shares
    ]
    try:
        urls: list[str] = []
        for process in processes:
            assert process.stdout is not None
            urls += process.stdout.readline().split()
        yield urls
    finally:
        for process in processes:
            process.communicate()


def reach(args: Namespace) -> None:
    """Trees and segments per second of one client."""
    print(table_head("servers", "segment", "trees/s", "segments/s", "client CPU, ms/segment", "most segments/s"))
    for count in args.servers:
        with servers_without_a_model(count) as urls:
            engine = VLLMServerEngine(Fleet(urls), [NEVER])
            for segment_length in args.segments:
                prompts = prompts_of(args.reach_trees)
                sampler = TreeSampler(engine, config_of(segment_length), [NEVER])
                sampler.sample(prompts[:8], seed=99)  # opens connections
                cpu = time.process_time()
                sampler.sample(prompts, seed=0)
                stats = sampler.stats
                each = (time.process_time() - cpu) / stats.num_segments
                print(
                    table_row(
                        count,
                        segment_length,
                        f"{len(prompts) / stats.seconds:.0f}",
                        f"{stats.num_segments / stats.seconds:.0f}",
                        f"{each * 1e3:.2f}",
                        f"{1 / each:.0f}",
                    ),
                    flush=True,
                )
            engine.close()


# Against the engine in this process


def engine_options() -> dict[str, Any]:
    """What the engine in this process and the servers both get, as arguments of `vllm.LLM`."""
    import torch

    options = {"max_num_seqs": 64, "max_model_len": 4096}
    if not torch.cuda.is_available():
        return options
    return options | {"gpu_memory_utilization": 0.4, "dtype": number_type()[0]}


def server_flags() -> list[str]:
    """The same as flags of a server."""
    return [word for name, value in engine_options().items() for word in (f"--{name.replace('_', '-')}", str(value))]


def cards() -> list[str | None]:
    """The cards as `CUDA_VISIBLE_DEVICES` names them; `[None]` on a processor."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [*(named.split(",")[:count] if named else map(str, range(count)))] or [None]


def in_process(model: str) -> SegmentEngine:
    """vLLM in this process."""
    import torch

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    place: dict[str, Any] = {}
    if not torch.cuda.is_available():  # as the servers on processors
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}
        place = {"block_size": 32, "enforce_eager": True}
    from vllm import LLM

    from treepo_trl.engines.vllm import VLLMEngine

    llm = LLM(model=model, enable_prefix_caching=True, logprobs_mode="processed_logprobs", **engine_options(), **place)
    return VLLMEngine(llm, [NEVER])


@contextmanager
def on_servers(model: str, count: int) -> Iterator[tuple[SegmentEngine, list[int]]]:
    """An engine on so many servers, and the ids of their first processes."""
    from tests.support.vllm_servers import vllm_servers

    with (
        tempfile.TemporaryDirectory() as folder,
        vllm_servers(count, model, Path(folder), server_flags(), cards()) as servers,
    ):
        engine = VLLMServerEngine(Fleet([server.url for server in servers]), [NEVER])
        yield engine, [server.process.pid for server in servers if server.process is not None]
        engine.close()


def cpu_seconds(mains: list[int]) -> dict[str, float]:
    """Processor time so far of servers and the processes that they have started, by kind."""
    import psutil

    found: dict[str, float] = {}
    for main in map(psutil.Process, mains):
        for process in (main, *main.children(recursive=True)):
            title = "API" if process is main else (process.cmdline() or ["?"])[0].rpartition("::")[2]
            name = title.split("_")[0].split("/")[-1]
            times = process.cpu_times()
            found[name] = found.get(name, 0.0) + times.user + times.system
    return found


def measure(engine: SegmentEngine, mains: list[int], args: Namespace) -> Iterator[Measured]:
    """Every repeat with every segment length."""
    for segment_length in args.segments:
        sampler = TreeSampler(engine, config_of(segment_length), [NEVER])
        sampler.sample(prompts_of(1), seed=99)
        for repeat in range(args.repeats):
            engine.reset_prefix_cache()
            before, cpu = cpu_seconds(mains), time.process_time()
            sampler.sample(prompts_of(args.trees), seed=repeat)
            stats, count = sampler.stats, sampler.stats.num_segments
            cost = {"client": time.process_time() - cpu}
            cost |= {name: total - before.get(name, 0.0) for name, total in cpu_seconds(mains).items()}
            yield {
                "segment": segment_length,
                "rate": count / stats.seconds,
                "wall": stats.seconds / count * 1e3,
                "cached": stats.num_cached_tokens / max(stats.num_prompt_tokens, 1),
                "cpu": {name: seconds / count * 1e3 for name, seconds in cost.items() if seconds > 0.01},
            }


def measure_way(way: str, args: Namespace, model: str) -> Iterator[Measured]:
    """Every repeat of one way; the engine or its servers start here."""
    if way == "in-process":
        yield from measure(in_process(model), [], args)
        return
    with on_servers(model, SERVERS[way]) as (engine, mains):
        yield from measure(engine, mains, args)


def run_way(args: Namespace) -> None:
    """One way, in this process; hands back its repeat with the least wall time for every segment length."""
    best: dict[int, Measured] = {}
    for each in measure_way(args.way, args, args.model or small_model_folder()):
        if each["segment"] not in best or each["wall"] < best[each["segment"]]["wall"]:
            best[each["segment"]] = each
    print_result(list(best.values()))


def compare(args: Namespace) -> None:
    """All ways, each in a process of its own."""
    print(table_head("way", "segment", "segments/s", "wall, ms/segment", "cached", "CPU, ms/segment"))
    names = ["trees", "repeats"] + (["model"] if args.model else [])
    for way in args.ways:
        given = ["--way", way, "--segments", *map(str, args.segments), *option_arguments(args, names)]
        records = result_of("benchmarks.servers", given)
        assert isinstance(records, list), RESULT
        for each in records:
            cpu = ", ".join(f"{name} {value:.1f}" for name, value in each["cpu"].items())
            cells = f"{each['rate']:.1f}", f"{each['wall']:.1f}", f"{each['cached']:.2f}", cpu
            print(table_row(way, each["segment"], *cells), flush=True)


def parse_options(arguments: list[str] | None = None) -> Namespace:
    """Options, of the command line if none are given."""
    parser = make_parser(__doc__)
    parser.add_argument("--reach", action="store_true", help="one client and servers without a model")
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 8, 64], help="of --reach")
    parser.add_argument("--reach_trees", type=int, default=256, help="of --reach")
    parser.add_argument("--model", help="hub id or folder; default: the small model that comes with packages")
    parser.add_argument("--segments", type=int, nargs="+", default=[16, 64, 256], help="tokens a segment")
    parser.add_argument("--trees", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--way", choices=SERVERS, help="this way alone, in this process")
    return parser.parse_args(arguments)


def main() -> None:
    """Read the options and measure."""
    args = parse_options()
    if args.reach:
        reach(args)
    elif args.way:
        run_way(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
