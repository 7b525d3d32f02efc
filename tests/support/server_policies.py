"""Tiny trainings whose policy is on vLLM servers, and what policy and servers say about one text."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import distributed

from tests.support.models import make_tokenizer
from tests.support.trainers import parameters_of
from tests.support.vllm_policies import config, different_words
from treepo_trl import TreePOTrainer
from treepo_trl.servers.connection import run_in_loop
from treepo_trl.servers.generation import ServerGeneration
from treepo_trl.servers.reference import policy_logprobs, probe_logprobs


def trainer_on(model: str, urls: str, folder: Path, adapter: bool = True, **changes: Any) -> Any:
    settings = {
        "use_cpu": True,
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": urls,
        "vllm_server_timeout": 120.0,
        "learning_rate": 0.05 if adapter else 0.01,
        "max_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "engine_check": "error",
        "model_init_kwargs": {"dtype": "float32"},
    }
    peft = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    prompts = [f"w{i} w{i + 1} w{i + 2}" for i in range(32)]
    return TreePOTrainer(
        model=model,
        processing_class=make_tokenizer(),
        reward_funcs=cast(Any, different_words),
        args=config(folder, **{**settings, **changes}),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=Dataset.from_dict({"prompt": prompts[:4]}),
        peft_config=peft if adapter else None,
    )


def watch(trainer: Any) -> list[tuple[int, torch.Tensor, dict[str, torch.Tensor]]]:
    """Step, the policy's log-probabilities of a text, and those of each server, after each synchronization."""
    generation: ServerGeneration = trainer.vllm_generation
    found, sync = [], generation.sync_weights

    def sync_and_look() -> None:
        sync()
        fleet = generation.fleet
        assert fleet is not None
        assert fleet.reference is not None
        ids = fleet.reference.token_ids
        policy = policy_logprobs(trainer.accelerator.unwrap_model(trainer.model), ids, trainer.accelerator.device)
        connections = [server.connection for server in fleet.servers]
        healthy = [each for each in connections if run_in_loop(each.is_healthy())]
        theirs = {each.url: run_in_loop(probe_logprobs(each, fleet.model, ids)) for each in healthy}
        found.append((trainer.state.global_step, policy, theirs))

    generation.sync_weights = sync_and_look
    return found


def train_and_write(model: str, urls: str, folder: str) -> None:
    """Train two steps in one of two processes; write what it has sampled, got and logged."""
    changes = {"per_device_train_batch_size": 16, "ddp_backend": "gloo", "max_steps": 2, "shuffle_dataset": False}
    trainer = trainer_on(model, urls, Path(folder), **changes, eval_strategy="steps", eval_steps=2)
    rank = trainer.accelerator.process_index
    sampled: list[int] = []
    got: list[list[list[int]]] = []
    sample, batch_sample = trainer.sampler.sample, trainer._source.sample

    def counting(prompts: Any, *args: Any, **kwargs: Any) -> Any:
        sampled.append(len(prompts))
        return sample(prompts, *args, **kwargs)

    def looking(batch: Any, prompts: Any, *args: Any) -> Any:
        trees = batch_sample(batch, prompts, *args)
        assert [tree.prompt_ids for tree in trees] == prompts
        got.append(prompts)
        return trees

    trainer.sampler.sample, trainer._source.sample = counting, looking
    trainer.train()
    logs = [
        {name: value for name, value in log.items() if "runtime" not in name and "second" not in name}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    torch.save(parameters_of(trainer), f"{folder}/rank{rank}.pt")
    Path(folder, f"rank{rank}.json").write_text(json.dumps({"sampled": sampled, "got": got, "logs": logs}))
    distributed.destroy_process_group()
