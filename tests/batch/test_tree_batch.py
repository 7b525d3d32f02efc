"""A batch of trees between the calls of GRPOTrainer: trees stay with their rewards, and no seed comes twice."""

import json
import math
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.trainers import RecordingTrainer, build, labelled, make_config, trained
from treepo_trl import SegmentTree
from treepo_trl.batch import TreeBatch, shuffle_trees
from treepo_trl.tree_log import tree_records


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


class AskingTwice(RecordingTrainer):
    """Samples again what was sampled, as a trainer does that looks for better completions."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        super()._generate_single_turn(*args, **kwargs)
        return super()._generate_single_turn(*args, **kwargs)


@pytest.mark.parametrize("rounds", [0, 1])
def test_rewards_are_those_of_the_completions(tmp_path: Path, tiny_model_dir: str, rounds: int) -> None:
    config = make_config(tmp_path, dynamic_sampling_rounds=rounds, log_trees=True)
    trained(AskingTwice, tiny_model_dir, config, reward_funcs=length)
    lines = [line for file in sorted((tmp_path / "trees").iterdir()) for line in file.read_text().splitlines()]
    assert len(lines) == 4
    for record in map(json.loads, lines):
        tree = SegmentTree.from_dict(record["tree"])
        assert record["rewards"] == [float(tree.nodes[leaf].end) for leaf in record["rows"]]


def test_each_sampling_has_a_seed_of_its_own(tmp_path: Path, tiny_model_dir: str) -> None:
    class AskingOutside(AskingTwice):
        """Samples before the batch too, as a subclass does that looks at its prompts first."""

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            self._generate([row["prompt"] for row in inputs])
            return super()._generate_and_score_completions(inputs)

    trainer = trained(AskingOutside, tiny_model_dir, make_config(tmp_path), reward_funcs=length)
    seeds = [told["seed"] for told in trainer.told]
    assert seeds == [f"7/{step}/{number}/0" for step in (0, 1) for number in range(4)]


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_sampling_behind_a_batch_has_trees_of_its_own(tmp_path: Path, tiny_model_dir: str, rounds: int) -> None:
    seen: list[tuple[list[SegmentTree], list[SegmentTree]]] = []

    class AskingBehind(RecordingTrainer):
        """Samples once more when a batch is done."""

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            trees = self._batch.trees
            self._generate([row["prompt"] for row in self.rows])
            seen.append((trees, self._batch.trees))
            return output

        def _calculate_rewards(self, inputs: Any, *args: Any) -> torch.Tensor:
            self.rows = inputs
            return super()._calculate_rewards(inputs, *args)

    trained(AskingBehind, tiny_model_dir, make_config(tmp_path, dynamic_sampling_rounds=rounds), reward_funcs=length)
    assert len(seen) == 2
    assert all(behind and not {id(tree) for tree in trees} & {id(tree) for tree in behind} for trees, behind in seen)


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_sampling_before_a_batch_is_not_of_the_batch_before(
    tmp_path: Path, tiny_model_dir: str, rounds: int
) -> None:
    asked: list[tuple[list[int], list[list[int]]]] = []

    class AskingFirst(RecordingTrainer):
        """Samples for a prompt of its own while a batch's first prompts are tokenized."""

        def _tokenize_prompts(self, prompts: Any) -> Any:
            tokenized = super()._tokenize_prompts(prompts)
            if len(asked) == self.state.global_step:
                asked.append(([5, 6], []))
                super()._generate_single_turn([[5, 6]] * 4, None, {}, 4)
                asked[-1][1].extend(tree.prompt_ids for tree in self._batch.trees)
            return tokenized

    trained(AskingFirst, tiny_model_dir, make_config(tmp_path, dynamic_sampling_rounds=rounds), reward_funcs=length)
    assert asked == [([5, 6], [[5, 6]])] * 2


def test_tokens_that_a_reward_samples_are_counted_once_for_a_chosen_batch(tmp_path: Path, tiny_model_dir: str) -> None:
    """With dynamic sampling the tokens of the batch that is trained on count, whoever generates on the way."""

    class AskingInRewards(RecordingTrainer):
        def _calculate_rewards(self, inputs: Any, prompts: Any, *args: Any) -> torch.Tensor:
            self._generate(list(prompts))
            return super()._calculate_rewards(inputs, prompts, *args)

    def counted(cls: type) -> float:
        config = make_config(tmp_path / cls.__name__, dynamic_sampling_rounds=1, log_trees=False)
        return trained(cls, tiny_model_dir, config, reward_funcs=length).state.num_input_tokens_seen

    assert counted(AskingInRewards) == counted(RecordingTrainer) > 0


def test_samplings_are_counted_for_each_step() -> None:
    batch = TreeBatch(3, 4)
    assert [batch.next(3).number, batch.next(4).number] == [1, 0]
    batch.adopt([])
    batch.adopt([])
    assert [batch.name, batch.next(3).name, batch.next(4).name] == ["3/2", "3/2", "4/0"]


def test_a_record_has_the_advantage_of_each_rows_last_token() -> None:
    tree = SegmentTree([9])
    tree.add(None, [1], None, "stop")
    tree.add(None, [2, 3, 4], None, "stop")
    rewards = [math.nan, 1.0]
    for advantages in ([[1.0, 0.0, 0.0], [2.0, 3.0, 4.0]], [1.0, 4.0]):
        (record,) = tree_records(3, [tree], [rewards], [advantages], str)
        assert (record["advantages"], record["rewards"], record["step"]) == ([1.0, 4.0], [None, 1.0], 3)


def test_trees_are_shuffled_and_their_rows_stay_in_order() -> None:
    batch = {
        "completion_ids": torch.arange(6)[:, None],
        "names": list("abcdef"),
        "num_items": torch.tensor(6),
        "no": None,
    }
    orders = set()
    for _ in range(200):
        shuffled: Any = shuffle_trees(batch, num_generations=2)
        rows = shuffled["completion_ids"][:, 0].tolist()
        assert ["abcdef"[row] for row in rows] == shuffled["names"]
        assert rows[1::2] == [row + 1 for row in rows[::2]]
        assert (shuffled["num_items"], shuffled["no"]) == (6, None)
        orders.add(tuple(rows[::2]))
    assert orders == set(permutations([0, 2, 4]))  # one of the six is missing with probability 6 * (5 / 6) ** 200


def test_an_evaluation_does_not_reopen_a_batch(tmp_path: Path, tiny_model_dir: str) -> None:
    """A checkpoint behind it says where the next batch begins, not where this one did."""

    def drawn(**changes: Any) -> list[Any]:
        folder = tmp_path / str(len(changes))
        config = make_config(
            folder, dynamic_sampling_rounds=1, save_strategy="steps", save_steps=1, shuffle_dataset=False, **changes
        )
        evaluated = labelled("vv") if changes else None
        build(
            RecordingTrainer, tiny_model_dir, config, train_dataset=labelled("v" * 8), eval_dataset=evaluated
        ).train()
        states = [json.loads((folder / f"checkpoint-{step}/trainer_state.json").read_text()) for step in (1, 2)]
        return [state["stateful_callbacks"]["treepo_prompts_drawn"] for state in states]

    assert drawn(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8) == drawn()
