"""PackedForward's check of the first tree against plain rows: when it stops a run, and what it covers."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.rows import ALONE, batch_of, make_forward, plain, ready_model, run, trees
from treepo_trl.model_support import FULL_REACH
from treepo_trl.update.packed_forward import model_inputs
from treepo_trl.update.packing import pack_rows


class Broken(nn.Module):
    """A model whose packed forward attends to the row in front of it, as one without a tree mask would."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config, self.dtype, self.device = model.config, model.dtype, model.device

    def forward(self, **inputs: Any) -> Any:
        if "tree_attention" in inputs:
            inputs["tree_attention"]._last.fill_(inputs["input_ids"].size(1) - 1)
        return self.model(**inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_forward_that_differs_stops_the_run_with_both_numbers(dtype: torch.dtype) -> None:
    model, batch = Broken(ready_model().to(dtype)), trees()
    with pytest.raises(RuntimeError) as error:
        run(make_forward("sdpa"), model, batch)
    message = str(error.value)
    first_tree = batch[0][:4], batch[1][:4], batch[2]
    is_scored = first_tree[1][:, -batch[2] :].bool()
    expected = plain(model, *first_tree)[0][is_scored].mean().item()
    assert f"and {expected:.4g} in plain rows" in message
    assert "where rounding explains" in message
    assert "`tree_packing='off'`" in message


@pytest.mark.parametrize(
    ("is_exact", "difference", "stops"),
    [(True, 0.9e-3, False), (True, 1.1e-3, True), (False, 0.09, False), (False, 0.11, True)],
)
def test_as_much_may_differ_as_rounding_explains(is_exact: bool, difference: float, stops: bool) -> None:
    """Differences of both signs, of a mean near zero."""
    forward, model = make_forward("sdpa"), ready_model()
    original = forward._forward

    def shifted(*args: Any) -> Any:
        result = original(*args)
        signs = 1 - 2 * (torch.arange(result.logps.size(1)) % 2)
        return result._replace(logps=result.logps + difference * signs)

    forward._forward, forward._is_exact = shifted, lambda module: is_exact
    with pytest.raises(RuntimeError, match="does not reproduce") if stops else nullcontext():
        run(forward, model, trees())


def test_a_tree_is_the_rows_of_one_prompt_whatever_pads_it() -> None:
    # The second prompt has one token, and padding where the first has the token that pads.
    ids, mask, num_scored = batch_of([[1, 5], [5]], [[7, 8], [7, 8]])
    forward, rows = make_forward("sdpa"), []

    def spy(model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(input_ids))
        return plain(model, input_ids, *args, **kwargs)

    forward(ready_model(), ids, mask, num_scored, 9, compute_entropy=False, compute_aux_loss=False, plain=spy)
    assert rows == [1]


def test_one_tree_is_checked_once_per_backend_and_dropout_is_off() -> None:
    model, batch = ready_model(attention_dropout=0.5).train(), trees()
    model.model.layers[0].eval()
    forward = make_forward("sdpa")
    checked: list[int] = []

    def spy(model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        checked.append(len(input_ids))
        assert not model.training
        return plain(model, input_ids, *args, **kwargs)

    for _ in range(2):
        forward(model, *batch, 99, compute_entropy=False, compute_aux_loss=False, plain=spy)
    assert checked == [4]  # the leaves of the first tree
    assert forward.checked == {(id(model), "sdpa")}
    assert model.training
    assert not model.model.layers[0].training  # as it was


def test_a_tree_without_a_scored_token_leaves_the_check_to_the_next() -> None:
    model, (ids, mask, num_scored) = ready_model(), trees()
    masked = mask.clone()
    masked[:4, -num_scored:] = 0  # as mask_truncated_completions does
    forward = make_forward("sdpa")
    run(forward, model, (ids, masked, num_scored))
    assert not forward.checked
    run(forward, model, (ids, mask, num_scored))
    assert forward.checked == {(id(model), "sdpa")}


def test_a_packed_forward_that_gives_no_numbers_stops_the_run() -> None:
    forward, model = make_forward("sdpa"), ready_model()
    original = forward._forward
    forward._forward = lambda *args: original(*args)._replace(logps=original(*args).logps * float("nan"))
    with pytest.raises(RuntimeError, match=r"differ by nan nats on average.*Set `tree_packing='off'`"):
        run(forward, model, trees())


def test_the_reference_is_checked_too_and_forwarded_with_its_own_attention() -> None:
    policy, reference, batch = ready_model(), ready_model(), trees()
    reference.set_attn_implementation("eager")
    forward = make_forward("sdpa")
    with torch.no_grad():
        values = [run(forward, model, batch)[0] for model in (policy, reference)]
    torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=0)
    assert forward.checked == {(id(policy), "sdpa"), (id(reference), "sdpa")}


@pytest.mark.parametrize(
    ("change", "is_exact"),
    [
        (lambda model: model, True),
        (lambda model: model.bfloat16(), False),
        (lambda model: model.model.layers[1].bfloat16(), False),  # as the layers of a quantised model
    ],
)
def test_float32_is_exact_only_if_all_of_the_model_is(change: Any, is_exact: bool) -> None:
    model = ready_model()
    change(model)
    assert make_forward()._is_exact(model) == is_exact


def test_sharded_models_run_the_same_forwards_whether_they_pack_or_not() -> None:
    """Two rows packed and plain at the first call, in every process; processes would wait for each other otherwise."""
    ids, mask, num_scored = trees()
    without_completions = mask.clone()
    without_completions[:, -num_scored:] = 0
    for batch in ((ids, mask, num_scored), batch_of(*ALONE), (ids, without_completions, num_scored)):
        model, forward = ready_model(), make_forward("auto", is_sharded=True)
        seen: list[int] = []
        model.model.embed_tokens.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(len(args[0]))
        )
        batch_sizes: list[int | None] = []

        def spy(*args: Any, batch_sizes: Any = batch_sizes, batch_size: int | None = None, **kwargs: Any) -> Any:
            batch_sizes.append(batch_size)
            return plain(*args, **kwargs)

        for _ in range(2):
            with torch.no_grad():
                forward(model, *batch, 99, compute_entropy=False, compute_aux_loss=False, plain=spy)
        assert batch_sizes[0] == 2
        assert len(seen) == 4  # two for the check, then one a call
        assert seen[:2] == [1, 2]  # the packed row, and two plain rows at once
    with pytest.raises(RuntimeError, match="does not reproduce"):
        run(make_forward("sdpa", is_sharded=True), Broken(ready_model()), trees())


# Inputs


def test_eager_attention_gets_the_mask_as_numbers_to_add() -> None:
    packed = pack_rows(*batch_of([[5], [5]], [[7, 9], [7, 8]]))
    mask = model_inputs(packed, "eager", torch.bfloat16, "sdpa", {"full_attention": FULL_REACH})["attention_mask"]
    assert mask.dtype == torch.bfloat16
    attends = packed.attention_mask()
    assert (mask[attends] == 0).all()
    assert (mask[~attends] == torch.finfo(torch.bfloat16).min).all()
