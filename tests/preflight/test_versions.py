"""What the import says of versions, and lines of other packages that are left out."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.broken_environments import pretend_version
from treepo_trl.preflight import quiet_terminal
from treepo_trl.preflight.quiet import _NOISE
from treepo_trl.preflight.versions import warn_of_versions


def test_this_environment_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_versions()
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("package", "found", "age"),
    [
        ("trl", "1.15.0", "old"),
        ("trl", "1.17.0", "new"),
        ("trl", "1.17.0.dev0", "new"),
        ("transformers", "5.9.1", "old"),
    ],
)
def test_another_version_is_a_line_with_the_command(
    package: str,
    found: str,
    age: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pretend_version(monkeypatch, tmp_path, package, found)
    warn_of_versions()
    (line,) = caplog.messages
    assert line.startswith(
        f'{package} {found} is too {age} for treepo-trl 0.1.0, and may fail: run `pip install "{package}'
    )


def test_the_import_says_it_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "transformers-99.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 99.0\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import treepo_trl; print(treepo_trl.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "0.1.0\n"
    assert len(done.stderr.splitlines()) == 1
    assert "transformers 99.0 is too new" in done.stderr


def test_hub_kernels_are_for_whoever_asks() -> None:
    code = "import os, treepo_trl; print(os.environ['USE_HUB_KERNELS'])"
    for given, expected in ({}, "NO"), ({"USE_HUB_KERNELS": "YES"}, "YES"):
        environment = {"PATH": "", **given}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        assert done.stdout == f"{expected}\n"


@pytest.mark.parametrize("name", _NOISE)
def test_the_line_is_left_out_and_others_are_not(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(name)
    filters = list(logger.filters)
    logger.addHandler(caplog.handler)  # those of transformers go to no other logger
    logger.propagate = False
    quiet_terminal()
    try:
        logger.warning(f"%s: {_NOISE[name]} (%s)", "before", "after")
        logger.warning("another line")
    finally:
        logger.filters[:] = filters
        logger.removeHandler(caplog.handler)
        logger.propagate = True
    assert caplog.messages == ["another line"]
