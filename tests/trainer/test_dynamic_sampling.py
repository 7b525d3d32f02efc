"""Dynamic sampling: the stream of prompts, what counts as a signal, the rounds, and the trainer with all of it."""

import json
import math
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import Qwen2Config, Qwen2ForSequenceClassification, TrainerCallback
from trl.trainer.utils import RepeatSampler

from tests.support.models import make_tokenizer
from tests.support.processes import run_in_two_processes
from tests.trainer.test_treepo_trainer import (
    assert_same_parameters,
    assert_same_run,
    build,
    logs_of,
    make_config,
    parameters_of,
)
from treepo_trl import SegmentTree, TreePOTrainer
from treepo_trl.dynamic_sampling import Candidate, PromptStream, fill_batch, without_signal


nan = math.nan


def rows(count: int) -> Dataset:
    return Dataset.from_dict({"prompt": [f"w{i}" for i in range(count)]})


def prompts_of(examples: list[dict[str, Any]]) -> list[str]:
    return [example["prompt"] for example in examples]


# The stream


@given(size=st.integers(1, 9), takes=st.lists(st.integers(0, 7), max_size=8), shuffle=st.booleans())
def test_each_pass_holds_each_example_once(size: int, takes: list[int], shuffle: bool) -> None:
    stream = PromptStream(rows(size), shuffle, seed=3)
    drawn = [prompt for count in takes for prompt in prompts_of(stream.take(count))]
    assert len(drawn) == sum(takes)
    for start in range(0, len(drawn), size):
        part = drawn[start : start + size]
        assert max(Counter(part).values()) == 1
        if not shuffle:
            assert part == [f"w{i}" for i in range(len(part))]


@given(size=st.integers(1, 9), before=st.integers(0, 25), after=st.integers(1, 12), shuffle=st.booleans())
def test_a_stream_goes_on_at_its_position(size: int, before: int, after: int, shuffle: bool) -> None:
    stream = PromptStream(rows(size), shuffle, seed=3)
    stream.take(before)
    again = PromptStream(rows(size), shuffle, seed=3, position=stream.position)
    assert again.take(after) == stream.take(after)
    assert again.position == stream.position


def test_the_order_is_trls() -> None:
    """Two passes of GRPOTrainer's sampler, which leaves out what does not fill a batch of 3."""
    theirs = RepeatSampler(rows(9), mini_repeat_count=1, batch_size=3, shuffle=True, seed=5)
    expected = [f"w{i}" for _ in range(2) for i in theirs]
    assert prompts_of(PromptStream(rows(9), shuffle=True, seed=5).take(18)) == expected
    assert expected[:9] != expected[9:]


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_iterable_dataset_streams_too(shuffle: bool) -> None:
    def generate() -> Iterator[dict[str, str]]:
        yield from ({"prompt": f"w{i}"} for i in range(5))

    def stream(position: tuple[int, int] = (0, 0)) -> PromptStream:
        return PromptStream(IterableDataset.from_generator(generate), shuffle, 3, position)

    whole = stream()
    drawn = prompts_of(whole.take(15))
    for start in (0, 5, 10):
        assert sorted(drawn[start : start + 5]) == [f"w{i}" for i in range(5)]
    assert (drawn[:5] != drawn[5:10]) is shuffle
    assert prompts_of(stream((1, 2)).take(4)) == drawn[7:11]


def test_a_dataset_without_examples_is_an_error() -> None:
    empty = IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(ValueError, match="gave no example"):
        PromptStream(empty, shuffle=False, seed=0).take(1)
    stream = PromptStream(rows(2), shuffle=False, seed=0, position=(0, 2))
    assert prompts_of(stream.take(1)) == ["w0"]  # a pass that is used up is none


# Signal

ONE = torch.ones(1)
TWO = torch.tensor([1.0, 0.5])


