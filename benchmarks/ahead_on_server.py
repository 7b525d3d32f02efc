"""
What `rollout_ahead=1` saves with a real server: seconds per step of the quickstart, whose trees vLLM samples.

    python -m benchmarks.ahead_on_server                            # three pairs of trainings, in turn
    python -m benchmarks.ahead_on_server --segment_length 16        # further options go to the trainings

On a processor the server has the first core and the training the last. With several cards the server has the last
and the training the first. Prints for each way the median over its trainings of the seconds per step, and of the
seconds that a batch was sampled; then the ratio, and what it would be if a step took exactly as long as the longer of
sampling and everything else.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import OUTPUTS, make_parser, run_to_log, small_model_folder, table_head, table_row
from benchmarks.servers import cards, server_flags
from tests.support.vllm_servers import LORA_FLAGS, vllm_servers


CORES = sorted(os.sched_getaffinity(0))
NOT_STEADY = 2  # steps at the start: connections are opened, and the first batch is not sampled ahead


@contextmanager
def on_core(position: int) -> Iterator[None]:
    """Processes that start in the block get one core, where there are no cards to share out."""
    before = os.sched_getaffinity(0)
    if not torch.cuda.is_available():
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        os.sched_setaffinity(0, {CORES[position]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def train(url: str, ahead: int, folder: Path, steps: int, extra: Sequence[str]) -> list[dict[str, float]]:
    """Logs of the steady steps of one training."""
    command = ["-m", "treepo_trl.cli", "quickstart", "--output_dir", str(folder), "--max_steps", str(steps)]
    command += [
        "--model_name_or_path",
        small_model_folder(),
        "--use_vllm",
        "true",
        "--vllm_mode",
        "server",
        "--vllm_server_base_url",
        url,
    ]
    command += ["--rollout_ahead", str(ahead), *extra]
    card = cards()[0]
    with on_core(-1):
        run_to_log(command, folder / "log.txt", **({"CUDA_VISIBLE_DEVICES": card} if card else {}))
    logs = [log for log in json.loads((folder / "quickstart.json").read_text())["steps"] if "step_time" in log]
    return logs[NOT_STEADY:-1]  # nothing is sampled ahead in the last


def main() -> None:
    """Start a server, train in both ways in turn, and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    args, extra = parser.parse_known_args()
    found: dict[int, list[tuple[float, float]]] = {0: [], 1: []}  # seconds of a step and of its sampling
    folder = OUTPUTS / "ahead_on_server"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (
        on_core(0),
        vllm_servers(1, small_model_folder(), folder, [*server_flags(), *LORA_FLAGS], cards()[-1:]) as (server,),
    ):
        for repeat in range(args.repeats):
            for ahead in (0, 1) if repeat % 2 == 0 else (1, 0):
                logs = train(server.url, ahead, folder / f"{ahead}-{repeat}", args.steps, extra)
                sampling = [log["tree/engine_seconds"] + log["tree/sampler_seconds"] for log in logs]
                found[ahead].append((median(log["step_time"] for log in logs), median(sampling)))
    print(table_head("rollout_ahead", "s per step", "each training", "s of sampling"))
    seconds = {ahead: [step for step, _ in values] for ahead, values in found.items()}
    for ahead, values in found.items():
        each = ", ".join(f"{value:.2f}" for value in seconds[ahead])
        print(table_row(ahead, f"{median(seconds[ahead]):.2f}", each, f"{median(s for _, s in values):.2f}"))
    step, sampling = median(seconds[0]), median(s for _, s in found[0])
    print(f"\n{step / median(seconds[1]):.2f} times as fast; {step / max(sampling, step - sampling):.2f} at best")


if __name__ == "__main__":
    main()
