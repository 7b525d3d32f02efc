"""Learning from equally many tokens, and in equally many seconds."""

import json
from pathlib import Path

from benchmarks.common import OUTPUTS
from benchmarks.report.cases import Case, Record, Stage, alternating


OUT = OUTPUTS / "gpu_report/learning"


def train(
    record: Record, arm: str, seed: int, options: list[str], seconds: list[int], model: str | None = None
) -> None:
    """
    One run: held-out reward at quarters of its tokens, and at the seconds that it has come to.

    Without a `model` it is SmolLM2-135M-Instruct.
    """
    import numpy as np

    from benchmarks import learning
    from benchmarks.common import number_type

    options = [*options, *(["--model", model] if model else []), "--dtype", number_type()[0]]
    args = learning.parse_options(["--tasks", "addition", "--out", str(OUT), *options])
    rate = args.rates[0]
    folder = Path(learning.run_folder(arm, "addition", seed, rate, args))
    folder.mkdir(parents=True, exist_ok=True)
    learning.train(arm, "addition", seed, rate, args)
    result = json.loads((folder / "result.json").read_text())
    for quarter in range(5):
        tokens = args.tokens * quarter / 4
        record(f"{arm}: reward at {tokens:.0f} tokens", float(learning.interpolate(result, [tokens])[0]))
    times = [point["seconds"] for point in result["curve"]]
    for second in seconds:
        if second <= times[-1]:
            rewards = [point["reward"] for point in result["curve"]]
            record(f"{arm}: reward at {second} s", float(np.interp(second, times, rewards)))
    record(f"{arm}: s in all", times[-1])


def cases(smoke: bool) -> list[Case]:
    """Each arm with each seed, in turn."""
    arms = ["sqrt 8"] if smoke else ["GRPO 8", "sqrt 8", "paper 8"]
    if smoke:
        options = ["--tokens", "64", "--points", "1", "--held_out", "2", "--completions", "8", "--rates", "1e-4"]
        options += ["--max_completion_length", "8", "--segment_length", "4"]
    else:
        options = ["--tokens", "40000", "--points", "8", "--rates", "1e-4", "--use_vllm"]
    return [
        Case(
            f"{arm}, seed {seed}",
            train,
            {"arm": arm, "seed": seed, "options": options, "seconds": [0] if smoke else [30, 60, 120]},
            "tiny" if smoke else None,
        )
        for arm, seed in alternating(arms, 1 if smoke else 3)
    ]


LEARNING = Stage(
    name="learning",
    title="Learning from equal tokens and in equal seconds",
    about="""\
SmolLM2-135M-Instruct with LoRA adds three numbers (`benchmarks.learning`): held-out reward over decoded tokens and
over seconds of training. *GRPO 8* is this package's trainer without branching; a test holds its loss equal to that
of `GRPOTrainer`.""",
    cases=cases,
)
