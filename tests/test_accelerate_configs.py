"""The files of `examples/accelerate_configs` as `accelerate launch` reads them; starting them takes cards."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.support.paths import ROOT


FOLDER = ROOT / "examples/accelerate_configs"


def launched(name: str) -> Any:
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / name), "train.py"])
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_line_is_an_option_of_accelerate_launch(path: Path) -> None:
    given, read = yaml.safe_load(path.read_text()), vars(launched(path.name))
    for options in (given.get("fsdp_config", {}), given.get("deepspeed_config", {})):
        assert {name: read[name] for name in options} == options
    assert (read["num_processes"], read["mixed_precision"]) == (8, "bf16")


def test_fsdp2_gathers_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first version is refused, and what is given is what accelerate's plugin takes."""
    arguments = launched("fsdp2.yaml")
    assert (arguments.use_fsdp, arguments.multi_gpu, arguments.use_deepspeed) == (True, False, False)
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)


def test_the_others_start_what_their_names_say() -> None:
    ddp, zero = launched("ddp.yaml"), launched("zero3.yaml")
    assert (ddp.use_fsdp, ddp.multi_gpu, ddp.use_deepspeed) == (False, True, False)
    assert (zero.use_fsdp, zero.multi_gpu, zero.use_deepspeed) == (False, False, True)
    assert zero.zero_stage == 3
