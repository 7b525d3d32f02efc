"""What a server must be, asked of servers without a model: each failure is one error that names it and the flag."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import make_tokenizer
from tests.support.policy_fake import (
    LORA,
    NEEDS,
    PolicyFake,
    admit,
    fleet_of,
    give,
    opened,
    versions_of,
    write_version,
)
from treepo_trl.servers import checks
from treepo_trl.servers.checks import ServerNeeds, check_server
from treepo_trl.servers.connection import ServerConnection, ServerLostError, run_in_loop
from treepo_trl.servers.reference import Reference, bound_of_probe
from treepo_trl.servers.versions import AdapterVersions, WeightVersions


def changed(section: str, **values: Any) -> dict[str, Any]:
    return {**LORA, section: {**LORA.get(section, {}), **values}}


@pytest.mark.needs_vllm
@pytest.mark.parametrize(
    ("changes", "attributes", "message"),
    [
        (changed("model_config", model="/models/other"), {}, "serves '/models/other' ... `--model /models/base`"),
        (changed("model_config", max_model_len=63), {}, "holds 63 tokens, and 64 are needed ... `--max-model-len 64`"),
        (changed("model_config", logprobs_mode="raw_logprobs"), {}, "`--logprobs-mode processed_logprobs`"),
        (changed("model_config", max_logprobs=5), {}, "gives 5 log-probabilities ... `--max-logprobs 20`"),
        (changed("cache_config", enable_prefix_caching=False), {}, "`--enable-prefix-caching`"),
        (changed("lora_config", max_loras=1), {}, "holds 1 adapter at once ... `--max-loras 2`"),
        (changed("lora_config", max_lora_rank=4), {}, "up to rank 4, and this one has 8 ... `--max-lora-rank 8`"),
        ({}, {}, "serves no adapters ... `--enable-lora --max-loras 2 --max-lora-rank 8`"),
        (LORA, {"has_scale_out": False}, "does not take token ids ... `--enable-scale-out`"),
        (LORA, {"has_dev_mode": False}, "VLLM_SERVER_DEV_MODE=1"),
        (LORA, {"version": "0.30.2"}, "is vLLM 0.30.2, and here is ... Install the same version"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_server_that_does_not_fit(changes: Any, attributes: dict[str, Any], message: str) -> None:
    with PolicyFake(changes) as server:
        vars(server).update(attributes)
        with pytest.raises(ValueError, match="server") as error:
            check_server(ServerConnection(server.url), NEEDS)
        for part in (server.url, *message.split(" ... ")):
            assert part in str(error.value)


def test_a_server_that_fits_tells_its_facts() -> None:
    with PolicyFake() as server:
        assert check_server(ServerConnection(server.url), NEEDS).max_lora_rank == 8


def test_another_tokenizer_is_refused() -> None:
    with PolicyFake() as server:
        vocabulary = server.tokenizer.get_vocab()
        server.tokenizer = make_tokenizer()
        server.tokenizer.add_tokens(["w59x"])
        check_server(ServerConnection(server.url), NEEDS)  # one token more that no text of ours has
        ids = {**vocabulary, "w7": vocabulary["w8"], "w8": vocabulary["w7"]}
        server.tokenizer = lambda text, **_: {"input_ids": [ids[word] for word in text.split()]}  # type: ignore
        with pytest.raises(ValueError, match=r"another tokenizer than the policy.*`--tokenizer`"):
            check_server(ServerConnection(server.url), NEEDS)


def test_the_same_folder_by_another_name_is_the_same_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    needs = ServerNeeds(str(tmp_path / "link"), make_tokenizer())
    with PolicyFake({"model_config": {"model": str(tmp_path / "model")}}) as server:
        check_server(ServerConnection(server.url), needs)


def test_an_address_where_nothing_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_AGAIN", 0.01)
    with PolicyFake() as server:
        url = server.url.replace("//", "//somebody:secret@")
    with pytest.raises(ValueError, match=r"No vLLM server answers at http://127\.0\.0\.1:") as error:
        fleet_of([url], AdapterVersions(str(tmp_path), "run"), 0.1)
    assert "`vllm_server_timeout`" in str(error.value)
    assert "secret" not in str(error.value)
    assert "somebody" not in str(error.value)


@pytest.mark.parametrize("status", [401, 403])
def test_an_address_where_something_else_answers(tmp_path: Path, status: int) -> None:
    """At once: a start would wait for minutes."""
    with PolicyFake() as server:
        server.health = status
        with pytest.raises(ValueError, match=rf"status {status}.*no vLLM server.*https://user:password@host") as error:
            fleet_of([server.url], AdapterVersions(str(tmp_path), "run"), 1e6)
        assert server.url in str(error.value)


@pytest.mark.parametrize("status", [404, 429, 503])
def test_a_server_that_does_not_come_up_tells_why(tmp_path: Path, status: int) -> None:
    """A gateway may answer so while a server starts."""
    with PolicyFake() as server:
        server.health = status
        with pytest.raises(ValueError, match=rf"No vLLM server answers at .*The last try: .*status {status}"):
            fleet_of([server.url], AdapterVersions(str(tmp_path), "run"), 0.0)


def test_credentials_are_not_shown_by_a_server_that_does_not_fit(tmp_path: Path) -> None:
    with PolicyFake({}) as server:
        url = server.url.replace("//", "//somebody:secret@")
        with pytest.raises(ValueError, match="--enable-lora") as error:
            fleet_of([url], AdapterVersions(str(tmp_path), "run"), 1.0)
        assert server.url in str(error.value)
        assert "secret" not in str(error.value)
        assert server.authorizations != {None}


# Versions


def test_each_version_has_a_name_and_a_folder_and_old_ones_go(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers, fakes = opened(stack, tmp_path, 2)
        for step in (0, 0, 1, 2):
            give(servers, step)
            names = versions_of(servers).names
            for fake in fakes:
                assert fake.adapters == {name: str(tmp_path / name) for name in names}
            assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
        assert names == ["treepo-run-1", "treepo-run-2"]
        assert fakes[0].unloaded == ["treepo-run-0", "treepo-run-0.1"]


def test_a_folder_appears_under_its_name_when_it_is_whole(tmp_path: Path) -> None:
    versions = AdapterVersions(str(tmp_path), "run")

    def write(folder: str) -> str:
        assert not (tmp_path / "treepo-run-3").exists()
        os.mkdir(f"{folder}/adapter")  # where PEFT puts one that is not named default
        return write_version(f"{folder}/adapter")

    versions.write(3, write)
    assert [path.name for path in tmp_path.iterdir()] == ["treepo-run-3"]
    assert os.listdir(versions.path) == ["weights"]


def test_a_folder_that_the_server_cannot_read(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers, (fake,) = opened(stack, tmp_path)
        versions_of(servers).write(0, lambda folder: folder)
        with pytest.raises(ValueError, match=r"No adapter found.*`vllm_server_adapter_dir`") as error:
            servers.distribute()
        assert fake.url in str(error.value)


def test_an_adapter_that_a_living_server_fails_on_is_no_lost_server(tmp_path: Path) -> None:
    """vLLM answers 500 for most of what it cannot load."""
    with ExitStack() as stack:
        servers, (fake,) = opened(stack, tmp_path)
        fake.can_load = False
        with pytest.raises(ValueError, match=r"could not load .*rank 64 is too large"):
            give(servers, 0)
        fake.die()
        with pytest.raises(ServerLostError):
            run_in_loop(versions_of(servers).load(servers.servers[0].connection))


def test_a_version_can_be_read_by_everybody(tmp_path: Path) -> None:
    versions = AdapterVersions(str(tmp_path), "run")

    def write(folder: str) -> str:
        os.chmod(folder, 0o700)
        write_version(folder)
        os.chmod(f"{folder}/weights", 0o600)  # as safetensors does
        return folder

    versions.write(0, write)
    assert Path(versions.path).stat().st_mode & 0o777 == 0o755
    assert Path(versions.path, "weights").stat().st_mode & 0o777 == 0o644


def test_a_server_that_loads_nothing_while_it_runs(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers, (fake,) = opened(stack, tmp_path)
        fake.loads_adapters = False
        with pytest.raises(ValueError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
            give(servers, 0)


def test_a_server_with_an_old_adapter_is_refused(tmp_path: Path) -> None:
    """It says that it has loaded the new one, and computes the old one."""
    with ExitStack() as stack:
        servers, fakes = opened(stack, tmp_path, 2)
        give(servers, 0)
        fakes[1].offset = 0.15
        with pytest.raises(ValueError, match=r"computes another model than the others.*0\.150 nats") as error:
            give(servers, 1)
        assert fakes[1].url in str(error.value)


def test_all_servers_with_another_model_than_the_policy_are_refused() -> None:
    reference, zeros = Reference(NEEDS, is_compared=True), torch.zeros(2)
    assert not reference.check_policy(zeros)
    reference.set("treepo-run-0", zeros)
    assert reference.check_policy(zeros + 0.09)
    for difference in (0.15, float("nan")):
        with pytest.raises(ValueError, match="another model than the policy"):
            reference.check_policy(zeros + difference)
    reference.is_quantized = True
    reference.check_policy(zeros + 5.0)  # by design; each batch is compared


def test_the_rounding_of_16_bits_is_no_other_model(tmp_path: Path) -> None:
    """Random tokens are 14 nats each, which bfloat16 rounds by nearly a tenth of a nat."""
    assert bound_of_probe(torch.float32) <= 0.1
    for types in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        assert 4 * 0.09 < bound_of_probe(*types) < 0.5
    with ExitStack() as stack:
        servers, fakes = opened(stack, tmp_path, 2, changes=changed("model_config", dtype="torch.bfloat16"))
        fakes[1].offset = 0.2
        give(servers, 0)
        fakes[1].offset = 0.6
        with pytest.raises(ValueError, match="computes another model than the others"):
            give(servers, 1)


# Servers that go and come


def test_a_server_that_comes_back_gets_the_current_version(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers, fakes = opened(stack, tmp_path, 2)
        give(servers, 0)
        fakes[1].die()
        give(servers, 1)
        assert [server.is_up for server in servers.servers] == [True, False]
        fakes[1].restart()
        admit(servers, 1)
        assert fakes[1].adapters == {"treepo-run-1": str(tmp_path / "treepo-run-1")}
        give(servers, 2)
        assert list(fakes[1].adapters) == ["treepo-run-1", "treepo-run-2"]


@pytest.mark.needs_vllm
def test_a_server_that_comes_back_as_another_one_is_refused(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers, (fake,) = opened(stack, tmp_path)
        give(servers, 0)
        fake.die()
        fake.offset = 0.2
        fake.restart()
        with pytest.raises(ValueError, match="than before it was started anew"):
            admit(servers, 0)
        fake.offset, fake.version = 0.0, "0.30.0"
        with pytest.raises(ValueError, match=r"is vLLM 0\.30\.0"):
            admit(servers, 0)


# All weights


def test_all_weights_have_a_version_on_the_server(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers, (fake,) = opened(stack, tmp_path, versions=WeightVersions)
        for step in (0, 1):
            give(servers, step)
            assert fake.weights == f"treepo-run-{step}"
            assert [path.name for path in tmp_path.iterdir()] == [f"treepo-run-{step}"]
        fake.die()
        fake.restart()
        admit(servers, 0)
        assert fake.weights == "treepo-run-1"


def test_weights_written_while_a_server_loads_others_are_not_taken_for_loaded(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers, (fake,) = opened(stack, tmp_path, versions=WeightVersions)
        versions_of(servers).write(0, write_version)
        fake.while_reloading = lambda: versions_of(servers).write(1, write_version)
        run_in_loop(versions_of(servers).load(servers.servers[0].connection))
        assert fake.weights == "treepo-run-0"
        fake.while_reloading = lambda: None
        run_in_loop(versions_of(servers).load(servers.servers[0].connection))
        assert fake.weights == "treepo-run-1"


def test_a_server_that_was_not_heard_to_go_on_is_told_again(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers, (fake,) = opened(stack, tmp_path, versions=WeightVersions)
        fake.fails = {"/resume"}
        give(servers, 0)
        fake.fails, fake.calls = set(), []
        admit(servers, 0)
        assert fake.calls == ["/resume"]  # it has the weights
        fake.fails, fake.calls = {"/pause"}, []
        versions_of(servers).write(1, write_version)
        with pytest.raises(ServerLostError, match="/pause"):
            run_in_loop(versions_of(servers).load(servers.servers[0].connection))
        assert fake.calls == ["/pause", "/resume"]  # a pause that failed may have begun


def test_weights_that_the_server_cannot_read(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers, (fake,) = opened(stack, tmp_path, versions=WeightVersions)
        fake.reloads = False
        with pytest.raises(ValueError, match=r"no such folder.*Restart it.*`vllm_server_adapter_dir`"):
            give(servers, 0)
        fake.die()
        with pytest.raises(ServerLostError):
            run_in_loop(versions_of(servers).load(servers.servers[0].connection))
