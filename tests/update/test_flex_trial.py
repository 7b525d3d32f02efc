"""FlexAttention is tried with the heads of every kind of layer."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tests.support.families import FAMILY
from tests.support.rows import rows_with
from treepo_trl.model_support import Heads, is_heterogeneous, layer_heads
from treepo_trl.update import tree_attention
from treepo_trl.update.flex_trial import why_flex_fails, why_too_small
from treepo_trl.update.tree_attention import TreeAttention


@pytest.mark.parametrize(
    ("family", "heads"),
    [
        ("Llama", [Heads(2, 1, 32, 32)] * 2),
        ("Gemma 4", [Heads(2, 1, 32, 32), Heads(2, 1, 64, 64)]),
        ("Gemma 4 E2B, E4B", [Heads(2, 1, 32, 32), Heads(2, 1, 64, 64)] * 2),
        ("DeepSeek-V3", [Heads(2, 2, 96, 32)] * 2),
        ("GPT-2", [Heads(2, 2, 32, 32)] * 2),
    ],
)
def test_heads_of_each_layer(family: str, heads: list[Heads]) -> None:
    assert layer_heads(FAMILY[family].config()) == heads


def test_configs_of_an_older_transformers() -> None:
    class Older:
        num_attention_heads, hidden_size, num_hidden_layers = 4, 64, 1

    assert not is_heterogeneous(Older())  # pyright: ignore
    assert layer_heads(Older()) == [Heads(4, 4, 16, 16)]  # pyright: ignore


def test_the_largest_head_of_any_layer_must_fit() -> None:
    config = FAMILY["Gemma 4"].config()
    assert why_too_small(99 * 1024, config) is None
    config = type(config)(
        **{**FAMILY["Gemma 4"].changes, "num_hidden_layers": 2, "head_dim": 64, "global_head_dim": 256}
    )
    assert "heads of 256 dimensions" in str(why_too_small(99 * 1024, config))


@pytest.mark.parametrize(
    ("config", "tried"),
    [
        (FAMILY["Gemma 4"].config(), [(2, 1, 32), (2, 1, 64)]),
        (FAMILY["Gemma 4 E2B, E4B"].config(), [(2, 1, 32), (2, 1, 64)]),
        (LlamaConfig(num_attention_heads=4, num_key_value_heads=2, hidden_size=64), [(4, 2, 16)]),
    ],
)
def test_each_kind_of_layer_is_tried_once(
    config: Any, tried: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def flex(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
        calls.append((query.size(1), key.size(1), query.size(-1)))
        return (query + key.mean() + value.mean()).transpose(1, 2), None

    monkeypatch.setattr(tree_attention, "flex_attention_forward", flex)
    packed = rows_with(10, 10, 4)
    attention = TreeAttention(packed.last_descendants, "flex")
    assert why_flex_fails(attention, packed.input_ids.size(1), config, torch.empty(0)) is None
    assert calls == tried
