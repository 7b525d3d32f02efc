"""Whole steps of a training: memory with a shared base, recipes against their plans, seconds against stock TRL."""

import re
from pathlib import Path
from typing import cast

import yaml

from benchmarks.common import ROOT
from benchmarks.report.cases import Case, Record, Stage, alternating
from treepo_trl.apps.doctor.findings import CannotRunError


RECIPE, ARCHITECTURE = "qwen2.5-1.5b-lora-12gb", "qwen2.5-1.5b"
TOY = ["--architecture", "tiny", "--leaves", "4", "--length", "16", "--trees", "1", "--steps", "1"]
ON_TRANSFORMERS = ["--engine", "transformers"]  # vLLM for CPUs takes no weights from stock TRL, and starts slowly
T4_GIB = 16
FOR_MANY_CARDS = {"paper-qwen2.5-7b": "full training of 7B in float32 is sharded over many cards"}


def steps(record: Record, model: str, way: str, label: str, seed: int, options: list[str]) -> None:
    """Seconds of each step but the first, and the peak of each part."""
    from benchmarks import memory

    args = memory.parse_options(["--card_gib", f"{_card_gib()}", "--seed", str(seed), *options])
    measured = memory.measure(way, args, model)
    for value in measured["seconds"][1:] or measured["seconds"]:
        record(f"{label}: s per step", value)
    for part, gib in measured["peaks"].items():
        record(f"{label}: GiB at most, {part}", gib)


def recipe(record: Record, name: str, architecture: str, smoke: bool, model: str = "") -> None:
    """Peak of two steps of a recipe on a card of its size, and what the plan says."""
    from benchmarks import memory

    if name in FOR_MANY_CARDS:
        raise CannotRunError(FOR_MANY_CARDS[name])
    has = _card_gib()
    wants = recipe_gib(name) or has
    if has < 0.9 * wants:  # what is sold as 12, 16 or 24 GB has up to a tenth less
        raise CannotRunError(f"the recipe is for {wants} GiB, the card has {has:.1f}")
    given = ["--recipe", name, "--architecture", architecture, "--card_gib", f"{min(wants, has)}"]
    args = memory.parse_options([*given, *([*TOY, *ON_TRANSFORMERS] if smoke else ["--as_it_stands"])])
    measured = memory.measure("treepo", args, model)
    peak, planned = max(measured["peaks"].values()), cast(float, measured["planned"])  # `None` is for stock TRL alone
    on_card = measured["device"] != "CPU"
    record(f"{name}: GiB at most", peak)
    record(f"{name}: GiB planned", planned)
    record(f"{name}: measured over planned", peak / planned if on_card else "the plan is for a card")
    for value in measured["seconds"]:
        record(f"{name}: s per step", value)


def _card_gib() -> float:
    """Memory of the card; of the machine where there is none."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    return psutil.virtual_memory().total / 2**30


def recipe_gib(name: str) -> int | None:
    """GiB of the card that a recipe is for, by its name; `None` if it names none."""
    if name.endswith("-t4"):
        return T4_GIB
    found = re.search(r"-(\d+)gb$", name)
    return int(found[1]) if found else None


def architecture_of(recipe: Path) -> str:
    """The architecture of a recipe's model: family and size in the model's name."""
    model = yaml.safe_load(recipe.read_text()).get("model_name_or_path")
    return "smollm2-135m" if model is None else "-".join(model.rpartition("/")[2].lower().split("-")[:2])


def recipe_cases(smoke: bool) -> list[Case]:
    """Each file of examples/cli_configs."""
    if smoke:
        given = {"name": RECIPE, "architecture": "tiny", "smoke": True}
        return [Case(RECIPE, recipe, given, "tiny")]
    cases: list[Case] = []
    for path in sorted((ROOT / "examples/cli_configs").glob("*.yaml")):
        architecture = architecture_of(path)
        given = {"name": path.stem, "architecture": architecture, "smoke": False}
        cases.append(Case(path.stem, recipe, given, None if path.stem in FOR_MANY_CARDS else architecture))
    return cases


def step_cases(smoke: bool) -> list[Case]:
    """Stock TRL and this package with the same seeds, in turn."""
    card = ["--leaves", "16", "--length", "1024", "--trees", "4", "--steps", "3"]
    batch = [*TOY, *ON_TRANSFORMERS] if smoke else card
    ways = [("treepo", "treepo", []), ("stock TRL", "stock TRL, 4 rows at a time", ["--rows", "4"])]
    if not smoke:
        ways.append(("stock TRL", "stock TRL, 16 rows at a time", ["--rows", "16"]))
    return [
        Case(
            f"{label}, seed {seed}",
            steps,
            {"way": way, "label": label, "seed": seed, "options": [*batch, *extra]},
            "tiny" if smoke else ARCHITECTURE,
        )
        for (way, label, extra), seed in alternating(ways, 1 if smoke else 2)
    ]


def shared_cases(smoke: bool) -> list[Case]:
    """Two copies of the base, one, and one beside an engine that sleeps."""
    ways = (
        ["treepo, shared base"] if smoke else ["treepo", "treepo, shared base", "treepo, shared base, engine sleeps"]
    )
    batch = TOY if smoke else ["--leaves", "16", "--length", "1024", "--trees", "2", "--steps", "2"]
    given = {"seed": 0, "options": batch}
    return [Case(way, steps, {"way": way, "label": way, **given}, "tiny" if smoke else ARCHITECTURE) for way in ways]


SHARED_BASE = Stage(
    name="shared-base",
    title="One copy of the base",
    about="""\
Two trees of 16 leaves of at most 1024 tokens with the 1.5B recipe (`benchmarks.memory`). GiB are all that is in use
on the card.""",
    cases=shared_cases,
)
RECIPES = Stage(
    name="recipes",
    title="Recipes: peak against plan",
    about="""\
Two steps of each recipe in `examples/cli_configs`, with its own batch and random weights, whose completions are as
long as they may be. A recipe for a smaller card gets that card's memory. The plan of the quickstart is for prompts
as long as its engine takes, which these are not.""",
    cases=recipe_cases,
)
STEP = Stage(
    name="step",
    title="A whole step against stock TRL",
    about="""\
Sampling, scoring and update of four prompts with 16 completions of at most 1024 tokens, LoRA on a 1.5B model with
vLLM (`benchmarks.memory`). The first step of a training is left out.""",
    cases=step_cases,
    ratios=tuple(
        (f"{stock} / treepo: s per step", f"{stock}: s per step", "treepo: s per step")
        for stock in ("stock TRL, 4 rows at a time", "stock TRL, 16 rows at a time")
    ),
)