@pytest.mark.parametrize(
    ("rewards", "weights", "aggregation", "expected"),
    [
        ([[[1], [1], [1]], [[0], [0], [1]]], ONE, "sum_then_normalize", [True, False]),
        ([[[1], [nan], [1]], [[nan], [0], [1]]], ONE, "sum_then_normalize", [True, False]),
        ([[[nan], [nan], [nan]], [[nan], [nan], [7]]], ONE, "sum_then_normalize", [True, True]),
        # 1 x 1 + 0.5 x 0 = 1 x 0 + 0.5 x 2: different rewards with the same sum.
        ([[[1, 0], [0, 2]], [[1, 0], [0, 1]]], TWO, "sum_then_normalize", [True, False]),
        # The sum has no signal, each function by itself has: +1 and -1, weighted 1 and 0.5.
        ([[[1, 0], [0, 2]], [[5, 5], [5, 5]]], TWO, "normalize_then_sum", [False, True]),
        # 0.1 has no exact mean: normalizing it leaves rounding errors, which are not equal.
        ([[[0.1, nan]] * 7 + [[nan, 0.7]]], TWO, "normalize_then_sum", [True]),
        ([[[0.1, nan]] * 7 + [[nan, 0.7]]], TWO, "sum_then_normalize", [False]),
        # A function of weight 0 is only logged.
        ([[[0, 1], [0, 2]]], torch.tensor([1.0, 0.0]), "sum_then_normalize", [True]),
    ],
)
def test_without_signal(rewards: list, weights: torch.Tensor, aggregation: str, expected: list[bool]) -> None:
    table = torch.tensor(rewards, dtype=torch.float32)
    is_without, sums = without_signal(table, weights, aggregation)
    assert is_without.tolist() == expected
    by_hand = (torch.nan_to_num(table) * weights).sum(-1).masked_fill(table.isnan().all(-1), nan)
    torch.testing.assert_close(sums, by_hand, equal_nan=True)


# Rounds


