"""
Write `docs/models.md`: what works with which family of models, as tiny random models of each have shown it.

    python docs/make_models.py                    # the page, from docs/models.json
    python docs/make_models.py --run              # what transformers and the update do, and the page
    python docs/make_models.py --run-vllm         # what vLLM does, and the page: a process a family, a minute each
    python docs/make_models.py --run-vllm "Llama" # of one family

What is in docs/models.json is found out again by `tests/test_models_page.py`, of vLLM's part some families.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.families import FAMILIES, FAMILY, Family


PAGE, RESULTS = Path(__file__).with_name("models.md"), Path(__file__).with_name("models.json")
TIMEOUT_S = 300
IN_CI = ("Llama", "Gemma 3", "Falcon-H1")
"""Families with which vLLM is run in each test run: plain, windows, recurrent beside attention."""


# vLLM


def vllm_of(family: Family) -> dict[str, Any]:
    """What vLLM does with a family: with an adapter, and without one where that fails. Each in its own process."""
    found = _in_a_process(family, with_adapter=True)
    if "error" not in found:
        return found
    without = _in_a_process(family, with_adapter=False)
    return without if "error" in without else {**without, "adapter_error": found["error"]}


def _in_a_process(family: Family, with_adapter: bool) -> dict[str, Any]:
    """What `serve` returns, or its error."""
    context = multiprocessing.get_context("forkserver")  # of a process that has imported everything
    context.set_forkserver_preload(
        ["tests.support.family_checks", "vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"]
    )
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(family.name, with_adapter, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(TIMEOUT_S) else {"error": f"no answer in {TIMEOUT_S} s"}
    except EOFError:
        found = {"error": "its process died"}
    process.kill()
    process.join()
    return found


def _serve(name: str, with_adapter: bool, sender: Connection) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, so that its errors come here
    from tests.support.family_checks import serve

    with tempfile.TemporaryDirectory() as folder:
        try:
            sender.send(dataclasses.asdict(serve(FAMILY[name], Path(folder), with_adapter)))
        except Exception as error:  # whatever it is, it is the answer
            traceback.print_exc()
            first_line = str(error).strip().splitlines()[0].replace(folder, "the model's folder")
            first_line = textwrap.shorten(first_line, 250, placeholder=" ...")
            sender.send({"error": f"{type(error).__name__}: {first_line}"})


# The results file


def read_results() -> dict[str, Any]:
    if RESULTS.exists():
        return json.loads(RESULTS.read_text(encoding="utf-8"))
    return {"versions": {}, "families": {}}


def write_results(results: dict[str, Any]) -> None:
    order = [family.name for family in FAMILIES]
    results["families"] = {name: results["families"][name] for name in order if name in results["families"]}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def run_vllm(names: list[str]) -> None:
    for name in names or [family.name for family in FAMILIES]:
        found = vllm_of(FAMILY[name])
        results = read_results()
        results["families"].setdefault(name, {})["vllm"] = found
        results["versions"]["vLLM"] = importlib.import_module("vllm").__version__
        write_results(results)
        print(name, found, flush=True)


def versions_of(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def run_torch() -> None:
    from tests.support.family_checks import facts_of

    results = read_results()
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            facts = dataclasses.asdict(facts_of(family, Path(folder)))
        results["families"].setdefault(family.name, {})["facts"] = facts
    results["versions"] |= versions_of("torch", "transformers", "trl", "peft", "bitsandbytes")
    write_results(results)


# The page

OPENING = """\
<!-- Made by `docs/make_models.py` from docs/models.json. Run that again instead of editing this page. -->

# Models

This page says what works with which family of models.
It was found out on a CPU, with a tiny random model of each family.
Real checkpoints of a family are larger and have the same layers.

| family | its layers have | sample, transformers | sample, vLLM | packed update | adapter to vLLM | QLoRA |
|---|---|---|---|---|---|---|
"""


def models_page() -> str:
    """The page as a text."""
    results = read_results()
    found = results["families"]
    rows = [
        "| " + " | ".join([family.name, family.has or "", *_cells(**found[family.name])]) + " |" for family in FAMILIES
    ]
    names: dict[str, list[str]] = {}
    for family in FAMILIES:
        for reason in _reasons(family, **found[family.name]):
            names.setdefault(reason, []).append(family.name)
    reasons = [f"- {', '.join(whose)}: {reason}." for reason, whose in names.items()]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    return OPENING + "\n".join(
        [*rows, EXPLANATION, *reasons, CLOSING.format(versions=versions, in_ci=", ".join(IN_CI))]
    )


def _cells(facts: dict[str, Any], vllm: dict[str, Any] | None = None) -> list[str]:
    if facts["not_trained"] or facts["padding"]:
        packed = "no" if facts["not_trained"] else "plain rows, padding"
    else:
        packed = "yes" if facts["not_packed"] is None else "plain rows"
    sampled, adapter = served_cells(vllm)
    return [
        "slots" if facts["no_slots"] is None else "copies",
        sampled,
        packed,
        adapter,
        "not the experts" if facts["experts_stay"] else "yes",
    ]


def _is_right(difference: float, rounding: float) -> bool:
    """
    Whether vLLM computes the model, by the largest difference in nats.

    vLLM rounds as often as transformers does, in another order. So it may be as far from float32 again.
    """
    return difference < max(0.01, 2 * rounding)


EXPLANATION = """
## What the columns mean

