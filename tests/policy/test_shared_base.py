"""A policy that computes with the weights of an engine: which it takes, and that nothing but memory changes."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.nn import Parameter
from transformers import AutoModelForCausalLM

from tests.support.models import make_model
from tests.support.qlora import qlora
from treepo_trl.policy.shared_base import check_sharing, different_weights, parked, report_sharing, share_weights


IDS = torch.tensor([[10, 11, 12, 13, 14, 15, 16]])
CPU = torch.device("cpu")
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Engine(torch.nn.Module):
    """The weights of a model as vLLM holds them: some stacked, the embedding padded, layers in LoRA wrappers."""

    packed_modules_mapping = PACKED

    def __init__(self, model: Any, padding: int = 63) -> None:
        super().__init__()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name in [name for name in weights if "embed_tokens" in name]:
            weights[name] = torch.cat([weights[name], torch.zeros(padding, weights[name].shape[1])])
        for packed, parts in PACKED.items():
            for first in [name for name in weights if f".{parts[0]}." in name]:
                names = [first.replace(parts[0], part) for part in parts]
                weights[first.replace(parts[0], packed)] = torch.cat([weights.pop(name) for name in names])
        self.weights = {name.replace("proj.", "proj.base_layer."): Parameter(w, False) for name, w in weights.items()}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter(self.weights.items())


def make_policy(**changes: Any) -> Any:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(make_model(**changes), config)


@pytest.fixture
def policy() -> Any:
    return make_policy()


@pytest.fixture
def base(policy: Any) -> Any:
    return policy.get_base_model()


@pytest.fixture
def engine() -> Engine:
    return Engine(make_model())


def holds(engine: Engine, weight: torch.Tensor) -> bool:
    return any(weight.untyped_storage().data_ptr() == w.untyped_storage().data_ptr() for w in engine.weights.values())


def step(policy: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, and the gradients of the adapter."""
    policy.zero_grad()
    loss = policy(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tied", [False, True])
def test_all_of_the_base_is_shared_and_nothing_else_changes(tied: bool) -> None:
    policy = make_policy(tie_word_embeddings=tied, attention_bias=True)
    base = policy.get_base_model()
    engine = Engine(make_model(tie_word_embeddings=tied, attention_bias=True))
    loss, gradients = step(policy)
    adapter = {name: p.data_ptr() for name, p in policy.named_parameters() if p.requires_grad}
    frozen = [p for p in base.parameters() if not p.requires_grad]
    expected = sum(p.nbytes for p in frozen)
    assert share_weights(base, engine, CPU) == (expected, {})
    assert all(holds(engine, p) for p in frozen)
    assert (base.lm_head.weight is base.model.embed_tokens.weight) is tied
    assert adapter == {name: p.data_ptr() for name, p in policy.named_parameters() if p.requires_grad}
    again, same = step(policy)
    assert torch.equal(again, loss)
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)


def test_parked_weights_leave_their_device_and_come_back() -> None:
    def data(place: str) -> Any:
        return SimpleNamespace(place=place, cpu=lambda: data("cpu"), to=data)

    def weight(requires_grad: bool = False) -> Any:
        return SimpleNamespace(data=data("cuda:1"), device="cuda:1", requires_grad=requires_grad)

    frozen, trained = weight(), weight(requires_grad=True)
    base: Any = SimpleNamespace(parameters=lambda: [frozen, trained])
    with contextlib.suppress(KeyError), parked(base):
        assert (frozen.data.place, trained.data.place) == ("cpu", "cuda:1")
        raise KeyError
    assert (frozen.data.place, trained.data.place) == ("cuda:1", "cuda:1")


def test_parked_weights_stay_replaced(policy: Any, base: Any, engine: Engine) -> None:
    engine.weights["model.norm.weight"].data += 1
    loss, _ = step(policy)
    with parked(base):
        share_weights(base, engine, CPU)
    assert holds(engine, base.model.embed_tokens.weight)
    assert not holds(engine, base.model.norm.weight)
    assert torch.equal(step(policy)[0], loss)


def test_an_engine_on_another_device_shares_nothing(base: Any, engine: Engine) -> None:
    assert share_weights(base, engine, torch.device("cuda"))[0] == 0


def test_what_was_copied_since_is_shared_again(base: Any, engine: Engine) -> None:
    first = share_weights(base, engine, CPU)
    norm, up = base.model.norm.weight, base.model.layers[0].mlp.up_proj.base_layer.weight
    norm.data = norm.data.clone()
    up.data = up.data + 1  # no longer the engine's
    assert share_weights(base, engine, CPU) == (first[0] - up.nbytes, {"model.layers.0.mlp.up_proj.weight": up.nbytes})
    assert holds(engine, norm)


