"""Trainings with dynamic sampling: what is sampled, scored, trained on and logged."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from tests.support.models import make_reward_model, make_tokenizer
from tests.support.trainers import (
    RecordingTrainer,
    assert_same_logs,
    assert_same_run,
    build,
    change,
    chat_prompts,
    labelled,
    logs_of,
    make_config,
    reward_by_kind,
    tables_of,
    train,
    trained,
)
from treepo_trl import SegmentTree, TreePOTrainer


def test_prompts_without_signal_never_reach_the_update(tmp_path: Path, tiny_model_dir: str) -> None:
    kinds = "cvnvccvvcvnv"
    trainer = train(tmp_path, tiny_model_dir, kinds, max_steps=4)
    varied = {f"w{i}" for i, kind in enumerate(kinds) if kind == "v"}
    assert len(trainer.updated) == 4
    for prompts, advantages in trainer.updated:
        assert Counter(Counter(prompts).values()) == {4: 2}  # the batch is full: two whole trees
        assert set(prompts) <= varied
        assert advantages.abs().max() > 0
    # Every prompt of the first pass is sampled once before any is sampled again.
    drawn = [prompt for prompts in trainer.sampled for prompt in prompts]
    assert len(drawn) >= len(kinds)
    assert sorted(drawn[: len(kinds)]) == sorted(f"w{i}" for i in range(len(kinds)))
    # What the pass has of varied prompts is trained on, none left out.
    updated = {prompt for prompts, _ in trainer.updated for prompt in prompts}
    assert updated == {prompt for prompt in drawn if prompt in varied}


def test_metrics_of_dynamic_sampling(tmp_path: Path, tiny_model_dir: str) -> None:
    """Batches of two in the dataset's order: v c, then v for the c; c c, then c v, then v."""
    trainer = train(tmp_path, tiny_model_dir, "vcvcccvv", max_steps=2, shuffle_dataset=False, log_trees=True)
    assert trainer.sampled == [["w0", "w1"], ["w2"], ["w3", "w4"], ["w5", "w6"], ["w7"]]
    assert [sorted(set(prompts)) for prompts, _ in trainer.updated] == [["w0", "w2"], ["w6", "w7"]]
    assert logs_of(trainer, "dynamic_sampling/rounds") == [1, 2]
    assert logs_of(trainer, "dynamic_sampling/replaced_prompts") == [1, 3]
    assert logs_of(trainer, "dynamic_sampling/frac_without_signal") == [0, 0]
    # w0 and w2 have a mean of 1/2, w1 of 1/4; two of 1/2 and three of 1/4.
    assert logs_of(trainer, "dynamic_sampling/reward") == pytest.approx([1.25 / 3, 1.75 / 5])
    assert logs_of(trainer, "reward") == [0.5, 0.5]
    files = sorted((tmp_path / "trees").iterdir())
    trees = [
        [SegmentTree.from_dict(r["tree"]) for r in map(json.loads, file.read_text().splitlines())] for file in files
    ]
    for kept, unique, discarded in zip(
        trees,
        logs_of(trainer, "tree/unique_tokens"),
        logs_of(trainer, "dynamic_sampling/discarded_tokens"),
        strict=True,
    ):
        assert len(kept) == 2
        assert sum(tree.num_unique_tokens for tree in kept) + discarded == unique
        assert discarded > 0
    # GRPOTrainer's own count of tokens is that of the batches that it trains on.
    completions = sum(tree.num_leaf_tokens for step in trees for tree in step)
    assert logs_of(trainer, "num_tokens")[-1] == completions + 2 * 8  # a prompt has one token


