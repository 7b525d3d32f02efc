"""PackedForward: when it packs, what it says, when it stops, and that pieces change nothing."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.models import make_model
from tests.support.rows import ALONE, batch_of, make_forward, packed_sizes, plain, ready_model, rows_with, run, trees
from treepo_trl.update import packed_forward, tree_attention
from treepo_trl.update.packed_forward import is_worth_packing
from treepo_trl.update.packing import PackedRows, cut_rows, pack_rows


def config_with(attention: str = "sdpa", **changes: Any) -> Any:
    config = make_model(**changes).config
    config._attn_implementation = attention
    return config


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message.removeprefix("[RANK 0] ") for record in caplog.records]


# When it pays


@pytest.mark.parametrize(("ratio", "worth"), [(1.14, False), (1.15, True), (3.0, True)])
def test_the_ratio_decides(ratio: float, worth: bool) -> None:
    packed = dataclasses.replace(rows_with(shared=1, own=99, count=1), num_padded_tokens=round(100 * ratio))
    assert is_worth_packing(packed) == worth


def test_padding_of_plain_rows_counts_since_they_forward_it() -> None:
    # Rows of 2, 2 and 12 tokens that share 1, in a batch that is 12 wide: 16 tokens, 36 with padding. The shared one
    # has three next tokens, so nothing is saved but the padding.
    packed = pack_rows(*batch_of([[5]] * 3, [[7], [8], [9] * 11]))
    assert packed.ratio == 1.0
    assert packed.num_padded_tokens == 36
    assert is_worth_packing(packed)


# What is chosen


def on_cuda(length: int, ratio: float = 2.0) -> PackedRows:
    """A row whose tokens say that they are on a CUDA device, for a rule that looks at nothing else."""
    ids: Any = SimpleNamespace(is_cuda=True, device="cuda:0", size=lambda dim: (1, length)[dim])
    return dataclasses.replace(rows_with(10, 10, 4), input_ids=ids, num_padded_tokens=round(ratio * length))


H100, RTX_4090, T4, NO_TRITON, AMD = 227 * 1024, 99 * 1024, 64 * 1024, 0, -1  # bytes of shared memory per block


@pytest.mark.parametrize(
    ("packed", "settings", "card", "backend"),
    [
        (rows_with(10, 10, 4), {}, H100, "sdpa"),  # on a processor
        (rows_with(1, 100, 4), {}, H100, None),
        (rows_with(1, 100, 4), {"max_tokens": 999}, H100, "sdpa"),
        (on_cuda(8191), {}, H100, "sdpa"),
        (on_cuda(8192), {}, H100, "flex"),
        (on_cuda(8192), {"head_dim": 256}, H100, "flex"),
        (on_cuda(8192), {"head_dim": 128}, RTX_4090, "flex"),
        (on_cuda(8192), {"head_dim": 160}, RTX_4090, "sdpa"),
        (on_cuda(8192), {}, T4, "sdpa"),
        (on_cuda(8192), {}, NO_TRITON, "sdpa"),
        (on_cuda(8192), {}, AMD, "sdpa"),  # whose properties do not have the field
        (on_cuda(8192), {"attention_dropout": 0.1}, H100, "sdpa"),
        (on_cuda(8192, ratio=1.1), {}, H100, None),
        (on_cuda(8192, ratio=1.1), {"max_tokens": 999}, H100, "flex"),
        (on_cuda(8192), {"attention": "flash_attention_2"}, H100, "flex"),
        (on_cuda(8192), {"attention": "eager"}, H100, "sdpa"),
        (on_cuda(8193), {"attention": "eager"}, H100, None),
    ],
)
def test_auto_chooses_by_sharing_length_and_machine(
    packed: PackedRows, settings: dict[str, Any], card: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_forward, "has_triton", lambda: card != NO_TRITON)
    properties = SimpleNamespace(shared_memory_per_block_optin=card) if card != AMD else SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    settings = dict(settings)
    forward = make_forward(max_tokens=settings.pop("max_tokens", None))
    assert forward._choose(packed, config_with(**settings)) == backend


@pytest.mark.parametrize("tree_packing", ["sdpa", "flex"])
def test_a_named_backend_packs_everything(tree_packing: str) -> None:
    for packed in (rows_with(10, 10, 4), rows_with(1, 100, 4), on_cuda(99, ratio=1.0)):
        assert make_forward(tree_packing)._choose(packed, config_with()) == tree_packing


def test_each_choice_of_auto_is_said_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    forward = make_forward()
    for packed in (rows_with(10, 10, 4), rows_with(10, 10, 4), rows_with(1, 100, 4), rows_with(1, 100, 4)):
        forward._choose(packed, config_with())
    # 4 rows of 20 tokens share 10, and each of these but the last has one next token: 53 positions (see test_packing).
    assert said(caplog) == [
        "tree_packing='auto' forwards packed rows with SDPA (FlexAttention needs a CUDA device): 80 tokens in rows, "
        "of them 80 no padding, 53 unique. It decides for each micro-batch.",
        "tree_packing='auto' forwards plain rows (packing pays from 1.15 forwarded tokens per unique token on): 404 "
        "tokens in rows, of them 404 no padding, 404 unique. It decides for each micro-batch.",
    ]


class OutOfResources(Exception):
    """Named as Triton's."""


