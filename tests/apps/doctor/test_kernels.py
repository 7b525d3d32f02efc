"""Number type, packed update and 4-bit layers: right here, and what is said where they are not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.support.broken_environments import hide
from tests.support.families import FAMILY
from treepo_trl.apps.doctor import packed_update
from treepo_trl.apps.doctor.findings import BrokenError, CannotRunError
from treepo_trl.apps.doctor.four_bit import check_four_bit
from treepo_trl.apps.doctor.needs import Needs, NumberType, everything
from treepo_trl.apps.doctor.number_type import check_number_type, why_not
from treepo_trl.apps.doctor.packed_update import check_packed
from treepo_trl.update.tree_attention import TreeAttention


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a card")


def recipe(model: str = "any", number_type: NumberType = "bfloat16", use_cpu: bool = True, **training: Any) -> Needs:
    return Needs(model, {"use_vllm": False, **training}, {"use_peft": False}, number_type, use_cpu, is_recipe=True)


def test_number_types_of_a_processor() -> None:
    assert "bfloat16 and float16 work on cpu" in check_number_type(everything("any"))
    for number_type in ("bfloat16", "float32"):
        assert f"{number_type} multiplies and trains on cpu" in check_number_type(recipe(number_type=number_type))


def test_a_recipe_in_bfloat16_where_there_is_none() -> None:
    """transformers refuses it here, as it does on a card below compute capability 8.0."""
    with pytest.raises(BrokenError, match="bfloat16 is refused here: Your setup doesn't support bf16/gpu") as error:
        check_number_type(recipe(use_cpu=False))
    assert "`use_cpu: true` and `bf16: false`" in error.value.remedy


def test_a_recipe_in_float16_on_a_processor() -> None:
    """A training refuses it: accelerate would compute in float32."""
    with pytest.raises(BrokenError, match="float16 is refused here: `fp16=True` needs a GPU") as error:
        check_number_type(recipe(number_type="float16"))
    assert "`use_cpu: true`, `fp16: false` and `bf16: false`" in error.value.remedy


def test_a_type_that_rounds_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not("float16", torch.device("cpu")) is None
    monkeypatch.setattr(torch, "randn", lambda *size, generator: 300 * torch.ones(*size))  # beyond float16's 65504
    assert why_not("float16", torch.device("cpu")) is not None
    assert why_not("bfloat16", torch.device("cpu")) is None


def test_packed_rows_give_what_plain_rows_give(tiny_model_dir: str) -> None:
    assert "of the gradient from plain rows (float32, cpu)" in check_packed(everything(tiny_model_dir), "sdpa")
    with pytest.raises(CannotRunError, match="no backward pass on a processor"):
        check_packed(everything(tiny_model_dir), "flex")


def test_a_kernel_that_attends_to_other_paths(tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TreeAttention.__init__

    def sees_all(self: TreeAttention, last: torch.Tensor, *args: Any) -> None:
        original(self, torch.full_like(last, len(last) - 1), *args)

    monkeypatch.setattr(TreeAttention, "__init__", sees_all)
    with pytest.raises(BrokenError, match=r"^Packed rows with `sdpa`: .* nats and .* of the gradient") as error:
        check_packed(everything(tiny_model_dir), "sdpa")
    assert "`tree_packing: 'off'`" in error.value.remedy


def test_a_kernel_that_is_short_of_shared_memory(tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("Compiling.\nOutOfResources: shared memory, Required: 114688, Hardware limit: 101376")

    monkeypatch.setattr(TreeAttention, "__call__", fails)
    with pytest.raises(BrokenError, match="shared memory, Required: 114688"):
        check_packed(everything(tiny_model_dir), "sdpa")


@pytest.mark.parametrize(
    ("family", "heads"),
    [("Qwen2, Qwen2.5", "32"), ("Gemma 4", "32 and 64"), ("DeepSeek-V3", "32 and 96"), ("gpt-oss", "32")],
)
def test_models_with_other_attention(family: str, heads: str, tmp_path: Path) -> None:
    """Heads whose size the config does not name, or whose sizes differ, and a model that has eager attention only."""
    FAMILY[family].model().save_pretrained(tmp_path)
    assert check_packed(everything(str(tmp_path)), "sdpa").endswith(f"; heads of {heads} dimensions")


def test_a_kernel_that_eager_attention_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILY["gpt-oss"].model().save_pretrained(tmp_path)
    # A device that flex would be tried on, for a rule that looks at nothing else.
    monkeypatch.setattr(packed_update, "training_device", lambda needs: SimpleNamespace(type="cuda"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    monkeypatch.setattr(packed_update, "_load", lambda *_: model)
    with pytest.raises(CannotRunError, match="eager attention"):
        check_packed(recipe(str(tmp_path), tree_packing="flex"), "flex")


def test_gradients_of_few_layers_that_depend_on_all() -> None:
    model = FAMILY["Gemma 4 E2B, E4B"].model()  # of four layers
    packed_update._train_outer_layers(model)
    trained = {name.split(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"0", "3"}


@pytest.mark.parametrize("where", ["_load", "_packed_logps"])
def test_a_card_without_memory_for_the_model_says_nothing_of_the_kernel(
    where: str, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(packed_update, where, fails)
    with pytest.raises(CannotRunError, match="too large to be compared here: CUDA out of memory"):
        check_packed(everything(tiny_model_dir), "sdpa")


def test_a_model_that_is_trained_on_plain_rows(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(CannotRunError, match="trains on plain rows: its absolute positions"):
        check_packed(everything(str(tmp_path)), "sdpa")


def test_a_4_bit_layer() -> None:
    assert "forward and backward on cpu" in check_four_bit(everything("any"))


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "bitsandbytes", "bitsandbytes")
    with pytest.raises(BrokenError, match="No module named 'bitsandbytes") as error:
        check_four_bit(everything("any"))
    assert error.value.remedy == 'Run `pip install "treepo-trl[quantization]"`.'
