"""Sampling with vLLM: trees against independent completions."""

from benchmarks.report.cases import Case, Record, Stage


def sample(record: Record, model: str, label: str, prompts: int, options: list[str]) -> None:
    """Every way in turn on one engine, for fixed and ragged lengths."""
    from benchmarks import rollout
    from benchmarks.common import number_type

    args = rollout.parse_options(["--model", model, "--dtype", number_type()[0], "--prompts", str(prompts), *options])
    bench = rollout.build(args)
    base = None
    for lengths in args.lengths:
        for way, result in rollout.compare(bench, lengths, args):
            prefix, cost = f"{label}, {in_words(prompts)}, {lengths}, {way}", result.cost
            if way == "independent":
                base = cost
            elif base is not None:
                seconds, tokens = cost.seconds / base.seconds, cost.decoded_tokens / base.decoded_tokens
                record(f"{prefix}: seconds over independent", seconds)
                record(f"{prefix}: of what its tokens allow", tokens / seconds)
                record(
                    f"{prefix}: serial segments over the longest path", result.serial_segments / result.longest_path
                )
            record(f"{prefix}: seconds", cost.seconds)
            record(f"{prefix}: tokens decoded", cost.decoded_tokens)
            record(f"{prefix}: trajectories", cost.leaves)


def in_words(prompts: int) -> str:
    """How many prompts."""
    return "1 prompt" if prompts == 1 else f"{prompts} prompts"


def cases(smoke: bool) -> list[Case]:
    """A process for each model and number of prompts."""
    if smoke:
        toy = ["--engine", "transformers", "--length", "16", "--width", "4", "--repeats", "1", "--prompt_length", "8"]
        toy += ["--ways", "sqrt"]
        return [Case("tiny, 2 prompts", sample, {"label": "tiny", "prompts": 2, "options": toy}, "tiny")]
    options = ["--length", "512", "--segment_length", "64", "--repeats", "2"]
    options += ["--ways", "early", "sqrt", "sqrt+root", "spread"]
    sizes = [("0.5B", 1), ("0.5B", 8), ("0.5B", 64), ("1.5B", 8), ("7B", 8)]
    return [
        Case(
            f"{label}, {in_words(prompts)}",
            sample,
            {"label": label, "prompts": prompts, "options": options},
            f"qwen2.5-{label.lower()}",
        )
        for label, prompts in sizes
    ]


ROLLOUT = Stage(
    name="rollout",
    title="Sampling: trees and independent completions",
    about="""\
16 completions of at most 512 tokens to each prompt, segments of 64, with vLLM (`benchmarks.rollout`). *Fixed*: all
have 512 tokens. *Ragged*: lognormal lengths with a mean of 256. *Of what its tokens allow* is 1.0 if nothing but
decoded tokens counts.""",
    cases=cases,
)
