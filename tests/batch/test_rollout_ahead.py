"""Batches that are sampled while the one before is updated: when, from which policy, and through a resume."""

import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.support.distributed import SCRIPT
from tests.support.fakes import FakeEngine, memoryless
from tests.support.policies import FakePolicy, use_fake_policy
from tests.support.processes import run_in_two_processes
from tests.support.trainers import (
    RecordingTrainer,
    assert_same_parameters,
    assert_same_run,
    build,
    change,
    logs_of,
    make_config,
    parity_reward,
    plain_prompts,
    watch_loss,
)
from treepo_trl.batch.ahead import LookAhead
from treepo_trl.checkpoints import newest_checkpoint


class GatedEngine(FakeEngine):
    """Waits before each answer for `gate`, which is called in the thread that samples."""

    def __init__(self, gate: Callable[[], object] = lambda: None) -> None:
        super().__init__(memoryless(0.1))
        self.gate = gate

    def collect(self, wake: Callable[[], bool] | None = None) -> Any:
        self.gate()
        return super().collect(wake)


Maker = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """Makes a trainer whose `versions` are the global steps at which its engine got the policy."""

    def maker(engine: FakeEngine | None = None, folder: str = "", **changes: Any) -> Any:
        versions: list[int] = []
        reward = changes.pop("reward", parity_reward)
        data, evaluated = changes.pop("data", plain_prompts()), changes.pop("eval_dataset", None)
        ahead, cls = changes.pop("rollout_ahead", 1), changes.pop("cls", RecordingTrainer)
        use_fake_policy(
            monkeypatch,
            partial(FakePolicy, synchronize=lambda trainer: versions.append(trainer.state.global_step), engine=engine),
        )
        config = make_config(tmp_path / folder, **{"max_steps": 4, **changes})
        config.rollout_ahead = ahead  # behind the check for servers: this engine shares nothing with the update
        trainer = build(cls, tiny_model_dir, config, reward_funcs=reward, train_dataset=data, eval_dataset=evaluated)
        trainer.versions = versions
        return trainer

    return maker


def steps_of(trainer: Any) -> list[str]:
    """The step of each batch that was sampled, by its seed: `seed/step/number/engine`."""
    return [told["seed"].split("/")[1] for told in trainer.told]


def test_a_batch_comes_from_the_policy_before_the_update_of_the_last_one(make: Maker) -> None:
    """Five batches, three an epoch: only the next one of an epoch is ahead, and none beyond the end."""
    scored: list[int] = []

    def reward(completion_ids: Any, trainer_state: Any, **_: Any) -> list[float]:
        scored.append(trainer_state.global_step)
        return parity_reward(completion_ids)

    trainer = make(data=plain_prompts(6), max_steps=5, reward=reward)
    trainer.train()
    assert steps_of(trainer) == ["0", "1", "2", "3", "4"]
    assert trainer.versions == [0, 0, 1, 3, 3]  # an epoch begins with the fourth batch
    assert scored == [0, 1, 2, 3, 4]
    assert change(trainer) > 1e-2


def test_sampling_goes_on_while_the_batch_before_is_scored_and_updated(make: Maker) -> None:
    updating, main = [threading.Event() for _ in range(4)], threading.main_thread()
    late: list[bool] = []

    def wait_for_the_update() -> None:
        if threading.current_thread() is not main:
            before = int(steps_of(trainer)[-1]) - 1
            late.append(updating[before].wait(60))

    trainer = make(GatedEngine(wait_for_the_update))
    watch_loss(trainer, lambda *_: updating[trainer.state.global_step].set())
    trainer.train()
    assert len(late) >= 3
    assert all(late)


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2, "gradient_accumulation_steps": 2}], ids=["", "twice"])
def test_only_the_time_of_sampling_changes(make: Maker, changes: dict[str, Any]) -> None:
    """An engine that does not know the policy: the same trees, rewards and updates. Learned widths come later."""
    runs = []
    for ahead in (0, 1):
        settings = {"rollout_ahead": ahead, "branch_schedule": "early", **changes}
        runs.append(make(folder=str(ahead), **settings))
        runs[-1].train()
    assert_same_run(*runs, parameter_tolerance=0.0)
    assert runs[0].sampled == runs[1].sampled
    assert runs[0].versions != runs[1].versions


class TwiceTrainer(RecordingTrainer):
    """Samples each batch once more, and trains on the second trees."""

    def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
        super()._generate_single_turn(*args, **options)
        return super()._generate_single_turn(*args, **options)


