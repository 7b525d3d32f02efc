# `make setup` installs what this needs; the package with the small model goes in without its own requirements.

"""
SmolLM2-135M-Instruct guesses a number: an environment in trees, on a CPU.

    python examples/scripts/guessing_game.py --max_steps 10

The game has `_fork`, so a tree resets it once, and every path that guesses gets a copy in the state of its prefix. It
owns its reward too. Writes the model and the trees to `--output_dir`.
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
from treepo_trl.quickstart import small_model


LARGEST = 15


@dataclass
class GameConfig(TreePOConfig):
    """Settings of the training; those that differ from the package's are here."""

    output_dir: str | None = field(default="outputs/guessing-game")
    use_cpu: bool = field(default=not torch.cuda.is_available())
    bf16: bool = field(default=torch.cuda.is_available())
    learning_rate: float = field(default=2e-5)
    per_device_train_batch_size: int = field(default=16)
    num_generations: int = field(default=8)
    max_completion_length: int = field(default=320)
    segment_length: int | None = field(default=16)
    max_tool_calling_iterations: int | None = field(default=4)
    max_steps: int = field(default=10)
    logging_steps: float = field(default=1)
    report_to: str = field(default="none")
    log_trees: bool = field(default=True)


class GuessingGame:
    """A number between 1 and 15, to be found with few guesses."""

    def reset(self, number: int, **_: object) -> str:
        """Start a game; the number comes from the example, so every reset of it is the same game."""
        self.number, self.guesses = number, list[int]()
        return f"I think of a number between 1 and {LARGEST}. Guess it."

    def guess(self, number: int) -> str:
        """
        Guesses the number.

        Args:
            number: The guess.
        """
        self.guesses.append(int(number))
        if self.guesses[-1] == self.number:
            return "Yes."
        return "It is larger." if self.guesses[-1] < self.number else "It is smaller."

    def get_reward(self) -> float:
        """1 for the number, less a tenth per guess; otherwise how near the best guess was."""
        if not self.guesses:
            return 0.0
        if self.number in self.guesses:
            return 1.0 - 0.1 * len(self.guesses)
        return 0.5 * (1 - min(abs(each - self.number) for each in self.guesses) / LARGEST)

    def _fork(self) -> "GuessingGame":
        other = GuessingGame()
        other.number, other.guesses = self.number, list(self.guesses)
        return other


def games(count: int, seed: int) -> Dataset:
    """Games with the columns `prompt` and `number`; `reset` gets the row and says the rest of the prompt."""
    rng = random.Random(seed)
    prompt: list[dict[str, Any]] = []
    for number, middle, answer in ((7, 5, "It is larger."), (3, 8, "It is smaller."), (12, 6, "It is larger.")):
        prompt += [
            {"role": "user", "content": f"I think of a number between 1 and {LARGEST}. Guess it."},
            _guess(middle),
            {"role": "tool", "name": "guess", "content": answer},
            _guess(number),
            {"role": "tool", "name": "guess", "content": "Yes."},
            {"role": "assistant", "content": f"It is {number}."},
        ]
    prompt.append({"role": "user", "content": ""})
    return Dataset.from_list([{"prompt": prompt, "number": rng.randint(1, LARGEST)} for _ in range(count)])


def _guess(number: int) -> dict[str, Any]:
    called = {"type": "function", "function": {"name": "guess", "arguments": {"number": number}}}
    return {"role": "assistant", "content": "", "tool_calls": [called]}


if __name__ == "__main__":
    training_args, model_args = TrlParser((GameConfig, ModelConfig)).parse_args_and_config()
    model_path = model_args.model_name_or_path or small_model(".cache/smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = qwen2_5_chat_template
    num_prompts = training_args.max_steps * training_args.generation_batch_size // training_args.num_generations
    trainer = TreePOTrainer(
        model=model_path,
        args=training_args,
        train_dataset=games(num_prompts, training_args.seed),
        processing_class=tokenizer,
        environment_factory=GuessingGame,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    for log in trainer.state.log_history:
        if "reward" in log:
            print(
                f"reward {log['reward']:.2f}, guesses per completion {log['tools/call_frequency']:.2f}, "
                f"executed {log['tree/tool_calls']:.0f}, resets {log['environment/resets']:.0f}"
            )