- **Sample, transformers.** `slots`: keys and values are kept once per segment and shared. `copies`: a path's whole
  state is copied for each of its children, and paths of one length are decoded together. Prefixes are computed once
  either way. The sampled log-probabilities are those of a plain forward.
- **Sample, vLLM.** Trees of the tiny model. In float32, log-probabilities are within 0.01 nats of transformers' own.
  Models with recurrent layers are served in bfloat16, as vLLM's kernels for processors have no float32. There
  transformers in bfloat16 is the measure: vLLM may be twice as far from float32 as transformers is for the same
  tokens.
  Qwen3.5 needs torchvision: without it vLLM refuses to load the model. It was installed here.
  `not shared`: its cache had none of the prompts' tokens. With recurrent layers its blocks were longer than these
  short paths. On a processor vLLM has no cache of prefixes for latent attention.
- **Packed update.** `yes`: log-probabilities of packed rows are within 1e-4 of those of plain rows, and gradients
  within 1e-5. `plain rows`: nothing is shared in the update, and the log says so. `padding`: a row's values depend on
  its padding, in `GRPOTrainer` too.
- **Adapter to vLLM.** A LoRA adapter in the engine moves it as it moves the policy.
- **failed here.** vLLM raised an error on a CPU, which is quoted below. Where it is about Triton it may work on a GPU:
  vLLM's kernels for experts with adapters need Triton, which is not there on a CPU.
- **QLoRA.** An adapter on 4-bit weights trains, and the transformers engine samples from it. `not the
  experts`: bitsandbytes leaves experts as they are, at their full size, and `all-linear` gives them no adapter.

## Windows and chunks

A token sees an ancestor if their positions differ by less than the window, or are in the same chunk.
Positions are depths in the tree, so the rule is that of plain rows.
The update has a mask for each kind of layer, with SDPA and with FlexAttention.
The transformers engine keeps all keys of window layers, and masks them.

Attention sinks and soft caps pack too. Gemma 2 needs `attn_implementation="eager"`. With SDPA, transformers leaves
out its soft caps, and the policy would not be the model that vLLM serves. A warning says so.
gpt-oss has no SDPA in transformers. With eager attention it packs if `router_aux_loss_coef` is 0.

## Recurrent, convolutional and linear attention

These layers have no keys that a mask could hide, so rows stay plain in the update.
In sampling, the state at a node's end is what its children start from.
vLLM finds a prefix again in whole blocks only, which are large for such layers.
It makes the blocks of attention as large, so the sampler's block is that of both.
Segments much shorter than a block share little: take longer ones.
`num_cached_tokens` is vLLM's own count, so what is not shared shows there.

vLLM 0.31 forgets the decoded tokens of window and recurrent layers, and children follow decoded tokens.
The engine is started with `prefix_cache_retention_interval=None`, which keeps them.
Set another value in `vllm_engine_kwargs` to save memory.
A finer `prefix_match_unit` helps prompts alone, as states are kept at ends of blocks while decoding.

## A family that is not here

The first path that the transformers engine samples is compared with a plain forward.
The first packed tree is compared with its plain rows.
A difference beyond rounding stops the run.
Layers of an unknown kind stay on plain rows, and are sampled from copies of their state.
A model without a cache that can be copied is refused before the run.

## Why not
"""

CLOSING = """
## Versions

{versions}. The tests find out again all but vLLM's part, and of that {in_ci}. GPUs were not tried.
"""


def _reasons(family: Family, facts: dict[str, Any], vllm: dict[str, Any] | None = None) -> Iterator[str]:
    """Why a family's cells are not "yes"."""
    if facts["no_slots"]:
        yield f"copies instead of slots: {facts['no_slots']}"
    if facts["not_trained"]:
        yield f"no training: {facts['not_trained']}"
    elif facts["not_packed"]:
        yield f"plain rows: {facts['not_packed']}"
    if vllm is None:
        return
    if "error" in vllm:
        yield f"vLLM: `{vllm['error']}`"
        return
    if family.about_vllm:
        yield f"vLLM: {family.about_vllm}"
    if not _base_is_right(vllm):
        yield f"vLLM: log-probabilities differ by up to {vllm['base']:.2g} nats, not known why"
    elif vllm["adapter"] is None:
        yield f"adapter in vLLM: `{vllm['adapter_error']}`"
    elif not _adapter_is_right(vllm):
        yield f"adapter in vLLM: log-probabilities differ by up to {vllm['adapter']:.2g} nats, not known why"


def _base_is_right(vllm: dict[str, Any]) -> bool:
    return _is_right(vllm["base"], vllm.get("rounding", 0.0))


def _adapter_is_right(vllm: dict[str, Any]) -> bool:
    return _is_right(vllm["adapter"], vllm.get("adapter_rounding", 0.0))


def served_cells(vllm: dict[str, Any] | None) -> tuple[str, str]:
    """The cells of sampling with vLLM and of an adapter in it."""
    if vllm is None:
        return "not tried", "not tried"
    if "error" in vllm:
        return "failed here", "failed here"
    sampled = "yes" if _base_is_right(vllm) else "no"
    if sampled == "yes" and not vllm["cached"]:
        sampled = "yes, not shared"
    if vllm["adapter"] is None:
        return sampled, "failed here"
    return sampled, "yes" if _adapter_is_right(vllm) else "no"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--run-vllm", nargs="*")
    arguments = parser.parse_args()
    if arguments.run:
        run_torch()
    if arguments.run_vllm is not None:
        run_vllm(arguments.run_vllm)
    PAGE.write_text(models_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
