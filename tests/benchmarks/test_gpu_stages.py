"""Stages of the GPU report whose parts start processes: what they start on how many cards, and what they refuse."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from benchmarks import servers
from benchmarks.common import ProcessFailed
from benchmarks.report.stages import servers as servers_stage
from benchmarks.report.stages import sharded
from tests.support.vllm_servers import VLLMServer
from treepo_trl.apps.doctor.findings import CannotRunError


def see_cards(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)


@pytest.mark.parametrize("cards", [1, 2, 8])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_a_process_for_each_card_and_two_at_most(way: str, cards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    see_cards(monkeypatch, cards)
    module, *options = sharded.launcher(way)
    assert module == "accelerate.commands.launch"
    read = _validate_launch_command(launch_command_parser().parse_args([*options, "train.py"]))[0]
    assert (read.num_processes, read.use_fsdp, read.multi_gpu) == (min(cards, 2), way == "fsdp2", way == "ddp")


def test_what_cannot_be_launched_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    see_cards(monkeypatch, 0)
    assert sharded.launcher("ddp")[0] == "torch.distributed.run"
    for way in ("fsdp2", "zero3"):
        with pytest.raises(CannotRunError, match="on cards alone"):
            sharded.launcher(way)
    see_cards(monkeypatch, 1)
    monkeypatch.setattr(sharded, "find_spec", lambda name: None)
    with pytest.raises(CannotRunError, match="needs the package deepspeed"):
        sharded.launcher("zero3")
    monkeypatch.setattr(sharded, "find_spec", lambda name: name)
    assert sharded.launcher("zero3")[0] == "accelerate.commands.launch"


def test_the_error_of_a_process_is_that_of_the_part(tmp_path: Path) -> None:
    one = ["torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    with pytest.raises(ProcessFailed, match=r"^ValueError: .*tokenizer"):
        sharded.launch(one, ["--model", str(tmp_path)])


def seen(**changes: Any) -> Any:
    return {"seconds": [2.0, 1.0], "gib": 1.0, "losses": [0.0, -0.1], "largest_b": 1e-5, **changes}


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ([seen(losses=[0.1, float("nan")])], "not finite"),
        ([seen(losses=[])], "not finite"),
        ([seen(largest_b=0.0)], "did not move"),
        ([seen(), seen(largest_b=2e-5)], "differs between processes"),
    ],
)
def test_a_training_that_learns_nothing_has_failed(measured: list[Any], message: str) -> None:
    sharded.check_learned([seen(), seen()])
    with pytest.raises(ProcessFailed, match=message):
        sharded.check_learned(measured)


@pytest.mark.parametrize("cards", [0, 1])
def test_two_servers_need_two_cards(cards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    see_cards(monkeypatch, cards)
    with pytest.raises(CannotRunError, match=f"this machine has {cards}"):
        servers_stage.sample(lambda *_: None, "model", "two", [])


def test_servers_have_cards_in_turn_and_flags_of_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    see_cards(monkeypatch, 0)
    assert servers.cards() == [None]
    see_cards(monkeypatch, 2)
    assert servers.cards() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert servers.cards() == ["5", "7"]
    on_processor, on_card = (VLLMServer("model", tmp_path / "log", card=card).command for card in (None, "5"))
    assert {"--enforce-eager", "--block-size"} <= set(on_processor)
    assert not {"--enforce-eager", "--block-size"} & set(on_card)
