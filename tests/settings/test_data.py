"""Data and tokenizers that the trainer refuses, at construction where it can be told then."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from tests.support.models import make_model, make_tokenizer
from tests.support.trainers import build, chat_prompts, make_config, plain_prompts
from treepo_trl import TreePOConfig, TreePOTrainer


PROMPTS = plain_prompts(8)


def make_trainer(config: TreePOConfig, **arguments: Any) -> TreePOTrainer:
    return build(TreePOTrainer, make_model(), config, **arguments)


IMAGES = "image prompts are not supported yet.*Remove the column"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_dataset": PROMPTS.add_column("image", [None] * 8)}, f"column 'image': {IMAGES}"),
        ({"train_dataset": PROMPTS.add_column("images", [None] * 8)}, f"column 'images': {IMAGES}"),
        ({"train_dataset": None}, "`train_dataset` is required"),  # TRL's error
    ],
)
def test_data_that_is_not_supported(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(make_config(tmp_path), **arguments)


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


def stream_of(*rows: dict[str, Any]) -> IterableDataset:
    """A stream that does not know its columns."""
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert stream.column_names is None
    return stream


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_stream_without_prompts_fails_before_anything_is_sampled(tmp_path: Path, rounds: int) -> None:
    stream = stream_of(*[{"question": "w1", "answer": "w2"}] * 8)
    trainer = make_trainer(make_config(tmp_path, dynamic_sampling_rounds=rounds), train_dataset=stream)
    trainer.sampler.sample = lambda *args, **kwargs: pytest.fail("sampled")  # pyright: ignore
    with pytest.raises(ValueError, match=r"no column 'prompt', only question, answer.*Rename"):
        trainer.train()


SIZE = r"has {} of the {} prompts .* `per_device_train_batch_size` \({}\) x `steps_per_generation` \({}\) x processes"


@pytest.mark.parametrize("rounds", [0, 1])
@pytest.mark.parametrize(("num_prompts", "micro_batch", "steps"), [(0, 8, 1), (1, 8, 1), (3, 8, 2), (3, 4, 4)])
def test_a_dataset_smaller_than_a_batch(
    tmp_path: Path, num_prompts: int, micro_batch: int, steps: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GRPOTrainer trains nothing and reports success. Found before the model, which is no model here."""
    sizes = {"per_device_train_batch_size": micro_batch, "steps_per_generation": steps}
    config = make_config(tmp_path, dynamic_sampling_rounds=rounds, **sizes)
    needed = micro_batch * steps // 4
    message = SIZE.format(num_prompts, needed, micro_batch, steps) + r" \(1\) .*`num_generations` \(4\).*Lower"
    with pytest.raises(ValueError, match=message):
        build(TreePOTrainer, "no/model", config, train_dataset=PROMPTS.select(range(num_prompts)))
    assert config.generation_batch_size == needed * config.num_generations  # TRL's number


def test_a_dataset_of_one_batch_is_trained(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path, max_steps=1), train_dataset=PROMPTS.select(range(2)))
    trainer.train()
    assert trainer.state.global_step == 1


def test_another_order_may_repeat_a_small_dataset(tmp_path: Path) -> None:
    class Repeating(TreePOTrainer):
        def get_train_dataloader(self) -> Any:
            rows: Any = [{"prompt": "w1"}] * 4 + [{"prompt": "w2"}] * 4
            return self.accelerator.prepare(DataLoader(rows, batch_size=8, collate_fn=list))

    trainer = build(Repeating, make_model(), make_config(tmp_path, max_steps=1), train_dataset=PROMPTS.select([0]))
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_stream_smaller_than_a_batch(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path), train_dataset=PROMPTS.select([0]).to_iterable_dataset())
    with pytest.raises(ValueError, match=r"made no step: it has not given the 2 prompts .* Check how the dataset is"):
        trainer.train()


class Stops(TrainerCallback):
    """Sets a field of the control at an event."""

    def __init__(self, event: str, field: str) -> None:
        def stop(args: Any, state: Any, control: Any, **_: Any) -> None:
            setattr(control, field, True)

        setattr(self, event, stop)