def test_a_batch_that_stays_without_signal_moves_nothing(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = train(tmp_path, tiny_model_dir, "ccnc", max_steps=2, dynamic_sampling_rounds=2)
    assert change(trainer) == 0
    assert [len(prompts) for prompts in trainer.sampled] == [2, 2, 2] * 2
    assert logs_of(trainer, "dynamic_sampling/frac_without_signal") == [1, 1]
    # Rounds branch differently, as steps do.
    assert [told["seed"] for told in trainer.told] == [
        f"7/{step}/0/0{round}" for step in (0, 1) for round in ("", "/1", "/2")
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_iterations": 2, "max_steps": 4},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "advantage_estimator": "treepo_segment"},
        {"per_device_train_batch_size": 4, "steps_per_generation": 2, "shuffle_dataset": False, "max_steps": 4},
    ],
    ids="-".join,
)
def test_with_nothing_to_replace_it_is_the_run_without(
    tmp_path: Path, tiny_model_dir: str, changes: dict[str, Any]
) -> None:
    """Also what is logged is logged once, for the same completions."""
    runs = []
    for rounds in (0, 3):
        settings = {"max_steps": 3, "dynamic_sampling_rounds": rounds, "log_trees": True, "log_completions": True}
        settings["fallback_policy"] = "root"  # a tree of one leaf would be replaced
        config = make_config(tmp_path / str(rounds), **{**settings, **changes})
        runs.append(trained(RecordingTrainer, tiny_model_dir, config))
    without, dynamic = runs
    assert dynamic.sampled == without.sampled
    assert_same_run(without, dynamic)
    assert_same_logs(without, dynamic, "dynamic_sampling/")
    for a, b in zip(tables_of(tmp_path / "0"), tables_of(tmp_path / "3"), strict=True):
        pd.testing.assert_frame_equal(a, b, atol=1e-4)
    trees = [sorted((tmp_path / str(rounds) / "trees").iterdir()) for rounds in (0, 3)]
    assert [file.name for file in trees[0]] == [file.name for file in trees[1]]
    counts = [[len(file.read_text().splitlines()) for file in files] for files in trees]
    assert counts[0] == counts[1]


def test_several_rewards_none_and_logged_columns(tmp_path: Path, tiny_model_dir: str) -> None:
    """What reward functions log belongs to the completions that are kept; each completion is scored once."""

    def first(
        completion_ids: list[list[int]], kind: list[str], prompts: list[str], log_extra: Any, log_metric: Any, **_: Any
    ) -> list[float | None]:
        log_extra("from", [f"{prompt}/{i % 4}" for i, prompt in enumerate(prompts)])
        if "c" not in kind:
            log_extra("sometimes", list(kind))
        log_metric("seen", float(len(prompts)))
        return [None if k == "n" else 1.0 for k in kind]

    rewards = [first, reward_by_kind]
    changes = {"max_steps": 1, "shuffle_dataset": False, "log_completions": True}
    trainer = train(tmp_path, tiny_model_dir, "cvnvv", rewards, **changes)
    assert trainer.sampled == [["w0", "w1"], ["w2"], ["w3"]]
    (table,) = tables_of(tmp_path)
    assert table["from"].tolist() == [f"{prompt}/{i}" for prompt in ("w3", "w1") for i in range(4)]
    assert table["sometimes"].fillna("").tolist() == ["v"] * 4 + [""] * 4
    assert table["prompt"].tolist() == ["w3"] * 4 + ["w1"] * 4
    assert table["reward_by_kind"].tolist() == [0.0, 1.0] * 4
    assert logs_of(trainer, "seen") == pytest.approx([(8 + 4 + 4) / 3])
    assert logs_of(trainer, "rewards/first/mean") == [1.0]


def test_a_reward_function_may_change_what_it_is_given(tmp_path: Path, tiny_model_dir: str) -> None:
    """Each completion has rows of its own: a judge that appends to the conversation does not meet its own words."""

    def judge(prompts: list[list[dict]], completions: list[list[dict]], notes: list[list[str]], **_: Any) -> list:
        for prompt, completion, note in zip(prompts, completions, notes, strict=True):
            prompt += completion
            note.append("seen")
        return [float(len(p) + len(n)) for p, n in zip(prompts, notes, strict=True)]

    dataset = chat_prompts(8).add_column("notes", [["a"]] * 8)
    changes = {"max_steps": 1, "dynamic_sampling_rounds": 1, "log_completions": True}
    trainer = train(tmp_path, tiny_model_dir, dataset, judge, **changes)
    assert [len(prompts) for prompts in trainer.sampled] == [2, 2]  # all rewards are 2 + 2: no signal
    assert logs_of(trainer, "dynamic_sampling/reward") == [4.0]
    (table,) = tables_of(tmp_path)
    assert [len(prompt) for prompt in table["prompt"]] == [1] * 8


