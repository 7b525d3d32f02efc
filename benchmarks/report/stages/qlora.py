"""QLoRA: how far the engine is from the policy, and its speed on either kind of base."""

from benchmarks.report.cases import Case, Record, Stage, alternating

from .engines import synchronize


def drift(record: Record, way: str, seed: int, options: list[str], model: str = "") -> None:
    """Nats between engine and policy at each step; with an empty `model` on SmolLM2-135M-Instruct."""
    from benchmarks import qlora

    args = qlora.parse_options(["--seed", str(seed), "--model", model, *options])
    for step, nats in enumerate(qlora.train(way, args), start=1):
        record(f"{way}: nats at step {step}", nats)


def cases(smoke: bool) -> list[Case]:
    """Each way with each seed; then the engine's speed on 4-bit weights, and on weights that are written out."""
    if smoke:
        toy = ["--steps", "1", "--length", "4"]
        return [
            Case(f"{way}, seed 0", drift, {"way": way, "seed": 0, "options": toy}, "tiny")
            for way in ("stock TRL", "quantized")
        ]
    ways = ["stock TRL", "quantized", "dequantized", "shared base"]
    speed = {"label": "7B in 4 bits", "options": ["--load_in_4bit", "--repeats", "5"]}
    return [
        *(
            Case(f"{way}, seed {seed}", drift, {"way": way, "seed": seed, "options": []})
            for way, seed in alternating(ways, 2)
        ),
        *(
            Case(f"7B, {way}", synchronize, {"way": way, **speed}, "qwen2.5-7b")
            for way in ("quantized", "dequantized")
        ),
    ]


QLORA = Stage(
    name="qlora",
    title="QLoRA",
    about="""\
Mean difference of log-probabilities between engine and policy in nats, on SmolLM2-135M-Instruct in NF4
(`benchmarks.qlora`), and speed of the engine of a 7B policy (`benchmarks.weight_sync`). *Quantized*: vLLM on the
policy's 4-bit weights. *Dequantized*: on the same weights written out in 16 bits.""",
    cases=cases,
)
