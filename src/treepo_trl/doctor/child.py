"""
The child process of a group of checks: `python -m treepo_trl.doctor.child GROUP NEEDS RESULTS`.

It appends a line to RESULTS after each check, so that its parent knows in which one it has ended.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from .findings import Check, finding_of
from .needs import Needs


_REMEDY = "Look for this error in the issues of the library that raised it."


def main(group: str, needs: Needs, results: Path) -> None:
    """Run the checks of a group and write their findings."""
    for name, check in _GROUPS[group](needs, results.parent):
        found = finding_of(name, check, _REMEDY)
        with results.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")


def kernel_names(needs: Needs) -> list[str]:
    """Checks of the group `kernels`, in their order."""
    packed = [f"packed update ({backend})" for backend in needs.backends]
    return ["number type", *packed, *(["4-bit"] if needs.needs_4bit else [])]


def training_names(needs: Needs) -> list[str]:
    """Checks of the group `training`, in their order."""
    adapter = ["adapter moves the engine"] if needs.has_adapter and needs.uses_vllm else []
    sleep = ["sleep and wake"] if needs.sleeps else []
    return ["engine", "same model", *adapter, *sleep, "planner"]


def _kernels(needs: Needs, _scratch: Path) -> Iterable[tuple[str, Check]]:
    from .four_bit import check_four_bit
    from .number_type import check_number_type
    from .packed_update import check_packed

    checks: dict[str, Check] = {
        "number type": partial(check_number_type, needs),
        "4-bit": partial(check_four_bit, needs),
        **{f"packed update ({backend})": partial(check_packed, needs, backend) for backend in needs.backends},
    }
    return [(name, checks[name]) for name in kernel_names(needs)]


def _training(needs: Needs, scratch: Path) -> Iterable[tuple[str, Check]]:
    from .training import SmallTraining

    checks = SmallTraining(needs, scratch / "training").checks()
    return [(name, checks[name]) for name in training_names(needs)]


_GROUPS = {"kernels": _kernels, "training": _training}


if __name__ == "__main__":
    main(sys.argv[1], Needs(**json.loads(sys.argv[2])), Path(sys.argv[3]))
