"""The names that `treepo_trl.quickstart` offers, loaded on first use."""

import subprocess
import sys

import pytest

from treepo_trl import quickstart
from treepo_trl.cli import main


def test_every_name_is_found() -> None:
    assert all(callable(getattr(quickstart, name)) or name.isupper() for name in quickstart.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'smal_model'"):
        quickstart.smal_model  # noqa: B018


def test_the_small_model_needs_no_library_of_the_tasks() -> None:
    code = (
        "import sys; from treepo_trl.quickstart import small_model; print({'datasets', 'evaluate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("package", ["evaluate", "reasoning_gym", "peft"])
def test_without_its_extra_the_command_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("treepo_trl.commands.quickstart", "treepo_trl.quickstart.accuracy"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(SystemExit, match=rf'error: The quickstart needs {package}: run `pip install "treepo-trl'):
        main(["quickstart", "--use_cpu", "true", "--bf16", "false"])
