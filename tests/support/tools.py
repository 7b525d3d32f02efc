"""A tokenizer and a model that can call tools, tools, and an engine that plays turns from a script."""

import asyncio
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from trl.chat_template_utils import qwen3_chat_template

from tests.support.fakes import QueueEngine
from tests.support.models import make_model
from treepo_trl import TreePOConfig
from treepo_trl.engines import SegmentRequest, SegmentResult


WIDTH = 6
TEXT_OF_ANSWER = "<tool_response>\n"


def with_template(tokenizer: Tokenizer, *words: str, **options: str) -> PreTrainedTokenizerFast:
    """The tokenizer with Qwen3's special tokens, some other whole words, and its chat template."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **ends, **options)
    fast.clean_up_tokenization_spaces = False
    fast.chat_template = qwen3_chat_template
    return fast


def with_ends_of(tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]) -> Qwen3ForCausalLM:
    """A tiny model that ends and pads as a tokenizer does."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = make_model(**{**ends, **settings})
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def make_chat_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, with Qwen3's chat template, which TRL knows how to parse."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    return with_template(tokenizer, *words)


def make_chat_model(**changes: object) -> Qwen3ForCausalLM:
    """The tiny model with this tokenizer's vocabulary."""
    size = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    return with_ends_of(make_chat_tokenizer(), {**size, "max_position_embeddings": 4096, **changes})


CHARACTERS = "\nasitnuer12"


def make_letter_tokenizer() -> PreTrainedTokenizerFast:
    """
    A token per character, of which there are few: a random model with it writes tool calls now and then.

    What stands between one of `asi` and one of `nue` is the argument of `echo`.
    """
    vocabulary = ["<unk>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = with_template(tokenizer, unk_token="<unk>")
    fast.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "tool_calls": {
                "open_pattern": "[asi]",
                "close_pattern": "[nue]",
                "repeats": True,
                "content": "text",
                "transform": {"type": "function", "function": {"name": "echo", "arguments": {"text": "{content}"}}},
            },
            "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
        },
    }
    return fast


def make_letter_model(**changes: object) -> Qwen3ForCausalLM:
    """A tiny model with this tokenizer's vocabulary, whose turns are short."""
    tokenizer = make_letter_tokenizer()
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "initializer_range": 0.15}
    return with_ends_of(tokenizer, {**size, **changes})


def echo(text: str) -> str:
    """
    Says it twice.

    Args:
        text: What to say.
    """
    return text + text


# Tools


def add(a: int, b: int) -> int:
    """
    Adds two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


async def slow_mul(a: int, b: int) -> int:
    """
    Multiplies two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    await asyncio.sleep(0.005)
    return a * b


def boom() -> str:
    """Fails."""
    raise RuntimeError("out of order")


def long_text(words: int) -> str:
    """
    Gives a long text.

    Args:
        words: How many words.
    """
    return " ".join(["word"] * words)


TOOLS: list[Callable[..., Any]] = [add, slow_mul, boom, long_text]


def call(tool: str, **arguments: object) -> str:
    """A tool call as the model writes it."""
    return "<tool_call>\n" + json.dumps({"name": tool, "arguments": arguments}) + "\n</tool_call>"


FIRST = (
    *(f"Let me add. {call('add', a=a, b=b)}" for a in (1, 2) for b in (3, 4)),
    f"I do both. {call('slow_mul', a=2, b=5)}\n{call('add', a=7, b=8)}",
    f"And three. {call('add', a=1, b=1)}\n{call('slow_mul', a=3, b=5)}\n{call('boom')}",
    "It is 7.",
    call("boom"),
    call("nope", x=1),
    call("add", a=1),
    "Bad <tool_call>{oops</tool_call>",
    call("long_text", words=30),
    call("long_text", words=200),
)
LATER = (
    "So the answer is 7.",
    "So the answer is 12, which the tool has said. " + "Done. " * 20,
    f"Once more. {call('add', a=5, b=6)}",
    call("slow_mul", a=3, b=3),
    call("long_text", words=60),
)


class ScriptedAgent(QueueEngine):
    """
    Plays turns: the first from `first`, the next ones from `later`.

    What it continues a sequence with depends on the seed, the sequence and how often it was asked for before, and not
    on the order of requests of other sequences.
    """

    def __init__(self, seed: int = 0, first: Sequence[str] = FIRST, later: Sequence[str] = LATER) -> None:
        super().__init__()
        self.seed, self.first, self.later = seed, first, later
        self.tokenizer = make_chat_tokenizer()
        self._asked: dict[tuple[int, ...], int] = {}
        self.num_decoded = 0

    def answer(self, request: SegmentRequest) -> SegmentResult:
        key = tuple(request.token_ids)
        count = self._asked[key] = self._asked.get(key, 0) + 1
        rng = random.Random(hashlib.sha256(repr((self.seed, key, count)).encode()).digest())
        text = self.tokenizer.decode(request.token_ids)
        begun = text.rsplit("<|im_start|>assistant\n", 1)[1]
        is_first = TEXT_OF_ANSWER not in text
        whole = [turn + "<|im_end|>" for turn in (self.first if is_first else self.later)]
        options = [turn for turn in whole if turn.startswith(begun)]
        assert options, f"no turn of the script begins with {begun!r}"
        rest = self.tokenizer(rng.choice(options)[len(begun) :], add_special_tokens=False)["input_ids"]
        tokens = rest[: request.max_tokens]
        self.num_decoded += len(tokens)
        logprobs = [-0.5 - 0.01 * (token % 7) for token in tokens]
        reason = "stop" if tokens[-1] == self.tokenizer.eos_token_id else "length"
        return SegmentResult(request.request_id, tokens, logprobs, reason)


def with_agent(trainer: Any, agent: QueueEngine) -> Any:
    """The trainer, whose engine is an agent from now on."""
    trainer.policy_engine.engine = trainer.sampler.engine = agent
    trainer.policy_engine.engine.model = None
    return trainer


# Trainings


def questions(count: int = 8) -> Dataset:
    return Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": f"What is {i} + 4?"}] for i in range(count)], "start": range(count)}
    )


def talk_reward(completions: list[list[dict[str, Any]]], **_: Any) -> list[float]:
    """Differs between most conversations."""
    return [0.1 * len(each) + 0.001 * len(str(each[-1]["content"])) for each in completions]


TOOL_SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": WIDTH,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 2,
    "num_generations": WIDTH,
    "max_completion_length": 700,
    "max_tool_calling_iterations": 3,
}
TREE_SETTINGS: dict[str, Any] = {
    "segment_length": 40,
    "branch_schedule": "early",
    "fallback_policy": "random",
    "advantage_estimator": "treepo",
    "leaf_weighting": "uniform",
}


def tool_config(folder: Path, **changes: Any) -> TreePOConfig:
    from tests.support.trainers import SETTINGS

    settings = {**SETTINGS, **TOOL_SETTINGS, **TREE_SETTINGS, **changes}
    return TreePOConfig(output_dir=str(folder), **settings)


def tool_trainer(cls: type, config: Any, agent: QueueEngine | None = None, **changes: Any) -> Any:
    """A trainer with the tools of this file; with an agent its engine is that."""
    from tests.support.trainers import build

    arguments = {
        "reward_funcs": talk_reward,
        "train_dataset": questions(),
        "processing_class": make_chat_tokenizer(),
        "tools": TOOLS,
        **changes,
    }
    model = arguments.pop("model", None) or make_chat_model()
    trainer = build(cls, model, config, **arguments)
    return trainer if agent is None else with_agent(trainer, agent)
