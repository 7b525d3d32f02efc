"""Training samples trees from the current policy."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils.other import is_compiled_module
from peft import LoraConfig

from tests.support.fakes import EOS, FakeEngine, memoryless
from tests.support.models import make_model
from tests.support.trainers import (
    RecordingTrainer,
    SpyTrainer,
    build,
    logs_of,
    make_config,
    parameters_of,
    parity_reward,
    plain_prompts,
    trained,
    watch_loss,
)
from treepo_trl import TreePOTrainer, TreeSampler, TreeSamplingConfig
from treepo_trl.batch.source import _warn_of_short_segments


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_logprobs_are_those_of_the_current_weights(tmp_path: Path, tiny_model_dir: str, kind: str) -> None:
    """No state of older weights is reused: after each of several large steps the engine agrees with a full forward."""
    peft = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3) if kind == "lora" else None
    config = make_config(tmp_path, max_steps=4, learning_rate=1.0, temperature=0.8)
    differences, firsts = [], []

    def check_and_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        assert trainer.model.training
        trainer.model.eval()
        for tree in trainer.all_trees[-1]:
            for leaf in tree.leaves:
                completion = tree.completion_ids(leaf)
                ids = torch.tensor([tree.prompt_ids + completion])
                with torch.no_grad():
                    logits = trainer.model(ids).logits[0, len(tree.prompt_ids) - 1 : -1] / 0.8
                expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
                differences.append((expected - torch.tensor(tree.logprobs(leaf))).abs().max().item())
        firsts.append(trainer.model(torch.tensor([[5, 6, 7]])).logits[0, -1].detach())
        trainer.model.train()
        return parity_reward(completion_ids)

    arguments = {"train_dataset": plain_prompts(2), "reward_funcs": check_and_reward, "peft_config": peft}
    trainer = build(SpyTrainer, tiny_model_dir, config, **arguments)
    trainer.train()
    assert len(firsts) == 4
    assert max(differences) < 1e-4
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(firsts)), "the policy moved"


def test_dropout_checkpointing_and_states_of_the_engine_are_never_there_together(tmp_path: Path) -> None:
    trainer = build(
        TreePOTrainer, make_model(attention_dropout=0.5), make_config(tmp_path, gradient_checkpointing=True)
    )

    engine = trainer.sampler.engine

    def state_of(model: Any) -> tuple[bool, bool, bool, str]:
        has_states = engine._storage is not None or engine._blocks.num_tokens > 0
        return model.training, model.is_gradient_checkpointing, has_states, model.config._attn_implementation

    in_engine, in_loss = [], []
    collect = engine.collect

    def watched_collect() -> Any:
        results = collect()
        in_engine.append(state_of(trainer.model))
        return results

    engine.collect = watched_collect
    watch_loss(trainer, lambda model, inputs: in_loss.append(state_of(model)))
    trainer.train()
    assert {state[:3] for state in in_engine} == {(False, False, True)}
    assert in_loss == [(True, True, False, "sdpa")] * 2


def test_model_is_back_in_train_mode_after_a_failed_sampling(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = build(RecordingTrainer, tiny_model_dir, make_config(tmp_path))
    engine = trainer.sampler.engine
    collect = engine.collect

    def fail() -> Any:
        raise RuntimeError("engine failure")

    engine.collect = fail
    with pytest.raises(RuntimeError, match="engine failure"):
        trainer.train()
    assert trainer.model.training
    engine.collect = collect
    trainer.train()
    assert trainer.state.global_step == 2


def test_same_seed_same_run(tmp_path: Path, tiny_model_dir: str) -> None:
    runs = []
    for seed in (7, 7, 8):
        trainer = trained(RecordingTrainer, tiny_model_dir, make_config(tmp_path, seed=seed))
        runs.append([tree.to_dict() for trees in trainer.all_trees for tree in trees])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_steps_of_a_run_branch_differently(tmp_path: Path, tiny_model_dir: str) -> None:
    """The sampler's seed is a new one for each generation, also within one optimizer step."""
    config = make_config(tmp_path, gradient_accumulation_steps=2, steps_per_generation=1)
    trainer = trained(RecordingTrainer, tiny_model_dir, config)
    assert [told["seed"] for told in trainer.told] == ["7/0/0/0", "7/0/1/0", "7/1/0/0", "7/1/1/0"]


def test_the_sampler_knows_the_progress_and_the_last_batchs_mean_length(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = trained(RecordingTrainer, tiny_model_dir, make_config(tmp_path, max_steps=4))
    assert [told["progress"] for told in trainer.told] == [0.0, 0.25, 0.5, 0.75]
    assert trainer.told[0]["expected_length"] is None  # nothing is known yet: the cap
    logged = logs_of(trainer, "tree/mean_length")
    for told, trees, value in zip(trainer.told[1:], trainer.all_trees, logged, strict=False):
        lengths = [
            sum(w * tree.nodes[leaf].end for w, leaf in zip(tree.leaf_weights(), tree.leaves, strict=True))
            for tree in trees
        ]
        assert value == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)
        assert told["expected_length"] == pytest.approx(value, abs=0.51)


def test_branching_by_entropy_trains(tmp_path: Path, tiny_model_dir: str) -> None:
    args = make_config(tmp_path, branching_policy="entropy", branching_temperature=0.2, branching_temperature_end=1.0)
    trainer = trained(RecordingTrainer, tiny_model_dir, args)
    nodes = [node for trees in trainer.all_trees for tree in trees for node in tree.nodes]
    assert nodes
    # A uniform distribution over the 65 tokens has the largest entropy.
    assert all(node.entropy is not None and 0 < node.entropy <= math.log(65) + 1e-4 for node in nodes)
    assert len({node.entropy for node in nodes}) > len(nodes) // 2


@pytest.mark.parametrize(("block_size", "is_told"), [(None, False), (4, False), (5, True), (9, True), (10, False)])
def test_segments_below_a_block_of_the_engines_cache_are_warned_about(
    block_size: int | None, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    PartialState()
    config = TreeSamplingConfig(num_generations=4, max_completion_length=20, segment_length=4, stop_repetition=False)
    _warn_of_short_segments(TreeSampler(FakeEngine(memoryless(0.0), block_size=block_size), config, [EOS]))
    assert ("shorter than a block of the engine's cache" in caplog.text) == is_told


def test_a_compiled_model_is_not_sampled_with(tmp_path: Path) -> None:
    """Each number of rows and tokens would be compiled anew: minutes for a step."""
    sampled_with: list[bool] = []
    config = make_config(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=2)
    trainer = build(TreePOTrainer, make_model(), config)
    sample = trainer.sampler.sample

    def watched(*args: Any, **kwargs: Any) -> Any:
        sampled_with.append(is_compiled_module(trainer.policy_engine.engine.model))
        return sample(*args, **kwargs)

    trainer.sampler.sample = watched
    trainer.train()
    assert is_compiled_module(trainer.model_wrapped)
    assert sampled_with == [False, False]
    assert all(torch.isfinite(parameter).all() for parameter in parameters_of(trainer).values())
