# `make setup` installs what this needs; the package with the small model goes in without its own requirements.

"""
Teach SmolLM2-135M-Instruct to multiply with a calculator: a tool in trees, with LoRA, on a CPU.

    python examples/scripts/calculator.py --max_steps 20

A shared call runs once, its answer is prefilled once, and the segments before and behind it get advantages of their
own. Writes the model and the trees to `--output_dir`. The model was not trained on tools: it gets the chat template of
Qwen2.5, and worked examples in its prompts.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import ModelConfig, TrlParser, get_peft_config
from trl.chat_template_utils import qwen2_5_chat_template

from treepo_trl import TreePOConfig, TreePOTrainer
from treepo_trl.quickstart import last_number, small_model


@dataclass
class CalculatorConfig(TreePOConfig):
    """Settings of the training; those that differ from the package's are here."""

    output_dir: str | None = field(default="outputs/calculator")
    use_cpu: bool = field(default=not torch.cuda.is_available())
    bf16: bool = field(default=torch.cuda.is_available())
    learning_rate: float = field(default=2e-4)
    per_device_train_batch_size: int = field(default=16)
    num_generations: int = field(default=8)
    max_completion_length: int = field(default=96)
    segment_length: int | None = field(default=12)
    max_tool_calling_iterations: int | None = field(default=2)
    max_steps: int = field(default=20)
    logging_steps: float = field(default=1)
    report_to: str = field(default="none")
    log_trees: bool = field(default=True)


def multiply(a: int, b: int) -> int:
    """
    Multiplies two whole numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


def question(a: int, b: int) -> list[dict[str, Any]]:
    """A prompt with worked examples."""
    messages: list[dict[str, Any]] = []
    for x, y in ((31, 27), (45, 62), (18, 93)):
        called = {"type": "function", "function": {"name": "multiply", "arguments": {"a": x, "b": y}}}
        messages += [
            {"role": "user", "content": f"What is {x} times {y}?"},
            {"role": "assistant", "content": "", "tool_calls": [called]},
            {"role": "tool", "name": "multiply", "content": str(x * y)},
            {"role": "assistant", "content": str(x * y)},
        ]
    return [*messages, {"role": "user", "content": f"What is {a} times {b}?"}]


def tasks(count: int, seed: int) -> Dataset:
    """Products of two-digit numbers, with the columns `prompt` and `answer`."""
    rng = random.Random(seed)
    pairs = [(rng.randint(11, 99), rng.randint(11, 99)) for _ in range(count)]
    return Dataset.from_list([{"prompt": question(a, b), "answer": a * b} for a, b in pairs])


def product_reward(completions: list[list[dict[str, Any]]], answer: list[int], **_: Any) -> list[float]:
    """1 for a conversation that ends in the product; a tenth for a call whose answer is the product."""
    rewards: list[float] = []
    for messages, product in zip(completions, answer, strict=True):
        said = messages[-1]["role"] == "assistant" and last_number(messages[-1]["content"]) == str(product)
        was_told = any(message["role"] == "tool" and message["content"] == str(product) for message in messages)
        rewards.append(max(float(said), 0.1 * was_told))
    return rewards


if __name__ == "__main__":
    training_args, model_args = TrlParser((CalculatorConfig, ModelConfig)).parse_args_and_config()
    model_path = model_args.model_name_or_path or small_model(".cache/smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = qwen2_5_chat_template
    num_prompts = training_args.max_steps * training_args.generation_batch_size // training_args.num_generations
    trainer = TreePOTrainer(
        model=model_path,
        reward_funcs=product_reward,
        args=training_args,
        train_dataset=tasks(num_prompts, training_args.seed),
        processing_class=tokenizer,
        tools=[multiply],
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    for log in trainer.state.log_history:
        if "reward" in log:
            print(
                f"reward {log['reward']:.2f}, calls per completion {log['tools/call_frequency']:.2f}, "
                f"executed {log['tree/tool_calls']:.0f}"
            )
