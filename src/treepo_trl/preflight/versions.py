"""Versions of TRL and transformers that this package was not made for, told at the import."""

import logging
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


logger = logging.getLogger("treepo_trl")
_CHECKED = ("trl", "transformers")  # whose private names and interfaces are used


def warn_of_versions() -> None:
    """Say in a line which of them is outside of its bounds, with the command that installs the right one."""
    try:
        requirements = [Requirement(line) for line in requires("treepo-trl") or []]
        found = {name: version(name) for name in _CHECKED}
    except PackageNotFoundError:  # a checkout that is not installed has no bounds here
        return
    for requirement in requirements:
        name = requirement.name
        if name in _CHECKED and not requirement.marker and not requirement.specifier.contains(found[name], True):
            age = "new" if _is_too_new(requirement, found[name]) else "old"
            logger.warning(
                f"{name} {found[name]} is too {age} for treepo-trl {version('treepo-trl')}, and may fail: run "
                f'`pip install "{name}{requirement.specifier}"`.'
            )


def _is_too_new(requirement: Requirement, found: str) -> bool:
    upper = [each for each in requirement.specifier if each.operator in ("<", "<=", "==", "~=")]
    return any(not each.contains(found, True) for each in upper)
