"""
What a small model learns about a tool that it needs, from equally many executed calls: trees against GRPOTrainer.

    python -m benchmarks.tool_learning                                            # three seeds of both trainers
    python -m benchmarks.tool_learning --seeds 1 --calls 300 --warm_steps 50      # a quick look

The task is `47*38*29`. A Llama with a token per character cannot do it. It can call `mul` twice, and say what the
second answer is. A warm start on conversations teaches it the form of a call, and to call only now and then. One call
in ten is copied wrongly. Rewards are 1 for the product, else 0.

A run stops when its calls are used up. A call that paths share runs once and counts once. Held-out reward is that of
256 tasks, one completion each at temperature 1, by TRL's own loop for both. Each run has a folder; a finished one is
not repeated.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer

from benchmarks.common import OUTPUTS, device_name, make_parser, table_head, table_row
from treepo_trl import TreePOConfig, TreePOTrainer


CALLS, SLIPS = 0.5, 0.1
"""How often a demonstration calls where it should, and how often a call has a wrong digit."""
TEMPLATE = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{ m.content + '\n' }}"
    "{%- elif m.role == 'tool' %}{{ '<t>' + m.content + '\n' }}"
    "{%- else %}{{ '<a>' + (m.content or '') }}{%- for call in m.tool_calls or [] %}"
    "{{ '[' + call.function.name + ':' }}"
    "{%- for name, value in call.function.arguments.items() %}{{ name + '=' + value | string }}{%- endfor %}"
    "{{ ']' }}{%- endfor %}{{ '<eos>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<a>' }}{%- endif %}"
)
PARSER: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<a>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\[mul:x=",
            "close_pattern": r"\]",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "mul", "arguments": {"x": "{content}"}}},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}
TREES: dict[str, Any] = {"segment_length": 8, "max_tool_calling_iterations": 3}
ARMS = {
    "GRPOTrainer": None,
    "trees, early": {**TREES, "branch_schedule": "early"},
    "trees, the defaults": TREES,
}


def mul(x: str) -> int:
    """
    Multiplies two numbers.

    Args:
        x: The numbers, with a star between them.
    """
    a, b = x.split("*")
    return int(a) * int(b)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A token per character, and the marks of turns."""
    characters = ["<unk>", *"mulx:=[]*\n0123456789"]
    tokenizer = Tokenizer(models.WordLevel({each: i for i, each in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()  # no space between characters
    marks = ("<eos>", "<pad>", "<a>", "<t>")
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    fast.chat_template, fast.response_template = TEMPLATE, PARSER
    return fast


def tasks(size: int, seed: int) -> Dataset:
    """Products of three numbers, with the columns `prompt` and `answer`."""
    rng = random.Random(seed)
    numbers = [(rng.randint(32, 99), rng.randint(32, 99), rng.randint(11, 99)) for _ in range(size)]
    prompts = [[{"role": "user", "content": "{}*{}*{}".format(*each)}] for each in numbers]
    return Dataset.from_dict({"prompt": prompts, "answer": [str(a * b * c) for a, b, c in numbers]})


def product_reward(completions: list[list[dict[str, Any]]], answer: list[str], **_: Any) -> list[float]:
    """1 for a conversation that ends in the product."""
    last = [messages[-1] for messages in completions]
    said = [each["content"] if each["role"] == "assistant" else None for each in last]
    return [float(text == product) for text, product in zip(said, answer, strict=True)]


# The warm start


def demonstration(rng: random.Random) -> list[tuple[str, bool]]:
    """Parts of a conversation, and whether the model says them."""
    a, b, c = rng.randint(32, 99), rng.randint(32, 99), rng.randint(11, 99)
    parts, known = [(f"{a}*{b}*{c}\n<a>", False)], a
    for factor in (b, c):
        if rng.random() >= CALLS:
            return [*parts, (f"{rng.randint(10_000, 970_000)}<eos>", True)]
        asked = f"{known}*{factor}"
        if rng.random() < SLIPS:
            place = rng.choice([i for i, character in enumerate(asked) if character.isdigit()])
            asked = f"{asked[:place]}{rng.randint(1, 9)}{asked[place + 1 :]}"
        known = mul(asked)
        parts += [(f"[mul:x={asked}]<eos>", True), (f"<t>{known}\n<a>", False)]
    return [*parts, (f"{known}<eos>", True)]


def warm_start(folder: Path, steps: int) -> None:
    """Train the small Llama on demonstrations."""
    tokenizer, rng = character_tokenizer(), random.Random(1)
    rows: list[dict[str, list[int]]] = []
    for _ in range(64 * steps):
        parts = [(tokenizer(text)["input_ids"], is_said) for text, is_said in demonstration(rng)]
        labels = [token if is_said else -100 for tokens, is_said in parts for token in tokens]
        rows.append({"input_ids": [token for tokens, _ in parts for token in tokens], "labels": labels})
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    args = TrainingArguments(
        output_dir=str(folder.with_name(folder.name + "-sft")),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    model = LlamaForCausalLM(config)
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    Trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), data_collator=collator).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# Runs


@dataclass
class CallBudget(TrainerCallback):
    """Counts executed calls, has the held-out reward measured at equal distances, and stops when they are used up."""

    budget: int
    num_points: int
    num_rows: int
    calls: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    curve: list[dict[str, float]] = field(default_factory=list)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Count a step, or take a measurement."""
        logs = given["logs"]
        if "eval_reward" in logs:
            seconds = time.perf_counter() - self.started
            self.curve.append({"calls": self.calls, "reward": logs["eval_reward"], "seconds": seconds})
        elif "reward" in logs:
            every = self.budget / self.num_points
            before = self.calls // every
            self.calls += logs.get("tree/tool_calls", logs["tools/call_frequency"] * self.num_rows)
            control.should_evaluate = self.calls // every > before
            control.should_training_stop = self.calls >= self.budget


def run(arm: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run; its result is written to `result.json`."""
    shape = ARMS[arm]
    settings = {
        "output_dir": str(folder),
        "seed": seed,
        "max_steps": 200,  # the callback stops before, unless the model gives calling up
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 256,
        "num_generations": 8,
        "num_generations_eval": 1,
        "max_completion_length": 96,
        "max_tool_calling_iterations": 3,
        "learning_rate": options.rate,
        "lr_scheduler_type": "constant",
        "scale_rewards": "batch",
        "eval_strategy": "steps",
        "eval_steps": 200,
        "eval_on_start": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    cls: Any = GRPOTrainer if shape is None else TreePOTrainer
    config: Any = GRPOConfig if shape is None else TreePOConfig
    trainer = cls(
        model=str(options.out / f"warm-start-{options.warm_steps}"),
        reward_funcs=product_reward,
        args=config(**{**settings, **(shape or {})}),
        train_dataset=tasks(4096, 100 + seed),
        eval_dataset=tasks(256, 2),
        tools=[mul],
    )
    budget = CallBudget(options.calls, options.points, 64)
    trainer.add_callback(budget)
    trainer.train()
    result = {"curve": budget.curve, "steps": trainer.state.global_step, "device": device_name()}
    (folder / "result.json").write_text(json.dumps(result))
    return result


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--arms", nargs="+", default=["GRPOTrainer", "trees, early"], choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=1200, help="Executed calls of a run.")
    parser.add_argument("--points", type=int, default=3, help="Measurements of a run, besides the first.")
    parser.add_argument("--rate", type=float, default=5e-4, help="Learning rate.")
    parser.add_argument("--warm_steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=OUTPUTS / "tool-learning", help="Folder of the runs.")
    options = parser.parse_args()
    start = options.out / f"warm-start-{options.warm_steps}"
    if not (start / "config.json").exists():
        warm_start(start, options.warm_steps)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    runs = [(seed, arm) for seed in range(options.seeds) for arm in options.arms]
    for seed, arm in runs:
        name = f"{arm}-{options.calls}-{options.points}-{options.rate:g}-{options.warm_steps}-{seed}"
        folder = options.out / name.replace(", ", "-").replace(" ", "-")
        file = folder / "result.json"
        found[arm].append(json.loads(file.read_text()) if file.exists() else run(arm, seed, options, folder))
    calls = np.linspace(0, options.calls, options.points + 1)
    print(table_head("trainer", *(f"{each:.0f} calls" for each in calls), "steps", "s, with measuring"))
    for arm, results in found.items():
        rewards = np.array([_rewards_at(calls, result["curve"]) for result in results])
        cells = [f"{column.mean():.2f} ({column.min():.2f} to {column.max():.2f})" for column in rewards.T]
        steps, seconds = (np.mean(values) for values in zip(*map(_cost, results), strict=True))
        print(table_row(arm, *cells, f"{steps:.0f}", f"{seconds:.0f}"))


def _rewards_at(calls: np.ndarray, curve: list[dict[str, float]]) -> np.ndarray:
    """Held-out reward at these numbers of calls, on lines between the measurements."""
    return np.interp(calls, [point["calls"] for point in curve], [point["reward"] for point in curve])


def _cost(result: dict[str, Any]) -> tuple[float, float]:
    return result["steps"], result["curve"][-1]["seconds"]


if __name__ == "__main__":
    main()