def run_fill(
    num_processes: int, num_local: int, rounds: int, good: set[int], size: int = 40
) -> tuple[list[Any], list[list[tuple[int, list[str]]]]]:
    """
    `fill_batch` on threads that gather from each other. A prompt of `good` has rewards 0 and 1, others 0 and 0.

    Returns each process's batch, and the candidates of its rounds that had no tree.
    """
    barrier = threading.Barrier(num_processes, timeout=10)
    shared: dict[int, list[list[float]]] = {}
    sampled: list[list[tuple[int, list[str]]]] = [[] for _ in range(num_processes)]
    batches: list[Any] = [None] * num_processes

    def process(rank: int) -> None:
        def score(candidates: list[Candidate], number: int) -> torch.Tensor:
            missing = [c for c in candidates if c.tree is None]
            sampled[rank].append((number, [c.example["prompt"] for c in missing]))
            for candidate in missing:
                candidate.tree = SegmentTree([int(candidate.example["prompt"][1:])])
            shared[rank] = [[0.0, float(int(c.example["prompt"][1:]) in good)] for c in candidates]
            barrier.wait()
            rewards = torch.tensor([shared[other] for other in range(num_processes)])[..., None]
            barrier.wait()
            return rewards

        stream = PromptStream(rows(size), shuffle=False, seed=0)
        batches[rank] = fill_batch(
            stream,
            num_local,
            rounds,
            score,
            lambda rewards: without_signal(rewards, ONE, "sum_then_normalize"),
            rank,
            num_processes,
        )
        assert stream.position == (0, num_local * num_processes + batches[rank].num_replaced)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(num_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return batches, sampled


def prompts_in(batch: Any) -> list[str]:
    return [candidate.example["prompt"] for candidate in batch.candidates]


def test_rounds_by_hand() -> None:
    """Of w0..w3 only w1 is good; w4 w5 w6 take the other places, w5 of them is good; then w7 and w8, both good."""
    (batch,), (sampled,) = run_fill(1, 4, rounds=3, good={1, 5, 7, 8})
    assert sampled == [(0, ["w0", "w1", "w2", "w3"]), (1, ["w4", "w5", "w6"]), (2, ["w7", "w8"])]
    assert prompts_in(batch) == ["w7", "w1", "w5", "w8"]
    assert batch.rewards.tolist() == [[0.0], [1.0]] * 4
    assert (batch.num_rounds, batch.num_replaced, batch.frac_without_signal) == (2, 5, 0.0)
    assert batch.mean_reward == pytest.approx(4 / 18)  # nine prompts were scored, twice each


def test_rounds_end_and_the_batch_stays_full() -> None:
    (batch,), (sampled,) = run_fill(1, 4, rounds=1, good={1})
    assert [number for number, _ in sampled] == [0, 1]
    assert prompts_in(batch) == ["w4", "w1", "w5", "w6"]
    assert (batch.num_rounds, batch.num_replaced, batch.frac_without_signal) == (1, 3, 0.75)


def test_nothing_to_replace_is_one_sampling() -> None:
    (batch,), (sampled,) = run_fill(1, 3, rounds=5, good={0, 1, 2})
    assert sampled == [(0, ["w0", "w1", "w2"])]
    assert (batch.num_rounds, batch.num_replaced) == (0, 0)


@given(
    num_processes=st.integers(1, 3),
    num_local=st.integers(1, 3),
    rounds=st.integers(0, 3),
    good=st.sets(st.integers(0, 39)),
)
def test_laws_of_the_rounds(num_processes: int, num_local: int, rounds: int, good: set[int]) -> None:
    batches, sampled = run_fill(num_processes, num_local, rounds, good)
    # All processes agree on what is global.
    for batch in batches:
        assert torch.equal(batch.rewards, batches[0].rewards)
        assert (batch.num_rounds, batch.num_replaced) == (batches[0].num_rounds, batches[0].num_replaced)
    # The batch is full, its trees are those of its prompts, and its rewards are in their places.
    kept = [prompt for batch in batches for prompt in prompts_in(batch)]
    assert len(kept) == num_processes * num_local
    numbers = [int(prompt[1:]) for prompt in kept]
    trees = [candidate.tree.prompt_ids for batch in batches for candidate in batch.candidates]
    assert trees == [[number] for number in numbers]
    assert batches[0].rewards.flatten().tolist() == [r for n in numbers for r in (0.0, float(n in good))]
    # Each prompt is sampled once, by one process, and no prompt of the stream is passed over.
    drawn = [prompt for calls in sampled for _, prompts in calls for prompt in prompts]
    assert sorted(drawn, key=lambda p: int(p[1:])) == [f"w{i}" for i in range(len(drawn))]
    # What has no signal is in the batch only if the rounds are used up; what has one is always kept.
    assert {f"w{i}" for i in good} & set(drawn) <= set(kept)
    if not set(numbers) <= good:
        assert batches[0].num_rounds == rounds
    assert batches[0].frac_without_signal == pytest.approx(sum(n not in good for n in numbers) / len(numbers))
    # Every process calls as often.
    assert len({len(calls) for calls in sampled}) == 1


# The trainer


class RecordingTrainer(TreePOTrainer):
    """Keeps which prompts were sampled and which reach the loss, with their advantages."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sampled: list[list[str]] = []
        self.seeds: list[str] = []
        self.updated: list[tuple[list[str], torch.Tensor]] = []
        sample = self.sampler.sample

        def recording_sample(prompts: Any, seed: str, **kwargs: Any) -> Any:
            self.sampled.append([self._tokenizer.decode(ids) for ids in prompts])
            self.seeds.append(seed)
            return sample(prompts, seed, **kwargs)

        self.sampler.sample = recording_sample

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        texts = self._tokenizer.batch_decode(inputs["prompt_ids"], skip_special_tokens=True)
        self.updated.append((texts, inputs["advantages"].clone()))
        return super()._compute_loss(model, inputs)


def labelled(kinds: str) -> Dataset:
    """A prompt for each letter: `v` has different rewards, `c` equal ones, `n` none at all."""
    return Dataset.from_dict({"prompt": [f"w{i}" for i in range(len(kinds))], "kind": list(kinds)})


def reward_by_kind(completion_ids: list[list[int]], kind: list[str], **_: Any) -> list[float | None]:
    values = {"c": lambda i: 0.25, "n": lambda i: None, "v": lambda i: float(i % 2)}
    return [values[k](i) for i, k in enumerate(kind)]


def train(tmp_path: Path, model: str, kinds: str, rewards: Any = reward_by_kind, **changes: Any) -> Any:
    config = make_config(tmp_path, **{"max_steps": 3, "dynamic_sampling_rounds": 4, **changes})
    trainer = build(RecordingTrainer, model, config, train_dataset=labelled(kinds), reward_funcs=rewards)
    trainer.train()
    return trainer


@pytest.mark.parametrize("estimator", ["treepo", "grpo", "leave_one_out"])
def test_prompts_without_signal_never_reach_the_update(tmp_path: Path, tiny_model_dir: str, estimator: str) -> None:
    kinds = "cvnvccvvcvnv"
    trainer = train(tmp_path, tiny_model_dir, kinds, advantage_estimator=estimator, max_steps=4)
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
    config = make_config(tmp_path, max_steps=2, dynamic_sampling_rounds=2)
    trainer = build(
        RecordingTrainer, tiny_model_dir, config, train_dataset=labelled("ccnc"), reward_funcs=reward_by_kind
    )
    before = parameters_of(trainer)
    trainer.train()
    assert_same_parameters(before, parameters_of(trainer), 0.0)
    assert [len(prompts) for prompts in trainer.sampled] == [2, 2, 2] * 2
    assert logs_of(trainer, "dynamic_sampling/frac_without_signal") == [1, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_iterations": 2, "max_steps": 4},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "advantage_estimator": "treepo_segment"},
        {"per_device_train_batch_size": 4, "steps_per_generation": 2, "shuffle_dataset": False, "max_steps": 4},
    ],
    ids=lambda changes: "-".join(changes) or "defaults",
)
def test_with_nothing_to_replace_it_is_the_run_without(
    tmp_path: Path, tiny_model_dir: str, changes: dict[str, Any]
) -> None:
    """Also what is logged is logged once, for the same completions."""
    runs = []
    for rounds in (0, 3):
        config = make_config(
            tmp_path / str(rounds), **{"max_steps": 3, "dynamic_sampling_rounds": rounds, "log_trees": True, **changes}
        )
        runs.append(build(RecordingTrainer, tiny_model_dir, config))
        runs[-1].train()
    without, dynamic = runs
    assert dynamic.sampled == without.sampled
    assert_same_run(without, dynamic)
    for a, b in zip(without.state.log_history, dynamic.state.log_history, strict=True):
        assert {key for key in b if not key.startswith("dynamic_sampling/")} == set(a)
        for key in a:
            if not any(part in key for part in ("seconds", "time", "per_second", "profiling/")):
                assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4, nan_ok=True), key
    assert list(without._logs["completion"]) == list(dynamic._logs["completion"])
    assert list(without._logs["advantages"]) == pytest.approx(list(dynamic._logs["advantages"]), abs=1e-4)
    trees = [sorted((tmp_path / str(rounds) / "trees").iterdir()) for rounds in (0, 3)]
    assert [file.name for file in trees[0]] == [file.name for file in trees[1]]
    counts = [[len(file.read_text().splitlines()) for file in files] for files in trees]
    assert counts[0] == counts[1]


def test_reward_functions_are_called_once_per_completion(tmp_path: Path, tiny_model_dir: str) -> None:
    calls: list[list[str]] = []

    def noisy(completions: list[str], kind: list[str], prompts: list[str], **_: Any) -> list[float]:
        calls.append(list(prompts))
        return [0.25 if k == "c" else torch.rand(()).item() for k in kind]

    trainer = train(tmp_path, tiny_model_dir, "cvvcvvcv", noisy, max_steps=2)
    scored = [prompt for call in calls for prompt in call]
    assert Counter(scored) == {p: 4 for prompts in trainer.sampled for p in prompts}


def test_several_rewards_none_and_logged_columns(tmp_path: Path, tiny_model_dir: str) -> None:
    """Columns and metrics that reward functions log belong to the completions that are kept."""

    def first(
        completion_ids: list[list[int]], kind: list[str], prompts: list[str], log_extra: Any, log_metric: Any, **_: Any
    ) -> list[float | None]:
        log_extra("from", [f"{prompt}/{i % 4}" for i, prompt in enumerate(prompts)])
        if "c" not in kind:
            log_extra("sometimes", list(kind))
        log_metric("seen", float(len(prompts)))
        return [None if k == "n" else 1.0 for k in kind]

    config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=3, shuffle_dataset=False)
    trainer = build(
        RecordingTrainer,
        tiny_model_dir,
        config,
        train_dataset=labelled("cvnvv"),
        reward_funcs=[first, reward_by_kind],
    )
    trainer.train()
    assert trainer.sampled == [["w0", "w1"], ["w2"], ["w3"]]
    extra = trainer._logs["extra"]
    assert list(extra["from"]) == [f"{prompt}/{i}" for prompt in ("w3", "w1") for i in range(4)]
    assert list(extra["sometimes"]) == ["v"] * 4 + [None] * 4
    assert list(trainer._logs["prompt"]) == ["w3"] * 4 + ["w1"] * 4
    assert list(trainer._logs["rewards"]["reward_by_kind"]) == [0.0, 1.0] * 4
    assert logs_of(trainer, "seen") == pytest.approx([(8 + 4 + 4) / 3])
    assert logs_of(trainer, "rewards/first/mean") == [1.0]


def test_a_reward_function_may_change_what_it_is_given(tmp_path: Path, tiny_model_dir: str) -> None:
    """Each completion has rows of its own: a judge that appends to the conversation does not meet its own words."""

    def judge(prompts: list[list[dict]], completions: list[list[dict]], notes: list[list[str]], **_: Any) -> list:
        for prompt, completion, note in zip(prompts, completions, notes, strict=True):
            prompt += completion
            note.append("seen")
        return [float(len(p) + len(n)) for p, n in zip(prompts, notes, strict=True)]

    messages = [[{"role": "user", "content": f"w{i}"}] for i in range(8)]
    config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=1)
    dataset = Dataset.from_list([{"prompt": message, "notes": ["a"]} for message in messages])
    trainer = build(RecordingTrainer, tiny_model_dir, config, train_dataset=dataset, reward_funcs=judge)
    trainer.train()
    assert [len(prompts) for prompts in trainer.sampled] == [2, 2]  # all rewards are 2 + 2: no signal
    assert logs_of(trainer, "dynamic_sampling/reward") == [4.0]
    assert all(len(prompt) == 1 for prompt in trainer._logs["prompt"])


class ShapingTrainer(RecordingTrainer):
    """Squares what the reward functions give."""

    calls = 0

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return super()._calculate_rewards(*args, **kwargs) ** 2 + 1


@pytest.mark.parametrize("estimator", ["grpo", "treepo"])
@pytest.mark.parametrize("rounds", [0, 2])
def test_shaped_rewards_are_shaped_once(tmp_path: Path, tiny_model_dir: str, estimator: str, rounds: int) -> None:
    config = make_config(
        tmp_path,
        max_steps=1,
        dynamic_sampling_rounds=rounds,
        advantage_estimator=estimator,
        branching_factor=1,  # one group: all estimators alike
        scale_rewards="none",
    )

    def zero_or_two(completion_ids: list, **_: Any) -> list[float]:
        return [2.0 * (i % 2) for i in range(len(completion_ids))]

    trainer = build(ShapingTrainer, tiny_model_dir, config, reward_funcs=zero_or_two)
    trainer.train()
    assert trainer.calls == 1
    assert logs_of(trainer, "reward") == [3.0]  # of 1 and 5
    (_, advantages) = trainer.updated[0]
    assert {abs(value) for value in advantages.flatten().tolist() if value} == {2.0}


def test_async_and_model_rewards_with_chat_prompts_and_lora(tmp_path: Path, tiny_model_dir: str) -> None:
    """A reward model differs between completions, so every prompt has a signal until it is weighted with 0."""
    torch.manual_seed(0)
    reward_model = Qwen2ForSequenceClassification(
        Qwen2Config(
            vocab_size=65,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_labels=1,
            pad_token_id=1,
            initializer_range=0.5,
        )
    )

    async def constant(completions: list, **_: Any) -> list[float]:
        return [1.0] * len(completions)

    sampled = []
    for weight in (1.0, 0.0):
        config = make_config(
            tmp_path, max_steps=1, dynamic_sampling_rounds=1, reward_weights=[1.0, weight], log_completions=True
        )
        trainer = build(
            RecordingTrainer,
            tiny_model_dir,
            config,
            train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": f"w{i}"}] for i in range(8)]}),
            reward_funcs=[constant, reward_model],
            reward_processing_classes=[None, make_tokenizer()],
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
        trainer.train()
        sampled.append([len(prompts) for prompts in trainer.sampled])
    assert sampled == [[2], [2, 2]]


@pytest.mark.parametrize(
    ("changes", "sampled"),
    [
        # `w1` and `w3` differ in the second function alone. Of weight 0 it is only logged.
        ({"reward_weights": [1.0, 0.0]}, [["w0", "w1"], ["w2", "w3"]]),
        ({"reward_weights": [1.0, 0.5]}, [["w0", "w1"], ["w2"]]),
        # The functions undo each other in the sum, and do not once each is normalized by its own deviation.
        ({"reward_weights": [0.0, 1.0], "multi_objective_aggregation": "normalize_then_sum"}, [["w0", "w1"], ["w2"]]),
    ],
)
def test_weights_decide_what_is_a_signal(
    tmp_path: Path, tiny_model_dir: str, changes: dict[str, Any], sampled: list[list[str]]
) -> None:
    def constant(kind: list[str], **_: Any) -> list[float]:
        return [1.0] * len(kind)

    config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=1, shuffle_dataset=False, **changes)
    trainer = build(
        RecordingTrainer,
        tiny_model_dir,
        config,
        train_dataset=labelled("cvcv"),
        reward_funcs=[constant, reward_by_kind],
    )
    trainer.train()
    assert trainer.sampled == sampled


def test_aggregation_decides_what_is_a_signal(tmp_path: Path, tiny_model_dir: str) -> None:
    """+1 and -2 of two functions: equal sums with weights 1 and 1/2, and no signal by sum alone."""

    def up(completion_ids: list, **_: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completion_ids))]

    def down(completion_ids: list, **_: Any) -> list[float]:
        return [-2.0 * (i % 2) for i in range(len(completion_ids))]

    rounds = {}
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        config = make_config(
            tmp_path,
            max_steps=1,
            dynamic_sampling_rounds=1,
            multi_objective_aggregation=aggregation,
            reward_weights=[1.0, 0.5],
        )
        trainer = build(RecordingTrainer, tiny_model_dir, config, reward_funcs=[up, down])
        trainer.train()
        rounds[aggregation] = len(trainer.sampled)
    assert rounds == {"sum_then_normalize": 2, "normalize_then_sum": 1}


def test_an_infinite_reward_is_no_signal_and_is_logged(tmp_path: Path, tiny_model_dir: str) -> None:
    def infinite(kind: list[str], **_: Any) -> list[float]:
        return [-math.inf if k == "i" and i % 2 else 0.0 for i, k in enumerate(kind)]

    config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=1)
    trainer = build(RecordingTrainer, tiny_model_dir, config, train_dataset=labelled("iiiiiii"), reward_funcs=infinite)
    before = parameters_of(trainer)
    trainer.train()
    assert len(trainer.sampled) == 2
    assert logs_of(trainer, "dynamic_sampling/frac_without_signal") == [1.0]
    assert -math.inf in trainer._logs["rewards"]["infinite"]
    assert_same_parameters(before, parameters_of(trainer), 0.0)


def test_unused_columns_are_removed_as_trl_does(tmp_path: Path, tiny_model_dir: str) -> None:
    seen: list[set[str]] = []

    def spy(prompts: list[str], **kwargs: Any) -> list[float]:
        seen.append(set(kwargs) & {"kind"})
        return [float(i % 2) for i in range(len(prompts))]

    for remove in (False, True):
        config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=1, remove_unused_columns=remove)
        dataset = labelled("vvvv")
        build(RecordingTrainer, tiny_model_dir, config, train_dataset=dataset, reward_funcs=spy).train()
    assert seen == [{"kind"}, set()]


def test_examples_may_hold_tensors(tmp_path: Path, tiny_model_dir: str) -> None:
    def reward(numbers: list[torch.Tensor], log_extra: Any, **_: Any) -> list[float]:
        assert all(isinstance(n, torch.Tensor) for n in numbers)
        log_extra("sum", [n.sum().item() for n in numbers])
        return [float(n.sum()) * (i % 2) for i, n in enumerate(numbers)]

    rows_with_numbers = [{"prompt": f"w{i}", "numbers": [0, 0] if i < 3 else [i, i]} for i in range(6)]
    dataset = Dataset.from_list(rows_with_numbers).with_format("torch")
    config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=2, shuffle_dataset=False)
    trainer = build(RecordingTrainer, tiny_model_dir, config, train_dataset=dataset, reward_funcs=reward)
    trainer.train()
    assert trainer.sampled == [["w0", "w1"], ["w2", "w3"], ["w4"]]
    assert list(trainer._logs["extra"]["sum"]) == [8] * 4 + [6] * 4


def test_rounds_branch_differently(tmp_path: Path, tiny_model_dir: str) -> None:
    config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=2)
    trainer = build(
        RecordingTrainer, tiny_model_dir, config, train_dataset=labelled("cccccccc"), reward_funcs=reward_by_kind
    )
    trainer.train()
    assert trainer.seeds == ["7/0/0/0", "7/0/0/0/1", "7/0/0/0/2"]


def test_an_iterable_dataset_is_read_once(tmp_path: Path, tiny_model_dir: str) -> None:
    """A source that gives each prompt once loses none to the data loader."""
    source = iter([f"w{i}" for i in range(20)])

    def generate() -> Iterator[dict[str, str]]:
        yield from ({"prompt": prompt, "kind": "v"} for prompt in source)

    def train_on_source(steps: int) -> Any:
        config = make_config(tmp_path, max_steps=steps, dynamic_sampling_rounds=2, shuffle_dataset=False)
        dataset = IterableDataset.from_generator(generate)
        trainer = build(RecordingTrainer, tiny_model_dir, config, train_dataset=dataset, reward_funcs=reward_by_kind)
        trainer.train()
        return trainer

    assert train_on_source(3).sampled == [["w0", "w1"], ["w2", "w3"], ["w4", "w5"]]
    with pytest.raises(ValueError, match="Pass 2 over the training dataset gave no example"):
        train_on_source(20)


def test_a_failed_batch_leaves_nothing_behind(tmp_path: Path, tiny_model_dir: str) -> None:
    def fails_once(completion_ids: list, log_extra: Any, **_: Any) -> list[float]:
        log_extra("column", ["x"] * len(completion_ids))
        if not failed:
            failed.append(True)
            raise RuntimeError("judge is down")
        return [float(i % 2) for i in range(len(completion_ids))]

    failed: list[bool] = []
    config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=1, log_trees=True)
    trainer = build(RecordingTrainer, tiny_model_dir, config, reward_funcs=fails_once)
    with pytest.raises(RuntimeError, match="judge is down"):
        trainer.train()
    trainer.train()
    assert logs_of(trainer, "dynamic_sampling/discarded_tokens") == [0]
    assert len(trainer._logs["extra"]["column"]) == 8


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_a_resumed_training_draws_on(tmp_path: Path, tiny_model_dir: str, kind: str) -> None:
    kinds = "cvvcvcvvccv"

    def make(name: str) -> Any:
        dataset = labelled(kinds)
        config = make_config(
            tmp_path / name, max_steps=4, dynamic_sampling_rounds=4, save_strategy="steps", save_steps=2
        )
        return build(
            RecordingTrainer,
            tiny_model_dir,
            config,
            train_dataset=dataset if kind == "map" else dataset.to_iterable_dataset(),
            reward_funcs=reward_by_kind,
        )

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert len(resumed.sampled) < len(whole.sampled)
    assert whole.sampled[-len(resumed.sampled) :] == resumed.sampled
    assert_same_parameters(parameters_of(whole), parameters_of(resumed), 1e-6)


def test_a_training_resumed_inside_a_batch_samples_it_again(tmp_path: Path, tiny_model_dir: str) -> None:
    def make(name: str) -> Any:
        config = make_config(
            tmp_path / name,
            max_steps=4,
            num_iterations=2,
            dynamic_sampling_rounds=4,
            save_strategy="steps",
            save_steps=1,
        )
        return build(
            RecordingTrainer,
            tiny_model_dir,
            config,
            train_dataset=labelled("cvvcvcvvccvvvv"),
            reward_funcs=reward_by_kind,
        )

    whole = make("whole")
    whole.train()
    starts = [0, next(i for i in range(1, len(whole.sampled)) if len(whole.sampled[i]) == 2)]
    for checkpoint, start in ((1, starts[0]), (2, starts[1]), (3, starts[1])):
        resumed = make(f"resumed{checkpoint}")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{checkpoint}"))
        rest = whole.sampled[start:]
        assert resumed.sampled[: len(rest)] == rest[: len(resumed.sampled)], checkpoint


def test_a_checkpoint_without_position_is_warned_about(
    tmp_path: Path, tiny_model_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    def run(name: str, rounds: int, checkpoint: str | None, **changes: Any) -> Any:
        config = make_config(
            tmp_path / name,
            max_steps=2,
            dynamic_sampling_rounds=rounds,
            save_strategy="steps",
            save_steps=1,
            **changes,
        )
        trainer = build(RecordingTrainer, tiny_model_dir, config)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    plain = run("plain", 0, None)
    checkpoint = str(tmp_path / "plain/checkpoint-1")
    resumed = run("resumed", 2, checkpoint)
    assert "does not say which prompts" in caplog.text
    assert resumed.sampled[0] == plain.sampled[0]
    caplog.clear()
    skipping = run("skipping", 2, checkpoint, ignore_data_skip=True)
    assert skipping.sampled[0] == plain.sampled[0]
    assert "does not say which prompts" not in caplog.text


def test_a_part_without_dynamic_sampling_is_warned_about_too(
    tmp_path: Path, tiny_model_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    """On, off, on: the position of the first part says nothing about what the second has drawn."""
    checkpoint = None
    for steps, rounds in ((1, 2), (2, 0), (3, 2)):
        config = make_config(
            tmp_path, max_steps=steps, dynamic_sampling_rounds=rounds, save_strategy="steps", save_steps=1
        )
        trainer = build(RecordingTrainer, tiny_model_dir, config)
        caplog.clear()
        trainer.train(resume_from_checkpoint=checkpoint)
        checkpoint = str(tmp_path / f"checkpoint-{steps}")
    assert "does not say which prompts" in caplog.text


def test_a_checkpoint_before_the_optimizer_step_does_not_lose_the_batch(tmp_path: Path, tiny_model_dir: str) -> None:
    """As transformers writes one when the process is told to end."""

    class SaveBeforeStep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                trainer._save_checkpoint(trainer.model, trial=None)

    config = make_config(tmp_path, max_steps=2, dynamic_sampling_rounds=1)
    trainer = build(RecordingTrainer, tiny_model_dir, config, callbacks=[SaveBeforeStep()])
    trainer.train()
    resumed = build(RecordingTrainer, tiny_model_dir, config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert len(trainer.sampled) == 2
    assert resumed.sampled == trainer.sampled[1:]


def test_training_twice_starts_the_stream_again(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = train(tmp_path, tiny_model_dir, "vvvvvvvvvvvv", max_steps=2, learning_rate=0.0)
    first = list(trainer.sampled)
    trainer.train()
    assert trainer.sampled[len(first) :] == first


def test_evaluation_is_not_touched(tmp_path: Path, tiny_model_dir: str) -> None:
    config = make_config(tmp_path, max_steps=1, dynamic_sampling_rounds=2, eval_strategy="steps", eval_steps=1)
    trainer = build(
        RecordingTrainer,
        tiny_model_dir,
        config,
        train_dataset=labelled("vvvv"),
        eval_dataset=labelled("cc"),
        reward_funcs=reward_by_kind,
    )
    trainer.train()
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


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_rounds_are_a_number(tmp_path: Path, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="`dynamic_sampling_rounds`"):
        make_config(tmp_path, dynamic_sampling_rounds=value)


SCRIPT = """
import json
import sys
from pathlib import Path

import torch
from torch import distributed

from tests.trainer import test_dynamic_sampling as here

model, folder = sys.argv[1:3]
trainer = here.train(
    Path(folder),
    model,
    here.TWO_PROCESSES,
    rewards=here.reward_and_log,
    max_steps=3,
    shuffle_dataset=False,
    log_trees=True,
    ddp_backend="gloo",
)
rank = trainer.accelerator.process_index
assert trainer.accelerator.num_processes == 2
torch.save({n: p.detach() for n, p in trainer.model.named_parameters()}, f"{folder}/rank{rank}.pt")
result = {
    "sampled": trainer.sampled,
    "updated": [prompts for prompts, _ in trainer.updated],
    "largest": [advantages.abs().max().item() for _, advantages in trainer.updated],
    "logs": trainer.state.log_history,
    "extra": list(trainer._logs["extra"]["from"]),
    "prompts": list(trainer._logs["prompt"]),
    "rewards": list(trainer._logs["rewards"]["reward_and_log"]),
}
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump(result, file)
distributed.destroy_process_group()
"""
# Four prompts per batch, two per process. First all of the second process's are replaced and one of the first's; then
# none; then one place of the first process needs all four rounds.
TWO_PROCESSES = "vcccvvv" + "vvvv" + "cvvvcccv"


def reward_and_log(prompts: list[str], completion_ids: Any, kind: list[str], log_extra: Any, **_: Any) -> list:
    log_extra("from", [f"{prompt}/{i % 4}" for i, prompt in enumerate(prompts)])
    return reward_by_kind(completion_ids, kind)


def test_two_processes_fill_one_batch(tmp_path: Path, tiny_model_dir: str) -> None:
    ranks = run_in_two_processes(SCRIPT, tmp_path, tiny_model_dir, str(tmp_path))
    assert ranks[0]["sampled"] == [
        ["w0", "w1"],
        ["w4"],
        ["w7", "w8"],
        ["w11", "w12"],
        ["w15"],
        ["w16"],
        ["w17"],
        ["w18"],
    ]
    assert ranks[1]["sampled"] == [["w2", "w3"], ["w5", "w6"], ["w9", "w10"], ["w13", "w14"], [], [], [], []]
    expected = [{"w0", "w4", "w5", "w6"}, {"w7", "w8", "w9", "w10"}, {"w18", "w12", "w13", "w14"}]
    for first, second, prompts in zip(ranks[0]["updated"], ranks[1]["updated"], expected, strict=True):
        assert Counter(first + second) == dict.fromkeys(prompts, 4)
    assert min(ranks[0]["largest"] + ranks[1]["largest"]) > 0
    kept = ["w18", "w12", "w13", "w14"]  # the logs hold the last batch
    for rank in ranks:
        assert rank["prompts"][::4] == kept
        assert rank["extra"] == [f"{prompt}/{i}" for prompt in kept for i in range(4)]
        assert rank["rewards"] == [0.0, 1.0] * 8
    logs = [log for log in ranks[0]["logs"] if "loss" in log]
    assert [log["dynamic_sampling/rounds"] for log in logs] == [1, 0, 4]
    assert [log["dynamic_sampling/replaced_prompts"] for log in logs] == [3, 0, 4]
    parameters = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert_same_parameters(*parameters, 0.0)
    for step, log in enumerate(logs):
        lines = (tmp_path / f"trees/trees_{step:06d}.jsonl").read_text().splitlines()
        unique = sum(SegmentTree.from_dict(json.loads(line)["tree"]).num_unique_tokens for line in lines)
        assert len(lines) == 4
        assert log["tree/unique_tokens"] == unique + log["dynamic_sampling/discarded_tokens"]