def test_a_batch_that_is_sampled_once_more_is_not_the_one_ahead(make: Maker) -> None:
    """The next batch stays where it is: the same run as without."""
    runs = []
    for ahead in (0, 1):
        settings = {"rollout_ahead": ahead, "branch_schedule": "early", "cls": TwiceTrainer}
        runs.append(make(folder=str(ahead), **settings))
        runs[-1].train()
    assert_same_run(*runs, parameter_tolerance=0.0)
    assert steps_of(runs[0]) == ["0", "0", "1", "1", "2", "2", "3", "3"]
    assert steps_of(runs[1]) == ["0", "1", "0", "2", "1", "3", "2", "3"]


def test_an_epoch_that_is_left_takes_its_next_batch_with_it(make: Maker) -> None:
    """Three batches an epoch. The third of the first is sampled ahead and never used: others come in its place."""

    class Leave(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_epoch_stop = state.global_step == 2

    trainer = make(data=plain_prompts(6), max_steps=5)
    trainer.add_callback(Leave())
    trainer.train()
    assert steps_of(trainer) == ["0", "1", "2", "2", "3", "4"]
    first, second = trainer.sampled[:3], trainer.sampled[3:]
    assert sorted(chain(*first)) == sorted(chain(*second))  # the prompts of an epoch each
    assert first != second


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}], ids=["after a batch", "inside of one"])
def test_a_training_that_is_resumed_is_the_same_number_for_number(
    make: Maker, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The trees that were sampled ahead are in the checkpoint; the policy that they are from is not."""
    changes = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, **changes}
    whole = make(folder="whole", **changes)
    whole.train()
    seed = count(1)  # another engine draws otherwise

    class Other(FakeEngine):
        def __init__(self) -> None:
            super().__init__(memoryless(0.1), seed=next(seed))

    checkpoint = str(tmp_path / "whole/checkpoint-3")
    resumed = make(folder="resumed", **changes)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_same_run(whole, resumed, parameter_tolerance=0.0)
    other = make(Other(), folder="other", **changes | {"max_steps": 4})
    other.train(resume_from_checkpoint=checkpoint)
    assert logs_of(other, "loss")[3] == logs_of(whole, "loss")[3]


def test_the_main_process_samples_ahead_for_all(tmp_path: Path, tiny_model_dir: str) -> None:
    """Two processes with one engine that does not know the policy: the same run as without, checkpoints too."""
    ranks = run_in_two_processes(SCRIPT, tmp_path, "train_ahead_and_write", tiny_model_dir, str(tmp_path))
    ahead = "treepo-trl-ahead"
    assert ranks[0]["threads"] == [["MainThread"] * 4, ["MainThread", ahead, ahead, ahead]]
    assert ranks[1]["threads"] == [[], []]
    for rank in ranks:
        assert rank["versions"] == [[0, 1, 2, 3], [0, 0, 1, 2]]
        assert rank["got"][0] == rank["got"][1]
        assert rank["difference"] == 0
        assert rank["moved"] > 1e-2
        for log, other in zip(rank["off"], rank["logs"], strict=True):
            assert all(other[name] == log[name] for name in ("loss", "reward") if name in log)
    assert not any(prompts in ranks[1]["got"][1] for prompts in ranks[0]["got"][1])
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert_same_parameters(first, second, 0.0)


def fail_in_a_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise OSError("the server has gone")


def test_an_error_of_the_thread_ends_the_step_that_needs_its_trees(make: Maker) -> None:
    trainer = make(GatedEngine(fail_in_a_thread))
    with pytest.raises(OSError, match="the server has gone") as error:
        trainer.train()
    assert trainer.state.global_step == 1  # the first update was made
    assert "collect" in [frame.name for frame in traceback.extract_tb(error.tb)]
    trainer.policy_engine.engine.gate = lambda: None
    trainer.train()
    assert trainer.state.global_step == 4


def test_an_error_of_the_thread_costs_no_checkpoint(
    make: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it end an evaluation: the update before is finished, and a training goes on from it."""
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"per_device_eval_batch_size": 8, "eval_dataset": plain_prompts(2)}
    trainer = make(GatedEngine(fail_in_a_thread), **settings)
    with pytest.raises(OSError, match="the server has gone") as error:
        trainer.train()
    assert "_sampled_ahead" in [frame.name for frame in traceback.extract_tb(error.tb)]
    assert len(logs_of(trainer, "eval_loss")) == 1
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")
    assert not list(tmp_path.glob("*/next_batch_*"))
    assert "without the batch that was being sampled ahead: OSError: the server has gone" in caplog.text
    trainer.policy_engine.engine.gate = lambda: None
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


