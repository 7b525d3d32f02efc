"""What bash completes: asked of bash itself, with no program in reach that TAB could start."""

import shutil
import subprocess
from pathlib import Path

import pytest

from treepo_trl.apps.completion.command import completion_script
from treepo_trl.cli import COMMANDS


BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="there is no bash")

# What bash does for TAB: it sets the words of the line, calls the function of the command, and reads COMPREPLY.
_ASK = """
source script
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
$(complete -p treepo-trl | { read -r line; line=${line#* -F }; echo "${line% treepo-trl}"; }) treepo-trl "${!#}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the script and two files."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "script").write_text(completion_script("bash"))
    (folder / "recipe.yaml").touch()
    (folder / "other.yaml").touch()
    return folder


def completed(folder: Path, *words: str) -> set[str]:
    """What bash offers for the last of the words after `treepo-trl`."""
    command = [str(BASH), "--norc", "-c", _ASK, "ask", "treepo-trl", *words]
    done = subprocess.run(
        command, cwd=folder, env={"PATH": "/nowhere"}, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ([""], set(COMMANDS)),
        (["e"], {"eval", "export"}),
        (["train", "--segment_l"], {"--segment_length"}),
        (["sample", "--vllm_q"], {"--vllm_quantization"}),
        (["sample", "--engine", ""], {"auto", "vllm", "transformers"}),
        (["sample", "--resume", "t"], {"true"}),
        (["doctor", "--js"], {"--json"}),
        (["doctor", "--card"], {"--card_gib"}),
        (["train", "--config", "re"], {"recipe.yaml"}),
        (["view", "oth"], {"other.yaml"}),
        (["quickstart", "--stock"], {"--stock_grpo"}),
        (["completion", ""], {"bash", "zsh"}),
        (["--de"], {"--debug"}),
    ],
    ids=" ".join,
)
def test_what_tab_offers(folder: Path, words: list[str], offered: set[str]) -> None:
    assert completed(folder, *words) == offered


def test_zsh_gets_a_script_of_its_own() -> None:
    script = completion_script("zsh")
    assert script.startswith("#compdef treepo-trl")
    assert "--segment_length" in script
    if zsh := shutil.which("zsh"):
        subprocess.run([zsh, "-n"], input=script, text=True, timeout=60, check=True)