def test_async_and_model_rewards_with_chat_prompts_and_lora(tmp_path: Path, tiny_model_dir: str) -> None:
    """A reward model differs between completions, so every prompt has a signal until it is weighted with 0."""
    reward_model = make_reward_model()

    async def constant(completions: list, **_: Any) -> list[float]:
        return [1.0] * len(completions)

    sampled = []
    for weight in (1.0, 0.0):
        settings = {"fallback_policy": "root", "reward_weights": [1.0, weight]}
        config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=1, **settings)
        trainer = trained(
            RecordingTrainer,
            tiny_model_dir,
            config,
            train_dataset=chat_prompts(8),
            reward_funcs=[constant, reward_model],
            reward_processing_classes=[None, make_tokenizer()],
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
        sampled.append([len(prompts) for prompts in trainer.sampled])
    assert sampled == [[2], [2, 2]]


def test_unused_columns_are_removed_as_trl_does(tmp_path: Path, tiny_model_dir: str) -> None:
    """The other tests read the column `kind`, which TRL keeps unless it is told otherwise."""

    def spy(prompts: list[str], **kwargs: Any) -> list[float]:
        assert "kind" not in kwargs
        return [float(i % 2) for i in range(len(prompts))]

    train(tmp_path, tiny_model_dir, "vvvv", spy, max_steps=1, remove_unused_columns=True)


def test_examples_may_hold_tensors(tmp_path: Path, tiny_model_dir: str) -> None:
    def reward(numbers: list[torch.Tensor], log_extra: Any, **_: Any) -> list[float]:
        assert all(isinstance(n, torch.Tensor) for n in numbers)
        log_extra("sum", [n.sum().item() for n in numbers])
        return [float(n.sum()) * (i % 2) for i, n in enumerate(numbers)]

    rows_with_numbers = [{"prompt": f"w{i}", "numbers": [0, 0] if i < 3 else [i, i]} for i in range(6)]
    dataset = Dataset.from_list(rows_with_numbers).with_format("torch")
    changes = {"max_steps": 1, "shuffle_dataset": False, "log_completions": True}
    trainer = train(tmp_path, tiny_model_dir, dataset, reward, **changes)
    assert trainer.sampled == [["w0", "w1"], ["w2", "w3"], ["w4"]]
    (table,) = tables_of(tmp_path)
    assert table["sum"].tolist() == [8] * 4 + [6] * 4


def test_an_iterable_dataset_is_read_once(tmp_path: Path, tiny_model_dir: str) -> None:
    """A source that gives each prompt once loses none to the data loader."""
    source = iter([f"w{i}" for i in range(20)])

    def generate() -> Iterator[dict[str, str]]:
        yield from ({"prompt": prompt, "kind": "v"} for prompt in source)

    def train_on_source(steps: int) -> Any:
        dataset = IterableDataset.from_generator(generate)
        return train(tmp_path, tiny_model_dir, dataset, max_steps=steps, shuffle_dataset=False)

    assert train_on_source(3).sampled == [["w0", "w1"], ["w2", "w3"], ["w4", "w5"]]
    with pytest.raises(ValueError, match="Pass 2 over the training dataset gave no example"):
        train_on_source(20)


def test_a_failed_batch_leaves_nothing_behind(tmp_path: Path, tiny_model_dir: str) -> None:
    def fails_once(completion_ids: list, log_extra: Any, **_: Any) -> list[float]:
        log_extra("column", ["fine" if failed else "failed"] * len(completion_ids))
        if not failed:
            failed.append(True)
            raise RuntimeError("judge is down")
        return [float(i % 2) for i in range(len(completion_ids))]

    failed: list[bool] = []
    settings = {"fallback_policy": "root", "log_completions": True}
    config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=1, **settings)
    trainer = build(RecordingTrainer, tiny_model_dir, config, reward_funcs=fails_once)
    with pytest.raises(RuntimeError, match="judge is down"):
        trainer.train()
    trainer.train()
    assert logs_of(trainer, "dynamic_sampling/discarded_tokens") == [0]
    (table,) = tables_of(tmp_path)
    assert table["column"].tolist() == ["fine"] * 8


def test_evaluation_is_not_touched(tmp_path: Path, tiny_model_dir: str) -> None:
    config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=2, eval_strategy="steps", eval_steps=1)
    arguments = {"train_dataset": labelled("vvvv"), "eval_dataset": labelled("cc"), "reward_funcs": reward_by_kind}
    trainer = trained(RecordingTrainer, tiny_model_dir, config, **arguments)
    assert logs_of(trainer, "eval_reward") == [0.25]
    assert not any(key.startswith("eval_dynamic_sampling") for log in trainer.state.log_history for key in log)


def test_an_order_of_its_own_is_refused(tmp_path: Path, tiny_model_dir: str) -> None:
    class Curriculum(TreePOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return super()._get_train_sampler(dataset)

    with pytest.raises(
        ValueError, match=r"`dynamic_sampling_rounds=1` .* `Curriculum` overrides `_get_train_sampler`"
    ):
        build(Curriculum, tiny_model_dir, make_config(tmp_path, dynamic_sampling_rounds=1))
    build(Curriculum, tiny_model_dir, make_config(tmp_path))
