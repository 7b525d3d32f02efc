"""Environments that lack a package or have a strange version of it, as the interpreter sees them."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from pathlib import Path
from types import ModuleType

import pytest


class _Hides(MetaPathFinder):
    """A finder in front of the others, to which some packages are not installed."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def hide(monkeypatch: pytest.MonkeyPatch, package: str, *distributions: str) -> None:
    """Let a package be not installed: neither its modules nor its distributions are found."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Hides([package]), *sys.meta_path])
    search = MetadataPathFinder.find_distributions

    def others(context: DistributionFinder.Context | None = None) -> list[Distribution]:
        context = context or DistributionFinder.Context()
        return [] if context.name in distributions else list(search(context))

    monkeypatch.setattr(MetadataPathFinder, "find_distributions", staticmethod(others))


def pretend_version(monkeypatch: pytest.MonkeyPatch, folder: Path, distribution: str, version: str) -> None:
    """Put the metadata of another version in front of the one that is installed, as a stray install does."""
    metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))
