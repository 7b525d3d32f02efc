"""The files in examples/servers: one set of flags for all servers, and trainings whose options the parsers take."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.command_lines import check_command
from tests.support.paths import ROOT


FOLDER = ROOT / "examples/servers"
OF_A_PROCESSOR = {"--dtype", "--max-model-len", "--max-num-seqs", "--enforce-eager", "--block-size"}
OF_A_PLACE = {"--host", "--port", "--model"}


def services(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())["services"]


def flags_of(text: str) -> dict[str, str]:
    """Flags and their values."""
    found = re.findall(r"(--[a-z][\w-]*)(?: ([\w.]+))?", text)
    return {name: value for name, value in found if name not in OF_A_PLACE}


@pytest.mark.parametrize("name", ["serve_cpu.sh", "compose.cards.yaml"])
def test_all_servers_start_with_the_same_flags(name: str) -> None:
    expected = flags_of((FOLDER / "serve.sh").read_text().split("exec ")[1])
    assert {"--enable-scale-out", "--enable-lora", "--max-loras"} <= set(expected)
    if name.endswith(".sh"):
        found = flags_of((FOLDER / name).read_text().split("exec ")[1])
        assert {flag for flag in found if flag in OF_A_PROCESSOR} == OF_A_PROCESSOR
        found = {flag: value for flag, value in found.items() if flag not in OF_A_PROCESSOR}
        assert found == expected
    for service in services(name).values() if name.endswith(".yaml") else []:
        if "entrypoint" not in service:  # that of vLLM's image
            assert flags_of(service["command"]) == expected


def test_the_training_in_containers_is_one_on_its_servers() -> None:
    found = services("compose.yaml")
    command = shlex.split(found["trainer"]["command"])
    check_command(["treepo-trl", *command])  # the entry point of the Dockerfile
    options = dict(zip(command[1::2], command[2::2], strict=True))
    urls = options["--vllm_server_base_url"].split(",")
    assert [re.findall(r"//([\w-]+):8000", url) for url in urls] == [["server-0"], ["server-1"]]
    for name in ("server-0", "server-1"):
        shell, script = found[name]["entrypoint"]
        assert shell == "bash"
        assert Path(script.replace("/opt/treepo-trl", str(ROOT))).is_file()  # where the Dockerfile has the checkout
    assert "WORKDIR /opt/treepo-trl\nCOPY . ." in (ROOT / "Dockerfile").read_text()
    mounts = {str(service["volumes"]) for service in found.values()}
    assert mounts == {"['workspace:/workspace']"}
    for option in ("--vllm_server_adapter_dir", "--output_dir"):
        assert options[option].startswith("/workspace/")


def test_the_training_on_cards_takes_its_options() -> None:
    (line,) = services("compose.cards.yaml")["trainer"]["command"]
    command = line.split("&& ")[1].replace("${MODEL:-", "").replace("}", "")
    check_command(shlex.split(command))
