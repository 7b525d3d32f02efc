"""
The child process of the small step: `python -m treepo_trl.apps.doctor.step NEEDS RESULTS`.

The trainer itself makes the step, with its engine, and with a difference between engine and policy as an error. A line
is appended to RESULTS after each check, so that the parent knows in which one the process has ended.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig
from trl import ModelConfig, get_quantization_config

from treepo_trl.memory import GIB, plan_memory
from treepo_trl.policy.starting_adapter import new_adapter_config
from treepo_trl.treepo_config import TreePOConfig
from treepo_trl.treepo_trainer import TreePOTrainer

from .checks import half_type
from .child import step_names
from .findings import BrokenError, CannotRunError, finding_of
from .recipe import Needs
from .remedies import engine_error
from .versions import how_to_install


PROMPTS = (
    "Add the numbers and say how you did it: 3 + 4 + 5 =",
    "The three largest rivers of the world, and where they begin:",
    "A recipe for a soup of carrots and potatoes, step by step:",
    "def median(values: list[float]) -> float:",
)
_NUM_LEAVES, _COMPLETION, _SEGMENT = 8, 32, 8
_SHARE = 0.3  # of the card's memory, for the engine
_CONTEXT = 512  # tokens that the engine can hold in one sequence
_LARGEST_RATIO = 1.5  # measured over planned memory above which the plan misleads
_LARGEST_ERROR = 0.02  # relative, of a 4-bit layer: rounding of 16-bit inputs


class MeasuredTrainer(TreePOTrainer):
    """[`TreePOTrainer`] that notes what a card's memory held before the update."""

    before_update: int | None = None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.before_update is None and self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before_update = torch.cuda.memory_allocated()
        return super().compute_loss(*args, **kwargs)


@dataclass
class SmallStep:
    """
    One step as the trainer makes it, of eight leaves.

    Attributes:
        needs ([`Needs`]):
            What is to be checked.
        folder (`Path`):
            For what the trainer writes.
    """

    needs: Needs
    folder: Path
    trainer: MeasuredTrainer | None = None

    def check_engine(self) -> str:
        """Build the trainer, which loads the model and starts the engine."""
        started = time.perf_counter()
        note = ""
        try:
            try:
                self.trainer = _build(self.needs, self.folder)
            except ValueError as error:
                if not (self.needs.is_stand_in and "Target modules" in str(error)):  # PEFT's words
                    raise
                settings, wanted = self.needs.model_settings, self.needs.model_settings["lora_target_modules"]
                names = wanted if isinstance(wanted, str) else ", ".join(sorted(wanted))
                note = f"; LoRA on all linear layers, as this model has no {names}"
                self.needs = replace(self.needs, model_settings=settings | {"lora_target_modules": ["all-linear"]})
                self.trainer = _build(self.needs, self.folder)
        except Exception as error:  # vLLM's own classes differ between its versions
            raise engine_error(error, self.needs) from error
        name = "vLLM" if self.needs.training["use_vllm"] else "the transformers engine"
        return f"{name} started in {time.perf_counter() - started:.0f} s{note}"

    def check_step(self) -> str:
        """Sample a tree, compare engine and policy, packed rows and plain ones, and update; on a card its memory."""
        trainer = self.trainer
        if trainer is None:
            raise CannotRunError("there is no engine")
        try:
            trainer.train()
        except Exception as error:  # of torch, vLLM, bitsandbytes or the trainer
            raise engine_error(error, self.needs) from error
        log = trainer.state.log_history[0]
        seen = f"a tree of {_NUM_LEAVES} leaves was sampled and trained on"
        if trainer._packed_forward is not None and trainer._packed_forward.checked:
            backends = ", ".join(backend for _, backend in trainer._packed_forward.checked)
            seen += f"; packed rows ({backends}) give what plain rows give"
        if "engine/logp_difference_mean" in log:
            seen += f"; engine and policy differ by {log['engine/logp_difference_mean']:.4f} nats per token"
            has_adapter = self.needs.model_settings["use_peft"] and trainer.args.vllm_lora_sync == "adapter"
            seen += ", and by rounding alone with a moved adapter" if has_adapter else ""
        if trainer.before_update is not None:
            measured = torch.cuda.max_memory_allocated() - trainer.before_update
            seen += f"; {compared_memory(_planned(self.needs, trainer.args), measured)}"
        return seen


def compared_memory(planned: float, measured: float) -> str:
    """
    Say how far a plan is from what was measured, both in bytes.

    Raises:
        BrokenError: if the step took much more than planned.
    """
    seen = f"the update added {measured / 2**20:.0f} MiB, planned were {planned / 2**20:.0f}"
    if measured > _LARGEST_RATIO * planned:
        remedy = "Leave as much more room on the card than `treepo-trl plan` says, and report it."
        raise BrokenError(f"{seen[:1].upper()}{seen[1:]}.", remedy)
    return seen


def _planned(needs: Needs, args: TreePOConfig) -> float:
    """Bytes that an update adds to the weights, by the plan."""
    config = AutoConfig.from_pretrained(needs.model)
    policy = plan_memory(config, args, _model_config(needs), 80.0 * GIB).policy
    return policy["gradients"] + policy["optimizer"] + policy["activations"]


def _build(needs: Needs, folder: Path) -> MeasuredTrainer:
    """A trainer with the settings that matter here, on few prompts."""
    args = TreePOConfig(
        str(folder),
        **_settings(needs),
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
    model_args = _model_config(needs)
    args.model_init_kwargs = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    return MeasuredTrainer(
        model=needs.model,
        reward_funcs=_share_of_different_tokens,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
        quantization_config=get_quantization_config(model_args),
        peft_config=new_adapter_config(model_args),
    )


def _settings(needs: Needs) -> dict[str, Any]:
    """The settings that are asked for, as this machine and a small model can have them."""
    settings = {"vllm_gpu_memory_utilization": _SHARE, "gradient_checkpointing": False, **needs.training}
    if settings["vllm_gpu_memory_utilization"] == "auto":  # planned for the recipe's model, and this one is small
        settings["vllm_gpu_memory_utilization"] = _SHARE
    if settings["use_vllm"]:
        settings |= {"vllm_mode": "colocate", "vllm_max_model_length": _CONTEXT}
    if needs.device.type == "cpu":
        settings.pop("optim", None)  # those of 8 bits are for cards
        return {**settings, "bf16": False, "fp16": False, "use_cpu": True}
    if settings["use_vllm"] and not needs.is_recipe:
        settings["vllm_enable_sleep_mode"] = True
    number_type = needs.number_type or half_type(needs.device)
    return {**settings, "bf16": number_type == "bfloat16", "fp16": number_type == "float16", "use_cpu": False}


def _model_config(needs: Needs) -> ModelConfig:
    # 8-bit layers round by what else is in the batch, so engine and policy would differ without a fault.
    settings = {name: value for name, value in needs.model_settings.items() if name != "load_in_8bit"}
    return ModelConfig(needs.model, lora_dropout=0.0, **settings)  # with dropout the policy is not what the engine has


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


def main(needs: Needs, results: Path) -> None:
    """Run the checks and write their findings."""
    step = SmallStep(needs, results.parent / "training")
    checks = {
        "engine": step.check_engine,
        "small step": step.check_step,
        "4-bit": lambda: check_four_bit(needs.device),
    }
    for name in step_names(needs):
        found = finding_of(name, checks[name], "Look for this error in the issues of the library that raised it.")
        with results.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    main(Needs(**json.loads(sys.argv[1])), Path(sys.argv[2]))
