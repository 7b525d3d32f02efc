"""The update's forward and backward pass: plain rows, and packed rows with either attention."""

from benchmarks.report.cases import Case, Record, Stage, as_cell
from treepo_trl.apps.doctor.findings import CannotRunError, in_words


def passes(record: Record, model: str, unique: int, options: list[str]) -> None:
    """Seconds and memory of every way on trees with so many unique tokens, over several ratios."""
    import torch

    from benchmarks import update
    from benchmarks.common import number_type

    on_card = torch.cuda.is_available()
    dtype = number_type()[0] if on_card else "float32"
    args = update.parse_options(["--model", model, "--dtype", dtype, "--lora", "16", *options])
    if args.packings == ["flex"] and not on_card:
        raise CannotRunError("the packed update runs FlexAttention on CUDA alone")
    device = torch.device("cuda" if on_card else "cpu")
    update.keep_freed_memory()
    network = update.make_model(args, device)
    for ratio in args.ratios:
        batch = update.make_batch(unique, ratio, update.MODELS[model].vocab_size, device)
        prefix = f"{unique} tokens, ratio {ratio:g}"
        ways = update.make_ways(args, network, batch)
        for way in list(ways):
            try:
                record(f"{prefix}, {way}: GiB", update.peak_gib(ways[way]))
            except Exception as error:  # of a kernel or for want of memory: the report says it, other ways go on
                record(f"{prefix}, {way}: GiB", f"failed: {as_cell(in_words(error))}")
                del ways[way]
                network.zero_grad(set_to_none=True)
        for _ in range(args.repeats):
            for way, run in ways.items():
                record(f"{prefix}, {way}: s", update.measure(network, run)[0])


def cases(smoke: bool) -> list[Case]:
    """A process for each number of tokens."""
    if smoke:
        toy = ["--rows", "4", "--ratios", "2", "--repeats", "1", "--packings"]
        sdpa = Case("sdpa", passes, {"model": "tiny", "unique": 64, "options": [*toy, "sdpa"]})
        return [sdpa, Case("flex", passes, {"model": "tiny", "unique": 64, "options": [*toy, "flex"]})]
    options = ["--gradient_checkpointing", "--ratios", "1.2", "2", "4", "--packings", "sdpa", "flex", "--repeats", "3"]
    return [
        Case(f"{unique} tokens", passes, {"model": "qwen2.5-1.5b", "unique": unique, "options": options})
        for unique in (1024, 2048, 4096, 8192)
    ]


KERNELS = Stage(
    name="kernels",
    title="Update: plain rows and packed rows",
    about="""\
Forward and backward pass of one tree of 16 leaves with random tokens, on a 1.5B model with LoRA of rank 16 and
gradient checkpointing (`benchmarks.update`). Plain rows go in micro-batches of 1, 4 and 16. *Ratio* is leaf tokens
per unique token, GiB are what a pass adds.""",
    cases=cases,
)
