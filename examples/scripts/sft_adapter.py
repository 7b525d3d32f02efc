# /// script
# dependencies = ["treepo-trl[quickstart]"]
# ///

"""
A small SFT adapter and tasks to go on with, by TRL's `SFTTrainer`: the first step of `life_of_an_adapter.sh`.

    python examples/scripts/sft_adapter.py --output_dir sft --max_steps 20

Writes the adapter, and the files `tasks.jsonl` and `held_out.jsonl` beside its folder.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer, TrlParser

from treepo_trl.quickstart import NUM_HELD_OUT, addition_tasks, small_model


@dataclass
class AdapterArguments:
    """What this script adds to the arguments of TRL's SFT."""

    model_folder: str = field(
        default=".cache/smollm2-135m-instruct", metadata={"help": "Where the small model is put."}
    )
    num_tasks: int = field(default=200, metadata={"help": "Tasks to train on."})


def worked(prompt: list[dict[str, str]]) -> str:
    """The sum of the last message, step by step: `3 + 4 + 5` is `3 + 4 = 7, 7 + 5 = 12`."""
    first, *others = map(int, prompt[-1]["content"].split(" + "))
    lines = []
    for number in others:
        lines.append(f"{first} + {number} = {first + number}")
        first += number
    return ", ".join(lines)


if __name__ == "__main__":
    script_args, training_args = TrlParser((AdapterArguments, SFTConfig)).parse_args_and_config()
    folder = Path(training_args.output_dir).parent
    for file in (folder / "tasks.jsonl", folder / "held_out.jsonl"):
        if file.exists():
            raise SystemExit(f"{file} exists already. Remove it, or name an `--output_dir` in another folder.")
    tasks, held_out = addition_tasks(script_args.num_tasks, NUM_HELD_OUT, training_args.seed)
    tasks.to_json(folder / "tasks.jsonl")
    held_out.to_json(folder / "held_out.jsonl")
    answers = [[{"role": "assistant", "content": worked(prompt)}] for prompt in tasks["prompt"]]
    trainer = SFTTrainer(
        model=small_model(script_args.model_folder),
        args=training_args,
        train_dataset=Dataset.from_dict({"prompt": tasks["prompt"], "completion": answers}),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