class FlexOutOfResources(torch.autograd.Function):
    """FlexAttention whose backward kernel, which needs most, does not fit."""

    @staticmethod
    def forward(_: Any, query: torch.Tensor) -> torch.Tensor:
        return query.clone()

    @staticmethod
    def backward(*_: Any) -> Any:
        raise OutOfResources("out of resource: shared memory, Required: 131072, Hardware limit: 101376.")


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("where", ["forward", "backward", "compiler"])
def test_a_card_on_which_flex_does_not_fit_gets_sdpa(
    where: str, is_sharded: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def flex(module: Any, query: torch.Tensor, *_: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        calls.append(None)
        if where == "forward":
            raise OutOfResources("shared memory")
        if where == "compiler":
            raise RuntimeError("No valid triton configs. OutOfResources: out of resource: shared memory") from None
        return FlexOutOfResources.apply(query).transpose(1, 2), None  # pyright: ignore

    monkeypatch.setattr(tree_attention, "flex_attention_forward", flex)
    model, batch = ready_model(), trees()
    forward = make_forward("flex", is_sharded=is_sharded)
    for _ in range(2):
        logps, entropies, _, _ = run(forward, model, batch)
        expected = run(make_forward("sdpa"), model, batch)
        assert torch.equal(logps, expected[0])
        assert torch.equal(entropies, expected[1])
    assert len(calls) == 1
    (message,) = [each for each in said(caplog) if "does not run on this card" in each]
    assert "shared memory" in message


def test_another_error_of_flex_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def flex(*_: Any, **kwargs: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(tree_attention, "flex_attention_forward", flex)
    with pytest.raises(RuntimeError, match="something else"):
        run(make_forward("flex"), ready_model(), trees())


def test_plain_rows_are_forwarded_where_packing_does_not_pay() -> None:
    model, batch = ready_model(), batch_of(*ALONE)
    logps, entropies, aux_loss, log = run(make_forward(), model, batch)
    expected = plain(model, *batch)
    assert torch.equal(logps, expected[0])
    assert torch.equal(entropies, expected[1])
    assert aux_loss is None
    assert log["tree/packing_ratio"] == [1.0]


def test_compiling_is_announced_once_per_length(caplog: pytest.LogCaptureFixture) -> None:
    forward = make_forward("flex")
    for length in (50, 100, 150):  # padded to 128, 128, 256
        with forward._compile_notice(rows_with(1, length, 1), "flex"):
            pass
    with forward._compile_notice(rows_with(1, 50, 1), "sdpa"):
        pass
    messages = said(caplog)
    assert [message for message in messages if "compiles for" in message] == [
        f"FlexAttention compiles for rows of up to {length} tokens; this can take a minute or two."
        for length in (128, 256)
    ]
    assert sum("first forward of that length took" in message for message in messages) == 2


def test_the_auxiliary_loss_is_the_mean_over_the_chunks_of_the_caller() -> None:
    losses = iter(torch.tensor([1.0, 2.0, 6.0]))

    def with_loss(*args: Any, **kwargs: Any) -> Any:
        return *plain(*args, **kwargs)[:2], next(losses)

    model, batch = ready_model(), batch_of(*ALONE)
    result = make_forward()(model, *batch, 1, compute_entropy=False, compute_aux_loss=True, plain=with_loss)
    assert result[2] == 3


def test_a_packed_forward_computes_in_the_precision_of_the_training() -> None:
    model, forward, dtypes = ready_model(), make_forward("sdpa"), []
    forward.accelerator = SimpleNamespace(
        autocast=lambda: torch.autocast("cpu", torch.bfloat16), unwrap_model=lambda model: model
    )
    forward.checked.add((id(model), "sdpa"))
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *values: dtypes.append(values[2].dtype))
    run(forward, model, trees())
    assert dtypes == [torch.bfloat16]


# Pieces


@pytest.mark.parametrize("max_tokens", [1, 9, 20, 30, 999])
def test_pieces_give_the_same_values_and_gradients(max_tokens: int) -> None:
    model, batch = ready_model(), trees()
    pieces = cut_rows(*batch, max_tokens)
    results = []
    for forward in (make_forward("sdpa"), make_forward("sdpa", max_tokens=max_tokens)):
        model.zero_grad()
        logps, entropies, _, log = run(forward, model, batch)
        lengths = packed_sizes([slice(None)] if forward.max_tokens is None else pieces, batch)
        assert log["tree/packing_ratio"] == [batch[1].sum().item() / sum(lengths)]
        weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
        (logps * weights + entropies).sum().backward()
        results.append((logps, entropies, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("largest_first", [False, True])
def test_all_pieces_but_the_largest_are_forwarded_again_in_the_backward_pass(largest_first: bool) -> None:
    model, (ids, mask, num_scored) = ready_model(), trees(3)
    batch = (ids.flip(0), mask.flip(0), num_scored) if largest_first else (ids, mask, num_scored)
    pieces = cut_rows(*batch, 25)
    assert len(pieces) > 2
    sizes = packed_sizes(pieces, batch)
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(args[0].size(1)))
    forward = make_forward("sdpa", max_tokens=25)
    forward.checked.add((id(model), "sdpa"))
    logps = run(forward, model, batch)[0]
    assert seen == sorted(sizes)  # the largest last, so that nothing else is kept beside it
    logps.sum().backward()
    assert sorted(seen[len(sizes) :]) == sorted(sizes)[:-1]
    with torch.no_grad():
        seen.clear()
        again = run(forward, model, batch)[0]
    assert seen == sorted(sizes)
    assert torch.equal(again, logps)


def test_pieces_are_cut_inside_the_chunks_of_the_caller() -> None:
    model, batch = ready_model(), trees(2)
    with torch.no_grad():
        logps, _, _, log = run(make_forward("sdpa", max_tokens=999), model, batch, batch_size=3)
        expected = plain(model, *batch)[0]
    assert len(log["tree/packing_ratio"]) == len(log["tree/packing_seconds"]) == 3  # 8 rows in threes
    is_scored = batch[1][:, -batch[2] :].bool()
    torch.testing.assert_close(logps[is_scored], expected[is_scored], atol=1e-4, rtol=0)
