"""Log-probabilities, entropies and gradients of packed rows through models are those of the plain rows."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from tests.support.rows import Batch, batch_of, forward_packed, plain, tiny_config, tiny_model, trees
from treepo_trl.update import tree_attention
from treepo_trl.update.packable import why_not_packable
from treepo_trl.update.packing import pack_rows


def gradients(model: PreTrainedModel, logps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    (logps * weights).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def tree_batch() -> Batch:
    """Two trees with a masked completion."""
    ids, mask, num_scored = trees(2)
    mask[5, -num_scored:] = 0
    return ids, mask, num_scored


@pytest.mark.parametrize("query_block", [8, 256])  # several blocks and one
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])  # of the others, see test_packed_families.py
def test_log_probabilities_entropies_and_gradients_are_those_of_the_plain_rows(
    name: str, attention: str, query_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_attention, "_QUERY_BLOCK", query_block)
    model = tiny_model(tiny_config(name), attention)
    assert why_not_packable(model.config) is None
    batch = tree_batch()
    packed = pack_rows(*batch)
    assert packed.ratio > 1.3
    assert 8 < packed.input_ids.size(1) < 256
    rows, packed_values = plain(model, *batch)[:2], forward_packed(model, packed)
    for expected, value in zip(rows, packed_values, strict=True):
        torch.testing.assert_close(value, expected.masked_fill(~packed.is_scored, 0), atol=1e-4, rtol=0)
    weights = torch.randn(packed.index.shape, generator=torch.Generator().manual_seed(0)) * packed.is_scored
    expected, value = gradients(model, rows[0], weights), gradients(model, packed_values[0], weights)
    assert (value - expected).norm() / expected.norm() < 1e-5


def test_the_real_model_in_bfloat16_is_off_by_no_more_than_plain_rows_are(small_model_dir: str) -> None:
    """Both against float32: rounding of bfloat16 explains the difference between packed and plain rows."""
    tokenizer = AutoTokenizer.from_pretrained(small_model_dir)
    prompt = tokenizer("A farmer has 17 sheep. All but 9 run away. How many are left?").input_ids
    starts = [" All but 9 ran away, so", " If all but nine run away,"]
    ends = [" nine sheep are left.", " the farmer keeps 9 of the sheep that he had before.", " 17 - 9 = 8.", " none!"]
    completions = [tokenizer(start + end).input_ids for start in starts for end in ends]
    batch = batch_of([prompt] * len(completions), completions)
    packed = pack_rows(*batch)
    values = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=dtype, attn_implementation="sdpa").eval()
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        with torch.no_grad():
            values[dtype, "plain"] = plain(model, *batch)[0][packed.is_scored]
            values[dtype, "packed"] = forward_packed(model, packed)[0][packed.is_scored]
    truth = values[torch.float32, "plain"]
    torch.testing.assert_close(values[torch.float32, "packed"], truth, atol=2e-4, rtol=0)
    errors = {way: (values[torch.bfloat16, way] - truth).abs().mean().item() for way in ("plain", "packed")}
    assert 0 < errors["packed"] < 1.3 * errors["plain"] < 0.1


def test_a_batch_without_any_token_goes_through_a_model_and_gives_no_gradient() -> None:
    ids, mask, num_scored = batch_of([[5, 6]], [[7, 8]])
    model, packed = tiny_model(tiny_config("qwen2")), pack_rows(ids, mask * 0, num_scored)
    logps, _ = forward_packed(model, packed)
    assert logps.tolist() == [[0.0, 0.0]]
    assert gradients(model, logps, torch.ones(1, 2)).abs().max() == 0
