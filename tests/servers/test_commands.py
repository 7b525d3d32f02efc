"""The commands over servers without a model."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.fake_vllm import VLLM_VERSION
from tests.support.models import make_tokenizer
from tests.support.policy_fake import LORA, PolicyFake
from tests.support.recipes import recipe_of
from treepo_trl.apps.doctor.findings import BrokenError
from treepo_trl.apps.doctor.servers import check_each, check_servers
from treepo_trl.command_line.engine import build_engine, use_adapter
from treepo_trl.command_line.engine_arguments import EngineArguments
from treepo_trl.engines import SamplingOptions, SegmentRequest
from treepo_trl.servers.checks import ServerNeeds


def adapter_in(folder: Path, rank: int = 4) -> str:
    from peft import LoraConfig

    LoraConfig(r=rank, target_modules=["q_proj"]).save_pretrained(str(folder))
    (folder / "weights").write_text("1")
    return str(folder)


def arguments(model: str, *servers: PolicyFake, **changes: Any) -> EngineArguments:
    urls = ",".join(server.url for server in servers)
    settings = {"model_name_or_path": model, "vllm_mode": "server", "vllm_server_base_url": urls}
    return EngineArguments(**{**settings, "vllm_server_timeout": 60.0, **changes})


def serving(model: str) -> dict[str, Any]:
    return {"model_config": {"model": model}, "lora_config": {"max_loras": 1, "max_lora_rank": 8}}


def test_adapters_take_turns_on_all_servers(tiny_model_dir: str, tmp_path: Path) -> None:
    adapters = [adapter_in(tmp_path / "a"), adapter_in(tmp_path / "b", rank=8)]
    with PolicyFake(serving(tiny_model_dir)) as first, PolicyFake(serving(tiny_model_dir)) as second:
        engine = build_engine(arguments(tiny_model_dir, first, second), [0], SamplingOptions(), adapters=adapters)
        for position in (0, 1, None):
            use_adapter(engine, adapters, position)
            list(engine.complete([SegmentRequest(i, [5, 6], 3, tree=i) for i in range(2)]))
        for server in (first, second):
            assert list(server.adapters.values()) == adapters
            assert [body["model"] for body in server.bodies] == [*server.adapters, "base"]
        assert not set(first.adapters) - set(second.adapters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vllm_server_base_url": None}, "go together"),
        ({"vllm_mode": "colocate"}, "go together"),
        (
            {"vllm_quantization": "bitsandbytes"},
            "`vllm_quantization='bitsandbytes'` is about an engine in this process",
        ),
        ({"dtype": "float32"}, "`dtype='float32'` is about an engine in this process"),
        ({"engine": "transformers"}, "`engine='transformers'` runs no vLLM, but `vllm_mode` is 'server'"),
    ],
)
def test_settings_that_do_not_go_with_servers(changes: dict[str, Any], message: str) -> None:
    given = {"vllm_mode": "server", "vllm_server_base_url": "http://nowhere", **changes}
    with pytest.raises(ValueError, match=message):
        EngineArguments(**given)


def test_an_adapter_above_the_rank_of_the_server(tiny_model_dir: str, tmp_path: Path) -> None:
    adapter = adapter_in(tmp_path / "a", rank=16)
    with PolicyFake(serving(tiny_model_dir)) as server, pytest.raises(ValueError, match="--max-lora-rank 16"):
        build_engine(arguments(tiny_model_dir, server), [0], SamplingOptions(), adapters=[adapter])


def test_an_adapter_that_the_server_cannot_load(tiny_model_dir: str, tmp_path: Path) -> None:
    """vLLM answers 500."""
    with PolicyFake(serving(tiny_model_dir)) as server:
        server.can_load = False
        with pytest.raises(
            ValueError, match=r"could not load the adapter .*rank 64 is too large.*the same path"
        ) as error:
            build_engine(arguments(tiny_model_dir, server), [0], SamplingOptions(), adapters=[adapter_in(tmp_path)])
        assert server.url in str(error.value)


def test_a_server_with_the_weights_of_a_training_is_refused(tiny_model_dir: str) -> None:
    with PolicyFake(serving(tiny_model_dir)) as server:
        server.weights = "treepo-other-7"
        with pytest.raises(ValueError, match=r"has the weights of a training \(treepo-other-7\).*Start it again"):
            build_engine(arguments(tiny_model_dir, server), [0], SamplingOptions(), adapters=[])


def test_the_doctor_names_server_and_flag() -> None:
    needs = ServerNeeds("/models/base", make_tokenizer(), num_adapters=2, adapter_rank=4)
    with PolicyFake() as other, PolicyFake() as server:
        assert f"2 servers of vLLM {VLLM_VERSION} in float32: 16 requests" in check_each(
            [other.url, server.url], needs
        )
    with pytest.raises(BrokenError, match=f"No vLLM server answers at {server.url}"):
        check_each([server.url], needs)
    with PolicyFake({}) as server, pytest.raises(BrokenError, match="serves no adapters") as error:
        check_each([server.url], needs)
    assert "--enable-lora --max-loras 2" in error.value.remedy
    with (
        PolicyFake() as first,
        PolicyFake(LORA | {"model_config": {"dtype": "torch.float16"}}) as second,
        pytest.raises(
            BrokenError, match=f"different number types: {first.url} in float32, {second.url} in float16"
        ) as error,
    ):
        check_each([first.url, second.url], needs)
    assert "`--dtype`" in error.value.remedy


def test_the_doctor_reads_the_servers_of_a_recipe(tiny_model_dir: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    with PolicyFake(serving(tiny_model_dir) | {"lora_config": {"max_loras": 2, "max_lora_rank": 16}}) as server:
        settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url, "use_peft": True}
        settings |= {"model_name_or_path": tiny_model_dir, "bf16": False, "use_cpu": True}
        recipe.write_text(yaml.safe_dump(settings))
        read = recipe_of(recipe, tiny_model_dir)
        assert check_servers(read).startswith("1 server of vLLM")
    assert read.has_servers
    assert not read.uses_vllm
    assert "vllm" in read.packages