def test_a_weight_that_differs_in_one_number_stays_the_policys(base: Any, engine: Engine) -> None:
    name = "model.layers.1.self_attn.qkv_proj.base_layer.weight"
    engine.weights[name].data[70, 3] += 1e-6  # k_proj comes after the 64 rows of q_proj
    own = base.model.layers[1].self_attn.k_proj.base_layer.weight
    before = own.clone()
    shared, names = share_weights(base, engine, CPU)
    assert names == {"model.layers.1.self_attn.k_proj.weight": own.nbytes}
    assert shared == sum(p.nbytes for p in base.parameters() if not p.requires_grad) - own.nbytes
    assert not holds(engine, own)
    assert torch.equal(own, before)
    assert holds(engine, base.model.layers[1].self_attn.v_proj.base_layer.weight)


def test_the_engines_weights_in_another_precision_or_memory_are_not_taken(base: Any) -> None:
    engine = Engine(make_model())
    for name, weight in engine.weights.items():
        engine.weights[name] = Parameter(weight.bfloat16().float().bfloat16(), False)
    assert share_weights(base, engine, CPU)[0] == 0
    engine = Engine(make_model())
    for weight in engine.weights.values():
        weight.data = weight.data.t().contiguous().t()  # the same numbers, by columns
    kept = share_weights(base, engine, CPU)[1]
    assert "model.layers.0.mlp.up_proj.weight" in kept
    assert "model.norm.weight" not in kept  # a vector has one order
    with torch.inference_mode():
        engine = Engine(make_model())
    assert share_weights(make_policy().get_base_model(), engine, CPU)[0] == 0


def test_weights_that_are_trained_are_never_shared(base: Any, engine: Engine) -> None:
    base.model.norm.weight.requires_grad_(True)
    shared, own = share_weights(base, engine, CPU)
    assert shared > 0
    assert own == {}  # all that is frozen
    assert not holds(engine, base.model.norm.weight)


def test_other_adapters_are_no_part_of_the_base(policy: Any, engine: Engine) -> None:
    policy.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"]))  # frozen while another one is trained
    assert any("lora_A.ref" in name and not p.requires_grad for name, p in policy.named_parameters())
    assert share_weights(policy.get_base_model(), engine, CPU)[1] == {}


class Mapper:
    """As vLLM's for models that it names otherwise."""

    def apply_list(self, names: list[str]) -> list[str]:
        return [name.replace("model.", "language_model.model.", 1) for name in names if "lm_head" not in name]


@pytest.mark.parametrize("stacked", [False, True])
def test_an_engine_with_names_of_its_own(base: Any, engine: Engine, stacked: bool) -> None:
    engine.weights = {name.replace("model.", "language_model.model.", 1): w for name, w in engine.weights.items()}
    assert share_weights(base, engine, CPU)[0] == base.lm_head.weight.nbytes  # the only name that is the same
    # A mapper may join layers too; what it only renames is asked for.
    joined = SimpleNamespace(get_rename_mapper=Mapper, apply_list=lambda names: ["model.qkv_proj.weight"])
    engine.hf_to_vllm_mapper = joined if stacked else Mapper()
    assert list(share_weights(base, engine, CPU)[1]) == ["lm_head.weight"]
    engine.weights["language_model.model.norm.weight"].data = torch.zeros(64)
    base.model.norm.weight.data = torch.ones(64)
    assert different_weights(base, engine) == ["model.norm.weight"]


def test_a_layer_that_the_policy_does_not_have_ends_its_row(base: Any, engine: Engine) -> None:
    """The places of later parts are unknown then."""
    engine.packed_modules_mapping = {**PACKED, "qkv_proj": ["other_proj", "k_proj", "v_proj"]}
    own = list(share_weights(base, engine, CPU)[1])
    assert {name.split(".")[-2] for name in own} == {"q_proj", "k_proj", "v_proj"}


def test_a_merged_model_is_saved_whole(policy: Any, engine: Engine, tmp_path: Path) -> None:
    """Shared weights are slices of one memory; a checkpoint has each once."""
    share_weights(policy.get_base_model(), engine, CPU)
    expected = policy.eval()(input_ids=IDS).logits
    policy.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, atol=1e-3, rtol=1e-4)


# Whether the engine has loaded the policy's base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_on_the_same_base_differs_in_nothing(base: Any, engine: Engine, dtype: torch.dtype) -> None:
    for name, weight in engine.weights.items():
        engine.weights[name] = Parameter(weight.to(dtype), False)
    engine.weights["model.layers.0.mlp.down_proj.base_layer.weight"].data = torch.empty(0)  # packed for other kernels
    rows = engine.weights["model.layers.1.self_attn.o_proj.base_layer.weight"]
    rows.data = rows.data[torch.randperm(len(rows))]  # in an order of the engine's own
    assert different_weights(base, engine) == []


@pytest.mark.parametrize(
    ("own", "held"),
    [
        (torch.bfloat16, torch.float16),  # a checkpoint in one of the two is rounded in the other
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.float32, torch.float8_e4m3fn),
    ],
)
def test_precisions_that_cannot_be_compared_say_nothing(
    base: Any, engine: Engine, own: torch.dtype, held: torch.dtype
) -> None:
    scale = 2 if held.itemsize == 1 else 1  # 8-bit weights have scales besides
    engine.weights = {name: Parameter((scale * w).to(held), False) for name, w in engine.weights.items()}
    assert different_weights(base.to(own), engine) == []


