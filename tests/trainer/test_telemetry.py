"""What TRL sends when a trainer is built is what docs/licences-and-telemetry.md says, and can be switched off."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry as hub
from trl.trainer import base_trainer

from treepo_trl import TreePOTrainer


def built_trainer() -> TreePOTrainer:
    """A trainer that has what TRL looks at for its ping, and nothing else."""
    trainer = TreePOTrainer.__new__(TreePOTrainer)
    device = torch.device("cpu")
    trainer.accelerator = SimpleNamespace(is_main_process=True, num_processes=1, device=device)
    trainer.is_deepspeed_enabled = trainer.is_fsdp_enabled = False
    trainer.train_dataset = Dataset.from_dict({"prompt": ["a secret"]})
    trainer.model = torch.nn.Module()
    trainer.model.config = SimpleNamespace(model_type="my-secret-model")
    return trainer


def test_the_ping_names_neither_model_nor_data(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda **ping: sent.append(ping))
    built_trainer()._send_telemetry()
    (ping,) = sent
    assert (ping["topic"], ping["library_name"]) == ("trl/other", "trl")
    assert ping["user_agent"] == {
        "model_arch": "other",
        "peft": "false",
        "dataset_source": "memory",
        "distributed": "none",
        "world_size": "1",
        "device": "cpu",
        "gpu": "other",
    }


@pytest.mark.parametrize("is_off", [False, True])
def test_the_variable_switches_it_off(monkeypatch: pytest.MonkeyPatch, is_off: bool) -> None:
    queued = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", is_off)
    monkeypatch.setattr(hub, "_start_telemetry_thread", lambda: None)
    monkeypatch.setattr(hub, "_TELEMETRY_QUEUE", SimpleNamespace(put=queued.append))
    built_trainer()._send_telemetry()
    assert len(queued) == (0 if is_off else 1)
