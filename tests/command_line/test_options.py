"""One set of options: what has the same name in two commands is the same option."""

import argparse
import importlib
from collections.abc import Iterator

import pytest

from treepo_trl.cli import COMMANDS


# Where an option differs, in what, and why.
_NO_TRAINING_BESIDE = "no policy is trained beside the engine, which may have the whole card"
_OTHER_DATA = "each command reads other data"
_OTHER_OUTPUT = "each command writes something else"
_NO_COLOCATION = "TRL's has `colocate` too, of a policy that is trained; its texts are of a training"
_OF_THE_PAST = "export is told of a training that is over"
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("adapter_name_or_path", "help"): "a training goes on from it, sampling uses it",
    ("attn_implementation", "help"): "engines decode with an attention of their own",
    ("bnb_4bit_quant_type", "help"): _OF_THE_PAST,
    (
        "branch_schedule",
        "default",
    ): "the default of trainings is made for the gradient, with lengths of earlier batches",
    ("dataset_config", "help"): _OTHER_DATA,
    ("dataset_name", "default"): "`sample` reads standard input",
    ("dataset_name", "help"): _OTHER_DATA,
    ("dataset_split", "default"): "evaluation is on the test split",
    ("dataset_split", "help"): _OTHER_DATA,
    ("dtype", "default"): "TRL trains in float32; without training the checkpoint's own type serves",
    ("dtype", "help"): "export writes weights, the others load them; TRL's has its default in its text",
    ("fallback_policy", "default"): "a training does without late leaves, sampling gives as many as it is asked for",
    ("load_in_4bit", "help"): _OF_THE_PAST,
    ("max_prompts", "help"): "`eval` makes 64 tasks where there is no end of them",
    ("model_name_or_path", "help"): "the base of an adapter, the model of checks, or the model",
    ("out", "help"): _OTHER_OUTPUT,
    ("output", "help"): _OTHER_OUTPUT,
    ("prompt_column", "help"): "`sample` reads JSON from standard input",
    ("reward_funcs", "help"): "a score of at least 1 is right in `eval`; a training takes any number",
    ("seed", "default"): "TRL's is 42",
    ("seed", "help"): "TRL's is of a training",
    ("use_bnb_nested_quant", "help"): _OF_THE_PAST,
    ("vllm_gpu_memory_utilization", "default"): _NO_TRAINING_BESIDE,
    ("vllm_gpu_memory_utilization", "help"): _NO_TRAINING_BESIDE,
    ("vllm_gpu_memory_utilization", "type"): "`auto` is planned, and a plan is of a training",
    ("vllm_mode", "choices"): _NO_COLOCATION,
    ("vllm_mode", "help"): _NO_COLOCATION,
    ("vllm_mode", "type"): _NO_COLOCATION,
    ("vllm_server_base_url", "help"): _NO_COLOCATION,
    ("vllm_server_timeout", "help"): _NO_COLOCATION,
}


def facts_of(action: argparse.Action) -> Iterator[tuple[str, object]]:
    yield "names", frozenset(name for name in action.option_strings if "-" not in name[2:])
    # TRL's parser has a function of its own for each list of choices, which says no more than they.
    yield "type", "choice" if action.choices else getattr(action.type, "__name__", action.type)
    yield "choices", None if action.choices is None else frozenset(action.choices)
    yield "nargs", action.nargs
    yield "default", repr(None if action.default == argparse.SUPPRESS else action.default)
    yield "help", action.help


@pytest.fixture(scope="module")
def options() -> dict[str, dict[str, argparse.Action]]:
    """Each option by the commands that have it."""
    found: dict[str, dict[str, argparse.Action]] = {}
    for command, (_, module) in COMMANDS.items():
        parser = importlib.import_module(module).command_parser()
        for action in parser._actions:
            found.setdefault(action.dest, {})[command] = action
    return found


def differences(options: dict[str, dict[str, argparse.Action]]) -> Iterator[tuple[str, str]]:
    for name, of_commands in options.items():
        facts = [dict(facts_of(action)) for action in of_commands.values()]
        yield from ((name, fact) for fact in facts[0] if len({each[fact] for each in facts}) > 1)


def test_an_option_is_the_same_in_all_commands(options: dict[str, dict[str, argparse.Action]]) -> None:
    assert set(differences(options)) == set(EXCEPTIONS)


def test_a_difference_is_found(options: dict[str, dict[str, argparse.Action]]) -> None:
    other = argparse.ArgumentParser().add_argument("--top_k", type=int, default=0, help="Other words.")
    assert ("top_k", "help") in set(differences(options | {"top_k": options["top_k"] | {"other": other}}))


def test_every_command_with_settings_takes_a_file(options: dict[str, dict[str, argparse.Action]]) -> None:
    assert set(options["config"]) == set(COMMANDS) - {"completion"}


def test_options_of_a_training_are_those_of_train(options: dict[str, dict[str, argparse.Action]]) -> None:
    """In `plan` and `doctor` all of them, so that a recipe and its options fit each of the three."""
    of_train = {name for name, commands in options.items() if "train" in commands}
    for command in ("plan", "doctor"):
        assert of_train <= {name for name, commands in options.items() if command in commands}