def test_4_bits_stored_as_floats_are_no_weights_in_16_bits(tmp_path: Path) -> None:
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    policy = qlora(str(tmp_path), "bfloat16", bnb_4bit_quant_storage="bfloat16").get_base_model()
    engine = Engine(make_model().to(torch.bfloat16), padding=0)
    assert different_weights(policy, engine) == []


def test_other_numbers_of_the_same_norm_and_sum_are_seen(base: Any, engine: Engine) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    held = engine.weights[name.replace("proj.", "proj.base_layer.")]
    held.data = -held.data  # the same norm
    assert different_weights(base, engine) == [name]
    held.data = -held.data.roll(1, 0)
    held.data[0] += 0.1
    held.data[1] -= 0.1  # the same sum
    assert different_weights(base, engine) == [name]
    held.data = torch.zeros(3, 5)  # transposed or arranged otherwise
    assert different_weights(base, engine) == []


def test_a_weight_that_the_engine_derives_from_the_policys_is_none_to_compare(base: Any, engine: Engine) -> None:
    base.model.register_parameter("A_log", Parameter(torch.ones(4), False))
    engine.weights["model.A"] = Parameter(-torch.ones(4).exp(), False)
    mapper: Any = SimpleNamespace(apply_list=lambda names: [name.replace("A_log", "A") for name in names])
    engine.hf_to_vllm_mapper = mapper
    assert different_weights(base, engine) == []
    assert list(share_weights(base, engine, CPU)[1]) == ["model.A_log"]


def test_a_merged_adapter_and_more_tokens_are_seen() -> None:
    """Changes in memory that the engine's checkpoint does not have."""
    engine = Engine(make_model(), padding=0)
    changed = make_policy().merge_and_unload()
    changed.resize_token_embeddings(70)
    config = LoraConfig(r=4, target_modules=["q_proj"])
    names = different_weights(get_peft_model(changed, config).get_base_model(), engine)
    linear = [name for name, _ in make_model().named_parameters() if "proj" in name]
    assert set(names) == {*linear, "model.embed_tokens.weight", "lm_head.weight"}


# Who may share, and how much is shared


def check(policy: Any, sharding: DistributedType = DistributedType.NO, processes: int = 1) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=sharding)
    check_sharing(policy, accelerator, processes)


@pytest.mark.parametrize("sharding", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_policy_in_parts_shares_nothing(sharding: DistributedType) -> None:
    check(make_policy(), DistributedType.MULTI_GPU)
    with pytest.raises(ValueError, match=f"{sharding.value} splits the policy's weights"):
        check(make_policy(), sharding)


def test_a_policy_on_several_cards_shares_nothing(policy: Any) -> None:
    device_map: dict[str, Any] = {"model.layers.0": 0, "model.layers.1": 0}
    policy.get_base_model().hf_device_map = device_map
    check(policy)
    device_map["model.layers.1"] = 1
    with pytest.raises(ValueError, match=r"spread over 0, 1 and .*`CUDA_VISIBLE_DEVICES=0`"):
        check(policy)
    device_map["lm_head"] = "cpu"
    with pytest.raises(ValueError, match=r"spread over 0, 1, cpu and .*`load_in_4bit`"):
        check(policy)


def test_4_bits_are_shared_if_vllm_can_hold_them(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: str) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setattr("vllm.model_executor.layers.quantization.QUANTIZATION_METHODS", ["bitsandbytes"])
    monkeypatch.setattr("vllm.plugins.load_general_plugins", lambda: None)
    check(qlora(tiny_model_dir))
    with pytest.raises(ValueError, match=r"`vllm_share_base_weights=True` needs .*k_proj") as error:
        check(qlora(tiny_model_dir, llm_int8_skip_modules=["k_proj", "lm_head"]))
    assert "Unset it" in str(error.value)
    assert "dequantized" not in str(error.value)  # which sharing excludes
    with pytest.raises(ValueError, match="with tensor parallelism"):
        check(qlora(tiny_model_dir), processes=2)


def test_what_is_held_twice_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    PartialState()  # accelerate's logger wants it
    dtypes = torch.bfloat16, torch.float16
    report_sharing(900 * 2**20, {"norm": 100 * 2**20}, *dtypes)
    assert caplog.text == ""
    own = {"norm": 2**10, "experts": 3 * 2**30, "embed": 2**30, "head": 2**29}
    report_sharing(2**30, own, *dtypes)
    assert "share 1.00 GiB of the base. 4.50 GiB are held twice, experts, embed, head for example" in caplog.text
    assert "(policy bfloat16, engine float16)" in caplog.text
    with pytest.raises(ValueError, match=r"`--dtype float16`"):
        report_sharing(0, own, *dtypes)
