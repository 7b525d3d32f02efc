"""vLLM's importance ratio from the update's own forward pass: the same training, with fewer forward passes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.support.trainers import SETTINGS, ReplayTrainer, assert_same_logs, assert_same_run, build, make_config
from treepo_trl import SegmentTree, TreePOTrainer
from treepo_trl.scoring.importance_ratio import ImportanceRatio
from treepo_trl.settings.grpo import CHOICES


SHAPE = {"segment_length": 2, "seed": 10}  # of which some trees lack leaves


class Counting(ReplayTrainer):
    """Counts forward passes of the policy, with gradients and without."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_forwards = {True: 0, False: 0}
        self.use_vllm = self.vllm_importance_sampling_correction = True
        self.policy_engine.gives_logprobs = True
        self.model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.num_forwards[torch.is_grad_enabled()] += 1


@pytest.fixture(scope="module")
def sampled(tiny_model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> list[list[SegmentTree]]:
    """Trees of two batches, of an engine that is not quite the policy."""
    generator = torch.Generator().manual_seed(0)
    trainer = build(TreePOTrainer, tiny_model_dir, make_config(tmp_path_factory.mktemp("sampled"), **SHAPE))
    batches: list[list[SegmentTree]] = []
    sample = trainer.sampler.sample

    def noisy(*args: Any, **kwargs: Any) -> list[SegmentTree]:
        trees = sample(*args, **kwargs)
        for node in (node for tree in trees for node in tree.nodes):
            noise = 0.5 * torch.randn(len(node.token_ids), generator=generator)
            node.logprobs = tuple((torch.tensor(node.logprobs) + noise).tolist())
        batches.append(trees)
        return trees

    trainer.sampler.sample = noisy
    trainer.train()
    assert any(len(tree.leaves) < SETTINGS["num_generations"] for trees in batches for tree in trees)
    return batches


def run(
    folder: Path,
    model: str,
    batches: list[list[SegmentTree]],
    once_more: bool,
    lora: float | None = None,
    **changes: Any,
) -> Any:
    """A training on recorded trees, with TRL's additional forward pass or without."""
    adapter = None if lora is None else LoraConfig(r=4, target_modules="all-linear", lora_dropout=lora)
    config = make_config(folder, **{"learning_rate": 0.1, **SHAPE, **changes})
    trainer = build(Counting, model, config, peft_config=adapter)
    trainer.recorded = list(batches)
    with pytest.MonkeyPatch.context() as patch:
        if once_more:
            patch.setattr(ImportanceRatio, "comes_from_the_update", False)
        trainer.train()
    return trainer


MODES = [{"vllm_importance_sampling_mode": mode} for mode in CHOICES["vllm_importance_sampling_mode"]]
LOSSES = [{"loss_type": loss, "beta": 0.1} for loss in CHOICES["loss_type"]]
BOUNDS = [
    {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.8},
    {"vllm_importance_sampling_clip_min": 0.8, "vllm_importance_sampling_clip_max": None},
    {"off_policy_mask_threshold": 0.05},
    {"importance_sampling_level": "sequence"},
    {"mask_truncated_completions": True},
    {"tree_packing": "off"},
    {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
]


@pytest.mark.parametrize(
    "changes", [*MODES, *LOSSES, *BOUNDS], ids=lambda changes: "-".join(map(str, changes.values()))
)
def test_the_training_is_the_same(
    tmp_path: Path, tiny_model_dir: str, sampled: list[list[SegmentTree]], changes: dict[str, Any]
) -> None:
    """Loss, gradient and all that is logged, those of the ratio included."""
    once_more, folded = (run(tmp_path, tiny_model_dir, sampled, each, **changes) for each in (True, False))
    assert_same_run(once_more, folded, parameter_tolerance=1e-6)
    assert_same_logs(once_more, folded)
    assert "sampling/importance_sampling_ratio/min" in folded.state.log_history[0]
    assert folded.num_forwards[True] == once_more.num_forwards[True]
    assert folded.num_forwards[False] < once_more.num_forwards[False]


@pytest.mark.parametrize("micro_batch", [2, 4, 8])
def test_one_forward_pass_per_micro_batch(
    tmp_path: Path, tiny_model_dir: str, sampled: list[list[SegmentTree]], micro_batch: int
) -> None:
    changes = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": 8 // micro_batch}
    once_more, folded = (
        run(tmp_path, tiny_model_dir, sampled, each, tree_packing="off", **changes) for each in (True, False)
    )
    assert folded.num_forwards == {True: 2 * 8 // micro_batch, False: 0}
    assert once_more.num_forwards[False] > 0
    assert_same_run(once_more, folded, parameter_tolerance=1e-5)


def test_dropout_is_that_of_the_update(tmp_path: Path, tiny_model_dir: str, sampled: list[list[SegmentTree]]) -> None:
    """With dropout another pass would compare vLLM with another model than the one that is updated."""
    trainer = run(tmp_path, tiny_model_dir, sampled, False, lora=0.5, tree_packing="off")
    assert trainer.num_forwards == {True: 2, False: 0}
    assert trainer.state.log_history[0]["clip_ratio/region_mean"] == 0


def test_a_batch_of_several_steps_is_compared_before_the_first(
    tmp_path: Path, tiny_model_dir: str, sampled: list[list[SegmentTree]]
) -> None:
    """Its later steps have another policy, so the old log-probabilities are computed as TRL does."""
    trainer = run(tmp_path, tiny_model_dir, sampled, False, num_iterations=2, max_steps=2)
    assert trainer.num_forwards[False] > 0


def test_an_engine_that_is_not_the_policy_stops_the_training_before_it_steps(
    tmp_path: Path, tiny_model_dir: str, sampled: list[list[SegmentTree]]
) -> None:
    trainer = build(
        Counting, tiny_model_dir, make_config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    )
    trainer.recorded = list(sampled)
    seen: list[int] = []

    def compare(batch: dict[str, torch.Tensor]) -> dict[str, float]:
        if "old_per_token_logps" not in batch:
            return {}
        seen.append(len(batch["old_per_token_logps"]))
        raise RuntimeError("not the policy")

    trainer.policy_engine.compare = compare
    with pytest.raises(RuntimeError, match="not the policy"):
        trainer.train()
    assert seen == [8]  # all rows at once, with the last micro-batch
    assert trainer.state.global_step == 0
