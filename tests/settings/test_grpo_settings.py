"""The page about TRL's settings: each field of `GRPOConfig` stands in one group, and its group is right."""

import re
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from accelerate import ParallelismConfig
from trl import GRPOConfig

from tests.support.models import make_model
from tests.support.paths import ROOT
from tests.support.trainers import build, make_config, parameters_of, plain_prompts
from treepo_trl import TreePOTrainer


PAGE = (ROOT / "docs" / "grpo-settings.md").read_text(encoding="utf-8")
FIELDS = {field.name for field in fields(GRPOConfig)}
# Newer names of `gradient_checkpointing` and its arguments, which follow them.
OF_NEWER_TRANSFORMERS = {"activation_checkpointing", "activation_checkpointing_kwargs"}
GROUPS = ("Refused", "Refused in part", "Without effect", "As with GRPOTrainer")


def settings_of(group: str) -> list[str]:
    """The fields in the first cells of a group's tables, or in its lists if it has no table."""
    body = PAGE.split(f"\n## {group}\n")[1].split("\n## ")[0]
    lines = [line.split("|")[1] for line in body.splitlines() if line.startswith("|")]
    lists = [line for line in body.splitlines() if line.startswith("`")]
    return [name for line in lines or lists for name in re.findall(r"`(\w+)`", line)]


def test_every_field_of_trl_is_in_one_group() -> None:
    """A field that TRL adds fails here: find out what becomes of it, and put it into its group."""
    listed = Counter(name for group in GROUPS for name in settings_of(group))
    assert [name for name, count in listed.items() if count > 1] == []
    assert set(listed) >= FIELDS
    assert set(listed) - FIELDS <= OF_NEWER_TRANSFORMERS


REFUSED: dict[str, dict[str, Any]] = {
    "vllm_structured_outputs_regex": {"use_vllm": True, "vllm_structured_outputs_regex": "a+"},
    "use_transformers_continuous_batching": {"use_transformers_continuous_batching": True},
    "use_transformers_paged": {"use_transformers_paged": True},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "parallelism_config": {"parallelism_config": ParallelismConfig(cp_size=2)},
}
REFUSED_IN_PART: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.0},
    "generation_kwargs": {"generation_kwargs": {"num_beams": 2}},
    "vllm_mode": {"use_vllm": True, "vllm_mode": "server", "vllm_enable_sleep_mode": True},
    "num_generations": {"num_generations": 6, "per_device_train_batch_size": 8},
    "mask_truncated_completions": {"mask_truncated_completions": True, "stop_pattern": "a"},
}


def test_refusals_are_those_of_the_page() -> None:
    assert list(REFUSED) == settings_of("Refused")
    assert list(REFUSED_IN_PART) == settings_of("Refused in part")


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_IN_PART])
def test_what_is_called_refused_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treepo_trl.settings.arguments.is_vllm_available", lambda: True)
    with pytest.raises(ValueError, match=name):
        TreePOTrainer(
            "no/model",
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=make_config(tmp_path, **{**REFUSED, **REFUSED_IN_PART}[name]),
            train_dataset=plain_prompts(8),
        )


OTHER_VALUES: dict[str, Any] = {
    "transformers_continuous_batching_config": {"max_memory_percent": 0.1},
    "log_multimodal": False,
    "cache_implementation": "static",
    "vllm_group_port": 51999,
    "dataloader_num_workers": 1,
    "dataloader_prefetch_factor": 3,
    "dataloader_persistent_workers": True,
    "dataloader_pin_memory": False,
}


def test_what_is_called_without_effect_changes_nothing(tmp_path: Path) -> None:
    assert list(OTHER_VALUES) == settings_of("Without effect")

    def trained_with(**changes: Any) -> dict[str, Any]:
        config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=1, **changes)
        trainer = build(TreePOTrainer, make_model(), config)
        trainer.train()
        return parameters_of(trainer)

    plain, changed = trained_with(), trained_with(**OTHER_VALUES)
    assert all(bool((plain[name] == changed[name]).all()) for name in plain)
