"""Tiny LoRA and QLoRA trainings with the real vLLM engine, and what engine and policy say about one text."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import BitsAndBytesConfig

from tests.support.models import make_tokenizer
from tests.support.segments import full_logprobs
from treepo_trl import TreePOConfig, TreePOTrainer


PROMPT, COMPLETION = [10, 11], [12, 13, 14, 15, 16, 17]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def config(tmp_path: Path, **kwargs: Any) -> TreePOConfig:
    settings = {
        "output_dir": str(tmp_path),
        "bf16": False,
        "per_device_train_batch_size": 16,
        "num_generations": 8,
        "max_completion_length": 24,
        "segment_length": 8,
        "report_to": [],
        "gradient_checkpointing": False,
    }
    return TreePOConfig(**{**settings, **kwargs})


def engine_logprobs(llm: Any, prompt: list[int], completion: list[int], lora_request: Any = None) -> torch.Tensor:
    """Log-probabilities of a completion by vLLM, which generates one token more."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=1.0)
    text = {"prompt_token_ids": prompt + completion}
    (output,) = llm.generate(text, params, lora_request=lora_request, use_tqdm=False)
    scored = zip(output.prompt_logprobs[len(prompt) :], completion, strict=True)
    return torch.tensor([position[token].logprob for position, token in scored])


def both_logprobs(trainer: TreePOTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `COMPLETION` after `PROMPT` by the engine with its adapter, and by the policy."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    # In evaluation bitsandbytes computes in bfloat16 on some CPUs.
    model.train(getattr(model.get_base_model(), "is_loaded_in_4bit", False))
    policy = full_logprobs(model, PROMPT, COMPLETION)
    model.train()
    llm = trainer.vllm_generation.llm
    return engine_logprobs(llm, PROMPT, COMPLETION, llm.lora_request), policy


def train_and_compare(trainer: TreePOTrainer, tolerance: float = 5e-3, least_change: float = 0.05) -> None:
    """
    Train for five steps; engine and policy must agree after each synchronization, and after the last update.

    Each update must move the policy by `least_change` nats, far more than the tolerance.
    """
    pairs = []
    generation: Any = trainer.vllm_generation
    sync_weights = generation.sync_weights

    def sync_and_look() -> None:
        sync_weights()
        pairs.append(both_logprobs(trainer))

    generation.sync_weights = sync_and_look
    trainer.train()
    generation.sync_weights()
    assert len(pairs) == 8  # the probe of the first step has two: the moved adapter, and the adapter as it was
    for engine, policy in pairs:
        torch.testing.assert_close(engine, policy, atol=tolerance, rtol=0)
    for (_, before), (_, after) in pairwise(pairs[-6:]):
        assert (before - after).abs().max() > least_change


def logged(trainer: TreePOTrainer, name: str) -> list[float]:
    """What each step has logged under a name."""
    return [log[name] for log in trainer.state.log_history if "loss" in log]


def different_words(completions: list[str], **_: Any) -> list[float]:
    """Almost never the same for all completions of a batch: every step moves the policy."""
    return [float(len(set(completion.split()))) for completion in completions]


def lora_trainer(
    model: Any,
    tmp_path: Path,
    quantization_config: BitsAndBytesConfig | None = None,
    peft_changes: dict[str, Any] | None = None,
    reward: Any = different_words,
    arguments: dict[str, Any] | None = None,
    **kwargs: Any,
) -> TreePOTrainer:
    """A trainer of a new adapter on `model`, or of the one that it has, with further `arguments`."""
    settings = {
        "use_cpu": not torch.cuda.is_available(),
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.2,
        "vllm_max_model_length": 128,
        "learning_rate": 0.05,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "fallback_policy": "root",  # the course of training for which the tolerances of 16 bits were measured
    }
    adapter: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    adapter |= peft_changes or {}
    data = Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(32)]})
    return TreePOTrainer(
        model=model,
        reward_funcs=reward,
        args=config(tmp_path, **{**settings, **kwargs}),
        **{"processing_class": make_tokenizer(), "train_dataset": data, **(arguments or {})},
        quantization_config=quantization_config,
        peft_config=None if isinstance(model, PeftModel) else LoraConfig(task_type="CAUSAL_LM", **adapter),
    )


def qlora_trainer(
    folder: str, tmp_path: Path, dtype: str = "float32", four_bits: dict[str, Any] = NF4, **kwargs: Any
) -> TreePOTrainer:
    """Everything but the 4-bit layers in float32 by default, so that rounding cannot hide a wrong weight."""
    trainer = lora_trainer(
        folder,
        tmp_path,
        quantization_config=BitsAndBytesConfig(**four_bits, bnb_4bit_compute_dtype=getattr(torch, dtype)),
        gradient_checkpointing=True,
        model_init_kwargs={"dtype": dtype},
        # Its check forwards in evaluation mode, where bitsandbytes re-packs the weights on CPUs with bfloat16, and
        # rounds their scales.
        tree_packing="off",
        **kwargs,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL has put the adapter into bfloat16
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return trainer


def engine_model(trainer: TreePOTrainer) -> Any:
    return trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model


def memory_of(weight: torch.Tensor) -> int:
    return weight.untyped_storage().data_ptr()
