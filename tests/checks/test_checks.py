"""What the trainer refuses, and that it says so at construction."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import GRPOConfig

from tests.support.models import make_model, make_tokenizer
from tests.support.trainers import SETTINGS, build, change, chat_prompts, make_config, plain_prompts
from treepo_trl import TreePOConfig, TreePOTrainer
from treepo_trl.checks import check_arguments


PROMPTS = plain_prompts(8)


def make_trainer(config: TreePOConfig, **arguments: Any) -> TreePOTrainer:
    return build(TreePOTrainer, make_model(), config, **arguments)


def test_plain_grpo_config(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"`args` is a `GRPOConfig`\. Pass a `TreePOConfig`"):
        build(TreePOTrainer, make_model(), GRPOConfig(output_dir=str(tmp_path), **SETTINGS))


IMAGES = "image prompts are not supported yet.*Remove the column"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
        (False, {"do_sample": False}, "has do_sample, which .* and `do_sample=True`"),
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
    monkeypatch.setattr("treepo_trl.checks.arguments.is_vllm_available", lambda: True)
    with pytest.raises(ValueError, match=message):
        make_trainer(make_config(tmp_path, use_vllm=use_vllm, generation_kwargs=kwargs))


@pytest.mark.parametrize("kwargs", [{"do_sample": True}, {"num_beams": 3}], ids=repr)
def test_generation_kwargs_that_vllm_refuses(
    tmp_path: Path, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setattr("treepo_trl.checks.arguments.is_vllm_available", lambda: True)
    with pytest.raises(
        ValueError, match=rf"(?s)`generation_kwargs` is .*{next(iter(kwargs))}.* `SamplingParams` refuses: .*Remove"
    ):
        make_trainer(make_config(tmp_path, use_vllm=True, generation_kwargs=kwargs))


def test_vllm_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treepo_trl.checks.arguments.is_vllm_available", lambda: True)
    with pytest.raises(ValueError, match=r"`vllm_structured_outputs_regex` is not supported.*Leave it out"):
        make_trainer(make_config(tmp_path, use_vllm=True, vllm_structured_outputs_regex="a+"))


def test_no_tools_are_no_tools(tmp_path: Path) -> None:
    check_arguments(make_config(tmp_path), [], None, None)


def test_known_generation_kwargs_are_used(tmp_path: Path) -> None:
    config = make_config(tmp_path, generation_kwargs={"top_k": 3, "min_p": 0.1, "do_sample": True})
    engine: Any = make_trainer(config).sampler.engine
    assert (engine.options.top_k, engine.options.min_p) == (3, 0.1)


def test_vllm_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treepo_trl.checks.arguments.is_vllm_available", lambda: False)
    with pytest.raises(
        ImportError, match=r"`use_vllm=True`, but vLLM is not installed.*pip install treepo-trl\[vllm\]"
    ):
        make_trainer(make_config(tmp_path, use_vllm=True))


def test_a_logger_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is loaded, which transformers does first."""
    monkeypatch.setattr("treepo_trl.checks.arguments.get_available_reporting_integrations", lambda: ["trackio"])
    with pytest.raises(ValueError, match=r"`report_to` has wandb, which is not installed"):
        make_trainer(make_config(tmp_path, report_to=["trackio", "wandb", "flyte", "azure_ml"]))


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


# Adapters


VIRTUAL_TOKENS = (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig)


@pytest.mark.parametrize("use_vllm", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", VIRTUAL_TOKENS)
def test_virtual_tokens_are_refused_by_both_engines(
    tmp_path: Path, kind: Any, wrapped: bool, use_vllm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treepo_trl.checks.arguments.is_vllm_available", lambda: True)
    adapter = kind(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model, given = (get_peft_model(make_model(), adapter), None) if wrapped else (make_model(), adapter)
    with pytest.raises(ValueError, match=r"_TUNING, which puts virtual tokens .* LoRA .* or use `GRPOTrainer`"):
        build(TreePOTrainer, model, make_config(tmp_path, use_vllm=use_vllm), peft_config=given)


@pytest.mark.parametrize("kind", VIRTUAL_TOKENS)
def test_with_virtual_tokens_a_row_depends_on_its_padding(kind: Any) -> None:
    """The reason: on the base it does not."""

    def logprobs(model: Any, padding: int) -> torch.Tensor:
        rows = torch.tensor([[1] * padding + [10, 11, 12]])
        mask = (torch.arange(rows.size(1)) >= padding).long()[None]
        with torch.no_grad():
            return model(input_ids=rows, attention_mask=mask).logits[:, -1].log_softmax(-1)  # as TRL forwards rows

    base = make_model().eval()
    torch.testing.assert_close(logprobs(base, 4), logprobs(base, 0))
    model = get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    assert (logprobs(model, 4) - logprobs(model, 0)).abs().max() > 0.5


@pytest.mark.parametrize(
    "adapter",
    [
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
    ],
    ids=["IA3", "LoHa"],
)
def test_other_adapters_are_trained_with_transformers(tmp_path: Path, adapter: Any) -> None:
    trainer = make_trainer(make_config(tmp_path, max_steps=1), peft_config=adapter)
    trainer.train()
    assert change(trainer) > 0


def test_an_adapter_that_cannot_be_merged_does_not_reach_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treepo_trl.checks.arguments.is_vllm_available", lambda: True)
    adapter = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
    with pytest.raises(ValueError, match=r"ADAPTION_PROMPT: vLLM serves LoRA .*Leave `use_vllm` out, or change the"):
        make_trainer(make_config(tmp_path, use_vllm=True, vllm_lora_sync="merge"), peft_config=adapter)


def test_adapter_is_checked_by_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treepo_trl.checks.arguments.is_vllm_available", lambda: True)
    config = make_config(tmp_path, use_vllm=True)
    with pytest.raises(ValueError, match=r"`use_dora=True`.*vllm_lora_sync='merge'"):
        make_trainer(config, peft_config=LoraConfig(use_dora=True, target_modules=["q_proj"]))


def test_adapter_is_not_checked_without_vllm(tmp_path: Path) -> None:
    make_trainer(make_config(tmp_path), peft_config=LoraConfig(use_dora=True, target_modules=["q_proj"]))
