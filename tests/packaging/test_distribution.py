"""Wheel and sdist: built without a network, complete, and readable on a package index."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from treepo_trl import __version__


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, built from the sdist, and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def metadata(built: tuple[Path, Path]) -> Message:
    with zipfile.ZipFile(built[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(wheel.read(name).decode())


def test_the_index_takes_them(built: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def test_the_wheel_holds_the_package_with_its_data(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = [path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert held == {path.relative_to(ROOT / "src").as_posix() for path in files}
    data = {"quickstart/recipe.yaml", "apps/view/page.html", "apps/view/style.css", "apps/view/main.js", "py.typed"}
    assert {f"treepo_trl/{name}" for name in data} <= held


def test_the_sdist_holds_what_setup_and_tests_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {".ci/run", "Makefile", "mkdocs.yml", "pyproject.toml", "LICENSE", "CITATION.cff"}
    for pattern in ("requirements/*.txt", "docs/**/*.md", "tests/**/*.py", "benchmarks/**/*.py", "examples/**/*.yaml"):
        found = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
        assert found, pattern
        needed |= found
    assert needed - held == set()


def test_the_page_of_the_index_has_no_link_into_the_repository(metadata: Message) -> None:
    page = metadata.get_payload()
    assert isinstance(page, str)
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.count("\n## ") == text.count("\n## ")  # nothing but links is gone
    assert len(page.splitlines()) >= len(text.splitlines()) - 5


def test_metadata_says_what_it_is(metadata: Message) -> None:
    assert metadata["Version"] == __version__
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Summary"]
    urls = metadata.get_all("Project-URL") or []
    assert urls
    assert all(", https://" in url for url in urls)
