"""What the trainer refuses, and that it says so at construction."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig
from trl import GRPOConfig

from tests.support.models import make_model
from tests.support.trainers import SETTINGS, build, make_config, plain_prompts
from treepo_trl import TreePOConfig, TreePOTrainer, checks
from treepo_trl.checks import check_arguments, check_datasets


PROMPTS = plain_prompts(8)


def make_trainer(config: TreePOConfig, **arguments: Any) -> TreePOTrainer:
    return build(TreePOTrainer, make_model(), config, **arguments)


def test_plain_grpo_config(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"`args` is a `GRPOConfig`\. Pass a `TreePOConfig`"):
        build(TreePOTrainer, make_model(), GRPOConfig(output_dir=str(tmp_path), **SETTINGS))


def a_tool(x: int) -> int:
    """
    A tool.

    Args:
        x: A number.
    """
    return x


class Environment:
    def reset(self, **kwargs: Any) -> None:
        return None


NO_TURNS = "is not supported yet .*Leave it out, or use `GRPOTrainer`"
IMAGES = "image prompts are not supported yet.*Remove the column"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": [a_tool]}, f"`tools` {NO_TURNS}"),
        ({"environment_factory": Environment}, f"`environment_factory` {NO_TURNS}"),
        ({"environment_factory": {"one": Environment}}, f"`environment_factory` {NO_TURNS}"),
        ({"rollout_func": lambda prompts, trainer: {}}, f"`rollout_func` {NO_TURNS}"),
        ({"train_dataset": PROMPTS.add_column("image", [None] * 8)}, f"column 'image': {IMAGES}"),
        ({"train_dataset": PROMPTS.add_column("images", [None] * 8)}, f"column 'images': {IMAGES}"),
        ({"train_dataset": None}, "`train_dataset` is required"),  # TRL's error
    ],
)
def test_arguments_that_are_not_supported(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(make_config(tmp_path), **arguments)


@pytest.mark.parametrize(
    ("use_vllm", "kwargs", "message"),
    [
        (False, {"num_beams": 4}, "has num_beams, which .*Remove the others, or set `use_vllm"),
        (False, {"top_k": 3, "seed": 1, "eta_cutoff": 0.1}, "`generation_kwargs` has eta_cutoff, seed, which"),
        *(
            (True, {name: 1, "best_of": 3}, f"`generation_kwargs` has {name}, which the tree sampler sets itself")
            for name in (
                *("n", "max_tokens", "logprobs", "stop", "detokenize", "ignore_eos", "structured_outputs"),
                # One seed for every request would make all siblings equal; penalties would forget the path.
                *("seed", "presence_penalty", "bad_words", "truncate_prompt_tokens"),
            )
        ),
    ],
)
def test_generation_kwargs_that_segments_cannot_have(
    tmp_path: Path, use_vllm: bool, kwargs: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "is_vllm_available", lambda: True)
    with pytest.raises(ValueError, match=message):
        make_trainer(make_config(tmp_path, use_vllm=use_vllm, generation_kwargs=kwargs))


def test_vllm_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "is_vllm_available", lambda: True)
    with pytest.raises(ValueError, match=r"`vllm_structured_outputs_regex` is not supported.*Leave it out"):
        make_trainer(make_config(tmp_path, use_vllm=True, vllm_structured_outputs_regex="a+"))


def test_no_tools_are_no_tools(tmp_path: Path) -> None:
    check_arguments(make_config(tmp_path), [], None, None)


def test_known_generation_kwargs_are_used(tmp_path: Path) -> None:
    config = make_config(tmp_path, generation_kwargs={"top_k": 3, "temperature": 0.5})
    engine = make_trainer(config).sampler.engine
    assert (engine.options.top_k, engine.options.temperature) == (3, 0.5)


def test_vllm_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "is_vllm_available", lambda: False)
    with pytest.raises(
        ImportError, match=r"`use_vllm=True`, but vLLM is not installed.*pip install treepo-trl\[vllm\]"
    ):
        make_trainer(make_config(tmp_path, use_vllm=True))


# Datasets


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: {"train_dataset": d},
        lambda d: {"eval_dataset": d},
        lambda d: {"eval_dataset": {"good": PROMPTS, "bad": d}},
        lambda d: {"eval_dataset": DatasetDict({"good": PROMPTS, "bad": d})},
        lambda d: {"train_dataset": d.to_iterable_dataset()},
    ],
    ids=["train", "eval", "dict", "DatasetDict", "iterable"],
)
def test_dataset_without_prompts(tmp_path: Path, wrap: Callable[[Any], dict[str, Any]]) -> None:
    dataset = Dataset.from_dict({"question": ["w1"] * 8, "answer": ["w2"] * 8})
    with pytest.raises(ValueError, match=r"no column 'prompt', only question, answer.*Rename"):
        make_trainer(make_config(tmp_path), **wrap(dataset))


def test_streams_of_unknown_columns_pass() -> None:
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "w1"}]))
    assert stream.column_names is None
    check_datasets(stream, None, {"a": stream})


def test_prompt_longer_than_the_context(tmp_path: Path) -> None:
    long = Dataset.from_dict({"prompt": ["w1 " * 600] * 8})
    trainer = make_trainer(make_config(tmp_path, max_steps=1), train_dataset=long)
    with pytest.raises(
        ValueError, match=r"(?s)starts with 'w1 w1.*has 600 tokens.*no room.*512 tokens.*Drop or shorten"
    ):
        trainer.train()


def test_empty_prompt(tmp_path: Path) -> None:
    empty = Dataset.from_dict({"prompt": ["w1", ""] * 4})
    trainer = make_trainer(make_config(tmp_path, max_steps=2), train_dataset=empty)
    with pytest.raises(ValueError, match=r"[Pp]rompt"):
        trainer.train()


# Adapters for vLLM


def test_adapter_is_checked_by_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "is_vllm_available", lambda: True)
    config = make_config(tmp_path, use_vllm=True)
    with pytest.raises(ValueError, match=r"`use_dora=True`.*vllm_lora_sync='merge'"):
        make_trainer(config, peft_config=LoraConfig(use_dora=True, target_modules=["q_proj"]))


def test_adapter_is_not_checked_without_vllm(tmp_path: Path) -> None:
    make_trainer(make_config(tmp_path), peft_config=LoraConfig(use_dora=True, target_modules=["q_proj"]))
