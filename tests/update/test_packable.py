"""Which models and settings are packed, and what the others are told."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.support.models import make_model
from tests.support.rows import batch_of, forward_packed, plain, skip_if_refused, tiny_config, tiny_model
from treepo_trl.update import packable
from treepo_trl.update.packable import packed_forward_for, packed_forward_or_none, why_no_trees, why_not_packable
from treepo_trl.update.packed_forward import PackedForward
from treepo_trl.update.packing import TreePacking, pack_rows


LINEAR: dict[str, Any] = {"layer_types": ["full_attention", "linear_attention"]}


@dataclass(frozen=True)
class Settings:
    tree_packing: TreePacking = "auto"
    max_tokens_per_micro_batch: int | None = None
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict[str, Any] | None = None


def accelerator_of(device: str = "cpu", num_processes: int = 1, **plugins: object) -> Any:
    return SimpleNamespace(device=torch.device(device), num_processes=num_processes, state=SimpleNamespace(**plugins))


def ask(model: Any, accelerator: Any = None, has_aux_loss: bool = False, **settings: Any) -> Any:
    return packed_forward_for(model, Settings(**settings), accelerator or accelerator_of(), has_aux_loss)


def eager() -> Any:
    model = make_model()
    model.set_attn_implementation("eager")
    return model


def without_interface() -> Any:
    model = make_model()
    model._supports_attention_backend = False
    return model


def test_the_packed_forward_has_the_settings_of_the_training() -> None:
    accelerator = accelerator_of()
    adapted = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear"))
    for model in (make_model(), adapted, eager()):
        forward = ask(model, accelerator, tree_packing="sdpa", max_tokens_per_micro_batch=99)
        assert isinstance(forward, PackedForward)
        assert (forward.tree_packing, forward.max_tokens, forward.is_sharded) == ("sdpa", 99, False)
        assert forward.accelerator is accelerator


@pytest.mark.parametrize("plugin", ["fsdp_plugin", "deepspeed_plugin"])
def test_sharded_trainings_are_known_by_their_plugin(plugin: str) -> None:
    assert ask(make_model(), accelerator_of(**{plugin: object()})).is_sharded
    assert not ask(make_model(), accelerator_of(**{plugin: None})).is_sharded


def test_off_asks_nothing() -> None:
    assert ask(make_model(**LINEAR), tree_packing="off") is None


NOT_PACKED = [
    (lambda: make_model(**LINEAR), False, "it has layers of type linear_attention"),
    (eager, True, "its load-balancing loss does not go with the mask of eager attention"),
    (without_interface, False, "its attention does not go through transformers' common interface"),
]


@pytest.mark.parametrize(("build", "has_aux_loss", "reason"), NOT_PACKED)
def test_a_model_that_is_not_packed(build: Callable[[], Any], has_aux_loss: bool, reason: str) -> None:
    """A sentence with `auto`; an error where packed rows, or tokens of them, were asked for."""
    message = f"Shared prefixes are not packed for Qwen3ForCausalLM: {reason}."
    assert ask(build(), has_aux_loss=has_aux_loss) == message
    with pytest.raises(ValueError, match="'off'") as error:
        ask(build(), has_aux_loss=has_aux_loss, tree_packing="sdpa")
    assert str(error.value) == f"`tree_packing` is 'sdpa', but {message} Set it to 'off'."
    with pytest.raises(ValueError, match="Leave it out") as error:
        ask(build(), has_aux_loss=has_aux_loss, max_tokens_per_micro_batch=99)
    budget = "`max_tokens_per_micro_batch` counts tokens of packed rows"
    assert str(error.value) == f"{budget}, but {message} Leave it out."


def test_a_forward_that_loses_trees_is_a_reason_but_for_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packable, "why_no_trees", lambda model: f"{type(model).__name__} loses it")
    assert ask(get_peft_model(make_model(), LoraConfig(r=4))) == (
        "Shared prefixes are not packed for Qwen3ForCausalLM: Qwen3ForCausalLM loses it."
    )
    assert isinstance(ask(eager()), PackedForward)


@pytest.mark.parametrize(
    ("build", "device", "message"),
    [
        (make_model, "cpu", r"'flex'` needs a CUDA device, this is 'cpu'.*Set `tree_packing='sdpa'`"),
        (eager, "cuda", r"this one has 'eager'"),
        (lambda: make_model(attention_dropout=0.1), "cuda", r"has no dropout, but.*`attention_dropout=0.1`"),
    ],
)
def test_flex_refuses_what_it_does_not_serve(build: Callable[[], Any], device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(build(), accelerator_of(device), tree_packing="flex")
    for other in ("auto", "sdpa"):
        assert isinstance(ask(build(), accelerator_of(device), tree_packing=other), PackedForward)


SHARDED, TWO = accelerator_of(fsdp_plugin=object()), accelerator_of(num_processes=2)
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.parametrize(
    ("accelerator", "has_aux_loss", "settings", "message"),
    [
        (SHARDED, False, {}, r"not supported with FSDP and DeepSpeed.*per_device_train_batch_size"),
        (TWO, False, REENTRANT, r"several processes and `use_reentrant=True`.*to False"),
        (accelerator_of(), True, {}, r"not supported with a load-balancing loss.*`router_aux_loss_coef=0`"),
        (accelerator_of(), False, REENTRANT, None),
        (TWO, False, {}, None),
        (TWO, False, {**REENTRANT, "gradient_checkpointing": False}, None),
        (TWO, False, {"gradient_checkpointing": True}, None),
        (TWO, False, {**REENTRANT, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, None),
    ],
)
def test_the_token_budget_is_served_or_refused(
    accelerator: Any, has_aux_loss: bool, settings: dict[str, Any], message: str | None
) -> None:
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        found = ask(make_model(), accelerator, has_aux_loss, max_tokens_per_micro_batch=99, **settings)
        assert isinstance(found, PackedForward)
    assert isinstance(ask(make_model(), accelerator, has_aux_loss, **settings), PackedForward)


@pytest.mark.parametrize(("attention", "is_left_out"), [("sdpa", True), ("eager", False)])
def test_a_soft_cap_that_training_leaves_out_is_said(
    attention: str, is_left_out: bool, caplog: pytest.LogCaptureFixture
) -> None:
    skip_if_refused(attention)
    AcceleratorState._reset_state()
    Accelerator(cpu=True)  # whose processes the logger asks for
    model = tiny_model(tiny_config("gemma2", attn_logit_softcapping=30.0), attention)
    assert isinstance(packed_forward_or_none(model, Settings(), accelerator_of(), False), PackedForward)
    said = [record.message for record in caplog.records if "bounds its attention scores at 30.0" in record.message]
    assert len(said) == is_left_out
    assert all("Load it with `attn_implementation='eager'`." in message for message in said)


# Architectures

# No families of `docs/models.md`, which test_packed_families.py has. Windows are shorter than the rows.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("cohere", "stablelm", "starcoder2", "bloom", "opt", "mamba")},
    "ministral": {"sliding_window": 4},
    "starcoder2 with windows": {"sliding_window": 4},
    "qwen3_next": {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon with alibi": {"alibi": True, "new_decoder_architecture": False},
    "doge": {"keep_window_size": 4},
    "gptj": {"rotary_dim": 4},
}
PACKED = {"cohere", "starcoder2", "starcoder2 with windows", "ministral", "gpt_neox"}
# Refused by older transformers, where OPT looks at the values of its mask, which the question has not.
PACKED_BY_NEWER_TRANSFORMERS = {"opt", "gptj"}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")
def test_no_architecture_passes_as_packable_and_gives_other_values(name: str) -> None:
    config = tiny_config(name.split()[0], **ARCHITECTURES[name])
    try:
        model = tiny_model(config)
    except ValueError:  # no SDPA attention for this architecture
        model = tiny_model(config, "eager")
    found = ask(model)
    if name not in PACKED_BY_NEWER_TRANSFORMERS:
        assert isinstance(found, PackedForward if name in PACKED else str)
    if isinstance(found, str):
        return
    prompt, shared = list(range(5, 12)), [list(range(20, 28)), list(range(40, 48))]
    batch = batch_of([prompt] * 4, [[*shared[i // 2], *range(30 + 5 * i, 38 + 5 * i)] for i in range(4)])
    with torch.no_grad():
        expected, value = plain(model, *batch)[0], forward_packed(model, pack_rows(*batch))[0]
    torch.testing.assert_close(value, expected, atol=1e-3, rtol=0)


# Configs


@pytest.mark.parametrize(
    "name",
    [
        *("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "xlstm"),
        # attention and recurrence in one model; several give `layer_types` only as a property
        *("bamba", "zamba", "zamba2", "falcon_h1", "nemotron_h", "granitemoehybrid", "qwen3_next", "minimax", "zaya"),
    ],
)
def test_recurrent_and_hybrid_models_are_refused(name: str) -> None:
    config = CONFIG_MAPPING[name]()
    config._attn_implementation = "sdpa"
    assert why_not_packable(config) is not None


def config_with(attention: str = "sdpa", **changes: Any) -> PreTrainedConfig:
    config = tiny_config("llama")
    config._attn_implementation = attention
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of type linear_attention"),
        ({"layer_types": ["hybrid", "sliding_attention", "conv"]}, "layers of type conv, hybrid"),
        ({"use_bidirectional_attention": True}, "attention that looks ahead"),
        ({"attn_temperature_tuning": True}, "the scale of its attention grows with packed positions"),
        ({"alibi": True}, "ALiBi"),
        (
            {"attention": "kernels-community/unknown"},
            "its attention is 'kernels-community/unknown' (load it with `attn_implementation='sdpa'`, or 'eager')",
        ),
    ],
)
def test_reasons_name_what_the_mask_cannot_serve(changes: dict[str, Any], reason: str) -> None:
    assert reason in (why_not_packable(config_with(**changes)) or "")


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None},
        {"sliding_window": 4096},
        {"layer_types": ["full_attention", "sliding_attention", "chunked_attention"]},
        {"layer_types": ["full_attention", "full_attention"]},
        {"sliding_window": 4096, "use_sliding_window": False},  # Qwen2 keeps the number and does not use it
        {"sliding_window": 4096, "layer_types": ["full_attention", "full_attention"]},
        *({"attention": name} for name in ("eager", "flash_attention_2", "flash_attention_3", "flex_attention")),
    ],
)
def test_windows_and_any_registered_attention_are_no_reasons(changes: dict[str, Any]) -> None:
    assert why_not_packable(config_with(**changes)) is None


# Forwards that take trees


def test_models_are_asked_whether_they_hand_trees_on() -> None:
    model = make_model().train()
    assert why_no_trees(model) is None
    assert model.training
    # StableLM's layers hand no keywords on: its attention gets the mask alone, whose integers are no mask.
    reason = why_no_trees(tiny_model(tiny_config("stablelm")))
    assert "does not take `tree_attention` (RuntimeError: Expected attn_mask dtype" in (reason or "")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_layer_that_does_not_say_its_window_is_a_reason(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one whose mask alone has the window: packed rows would see beyond it, and nothing would say so."""
    model = tiny_model(tiny_config("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1), attention)
    assert why_no_trees(model) is None
    made = type(model.model.layers[0].self_attn)
    build = made.__init__

    def without_window(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.sliding_window = None

    monkeypatch.setattr(made, "__init__", without_window)
    reason = "its layers of type sliding_attention do not give their attention the window that its config names"
    assert why_no_trees(model) == reason
    assert ask(model) == f"Shared prefixes are not packed for Qwen2ForCausalLM: {reason}."


def test_the_question_needs_no_weights() -> None:
    """As under DeepSpeed ZeRO-3, which holds empty parameters between forwards."""
    model = make_model()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    assert why_no_trees(model) is None


def test_any_failure_is_a_reason_and_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()

    def forward(self: Any, **_: Any) -> None:
        raise AssertionError("rope dims")

    monkeypatch.setattr(type(model.model), "forward", forward)
    assert why_no_trees(model) == "its forward does not take `tree_attention` (AssertionError: rope dims)"
