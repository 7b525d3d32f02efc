"""Prompts with answers for `treepo-trl eval`: presets, reasoning-gym, and data of one's own."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from datasets import Dataset

from treepo_trl.command_line.prompts import load_named_dataset, prompt_column, take_split
from treepo_trl.evaluation import Judgement
from treepo_trl.evaluation.answers import judge_math, math_answer, math_verify_is_available

from .arguments import EvalArguments


_NUM_GENERATED = 64  # tasks of reasoning-gym, which have no end
_TASK_SEED = 42  # that of a training by default: the quickstart trains on no task that it holds out
_GYM = "reasoning_gym:"
_NO_COLUMNS = ("prompt", "prompts", "completion", "completions", "completion_ids")
"""Columns that no reward function gets: TRL drops them, or has these names for what is sampled."""


@dataclass
class EvalSet:
    """Prompts and what their completions are scored with."""

    prompts: list[object]
    """Text or messages."""
    columns: dict[str, list[object]] = field(default_factory=dict)
    """A value per prompt for each column that a reward function gets."""
    judge: Callable[[int, str], Judgement] | None = None
    """Score and answer of a text, given the index of its prompt; `None` where the data has no answers."""
    answer_of: Callable[[str], str | None] | None = None
    """Answer of a text, for maj@k of reward functions; `None` where answers cannot be told."""


@dataclass(frozen=True)
class Preset:
    """A dataset of the hub whose columns are known."""

    dataset_name: str
    dataset_config: str | None
    split: str
    question: str
    answer: str
    separator: str | None = None
    """What stands before the answer in its column."""


PRESETS = {
    "gsm8k": Preset("openai/gsm8k", "main", "test", "question", "answer", "####"),
    "math500": Preset("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "aime": Preset("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
}
_INSTRUCTION = "Think step by step, and write the final answer as \\boxed{answer}."


def load_eval_set(arguments: EvalArguments) -> EvalSet:
    """
    The prompts that are asked for.

    Raises:
        ValueError: if they are not there, or lack what their completions are scored with.
    """
    name = cast(str, arguments.dataset_name)
    if name in PRESETS:
        _refuse(arguments, "dataset_config", "prompt_column", "answer_column")
        return _preset(PRESETS[name], arguments)
    if name == "addition":
        _refuse(arguments, "dataset_config", "dataset_split", "prompt_column", "answer_column")
        return _additions(arguments.max_prompts)
    if name.startswith(_GYM):
        _refuse(arguments, "dataset_split", "prompt_column", "answer_column")
        return _reasoning_gym(name.removeprefix(_GYM), arguments)
    return _own_data(name, arguments)


def _refuse(arguments: EvalArguments, *options: str) -> None:
    """Raise for options that mean nothing for the data that is asked for."""
    for option in options:
        if getattr(arguments, option) is not None:
            raise ValueError(
                f"`--{option} {getattr(arguments, option)}` is not for `--dataset_name {arguments.dataset_name}`, "
                "which has its own. Leave it out, or name the dataset by its hub id, file or folder."
            )


def _preset(preset: Preset, arguments: EvalArguments) -> EvalSet:
    splits = load_named_dataset(preset.dataset_name, preset.dataset_config, preset.split)
    split = arguments.dataset_split or preset.split
    dataset = _rows(cast(Dataset, take_split(splits, split, "--dataset_split")), arguments)
    for column in (preset.question, preset.answer):
        if column not in dataset.column_names:
            raise ValueError(
                f"{preset.dataset_name} has no column {column!r}, only {', '.join(dataset.column_names)}. Name the "
                "dataset and its columns with `--dataset_name`, `--prompt_column` and `--answer_column`."
            )
    prompts: list[object] = [
        [{"role": "user", "content": f"{question}\n\n{_INSTRUCTION}"}] for question in dataset[preset.question]
    ]
    answers = [str(answer) for answer in dataset[preset.answer]]
    if preset.separator is not None:
        answers = [answer.rpartition(preset.separator)[2].strip() for answer in answers]
    return _math_set(prompts, answers, {"solution": cast("list[object]", answers)}, bool(arguments.reward_funcs))


def _own_data(name: str, arguments: EvalArguments) -> EvalSet:
    config = arguments.dataset_config
    if config is not None and not isinstance(config, str):
        raise ValueError(f"`dataset_config` is {config!r}; settings as JSON are for {_GYM}NAME. Give a name.")
    splits = load_named_dataset(name, config, arguments.dataset_split or "test")
    split = arguments.dataset_split or ("test" if "test" in splits or len(splits) > 1 else str(next(iter(splits))))
    dataset = _rows(cast(Dataset, take_split(splits, split, "--dataset_split")), arguments)
    prompts_from = prompt_column(dataset, arguments.prompt_column)
    prompts, names = list(dataset[prompts_from]), dataset.column_names
    columns = {name: list(dataset[name]) for name in names if name not in {prompts_from, *_NO_COLUMNS}}
    known = [column for column in ("solution", "answer") if column in columns]
    column = arguments.answer_column or (known[0] if known else None)
    if column is not None and column not in names:
        raise ValueError(f"The dataset has no column {column!r}, only {', '.join(names)}. Set `--answer_column`.")
    if column is None:
        if not arguments.reward_funcs:
            raise ValueError(
                f"{name} has no answers: no column `solution` or `answer`, only {', '.join(dataset.column_names)}. "
                "Set `--answer_column`, or score with `--reward_funcs`."
            )
        return EvalSet(prompts, columns)
    answers = list(dataset[column])
    missing = [i for i, answer in enumerate(answers) if answer is None or not str(answer).strip()]
    if missing and not arguments.reward_funcs:
        raise ValueError(
            f"{name} lacks answers: `{column}` is empty for {len(missing)} of {len(prompts)} prompts, the first is "
            f"prompt {missing[0]}. Remove these rows, or set `--answer_column`."
        )
    return _math_set(prompts, [str(answer) for answer in answers], columns, bool(arguments.reward_funcs))


def _rows(dataset: Dataset, arguments: EvalArguments) -> Dataset:
    if len(dataset) == 0:
        raise ValueError(f"`--dataset_name {arguments.dataset_name}` has no rows in this split.")
    return dataset.select(range(min(len(dataset), arguments.max_prompts or len(dataset))))


def _math_set(
    prompts: list[object], answers: list[str], columns: dict[str, list[object]], has_rewards: bool
) -> EvalSet:
    """Prompts whose answers math-verify compares; with reward functions it only tells wrong ones apart, if it can."""
    if has_rewards:
        can_be_told = math_verify_is_available() and all(math_answer(answer) is not None for answer in answers)
        return EvalSet(prompts, columns, answer_of=math_answer if can_be_told else None)
    if not math_verify_is_available():
        raise ImportError(
            "Answers are compared by math-verify, which is not installed. Run `pip install treepo-trl[math]`, or give "
            "`--reward_funcs`."
        )
    for i, answer in enumerate(answers):
        if math_answer(answer) is None:
            raise ValueError(
                f"The answer of prompt {i}, {answer!r:.80}, holds no number and no formula to compare with. Set "
                "`--answer_column`, or score with `--reward_funcs`."
            )
    return EvalSet(prompts, columns, lambda index, text: judge_math(text, answers[index]), math_answer)


def _additions(max_prompts: int | None) -> EvalSet:
    from treepo_trl.quickstart import NUM_HELD_OUT, addition_tasks, last_number

    if max_prompts is not None and max_prompts > NUM_HELD_OUT:
        raise ValueError(
            f"`--max_prompts {max_prompts}` is above the tasks of addition that no training sees: the quickstart "
            f"holds out {NUM_HELD_OUT}. Lower it."
        )
    _, held_out = addition_tasks(1, NUM_HELD_OUT, _TASK_SEED)
    held_out = held_out.select(range(max_prompts or NUM_HELD_OUT))
    answers = list(held_out["answer"])

    def judge(index: int, text: str) -> Judgement:
        answer = last_number(text)
        return Judgement(float(answer == answers[index]), answer or None)

    return EvalSet(list(held_out["prompt"]), {"answer": answers}, judge, lambda text: last_number(text) or None)


def _reasoning_gym(name: str, arguments: EvalArguments) -> EvalSet:
    """A set of `reasoning-gym` with its own scores, asked for in the format that its answers are read from."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"`--dataset_name {_GYM}{name}` needs `pip install reasoning-gym`.") from error
    from reasoning_gym.factory import DATASETS
    from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4) or sorted(DATASETS)[:3]
        raise ValueError(f"reasoning-gym has no data set {name!r}. Close names are {', '.join(close)}.")
    settings = arguments.dataset_config or {}
    if isinstance(settings, str):
        raise ValueError(
            f"`dataset_config` is {settings!r}; give settings of {name} as JSON, such as '{{\"seed\": 1}}'."
        )
    given: dict[str, Any] = {"size": arguments.max_prompts or _NUM_GENERATED, "seed": _TASK_SEED, **settings}
    try:
        dataset = reasoning_gym.create_dataset(name, **given)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"`dataset_config` {settings} does not suit {name} of reasoning-gym: {error}.") from error
    entries = [dataset[i] for i in range(len(dataset))]

    def judge(index: int, text: str) -> Judgement:
        answer = extract_answer(text)
        return Judgement(float(dataset.score_answer(answer, entries[index])), answer)

    system = {"role": "system", "content": SYSTEM_PROMPTS["default"]}
    prompts: list[object] = [[system, {"role": "user", "content": entry["question"]}] for entry in entries]
    return EvalSet(prompts, {"answer": [entry["answer"] for entry in entries]}, judge, extract_answer)
