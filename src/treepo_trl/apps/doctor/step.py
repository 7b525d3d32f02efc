"""
The child process of the small step: `python -m treepo_trl.apps.doctor.step RECIPE RESULTS`.

The trainer itself makes the step, with its engine, and with a difference between engine and policy as an error. A line
is appended to RESULTS after each check, so that the parent knows in which one the process has ended.
"""

import json
import pickle
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import ModelConfig, get_quantization_config

from treepo_trl.policy.starting_adapter import new_adapter_config
from treepo_trl.treepo_config import TreePOConfig
from treepo_trl.treepo_trainer import TreePOTrainer

from .checks import half_type
from .child import step_names
from .findings import BrokenError, CannotRunError, finding_of
from .recipe import Recipe
from .remedies import engine_error
from .versions import how_to_install


_PROMPT = "Add the numbers and say how you did it: 3 + 4 + 5 ="
_NUM_LEAVES, _COMPLETION, _SEGMENT = 8, 32, 8
_SHARE = 0.3  # of the card's memory, for the engine
_CONTEXT = 512  # tokens that the engine can hold in one sequence
_LARGEST_ERROR = 0.02  # relative, of a 4-bit layer: rounding of 16-bit inputs


_TRAINING_SETTINGS = (
    *("vllm_gpu_memory_utilization", "vllm_engine_kwargs", "vllm_lora_sync", "vllm_base_weights"),
    *("vllm_share_base_weights", "vllm_enable_sleep_mode", "vllm_sleep_keeps_weights"),
    *("tree_packing", "gradient_checkpointing", "optim"),
)
_MODEL_SETTINGS = (
    *("dtype", "attn_implementation", "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "use_dora"),
    *("use_rslora", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"),
)
"""What of a recipe the step takes over. Layers in 8 bits round by what else is in the batch, so they are left out."""
_OF_ADAPTERS = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
"""Options of a new adapter, and what they are called in an adapter's config."""


class SmallStep:
    """One step of eight leaves as the trainer makes it; `folder` is for what the trainer writes."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.trainer: TreePOTrainer | None = None

    def check_engine(self) -> str:
        """Build the trainer, which loads the model and starts the engine."""
        started = time.perf_counter()
        settings, note = _model_settings(self.recipe), ""
        try:
            try:
                self.trainer = _build(self.recipe, settings, self.folder)
            except ValueError as error:
                is_stand_in = self.recipe.model.model_name_or_path != self.recipe.step_model
                if not (is_stand_in and "Target modules" in str(error)):  # PEFT's words
                    raise
                wanted = settings["lora_target_modules"]
                names = wanted if isinstance(wanted, str) else ", ".join(sorted(wanted))
                note = f"; LoRA on all linear layers, as this model has no {names}"
                settings["lora_target_modules"] = ["all-linear"]
                self.trainer = _build(self.recipe, settings, self.folder)
        except Exception as error:  # vLLM's own classes differ between its versions
            raise engine_error(error, self.recipe) from error
        name = "vLLM" if self.recipe.uses_vllm else "the transformers engine"
        return f"{name} started in {time.perf_counter() - started:.0f} s{note}"

    def check_step(self) -> str:
        """Sample a tree, compare engine and policy, packed rows and plain ones, and update."""
        trainer = self.trainer
        if trainer is None:
            raise CannotRunError("there is no engine")
        try:
            trainer.train()
        except Exception as error:  # of torch, vLLM, bitsandbytes or the trainer
            raise engine_error(error, self.recipe) from error
        log = trainer.state.log_history[0]
        seen = f"a tree of {_NUM_LEAVES} leaves was sampled and trained on"
        if trainer.packed_forward is not None and trainer.packed_forward.checked:
            backends = ", ".join(backend for _, backend in trainer.packed_forward.checked)
            seen += f"; packed rows ({backends}) give what plain rows give"
        if "engine/logp_difference_mean" in log:
            seen += f"; engine and policy differ by {log['engine/logp_difference_mean']:.4f} nats per token"
            travels = self.recipe.has_adapter and trainer.args.vllm_lora_sync == "adapter"
            seen += ", and by rounding alone with a moved adapter" if travels else ""
        return seen


def _build(recipe: Recipe, model_settings: dict[str, Any], folder: Path) -> TreePOTrainer:
    """A trainer with the settings that matter here, on one prompt."""
    model = ModelConfig(recipe.step_model, **model_settings)
    args = TreePOConfig(
        str(folder),
        **_training_settings(recipe),
        model_init_kwargs={"dtype": model.dtype, "attn_implementation": model.attn_implementation},
        per_device_train_batch_size=_NUM_LEAVES,
        num_generations=_NUM_LEAVES,
        max_completion_length=_COMPLETION,
        segment_length=_SEGMENT,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        engine_check="error",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    return TreePOTrainer(
        model=recipe.step_model,
        reward_funcs=_share_of_different_tokens,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [_PROMPT]}),
        quantization_config=get_quantization_config(model),
        peft_config=new_adapter_config(model),
    )


def _training_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that are asked for, as this machine and a small model can have them."""
    settings: dict[str, Any] = {name: getattr(recipe.training, name) for name in _TRAINING_SETTINGS}
    settings["use_vllm"] = recipe.uses_vllm
    if settings["vllm_gpu_memory_utilization"] == "auto":  # planned for the recipe's model, and this one is small
        settings["vllm_gpu_memory_utilization"] = _SHARE
    if not recipe.is_given:
        settings |= {"vllm_gpu_memory_utilization": _SHARE, "gradient_checkpointing": False}
        settings["vllm_enable_sleep_mode"] = recipe.device.type == "cuda"
    if recipe.uses_vllm:
        settings["vllm_max_model_length"] = _CONTEXT
    if recipe.device.type == "cpu":
        del settings["optim"]  # those of 8 bits are for cards
        return {**settings, "bf16": False, "fp16": False, "use_cpu": True}
    number_type = recipe.number_type or half_type(recipe.device)
    return {**settings, "bf16": number_type == "bfloat16", "fp16": number_type == "float16"}


def _model_settings(recipe: Recipe) -> dict[str, Any]:
    """Settings of the model and of a new adapter, which is like the one that a recipe goes on from."""
    settings: dict[str, Any] = {name: getattr(recipe.model, name) for name in _MODEL_SETTINGS}
    own = {option: getattr(recipe.adapter, name, None) for option, name in _OF_ADAPTERS.items()}
    settings |= {option: value for option, value in own.items() if value is not None}
    # With dropout the policy would not be what the engine has.
    return {**settings, "use_peft": recipe.has_adapter, "lora_dropout": 0.0}


def _share_of_different_tokens(completion_ids: list[list[int]], **_: object) -> list[float | None]:
    """A reward that differs between completions."""
    return [len(set(ids)) / len(ids) for ids in completion_ids]


def check_four_bit(device: torch.device) -> str:
    """One NF4 layer: forward and backward as its weights, dequantized, give them."""
    try:
        import bitsandbytes
        from bitsandbytes.functional import dequantize_4bit
    except ImportError as error:
        raise BrokenError(f"bitsandbytes cannot be imported ({error}).", how_to_install("bitsandbytes")) from error
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to(device)
    rows = torch.randn(8, 128, device=device, requires_grad=True)
    output = layer(rows)
    (gradient,) = torch.autograd.grad(output.square().sum(), rows)
    quantized: Any = layer.weight  # `Params4bit`, which has the scales
    weight = dequantize_4bit(quantized.data, quantized.quant_state).to(torch.float32)
    expected = rows.detach() @ weight.T
    for name, found, wanted in (("forward", output, expected), ("backward", gradient, 2 * expected @ weight)):
        error = ((found - wanted).norm() / wanted.norm()).item()
        if not error <= _LARGEST_ERROR:  # so that no number fails too
            remedy = "Run `pip install --upgrade bitsandbytes`, or leave `load_in_4bit` out."
            raise BrokenError(f"The {name} pass of a 4-bit layer is off by {error:.2g}.", remedy)
    return f"an NF4 layer of bitsandbytes computes forward and backward on {device.type}"


def main(recipe: Recipe, results: Path) -> None:
    """Run the checks and write their findings."""
    step = SmallStep(recipe, results.parent / "training")
    checks = {
        "engine": step.check_engine,
        "small step": step.check_step,
        "4-bit": lambda: check_four_bit(recipe.device),
    }
    for name in step_names(recipe):
        found = finding_of(name, checks[name], "Look for this error in the issues of the library that raised it.")
        with results.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    main(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
