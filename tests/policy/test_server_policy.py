"""Trainings whose policy is on two real vLLM servers: what these compute at each step, and after one was killed."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.support.cpu_servers import CPUServer, start_servers
from tests.support.models import make_model, make_tokenizer
from tests.support.vllm_policies import config, different_words, logged
from treepo_trl import TreePOTrainer
from treepo_trl.engines.server_connection import ServerConnection
from treepo_trl.policy.policy_servers import probe_logprobs
from treepo_trl.policy.server_generation import ServerGeneration
from treepo_trl.policy.server_policy import policy_logprobs


pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("model"))
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def servers(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[CPUServer]]:
    started = start_servers(model, tmp_path_factory.mktemp("logs"), 2)
    yield started
    for server in started:
        server.kill()


def trainer_on(model: str, servers: list[CPUServer], folder: Path, adapter: bool = True, **changes: Any) -> Any:
    settings = {
        "use_cpu": True,
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": ",".join(server.url for server in servers),
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
        reward_funcs=different_words,
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
        servers = generation.servers
        assert servers is not None
        ids = servers.probe_ids()
        name = servers.versions.model or trainer.model.name_or_path
        policy = policy_logprobs(trainer.accelerator.unwrap_model(trainer.model), ids, trainer.accelerator.device)
        theirs = {s.url: probe_logprobs(s, name, ids) for s in servers.servers if s.is_healthy()}
        found.append((trainer.state.global_step, policy, theirs))

    generation.sync_weights = sync_and_look
    return found


def assert_followed(found: list[Any], steps: list[int], num_servers: int = 2) -> None:
    """Every server computes what the policy computes, in each step, and each step has moved the policy."""
    last = {step: (policy, theirs) for step, policy, theirs in found}
    assert list(last) == steps
    for policy, theirs in last.values():
        assert len(theirs) == num_servers
        for logprobs in theirs.values():
            torch.testing.assert_close(logprobs, policy, atol=1e-3, rtol=0)
    for before, after in pairwise(steps):
        assert (last[before][0] - last[after][0]).abs().max() > 0.02


def test_an_adapter_reaches_the_servers_at_each_step(model: str, servers: list[CPUServer], tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    trainer = trainer_on(
        model, servers, tmp_path, vllm_server_adapter_dir=str(shared), eval_strategy="steps", eval_steps=5
    )
    found = watch(trainer)
    trainer.train()
    assert_followed(found, [0, 1, 2, 3, 4, 5])  # the last for an evaluation
    assert max(logged(trainer, "engine/logp_difference_mean")) < 1e-3
    assert all(log["eval_reward"] > 0 for log in trainer.state.log_history if "eval_reward" in log)
    (folder,) = shared.iterdir()
    names = trainer.vllm_generation.servers.versions.names
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert len(names) == 2  # older ones are gone, here and on the servers
    loaded = {each.id for each in ServerConnection(servers[0].url).models() if each.parent is not None}
    assert set(names) == {name for name in loaded if name.startswith(names[0].rsplit("-", 1)[0])}


def test_all_weights_reach_the_servers_at_each_step(model: str, servers: list[CPUServer], tmp_path: Path) -> None:
    trainer = trainer_on(model, servers, tmp_path, adapter=False, max_steps=2)
    found = watch(trainer)
    trainer.train()
    trainer.vllm_generation.sync_weights()
    assert_followed(found, [0, 1, 2])
    versions = {ServerConnection(server.url).get("/weight_info")["weight_version"] for server in servers}
    assert versions == {trainer.vllm_generation.servers.versions.name}
    # An adapter on this base would be trained on samples of another model than the policy.
    other = trainer_on(model, servers, tmp_path, max_steps=1, engine_check="warn")
    with pytest.raises(ValueError, match="another model than the policy"):
        other.train()
    give_the_base_back(model, servers)


def give_the_base_back(model: str, servers: list[CPUServer]) -> None:
    for server in servers:
        call = {"method": "reload_weights", "kwargs": {"weights_path": model}}
        ServerConnection(server.url).post("/collective_rpc", call)
        ServerConnection(server.url).reset_prefix_cache()


def test_a_server_is_killed_and_comes_back(model: str, servers: list[CPUServer], tmp_path: Path) -> None:
    """In the middle of a batch: the other one takes over; the next step is on the right adapter, on both."""
    trainer = trainer_on(model, servers, tmp_path, max_steps=4)
    found, engine = watch(trainer), trainer.policy_engine.engine
    submit, told = engine.submit, []

    def submit_and_kill(requests: Any) -> None:
        submit(requests)
        if trainer.state.global_step == 1 and not told:
            told.append("killed")
            servers[0].kill()
            servers[0].start()
        if trainer.state.global_step == 2 and len(told) == 1:  # in the middle of a batch too
            servers[0].wait()
            told.append("back")

    engine.submit = submit_and_kill
    trainer.train()
    assert told == ["killed", "back"]
    assert engine.num_lost == 1
    last = {step: (policy, theirs) for step, policy, theirs in found}
    assert [len(theirs) for _, theirs in last.values()] == [2, 2, 1, 2]
    for policy, theirs in last.values():
        for logprobs in theirs.values():
            torch.testing.assert_close(logprobs, policy, atol=1e-3, rtol=0)
    assert all(loss == loss for loss in logged(trainer, "loss"))
    assert max(logged(trainer, "engine/logp_difference_mean")) < 1e-3
    assert len(logged(trainer, "loss")) == 4
