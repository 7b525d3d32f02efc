"""Trainers that record or replay what they sample, their settings, data and rewards, and what a run is compared by."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from trl import GRPOTrainer

from tests.support.models import make_tokenizer
from treepo_trl import SegmentTree, TreePOConfig, TreePOTrainer
from treepo_trl.update.advantages import leaf_paths, tree_advantages
from treepo_trl.update.row_advantages import weighted_advantages


NUM_GENERATIONS = 4


def parity_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Differs between most completions: share of even tokens, plus a little for length."""
    return [sum(t % 2 == 0 for t in ids) / len(ids) + 0.01 * len(ids) for ids in completion_ids]


def length_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text.split())) for text in texts]


def plain_prompts(count: int = 16) -> Dataset:
    """Prompts of different lengths, each a different text."""
    return Dataset.from_dict(
        {"prompt": [" ".join(f"w{(7 * i + j) % 60}" for j in range(1 + i % 5)) for i in range(count)]}
    )


def chat_prompts(count: int = 16) -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": f"w{i} w{i + 1}"}] for i in range(count)]})


SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "per_device_train_batch_size": 2 * NUM_GENERATIONS,
    "num_generations": NUM_GENERATIONS,
    "max_completion_length": 12,
    "max_steps": 2,
    "optim": "sgd",  # unlike Adam it does not blow rounding errors up to the size of a step
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 7,
}


def make_config(folder: Path, **changes: Any) -> TreePOConfig:
    return TreePOConfig(output_dir=str(folder), **{**SETTINGS, "segment_length": 4, **changes})


class RecordingTrainer(TreePOTrainer):
    """
    Keeps what is sampled and what reaches the loss.

    Attributes:
        sampled: texts of the prompts of each sampling.
        told: seed and keywords that each sampling was given.
        all_trees: trees of each sampling.
        updated: texts of the prompts of each micro-batch's rows, with their advantages.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sampled: list[list[str]] = []
        self.told: list[dict[str, Any]] = []
        self.all_trees: list[list[SegmentTree]] = []
        self.updated: list[tuple[list[str], torch.Tensor]] = []
        sample = self.sampler.sample

        def recording_sample(prompts: list[list[int]], seed: str, **kwargs: Any) -> list[SegmentTree]:
            self.sampled.append([self.processing_class.decode(ids) for ids in prompts])
            self.told.append({"seed": seed, **kwargs})
            self.all_trees.append(sample(prompts, seed, **kwargs))
            return self.all_trees[-1]

        self.sampler.sample = recording_sample

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        texts = self.processing_class.batch_decode(inputs["prompt_ids"], skip_special_tokens=True)
        self.updated.append((texts, inputs["advantages"].clone()))
        return super()._compute_loss(model, inputs)


class SpyTrainer(RecordingTrainer):
    """
    Keeps what comes out of the scoring too, and makes the shuffle that follows repeatable.

    Attributes:
        generations: inputs, output, rewards and trees of each batch of the training.
        evaluations: inputs, output and rewards of each batch of an evaluation.
        completions: what each sampling of the training handed to GRPOTrainer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generations: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.raw_rewards: torch.Tensor | None = None
        self.completions: list[Any] = []

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._generate_single_turn(*args, **kwargs)
        if self.model.training:
            self.completions.append(result)
            torch.manual_seed(len(self.completions))  # so that the shuffle that follows can be repeated
        return result

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.raw_rewards = super()._calculate_rewards(*args, **kwargs)
        return self.raw_rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        record = {
            "inputs": inputs,
            "output": {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in output.items()},
            "rewards": self.raw_rewards.clone(),
        }
        if self.model.training:
            self.generations.append({**record, "trees": self.all_trees[-1]})
        else:
            self.evaluations.append(record)
        return output


class ReplayTrainer(TreePOTrainer):
    """Uses the trees that another trainer has sampled."""

    recorded: list[list[SegmentTree]]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            self.num_replayed = getattr(self, "num_replayed", 0) + 1
            self.sampler.sample = lambda prompts, seed, **_: self.recorded[self.num_replayed - 1]
        result = super()._generate_single_turn(*args, **kwargs)
        if self.model.training:
            torch.manual_seed(self.num_replayed)
        return result


class ReplayStockTrainer(GRPOTrainer):
    """Stock GRPOTrainer on the completions that another trainer has sampled."""

    recorded: list[Any]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if not self.model.training:
            return super()._generate_single_turn(*args, **kwargs)
        self.num_replayed = getattr(self, "num_replayed", 0) + 1
        torch.manual_seed(self.num_replayed)
        return self.recorded[self.num_replayed - 1]


def build(cls: type, model: Any, config: Any, **changes: Any) -> Any:
    arguments = {
        "reward_funcs": parity_reward,
        "train_dataset": plain_prompts(),
        "processing_class": make_tokenizer(),
        **changes,
    }
    trainer = cls(model=model, args=config, **arguments)
    trainer.initial_parameters = parameters_of(trainer)
    return trainer