@pytest.mark.slow
def test_two_processes_agree_on_what_is_lost(tmp_path: Path, tiny_model_dir: str) -> None:
    """The first one's thread fails; then the file of the second one alone is damaged."""
    ranks = run_in_two_processes(SCRIPT, tmp_path, "lose_what_is_ahead_and_write", tiny_model_dir, str(tmp_path))
    assert [rank["errors"] for rank in ranks] == [
        ["OSError: the server has gone"],
        ["RuntimeError: The main process has failed. OSError: the server has gone"],
    ]
    for rank in ranks:
        assert rank["saved"] == [str(tmp_path / "checkpoint-1"), []]
        assert rank["damaged"] == ["next_batch_0.json", "next_batch_1.json"]
        assert rank["is_pending"] == [False, True]
    assert ranks[0]["seeds"] == ["1", "2", "3", "2", "3"]  # the step of each batch: the third is sampled twice


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "',
        b"\xff",
        '{"name": "2/0", "prompts": [], "totals": {"trees": 1}, "trees": []}',  # of a version that counts less
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("[]", "{}", '{"trees": [[]], "totals": {}}')),
    ],
    ids=str,
)
def test_a_damaged_next_batch_is_sampled_anew(
    make: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: Any
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    make(**settings, max_steps=3).train()
    file = tmp_path / "checkpoint-2/next_batch_0.json"
    assert file.exists()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    resumed = make(folder="resumed", **settings)
    resumed.train(resume_from_checkpoint=str(file.parent))
    assert steps_of(resumed) == ["2", "3"]
    assert "It is sampled anew" in caplog.text
    assert str(file.parent) in caplog.text


def test_a_next_batch_is_not_of_an_earlier_write(make: Maker, tmp_path: Path) -> None:
    """One that was killed; the checkpoint that is written then has no next batch."""
    stale = tmp_path / "checkpoint-1/next_batch_0.json"
    stale.parent.mkdir()
    stale.write_text("{}")
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make(**settings).train()
    assert newest_checkpoint(str(tmp_path)) == str(stale.parent)
    assert not stale.exists()


def test_an_evaluation_waits_for_the_thread(make: Maker) -> None:
    def be_slow() -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)

    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8, "max_steps": 3}
    trainer = make(GatedEngine(be_slow), eval_dataset=plain_prompts(2), **settings)
    done: list[bool | None] = []
    evaluation = trainer.policy_engine.evaluation

    def look() -> Any:
        pending = trainer._source.pending
        done.append(None if pending is None else pending._future.done())
        return evaluation()

    trainer.policy_engine.evaluation = look
    trainer.train()
    assert done == [True, True, None]


def test_the_ratio_corrects_the_age_of_the_trees(make: Maker) -> None:
    """The engine's numbers are of the time of sampling, and the policy's of the time of use."""
    trainer = make(vllm_importance_sampling_mode="token_truncate")
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    ratios: list[float] = []

    def look(model: Any, inputs: dict[str, Any]) -> None:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            now, *_ = trainer._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))
        is_token = inputs["completion_mask"].bool()
        expected = (
            (now - inputs["sampling_per_token_logps"]).exp().clamp(max=trainer.vllm_importance_sampling_clip_max)
        )
        torch.testing.assert_close(inputs["importance_sampling_ratio"][is_token], expected[is_token])
        sampled = {value for tree in trainer._batch.trees for leaf in tree.leaves for value in tree.logprobs(leaf)}
        for value in inputs["sampling_per_token_logps"][is_token].tolist():
            assert min(abs(value - each) for each in sampled) < 1e-6
        ratios.append(float(expected.mean()))

    watch_loss(trainer, look)
    trainer.train()
    assert len(ratios) == 4


def test_what_is_to_come_is_seen_and_given_once() -> None:
    rows: list[Any] = [[{"prompt": str(i)}] for i in range(4)]
    epoch = LookAhead(iter(rows))
    assert next(epoch) == rows[0]
    assert epoch.peek(1) == rows[2]
    assert epoch.peek(0) == rows[1]
    assert epoch.peek(3) is None
    assert list(epoch) == rows[1:]
