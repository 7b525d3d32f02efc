"""Trainings with tools: the real engine of the policy, the logs, evaluation, dynamic sampling and checkpoints."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.chat_template_utils import parse_response

from tests.support.tools import (
    LATER,
    ScriptedAgent,
    add,
    call,
    echo,
    make_letter_model,
    make_letter_tokenizer,
    questions,
    talk_reward,
    tool_config,
    tool_trainer,
)
from tests.support.trainers import RecordingTrainer, SpyTrainer, assert_same_parameters, change, logs_of, parameters_of
from treepo_trl import SegmentTree


LETTERS: dict[str, Any] = {
    "max_completion_length": 360,
    "segment_length": 8,
    "max_tool_calling_iterations": 4,
    "stop_repetition": False,
}


def letter_trainer(cls: type, folder: Path, model: Any = None, **changes: Any) -> Any:
    """A random model on the engine of the policy, which calls `echo` now and then."""
    arguments = {name: changes.pop(name) for name in list(changes) if name in ("reward_funcs", "train_dataset")}
    return tool_trainer(
        cls,
        tool_config(folder, **{**LETTERS, **changes}),
        processing_class=make_letter_tokenizer(),
        model=model or make_letter_model(),
        tools=[echo],
        **arguments,
    )


def check_conversations(trainer: Any, trees: list[SegmentTree]) -> int:
    """Every turn that called has the answer that the tool gives, in the template's tokens; returns how many."""
    tokenizer, found = trainer.processing_class, 0
    for tree in trees:
        for node, each in enumerate(tree.nodes):
            if each.is_sampled:
                continue
            found += 1
            assert each.parent is not None
            start = tree.turn_start(each.parent)
            before = tree.sequence_ids(start)
            turn = tree.sequence_ids(each.parent)[len(before) :]
            message = parse_response(tokenizer, turn, prefix=before, tools=[echo])
            assert tree.nodes[each.parent].messages == (message,)
            answers = [2 * asked["function"]["arguments"]["text"] for asked in message["tool_calls"]]
            assert [answer["content"] for answer in each.messages] == answers
            assert list(each.token_ids) == trainer._get_tool_suffix_ids(list(each.messages))
            assert tree.nodes[each.parent].num_calls == len(answers)
            assert node not in tree.leaves
    return found


