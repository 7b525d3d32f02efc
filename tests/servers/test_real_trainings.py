"""Trainings whose policy is on two real vLLM servers: what these compute at each step, and after one was killed."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from tests.support.fake_vllm import until
from tests.support.processes import run_in_two_processes
from tests.support.server_policies import trainer_on, watch
from tests.support.trainers import assert_same_parameters, watch_loss
from tests.support.vllm_policies import logged
from tests.support.vllm_servers import VLLMServer
from treepo_trl.servers import fleet
from treepo_trl.servers.connection import ServerConnection, run_in_loop


pytestmark = pytest.mark.vllm

SCRIPT = """
import sys

from tests.support.server_policies import train_and_write

train_and_write(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def model(tiny_model_dir: str) -> str:
    return tiny_model_dir


def versions_of(trainer: Any) -> Any:
    return trainer.vllm_generation.fleet.policy


def urls_of(servers: list[VLLMServer]) -> str:
    return ",".join(server.url for server in servers)


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


def test_an_adapter_reaches_the_servers_at_each_step(model: str, servers: list[VLLMServer], tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    trainer = trainer_on(
        model, urls_of(servers), tmp_path, vllm_server_adapter_dir=str(shared), eval_strategy="steps", eval_steps=5
    )
    found = watch(trainer)
    trainer.train()
    assert_followed(found, [0, 1, 2, 3, 4, 5])  # the last for an evaluation
    assert max(logged(trainer, "engine/logp_difference_mean")) < 1e-3
    assert all(log["eval_reward"] > 0 for log in trainer.state.log_history if "eval_reward" in log)
    (folder,) = shared.iterdir()
    names = versions_of(trainer).names
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert len(names) == 2  # older ones are gone, here and on the servers
    loaded = set(run_in_loop(ServerConnection(servers[0].url).models()))
    assert set(names) == {name for name in loaded if name.startswith(names[0].rsplit("-", 1)[0])}
    in_16_bits = trainer_on(model, urls_of(servers), tmp_path / "16", bf16=True)
    assert in_16_bits.vllm_generation.fleet.reference.bound > trainer.vllm_generation.fleet.reference.bound


def test_all_weights_reach_the_servers_at_each_step(model: str, servers: list[VLLMServer], tmp_path: Path) -> None:
    trainer = trainer_on(model, urls_of(servers), tmp_path, adapter=False, max_steps=2)
    found = watch(trainer)
    trainer.train()
    trainer.vllm_generation.sync_weights()
    assert_followed(found, [0, 1, 2])
    versions = {run_in_loop(ServerConnection(server.url).get("/weight_info"))["weight_version"] for server in servers}
    assert versions == {versions_of(trainer).name}
    # An adapter on this base would be trained on samples of another model than the policy.
    other = trainer_on(model, urls_of(servers), tmp_path, max_steps=1, engine_check="warn")
    with pytest.raises(ValueError, match="another model than the policy"):
        other.train()
    give_the_base_back(model, servers)


def give_the_base_back(model: str, servers: list[VLLMServer]) -> None:
    for server in servers:
        call = {"method": "reload_weights", "kwargs": {"weights_path": model}}
        run_in_loop(ServerConnection(server.url).post("/collective_rpc", call))
        run_in_loop(ServerConnection(server.url).reset_prefix_cache())


@pytest.mark.slow
def test_a_batch_ahead_is_from_the_adapter_before_the_last_update(
    model: str, servers: list[VLLMServer], tmp_path: Path
) -> None:
    """By the log-probabilities that servers gave with the tokens: those of that adapter, and of no later one."""
    trainer = trainer_on(model, urls_of(servers), tmp_path, max_steps=3, rollout_ahead=1)
    adapters: list[dict[str, torch.Tensor]] = []  # at each step
    distances: list[list[float]] = []  # of each batch, from each adapter up to now
    ratios: list[torch.Tensor] = []

    def look(policy: Any, inputs: dict[str, torch.Tensor]) -> None:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        is_token, peft = inputs["completion_mask"].bool(), trainer.accelerator.unwrap_model(policy)
        adapters.append({name: value.clone() for name, value in get_peft_model_state_dict(peft).items()})
        distances.append([])
        for adapter in adapters:  # ends with that of now
            set_peft_model_state_dict(peft, adapter)
            with torch.no_grad():
                logprobs, *_ = trainer._get_per_token_logps_and_entropies(policy, ids, mask, is_token.size(1))
            distances[-1].append(float((logprobs - inputs["sampling_per_token_logps"])[is_token].abs().max()))
        ratios.append(inputs["importance_sampling_ratio"])

    watch_loss(trainer, look)
    trainer.train()
    assert len(distances) == 3
    for step, of_adapters in enumerate(distances):
        sampled_from = max(step - 1, 0)
        assert of_adapters[sampled_from] < 1e-3
        assert all(value > 0.02 for version, value in enumerate(of_adapters) if version != sampled_from)
    assert all(ratio.isfinite().all() for ratio in ratios)
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


@pytest.mark.slow
def test_two_processes_update_and_one_samples(model: str, servers: list[VLLMServer], tmp_path: Path) -> None:
    """Each process gets the trees of its own prompts, from one sampling for both; evaluation too."""
    ranks = run_in_two_processes(SCRIPT, tmp_path, model, urls_of(servers), str(tmp_path))
    assert [rank["sampled"] for rank in ranks] == [[4, 4], []]  # prompts of both
    for step in range(2):
        first, second = (rank["got"][step] for rank in ranks)
        assert len(first) == len(second) == 2
        assert not any(prompt in second for prompt in first)
    for log, other in zip(*(rank["logs"] for rank in ranks), strict=True):
        assert log["engine/logp_difference_mean"] < 1e-3
        assert all(log[name] == other[name] for name in ("loss", "grad_norm", "reward", "tree/decoded_tokens"))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert_same_parameters(first, second, 0.0)


@pytest.mark.slow
def test_a_server_is_killed_and_comes_back(
    model: str, servers: list[VLLMServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a batch: the other one takes over; the next step is on the right adapter, on both."""
    monkeypatch.setattr(fleet, "_LONGEST_WAIT", 0.25)
    trainer = trainer_on(model, urls_of(servers), tmp_path, max_steps=4)
    found, engine = watch(trainer), trainer.policy_engine.engine
    submit, told = engine.submit, []

    def submit_and_kill(requests: Any) -> None:
        submit(requests)
        if trainer.state.global_step == 1 and not told:
            told.append("killed")
            servers[0].kill()
        if trainer.state.global_step == 2 and len(told) == 1:  # in the middle of a batch too
            servers[0].start()
            servers[0].wait()
            until(lambda: len(engine.fleet.living()) == 2)
            told.append("back")

    engine.submit = submit_and_kill
    trainer.train()
    assert told == ["killed", "back"]
    assert engine.fleet.num_lost == 1
    last = {step: (policy, theirs) for step, policy, theirs in found}
    assert [len(theirs) for _, theirs in last.values()] == [2, 2, 1, 2]
    for policy, theirs in last.values():
        for logprobs in theirs.values():
            torch.testing.assert_close(logprobs, policy, atol=1e-3, rtol=0)
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert max(logged(trainer, "engine/logp_difference_mean")) < 1e-3
    assert len(logged(trainer, "loss")) == 4
