"""
The report of a GPU: stages of at most 8 minutes, a file each, gathered over several visits and on several cards.

    python -m benchmarks.gpu_report                        # every stage that this card has no file of
    python -m benchmarks.gpu_report --stages kernels step  # these alone
    python -m benchmarks.gpu_report --retry                # parts that failed, again
    python -m benchmarks.gpu_report --render               # docs/performance-gpu.md from the files that are there
    python -m benchmarks.gpu_report --smoke                # every stage at toy size, on a processor

A stage has parts, each in a process of its own, in an order that turns from seed to seed. Its file holds the card,
versions, commit, seeds, all values and their medians. A stage that was not done in its time goes on at the next call,
as long as the code and the versions are the same. A part that fails leaves its last line there and stops no other.
`--retry` leaves a finished file of other code, versions or another machine as it is; delete it to measure it anew.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

from benchmarks.common import OUTPUTS, ROOT, make_parser
from benchmarks.report import files
from benchmarks.report.cases import Case, Stage
from benchmarks.report.machine import commit, describe_card, folder_name, versions
from benchmarks.report.page import render
from benchmarks.report.processes import Processes
from benchmarks.report.stages import STAGES


DATA = ROOT / "benchmarks/data/gpu"
PAGE = ROOT / "docs/performance-gpu.md"
SMOKE = OUTPUTS / "gpu_report/smoke"
MINUTES = 8.0


def machine_of(processes: Processes) -> dict[str, str]:
    """Facts about the card."""
    outcome = processes.run(Case("machine", describe_card), "machine", 120)
    if "failed" in outcome:
        raise SystemExit(f"The card cannot be asked: {outcome['failed']}")
    return {row: str(values[0]) for row, values in outcome["rows"].items()}


def opened(path: Path, fresh: files.StageFile, retry: bool) -> files.StageFile:
    """What is there of a stage, or `fresh` if nothing can be kept of it."""
    if not path.exists():
        return fresh
    data = files.read(path)
    failed = [name for name, outcome in data["cases"].items() if "failed" in outcome]
    if data["is_finished"] and not (retry and failed):
        return data
    others = {
        "commit": f"at commit {data['commit']}",
        "versions": "with other versions",
        "machine": "on another machine",
    }
    other = next((words for key, words in others.items() if data[key] != fresh[key]), None)
    if other is not None and data["is_finished"]:
        say(f"{data['stage']}: was measured {other}; delete {path} to measure it anew")
        return data
    if other is not None:
        say(f"{data['stage']}: begins anew, since code, versions or machine are not those of its file")
        return fresh
    if retry:
        data["cases"] = {name: outcome for name, outcome in data["cases"].items() if name not in failed}
    data["is_finished"] = False
    return data


def run_stage(stage: Stage, path: Path, data: files.StageFile, processes: Processes, limit: float) -> None:
    """
    Run the parts of a stage that are missing, for `limit` seconds at most, and write its file after each.

    A part that the limit cuts off is left to the next visit. One that had the whole time has failed.
    """
    started = time.monotonic()
    cases = stage.cases(data["smoke"])
    missing = [case for case in cases if case.name not in data["cases"]]
    data["seeds"] = sorted({case.arguments.get("seed", 0) for case in cases})
    for case in missing:
        left = limit - (time.monotonic() - started)
        outcome = processes.run(case, f"{stage.name}-{folder_name(case.name)}", left)
        if outcome.pop("timed_out", False) and case is not missing[0]:
            break
        data["cases"][case.name] = outcome
        say(f"{stage.name}, {case.name}: {outcome.get('failed') or outcome.get('cannot_run') or 'done'}")
        files.write(path, data)
    data["is_finished"] = all(case.name in data["cases"] for case in cases)
    files.write(path, data)


def say(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr, flush=True)


def parse_options() -> argparse.Namespace:
    """Options of the command line."""
    names = [stage.name for stage in STAGES]
    parser = make_parser(__doc__)
    parser.add_argument("--stages", nargs="+", default=names, choices=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--render", action="store_true", help="write the page and run nothing")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on a processor; files and page in --data")
    parser.add_argument("--retry", action="store_true", help="run failed parts again")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for a stage in one visit")
    parser.add_argument("--data", type=Path, help="folder of the files, a folder in it for each card")
    parser.add_argument("--page", type=Path, help="where --render writes")
    options = parser.parse_args()
    options.data = options.data or (SMOKE if options.smoke else DATA)
    options.page = options.page or (options.data / "performance-gpu.md" if options.smoke else PAGE)
    if options.minutes <= 0:
        parser.error(f"`--minutes` is {options.minutes:g}; a stage needs more than 0, for instance {MINUTES:g}.")
    return options


def main() -> None:
    """Run what is missing, or write the page."""
    options = parse_options()
    try:
        if options.render:
            options.page.parent.mkdir(parents=True, exist_ok=True)
            options.page.write_text(render(options.data, STAGES))
            say(f"{options.page}")
        else:
            run_stages(options)
    except ValueError as error:  # a file of a stage that is none
        raise SystemExit(str(error)) from None


def run_stages(options: argparse.Namespace) -> None:
    """Run what the card at hand has no files of."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no part is left running
    processes = Processes(OUTPUTS / "gpu_report/logs", options.smoke)
    machine = machine_of(processes)
    if machine["card"] == "CPU" and not options.smoke:
        raise SystemExit("torch sees no CUDA card here. --smoke runs every stage at toy size on a processor.")
    packages, code = versions(), commit()
    for stage in (stage for stage in STAGES if stage.name in options.stages):
        path = options.data / folder_name(machine["card"]) / f"{stage.name}.json"
        data = opened(path, files.new_file(stage.name, options.smoke, machine, packages, code), options.retry)
        if data["is_finished"]:
            say(f"{stage.name}: is there already ({path})")
            continue
        run_stage(stage, path, data, processes, 60 * options.minutes)


if __name__ == "__main__":
    main()