def trained(cls: type, model: Any, config: Any, **changes: Any) -> Any:
    """A trainer whose training is done."""
    trainer = build(cls, model, config, **changes)
    trainer.train()
    return trainer


def watch_loss(trainer: Any, look: Callable[[Any, dict[str, Any]], object]) -> None:
    """Call `look` with the model and the rows of each micro-batch before its loss is computed."""
    compute_loss = trainer._compute_loss

    def watched(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        look(model, inputs)
        return compute_loss(model, inputs)

    trainer._compute_loss = watched


def parameters_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same_parameters(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert a.keys() == b.keys()
    worst = max((a[name] - b[name]).abs().max().item() for name in a)
    assert worst <= tolerance, f"parameters differ by {worst}"


def change(trainer: Any) -> float:
    """The largest change of a parameter since `build`."""
    after = parameters_of(trainer)
    return max((value - after[name]).abs().max().item() for name, value in trainer.initial_parameters.items())


def logs_of(trainer: Any, key: str) -> list[float]:
    return [log[key] for log in trainer.state.log_history if key in log]


def tables_of(folder: Path) -> list[pd.DataFrame]:
    """The tables of completions that a run with `log_completions` has written, one per step."""
    return [pd.read_parquet(file) for file in sorted((folder / "completions").iterdir())]


def assert_same_run(
    a: Any,
    b: Any,
    keys: tuple[str, ...] = ("loss", "grad_norm", "reward", "reward_std", "entropy"),
    parameter_tolerance: float = 1e-4,
) -> None:
    for key in keys:
        assert logs_of(a, key) == pytest.approx(logs_of(b, key), abs=1e-4, rel=1e-4), key
    assert len(logs_of(a, "loss")) == a.state.max_steps
    assert_same_parameters(parameters_of(a), parameters_of(b), parameter_tolerance)


def assert_same_logs(a: Any, b: Any, *only: str) -> None:
    """All metrics but times are the same; names that begin with one of `only` are those of one of the two."""
    for mine, theirs in zip(a.state.log_history, b.state.log_history, strict=True):
        assert {key for key in set(mine) ^ set(theirs) if not key.startswith((*only, "profiling/"))} == set()
        for key in set(mine) & set(theirs):
            if not any(part in key for part in ("seconds", "time", "per_second", "profiling/")):
                assert mine[key] == pytest.approx(theirs[key], abs=1e-4, rel=1e-4, nan_ok=True), key


# Advantages


def expected_advantages(
    generation: dict[str, Any],
    scale: str,
    estimator: str = "optimal_baseline",
    rejection: bool = False,
    weighting: str = "inverse_branching",
) -> torch.Tensor:
    """(B, T): `tree_advantages` over the deviation that `scale_rewards` names, on each token of a segment."""
    output, rewards = generation["output"], generation["rewards"].double()
    totals = rewards.nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)
    result = torch.zeros(output["completion_ids"].shape)
    for i, tree in enumerate(generation["trees"]):
        group = totals[i * NUM_GENERATIONS : (i + 1) * NUM_GENERATIONS]
        pool = group if scale == "group" else totals
        divisor = 1.0 if scale == "none" else pool[~pool.isnan()].std() + 1e-4
        (ids,), _ = leaf_paths([tree])
        if weighting == "inverse_branching":
            (values,) = weighted_advantages([tree], ids[None], group[None], estimator, rejection) * NUM_GENERATIONS
        else:
            values = tree_advantages(group, ids, estimator, subgroup_rejection=rejection)
        for j, leaf in enumerate(tree.leaves):
            lengths = [len(tree.nodes[node].token_ids) for node in tree.path(leaf)]
            tokens = [value for value, n in zip(values[j].tolist(), lengths, strict=False) for _ in range(n)]
            result[i * NUM_GENERATIONS + j, : len(tokens)] = torch.tensor(tokens) / divisor
    return result


# Dynamic sampling


def labelled(kinds: str) -> Dataset:
    """A prompt for each letter: `v` has different rewards, `c` and `z` (zeros) equal ones, `n` none at all."""
    return Dataset.from_dict({"prompt": [f"w{i}" for i in range(len(kinds))], "kind": list(kinds)})


def reward_by_kind(completion_ids: list[list[int]], kind: list[str], **_: Any) -> list[float | None]:
    values = {"c": lambda i: 0.25, "z": lambda i: 0.0, "n": lambda i: None, "v": lambda i: float(i % 2)}
    return [values[k](i) for i, k in enumerate(kind)]


def train(
    folder: Path, model: str, data: str | Dataset | IterableDataset, rewards: Any = reward_by_kind, **changes: Any
) -> Any:
    """A training with dynamic sampling that is done; `data` is a dataset or the kinds of its prompts."""
    whole = {"fallback_policy": "root"}  # each prompt has as many completions as the rewards by kind count on
    config = make_config(folder, **{"max_steps": 3, "dynamic_sampling_rounds": 4, **whole, **changes})
    dataset = labelled(data) if isinstance(data, str) else data
    return trained(RecordingTrainer, model, config, train_dataset=dataset, reward_funcs=rewards)