def test_tools_on_the_engine_of_the_policy(tmp_path: Path) -> None:
    """Answers are prefilled and not sampled, and log-probabilities behind them are the policy's."""
    trainer = letter_trainer(SpyTrainer, tmp_path, max_steps=2)
    first = make_letter_model().eval()
    trainer.train()
    assert change(trainer) > 1e-3
    assert check_conversations(trainer, [tree for trees in trainer.all_trees for tree in trees]) > 5
    worst = 0.0
    for tree in trainer.all_trees[0]:
        for leaf in tree.leaves:
            ids = torch.tensor([tree.sequence_ids(leaf)])
            with torch.no_grad():
                logprobs = first(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            own = logprobs[len(tree.prompt_ids) - 1 :] * torch.tensor(tree.sampled_mask(leaf))
            worst = max(worst, (own - torch.tensor(tree.logprobs(leaf))).abs().max().item())
    assert worst < 1e-4
    for generation in trainer.generations:
        mask = generation["output"]["tool_mask"]
        rows = [(tree, leaf) for tree in generation["trees"] for leaf in tree.leaves]
        for own, (tree, leaf) in zip(mask.tolist(), rows, strict=True):
            assert own[: tree.nodes[leaf].end] == tree.sampled_mask(leaf)
            assert set(own[tree.nodes[leaf].end :]) <= {1}
    for name in ("tree/tool_calls", "tree/answer_tokens", "tools/call_frequency"):
        assert min(logs_of(trainer, name)) > 0
    assert min(logs_of(trainer, "tree/turns_mean")) > 1
    assert min(logs_of(trainer, "tree/calls_per_executed")) >= 1


def test_packed_rows_with_answers_give_the_loss_of_plain_rows(tmp_path: Path) -> None:
    """The same trees twice: answers fold like any token, and no loss reads them."""
    runs = []
    for packing in ("sdpa", "off"):
        settings = {"tree_packing": packing, "advantage_estimator": "value_difference", "max_steps": 1}
        settings |= {"steps_per_generation": 1, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 12}
        trainer = tool_trainer(SpyTrainer, tool_config(tmp_path / packing, **settings), ScriptedAgent(2))
        trainer.train()
        runs.append(trainer)
    packed, plain = runs
    for name in ("loss", "grad_norm", "entropy"):
        assert logs_of(packed, name) == pytest.approx(logs_of(plain, name), abs=1e-4)
    assert_same_parameters(parameters_of(packed), parameters_of(plain), 1e-4)
    assert logs_of(packed, "tree/packing_ratio")[0] > 1.5


def test_rewards_may_change_the_conversations(tmp_path: Path) -> None:
    """Rows share nodes, and no messages."""
    seen = []

    def reward(completions: list[list[dict[str, Any]]], **_: Any) -> list[float]:
        seen.append([len(each) for each in completions])
        for each in completions:
            assert all("x" not in message for message in each)
            for message in each:
                message["x"] = 1
        return talk_reward(completions)

    trainer = tool_trainer(RecordingTrainer, tool_config(tmp_path), ScriptedAgent(1), reward_funcs=reward)
    trainer.train()
    assert max(max(counts) for counts in seen) > 2


def test_evaluation_calls_tools_too(tmp_path: Path) -> None:
    trainer = letter_trainer(SpyTrainer, tmp_path, num_generations_eval=2, per_device_eval_batch_size=8, max_steps=1)
    metrics = trainer.evaluate(questions(4))
    assert metrics["eval_tools/call_frequency"] > 0
    assert trainer.all_trees == []
    trainer.train()
    assert len(trainer.all_trees) == 1


def test_completions_are_logged_with_their_mean_advantage(tmp_path: Path) -> None:
    """Over sampled tokens: an answer's tokens do not count."""
    trainer = tool_trainer(
        SpyTrainer, tool_config(tmp_path, advantage_estimator="value_difference", max_steps=1), ScriptedAgent(1)
    )
    trainer.train()
    (generation,) = trainer.generations
    advantages = generation["output"]["advantages"]
    rows = [(tree, leaf) for tree in generation["trees"] for leaf in tree.leaves]
    for row, (tree, leaf) in enumerate(rows):
        mask = torch.tensor(tree.sampled_mask(leaf)).bool()
        own = advantages[row, : len(mask)][mask].mean().item()
        assert list(trainer._logs["advantages"])[row] == pytest.approx(own, abs=1e-5)


def test_dynamic_sampling_with_tools(tmp_path: Path) -> None:
    """Prompts of one reward are replaced; what is kept runs no call again."""
    num_called = itertools.count()

    def counted(a: int, b: int) -> int:
        next(num_called)
        return a + b

    counted.__name__, counted.__doc__ = "add", add.__doc__

    def reward(completions: list[Any], start: list[int], **_: Any) -> list[float]:
        values = talk_reward(completions)
        return [0.0 if first % 2 else value for value, first in zip(values, start, strict=True)]

    first = [call("add", a=a, b=1) for a in range(4)] + ["It is 7."]
    later = [call("add", a=a, b=2) for a in range(3)] + list(LATER[:2])
    trainer = tool_trainer(
        SpyTrainer,
        tool_config(tmp_path, dynamic_sampling_rounds=3, max_steps=3),
        ScriptedAgent(3, first, later),
        tools=[counted],
        reward_funcs=reward,
    )
    trainer.train()
    sampled = [tree for trees in trainer.all_trees for tree in trees]
    assert sum(logs_of(trainer, "dynamic_sampling/replaced_prompts")) == len(sampled) - 6 > 0
    assert next(num_called) == sum(node.num_calls for tree in sampled for node in tree.nodes)
    assert change(trainer) > 1e-4
    for generation in trainer.generations:
        assert (generation["output"]["tool_mask"] == 0).any()


def test_a_training_is_resumed_inside_of_a_batch(tmp_path: Path) -> None:
    """A generation batch of two steps, cut between them: the rest of its rows is in the checkpoint, with masks."""
    finals = []
    for name, start in (("whole", None), ("resumed", str(tmp_path / "whole/checkpoint-1"))):
        settings = {"gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
        trainer = tool_trainer(SpyTrainer, tool_config(tmp_path / name, **settings), ScriptedAgent(7))
        if start is not None:
            trainer.sampler.engine._asked.clear()
        trainer.train(resume_from_checkpoint=start)
        finals.append((trainer, parameters_of(trainer)))
    (whole, expected), (resumed, found) = finals
    assert len(whole.generations) == 2
    assert len(resumed.generations) == 1
    assert logs_of(resumed, "loss")[:2] == pytest.approx(logs_of(whole, "loss")[:2], abs=1e-5)
    assert set(found) == set(expected)
