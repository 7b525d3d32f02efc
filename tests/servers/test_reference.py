"""Batches before which servers were lost: what those that come back are compared with, and who is probed."""

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.config import make
from tests.support.fake_vllm import until
from tests.support.policy_fake import LORA, NEEDS, PolicyFake, computed, opened, sample, versions_of, write_version
from treepo_trl.servers.fleet import Fleet
from treepo_trl.servers.generation import ServerGeneration
from treepo_trl.servers.policy import ServerPolicy
from treepo_trl.trl.host import Host


pytestmark = pytest.mark.usefixtures("lost_servers_are_asked_often")

QUANTIZED = {**LORA, "model_config": {"quantization": "bitsandbytes"}}
VOCABULARY = len(NEEDS.tokenizer)


class Uniform(torch.nn.Module):
    """A policy to which all tokens are equally likely."""

    dtype = torch.bfloat16

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY))


def logprobs_of(fleet: Fleet) -> torch.Tensor | None:
    assert fleet.reference is not None
    return fleet.reference.logprobs


def as_the_policy(fake: PolicyFake) -> None:
    fake.offset = -math.log(VOCABULARY) - computed("treepo-run-0")


def server_policy(stack: ExitStack, servers: Fleet, fake: PolicyFake, folder: Path) -> Any:
    """A `ServerPolicy` at step 0 that is connected to a trainer, and has sent nothing yet."""
    generation: Any = ServerGeneration.__new__(ServerGeneration)
    accelerator = SimpleNamespace(
        is_main_process=True,
        num_processes=1,
        device=torch.device("cpu"),
        mixed_precision="no",
        native_amp=False,
        unwrap_model=lambda model: model,
    )
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=0),
        args=make(folder, use_vllm=True, vllm_mode="server", engine_check="warn", vllm_server_timeout=60.0),
        accelerator=accelerator,
        model=Uniform(),
        model_wrapped=Uniform(),
        vllm_generation=generation,
        eos_token_ids=[0],
        _last_loaded_step=-1,
    )
    generation.fleet, generation.facts = servers, servers.servers[0].facts
    generation.accelerator = accelerator
    generation._write = lambda step: versions_of(servers).write(step, write_version)
    policy: Any = ServerPolicy(trainer.args, loads_adapter=False)
    policy.connect(Host(trainer))
    stack.callback(policy.engine.close)
    return policy


def go_to(policy: Any, step: int, in_batch: bool = True) -> None:
    policy._host.trainer.state.global_step = step
    with policy.ready("7/0", [[1]], in_batch=in_batch):
        pass
    policy._host.trainer._last_loaded_step = step


@pytest.mark.parametrize("count", [1, 2])
def test_a_wrong_server_is_not_compared_with_itself(stack: ExitStack, tmp_path: Path, count: int) -> None:
    servers, fakes = opened(stack, tmp_path, count)
    for fake in fakes:
        as_the_policy(fake)
    policy = server_policy(stack, servers, fakes[0], tmp_path)
    engine = policy.engine
    go_to(policy, 0)
    for fake in fakes:
        fake.forget()
        fake.offset += 5.0  # another revision of the model
    go_to(policy, 1)
    until(lambda: all("computes another model" in server.error for server in servers.servers))
    for fake in fakes:
        as_the_policy(fake)
    until(lambda: len(engine.fleet.living()) == count)
    sample(engine)
    assert all(fake.served == {"treepo-run-1"} for fake in fakes)


def test_a_first_batch_without_a_server_is_compared_too(stack: ExitStack, tmp_path: Path) -> None:
    servers, (fake,) = opened(stack, tmp_path)
    policy = server_policy(stack, servers, fake, tmp_path)
    fake.die()
    versions_of(servers).write(0, write_version)  # the first was given at the start of the training
    go_to(policy, 1)
    torch.testing.assert_close(
        logprobs_of(servers), torch.full((62,), -math.log(VOCABULARY), dtype=torch.float64), atol=1e-5, rtol=0
    )
    assert policy._is_probed  # whoever comes back is compared with that


def test_a_quantized_server_is_compared_with_servers_alone(stack: ExitStack, tmp_path: Path) -> None:
    """By design it computes another model than the policy."""
    servers, (fake,) = opened(stack, tmp_path, changes=QUANTIZED)
    policy = server_policy(stack, servers, fake, tmp_path)
    engine = policy.engine
    versions_of(servers).write(0, write_version)
    fake.die()
    go_to(policy, 1)
    assert logprobs_of(servers) is None
    assert not policy._is_probed  # nothing was compared
    fake.restart()
    until(lambda: engine.fleet.living())
    sample(engine)
    go_to(policy, 2)
    assert policy._is_probed
    torch.testing.assert_close(
        logprobs_of(servers), torch.full((62,), computed("treepo-run-2"), dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_a_probe_leaves_out_a_server_that_is_gone(stack: ExitStack, tmp_path: Path) -> None:
    servers, fakes = opened(stack, tmp_path, 2)
    policy = server_policy(stack, servers, fakes[0], tmp_path)
    go_to(policy, 0, in_batch=False)
    fakes[0].die()  # which nobody knows yet
    assert [result.request_id for result in policy._plain_segments([[5, 6], [7, 8]])] == [0, 1]
    assert len(fakes[1].bodies) == 3  # one was the comparison of the servers
    assert policy.engine.fleet.living() == servers.servers[1:]


def test_a_probe_waits_for_a_server(stack: ExitStack, tmp_path: Path) -> None:
    servers, (fake,) = opened(stack, tmp_path)
    policy = server_policy(stack, servers, fake, tmp_path)
    go_to(policy, 0, in_batch=False)
    fake.die()
    with ThreadPoolExecutor(1) as thread:
        results = thread.submit(policy._plain_segments, [[5, 6]])
        until(lambda: not policy.engine.fleet.living() or results.done())
        fake.restart()
        assert len(results.result()) == 1
    assert fake.served == {"treepo-run-0"}
