"""
What `benchmarks.learning` trains on: three families of tasks, and the models that learn them.

`gcd` and `products` are for a Llama of 0.8 million parameters with a token per character. TRL's `SFTTrainer` first
trains it on demonstrations of the family. One step in five of a demonstration is wrong, and the rest follows from it.
So the model learns to solve the task and to slip, and training has something to improve. `addition` is the quickstart:
SmolLM2-135M-Instruct with LoRA and one worked example in the prompt, without a warm start.
"""

import random
from collections.abc import Callable
from pathlib import Path

import reasoning_gym
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from treepo_trl.quickstart import addition_tasks


SLIPS = 0.2
"""Of a demonstration's steps, which goes on with the wrong result."""
Slip = Callable[[], int]
Rows = list[dict[str, str]]


def gcd(entry: dict, slip: Slip) -> tuple[str, str]:
    """`96,64` and Euclid's `96%64=32 64%32=0 32`."""
    a, b = entry["metadata"]["numbers"]
    short, steps = f"{a},{b}", []
    while b:
        rest = (a % b + slip()) % b
        steps.append(f"{a}%{b}={rest}")
        a, b = b, rest
    return short, " ".join([*steps, str(a)])


def products(entry: dict, slip: Slip) -> tuple[str, str]:
    """`47*38` and `47*30=1410 47*8=376 1410+376=1786`."""
    a, b = map(int, entry["metadata"]["expression"].split(" * "))
    tens, units = a * (b - b % 10) + slip(), a * (b % 10) + slip()
    total = tens + units + slip()
    return f"{a}*{b}", f"{a}*{b - b % 10}={tens} {a}*{b % 10}={units} {tens}+{units}={total}"


WORKED = {
    "gcd": (gcd, {"min_numbers": 2, "max_numbers": 2, "min_value": 10, "max_value": 100}),
    "products": (products, {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}),
}
"""Short form and worked solution of a task, and the options of its generator."""
TASKS = [*WORKED, "addition"]


def worked_rows(task: str, size: int, seed: int) -> Rows:
    """Short form, question for people, a demonstration that slips now and then, and the answer."""
    worked, options = WORKED[task]
    rng = random.Random(seed)
    rows: Rows = []
    for entry in reasoning_gym.create_dataset(task, size=size, seed=seed, **options):
        short, demonstration = worked(entry, lambda: rng.randint(1, 9) if rng.random() < SLIPS else 0)
        question = entry["question"]
        rows.append(
            {"prompt": short + "\n", "question": question, "solution": demonstration, "answer": entry["answer"]}
        )
    return rows


def datasets_of(task: str, num_held_out: int, seed: int, is_short: bool = True) -> tuple[Dataset, Dataset]:
    """
    Tasks to train on, by seed, and the same held-out ones for every seed; columns `prompt` and `answer`.

    The prompt is the short form, or a conversation with the question for a model of its own.
    """
    if task == "addition":
        _, held_out = addition_tasks(1, num_held_out, 2)
        train, _ = addition_tasks(4096, 1, 100 + seed)
        known = {row["prompt"][-1]["content"] for row in held_out}
        return train.filter(lambda row: row["prompt"][-1]["content"] not in known), held_out
    sets: list[Dataset] = []
    for size, each_seed in ((4096, 100 + seed), (num_held_out, 2)):
        rows = worked_rows(task, size, each_seed)
        prompts = [row["prompt"] if is_short else [{"role": "user", "content": row["question"]}] for row in rows]
        sets.append(Dataset.from_dict({"prompt": prompts, "answer": [row["answer"] for row in rows]}))
    return sets[0], sets[1]


def lora_of(task: str) -> LoraConfig | None:
    """The quickstart's adapter for SmolLM2; the small Llama is trained whole."""
    if task != "addition":
        return None
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character of the short tasks."""
    vocabulary = ["<eos>", "<pad>", "<unk>", *"0123456789+-*%=, \n"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()  # no space between characters
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )


def warm_start(task: str, folder: Path, steps: int) -> None:
    """Train the small Llama on demonstrations: it learns the task and to slip as often as they do."""
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=tokenizer.get_vocab()["<eos>"],
        pad_token_id=tokenizer.get_vocab()["<pad>"],
        bos_token_id=None,
    )
    rows = [{"prompt": row["prompt"], "completion": row["solution"]} for row in worked_rows(task, 64 * steps, seed=1)]
    args = SFTConfig(
        output_dir=str(folder.with_name(folder.name + "-sft")),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))