@pytest.mark.parametrize(
    ("event", "field"),
    [("on_substep_end", "should_training_stop"), ("on_step_begin", "should_training_stop")],
)
def test_a_training_may_be_stopped_before_its_first_step(tmp_path: Path, event: str, field: str) -> None:
    config = make_config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer = make_trainer(config, train_dataset=PROMPTS, callbacks=[Stops(event, field)])
    assert trainer.train().global_step == 0


def test_a_column_of_a_transform_is_a_column(tmp_path: Path) -> None:
    rows = PROMPTS.rename_column("prompt", "text").with_transform(lambda batch: {"prompt": batch["text"]})
    trainer = make_trainer(make_config(tmp_path, max_steps=1, remove_unused_columns=False), train_dataset=rows)
    assert trainer.train().global_step == 1


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"good": PROMPTS, "bad": d}], ids=["one", "dict"])
def test_an_empty_evaluation_dataset(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"The evaluation dataset has no rows.*leave it out"):
        make_trainer(make_config(tmp_path), eval_dataset=wrap(PROMPTS.select([])))


NO_PROMPTS: list[Any] = [
    *(None, {"role": "user", "content": "w1"}, [], ["w1"], [{"content": "w1"}]),
    [{"role": "user", "content": None}],  # a template would print None
]


@pytest.mark.parametrize("prompt", NO_PROMPTS, ids=repr)
def test_prompts_that_are_none(tmp_path: Path, prompt: Any) -> None:
    """The first row is looked at when the trainer is built, the others when they come."""
    message = r"A prompt of the dataset is .*It must be text, or a list of messages"
    with pytest.raises(ValueError, match=message):
        make_trainer(make_config(tmp_path), train_dataset=Dataset.from_dict({"prompt": [prompt] * 8}))
    late = stream_of({"prompt": "w1"}, {"prompt": prompt})
    trainer = make_trainer(make_config(tmp_path, shuffle_dataset=False), train_dataset=late)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_trainer_that_tokenizes_itself_takes_any_prompt(tmp_path: Path) -> None:
    class Tokenizing(TreePOTrainer):
        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            return [[10, number] for number in prompts], None, {}

        def _generate(self, prompts: list[Any]) -> Any:
            tokens, *_ = self._tokenize_prompts(prompts)
            completions, logps = self._generate_single_turn(tokens, None, {}, self.num_generations)
            return tokens, completions, None, ["w1"] * len(prompts), logps, {}, None, []

    numbers = Dataset.from_dict({"prompt": list(range(10, 18))})
    trainer = build(Tokenizing, make_model(), make_config(tmp_path, max_steps=1), train_dataset=numbers)
    assert trainer.train().global_step == 1


# Tokenizers


def tokenizer_with(**changes: Any) -> Any:
    tokenizer = make_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "model", "data", "message"),
    [
        ({"eos_token": None}, {}, PROMPTS, r"has no EOS token.*Set `processing_class.eos_token`"),
        ({"eos_token": None, "pad_token": None}, {}, PROMPTS, r"has no EOS token"),
        ({"chat_template": None}, {}, chat_prompts(8), r"no chat template. Set `processing_class.chat_template`"),
        ({"pad_token": "w59"}, {"vocab_size": 64}, PROMPTS, r"pad_token 'w59' has the id 64, but the model has 64"),
    ],
)
def test_tokenizers_that_do_not_go_with_model_or_data(
    tmp_path: Path, tokenizer: dict[str, Any], model: dict[str, Any], data: Dataset, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(
            TreePOTrainer,
            make_model(**model),
            make_config(tmp_path),
            train_dataset=data,
            processing_class=tokenizer_with(**tokenizer),
        )


def test_a_tokenizer_without_pad_token_pads_with_eos(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(pad_token=None)
    make_trainer(make_config(tmp_path), processing_class=tokenizer)
    assert tokenizer.pad_token == "<eos>"


def test_prompts_of_another_vocabulary(tmp_path: Path) -> None:
    trainer = build(TreePOTrainer, make_model(vocab_size=30), make_config(tmp_path), train_dataset=PROMPTS)
    with pytest.raises(RuntimeError, match=r"vocabulary of 30: the tokenizer does not belong to the model"):
        trainer.train()


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
