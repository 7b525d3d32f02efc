"""
Segments from vLLM servers: against the engine in this process, and how far one client reaches.

    python -m benchmarks.servers --reach                      # servers without a model, that answer at once
    python -m benchmarks.servers                              # SmolLM2-135M: in process, one server, two servers
    python -m benchmarks.servers --segments 16 --trees 2 --repeats 1 --ways in-process one  # a quick look

`--reach` prints, for 1, 8 and 64 servers, trees and segments per second and the processor time that the client spends
on a segment. The inverse of that time is the most segments per second of one client, whatever the servers do. The
servers have processes of their own.

Without it, the same trees are grown in each of the ways and with each segment length. Prints wall time per segment,
processor time per segment of the client and of the servers' processes by their names, and the cached share.
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

from benchmarks.common import (
    RESULT,
    make_parser,
    option_arguments,
    print_result,
    result_of,
    small_model_folder,
    table_head,
    table_row,
)
from treepo_trl import TreeSampler, TreeSamplingConfig
from treepo_trl.engines import SegmentEngine
from treepo_trl.engines.server_connection import ServerConnection
from treepo_trl.engines.vllm_server import VLLMServerEngine


SEGMENTS_PER_PATH = 6
PROMPT_TOKENS = 64
NEVER = 49151  # a token that SmolLM2 does not draw: every tree has the same shape


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
            engine = VLLMServerEngine([ServerConnection(url) for url in urls], [NEVER])
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


def in_process(model: str) -> SegmentEngine:
    """vLLM in this process."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # as the servers
    from vllm import LLM

    from treepo_trl.engines.vllm import VLLMEngine

    llm = LLM(
        model=model,
        block_size=32,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        max_num_seqs=64,
        max_model_len=4096,
        enforce_eager=True,
    )
    return VLLMEngine(llm, [NEVER])


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


def measure(engine: SegmentEngine, mains: list[int], args: Namespace) -> list[dict[str, object]]:
    """A record for every segment length, of the repeat with the least wall time."""
    records = []
    for segment_length in args.segments:
        sampler = TreeSampler(engine, config_of(segment_length), [NEVER])
        sampler.sample(prompts_of(1), seed=99)
        best: dict[str, object] | None = None
        for repeat in range(args.repeats):
            engine.reset_prefix_cache()
            before, cpu = cpu_seconds(mains), time.process_time()
            sampler.sample(prompts_of(args.trees), seed=repeat)
            stats, count = sampler.stats, sampler.stats.num_segments
            cost = {"client": time.process_time() - cpu}
            cost |= {name: total - before.get(name, 0.0) for name, total in cpu_seconds(mains).items()}
            record: dict[str, object] = {
                "segment": segment_length,
                "rate": count / stats.seconds,
                "wall": stats.seconds / count * 1e3,
                "cached": stats.num_cached_tokens / max(stats.num_prompt_tokens, 1),
                "cpu": {name: seconds / count * 1e3 for name, seconds in cost.items() if seconds > 0.01},
            }
            if best is None or stats.seconds / count * 1e3 < best["wall"]:  # pyright: ignore[reportOperatorIssue]
                best = record
        assert best is not None
        records.append(best)
    return records


def run_way(args: Namespace) -> None:
    """One way, in this process; hands its records back."""
    model = args.model or small_model_folder()
    if args.way == "in-process":
        print_result(measure(in_process(model), [], args))
        return
    from tests.support.vllm_servers import vllm_servers

    flags = ["--max-num-seqs", "64", "--max-model-len", "4096"]
    count = {"one": 1, "two": 2}[args.way]
    with tempfile.TemporaryDirectory() as folder, vllm_servers(count, model, Path(folder), flags) as servers:
        engine = VLLMServerEngine([ServerConnection(server.url) for server in servers], [NEVER])
        mains = [server.process.pid for server in servers if server.process is not None]
        print_result(measure(engine, mains, args))
        engine.close()


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


def main() -> None:
    """Read the options and measure."""
    parser = make_parser(__doc__)
    parser.add_argument("--reach", action="store_true", help="one client and servers without a model")
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 8, 64], help="of --reach")
    parser.add_argument("--reach_trees", type=int, default=256, help="of --reach")
    parser.add_argument("--model", help="hub id or folder; default: the small model that comes with packages")
    parser.add_argument("--segments", type=int, nargs="+", default=[16, 64, 256], help="tokens a segment")
    parser.add_argument("--trees", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=["in-process", "one", "two"])
    parser.add_argument("--way", choices=["in-process", "one", "two"], help="this way alone, in this process")
    args = parser.parse_args()
    if args.reach:
        reach(args)
    elif args.way:
        run_way(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
