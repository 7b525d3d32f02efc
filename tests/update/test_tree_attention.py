"""Attention over a packed row is attention under its dense mask, whatever the backend and however the row is cut."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.support.models import make_model
from treepo_trl.model_support import FULL_REACH, Reach
from treepo_trl.update import tree_attention
from treepo_trl.update.block_attention import Scores
from treepo_trl.update.tree_attention import LayerAttention, TreeAttention, flex_length, serve_trees


FOREST = [-1, 0, 1, 1, 0, -1]  # parents in depth-first order, -1 for roots


def last_of(parents: list[int]) -> torch.Tensor:
    """Last descendant of each position, from parents (-1 for roots), which come in depth-first order."""
    last = list(range(len(parents)))
    for i in reversed(range(len(parents))):
        if parents[i] >= 0:
            last[parents[i]] = max(last[parents[i]], last[i])
    return torch.tensor(last)


def path_to(parents: list[int], i: int) -> list[int]:
    """The ancestors of a position and itself, the root first."""
    path = [i]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def dense_mask(parents: list[int], reach: Reach = FULL_REACH) -> torch.Tensor:
    """True where the column is the row's ancestor or itself and the row sees that far, by walking down."""
    mask = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for i in range(len(parents)):
        path = path_to(parents, i)
        seen = path
        if reach.window is not None:
            seen = path[-reach.window :]
        elif reach.chunk is not None:
            seen = path[(len(path) - 1) // reach.chunk * reach.chunk :]
        mask[i, seen] = True
    return mask


REACHES = st.one_of(
    st.just(FULL_REACH), st.builds(Reach, window=st.integers(1, 30)), st.builds(Reach, chunk=st.integers(1, 30))
)


@st.composite
def forests(draw: st.DrawFn, max_size: int = 40) -> list[int]:
    """Parents in depth-first order: each position hangs on one of the current path, or starts a new tree."""
    path: list[int] = []
    parents = []
    for i in range(draw(st.integers(1, max_size))):
        keep = draw(st.one_of(st.just(len(path)), st.integers(0, len(path))))  # mostly a chain
        path = path[:keep]
        parents.append(path[-1] if path else -1)
        path.append(i)
    return parents


def states(length: int, dtype: torch.dtype = torch.float32, heads: int = 4, key_heads: int = 2) -> list[torch.Tensor]:
    """Queries, keys and values; values of another size than keys."""
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(1, count, length, size, generator=generator).to(dtype).requires_grad_()
        for count, size in ((heads, 8), (key_heads, 8), (key_heads, 4))
    ]


def dense(
    parents: list[int], inputs: list[torch.Tensor], scaling: float | None = None, reach: Reach = FULL_REACH
) -> torch.Tensor:
    mask = dense_mask(parents, reach)
    output = F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True, scale=scaling)
    return output.transpose(1, 2)


def attend(
    tree: TreeAttention,
    inputs: list[torch.Tensor],
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **layer: Any,
) -> torch.Tensor:
    return tree(nn.Module(), *inputs, LayerAttention(Scores(dropout, scaling, softcap), **layer))


@pytest.fixture(params=[0, 10**9])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of blocks are gathered again for the backward pass, or kept."""
    monkeypatch.setattr(tree_attention, "_MAX_KEPT_COPIES", request.param)


def gradients_of(output: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return torch.autograd.grad((output * weights.to(output.dtype)).sum(), inputs)


@given(forests(), st.integers(1, 45), st.sampled_from([0, 10**9]), st.sampled_from([None, 1.5]), REACHES)
def test_blocks_of_any_size_give_the_dense_result_and_its_gradients(
    parents: list[int], query_block: int, max_kept: int, scaling: float | None, reach: Reach
) -> None:
    """Whether the blocks' keys are kept for the backward pass or gathered again."""
    inputs = states(len(parents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_attention, "_MAX_KEPT_COPIES", max_kept)
        expected = dense(parents, inputs, scaling, reach)
        tree = TreeAttention(last_of(parents), "sdpa", query_block)
        output = attend(tree, inputs, scaling=scaling, reach=reach)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients_of(output, inputs), gradients_of(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@given(forests(), st.integers(1, 45), REACHES)
def test_a_block_has_the_keys_that_its_queries_see_and_no_other(
    parents: list[int], query_block: int, reach: Reach
) -> None:
    mask = dense_mask(parents, reach)
    blocks = TreeAttention(last_of(parents), "sdpa", query_block).query_blocks(reach)
    assert [i for block in blocks for i in range(block.start, block.end)] == list(range(len(parents)))
    for block in blocks:
        rows = slice(block.start, block.end)
        own = torch.arange(block.start, block.end)
        assert set(block.keys.tolist()) == set(torch.nonzero(mask[rows].any(0)).flatten().tolist()) | set(own.tolist())
        own_mask = block.mask(torch.float32)
        assert torch.equal(own_mask == 0, mask[rows][:, block.keys])
        assert torch.equal(own_mask == -torch.inf, ~mask[rows][:, block.keys])


@given(forests())
@settings(max_examples=20)
def test_depths_are_the_lengths_of_paths(parents: list[int]) -> None:
    depths = TreeAttention(last_of(parents), "sdpa").depths()
    assert depths.tolist() == [len(path_to(parents, i)) - 1 for i in range(len(parents))]


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("scaling", [None, 1.5])
@pytest.mark.parametrize("reach", [FULL_REACH, Reach(window=3)])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(0.5, False), (None, True)])
def test_soft_caps_and_sinks_are_those_of_the_formula(
    softcap: float | None, with_sinks: bool, reach: Reach, scaling: float | None
) -> None:
    """Products, bounded; a sink's score beside those of the keys, its weight thrown away."""
    parents = [i - 1 for i in range(12)] + [5, *range(12, 17)] + [-1, 18, 18]
    query, key, value = inputs = states(len(parents))
    sinks = torch.tensor([2.0, -1.0, 0.5, 4.0], requires_grad=True)  # a weight of most and of nearly nothing
    products = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * (8**-0.5 if scaling is None else scaling)
    if softcap is not None:
        products = torch.tanh(products / softcap) * softcap
    products = products.masked_fill(~dense_mask(parents, reach), -torch.inf)
    if with_sinks:
        products = torch.cat([products, sinks[None, :, None, None].expand(-1, -1, len(parents), 1)], -1)
    weights = products.softmax(-1)[..., : len(parents)]
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    layer = {"reach": reach, "sinks": sinks if with_sinks else None}
    output = attend(TreeAttention(last_of(parents), "sdpa", 5), inputs, scaling=scaling, softcap=softcap, **layer)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    leaves = [*inputs, sinks] if with_sinks else inputs
    for a, b in zip(gradients_of(output, leaves), gradients_of(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_as_close_as_the_dense_ones(dtype: torch.dtype) -> None:
    parents = [i - 1 for i in range(64)] + [31, *range(64, 95)] + [15, *range(96, 127)]  # a trunk with two branches
    exact, half = states(len(parents)), [tensor.detach().to(dtype).requires_grad_() for tensor in states(len(parents))]
    truth = gradients_of(dense(parents, exact), exact)
    by_blocks = gradients_of(attend(TreeAttention(last_of(parents), "sdpa", 16), half), half)
    by_mask = gradients_of(dense(parents, half), half)
    for ours, theirs, true in zip(by_blocks, by_mask, truth, strict=True):
        assert ours.dtype == dtype
        assert (ours - true).norm() < 1.5 * (theirs - true).norm()


@pytest.mark.usefixtures("kept")
def test_autocast_attends_in_its_own_dtype() -> None:
    inputs = states(len(FOREST))
    tree = TreeAttention(last_of(FOREST), "sdpa", 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(tree, inputs)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), dense(FOREST, inputs), atol=0.05, rtol=0.05)
    assert all(gradient.dtype == torch.float32 for gradient in gradients_of(output, inputs))


def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    inputs = [tensor.detach() for tensor in states(len(FOREST))]
    tree = TreeAttention(last_of(FOREST), "sdpa", 2)
    torch.manual_seed(0)
    draws = torch.stack([attend(tree, inputs, dropout=0.5) for _ in range(4000)])
    assert draws.std(0).max() > 0.1
    torch.testing.assert_close(draws.mean(0), dense(FOREST, inputs), atol=0.15, rtol=0)


@pytest.mark.usefixtures("kept")
def test_dropout_is_the_same_in_both_passes() -> None:
    """Also of a path that is too long to be kept: a block that is attended again would drop other weights."""
    inputs = states(len(FOREST))
    torch.manual_seed(0)
    output = attend(TreeAttention(last_of(FOREST), "sdpa", 2), inputs, dropout=0.5)
    # The output is linear in the values: for those drawn weights, gradient times values is the output itself.
    (gradient,) = torch.autograd.grad(output.sum(), [inputs[2]])
    torch.testing.assert_close((gradient * inputs[2]).sum(), output.sum())
    assert (output - dense(FOREST, inputs)).abs().max() > 0.1


@pytest.mark.parametrize(("length", "is_kept"), [(40, True), (41, False)])
def test_keys_and_masks_of_long_paths_are_not_kept(length: int, is_kept: bool) -> None:
    # A chain in blocks of 5: block i has 5 (i + 1) keys, 8 blocks 180 in all, 4.5 times 40. With 4.5 allowed, a ninth
    # block of 1 brings them to 221, 5.4 times 41.
    parents = list(range(-1, length - 1))
    inputs = states(length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_attention, "_MAX_KEPT_COPIES", 4.5)
        tree = TreeAttention(last_of(parents), "sdpa", 5)
        output = attend(tree, inputs)
    assert bool(tree._masks) == is_kept
    graph, pending = set(), [output.grad_fn]
    while pending:
        node = pending.pop()
        graph.add(type(node).__name__)
        pending += [below for below, _ in node.next_functions if below is not None]
    assert ("_GatherBackward" in graph, "AttendAgainBackward" in graph) == (is_kept, not is_kept)


# FlexAttention


@given(forests(max_size=300))
@example([i - 1 for i in range(256)] + [127, *range(256, 383)])  # a trunk and two branches, of a block each
@settings(max_examples=20)
def test_the_block_mask_is_the_one_that_looks_at_every_pair(parents: list[int]) -> None:
    last = last_of(parents)
    ours = TreeAttention(last, "flex").block_mask()
    length = flex_length(len(parents))
    padded = torch.cat([last, torch.arange(len(last), length)])
    slow = create_block_mask(
        lambda _b, _h, q, k: (k <= q) & (q <= padded[k]), None, None, length, length, device="cpu"
    )
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(slow, name)), name
    assert torch.equal(ours.to_dense(), slow.to_dense())


@given(forests(max_size=300), REACHES)
@example([i - 1 for i in range(300)], Reach(window=130))  # blocks that are seen, seen in part and out of reach
@example([i - 1 for i in range(300)], Reach(chunk=130))
@settings(max_examples=20)
def test_the_block_mask_lets_pass_what_the_reach_does(parents: list[int], reach: Reach) -> None:
    mask = TreeAttention(last_of(parents), "flex").block_mask(reach)
    length = len(parents)
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    pairs = mask.mask_mod(torch.tensor(0), torch.tensor(0), query, key)
    expected = dense_mask(parents, reach)
    assert torch.equal(pairs, expected)
    blocks = torch.zeros(mask.shape[-1] // 128, mask.shape[-1] // 128, dtype=torch.int64)  # 0 never, 1 in part, 2 all
    for kind, counts, indices in (
        (1, mask.kv_num_blocks, mask.kv_indices),
        (2, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert counts is not None
        assert indices is not None
        for i, count in enumerate(counts[0, 0].tolist()):
            blocks[i, indices[0, 0, i, :count].long()] = kind
    of_pairs = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)[:length, :length]
    assert not expected[of_pairs == 0].any()
    assert expected[of_pairs == 2].all()
    if reach == Reach(window=130) and length == 300:
        assert blocks[2].tolist() == [1, 1, 1, 0]  # the third block sees the first one's end


@pytest.mark.parametrize(("length", "padded"), [(1, 128), (128, 128), (129, 256), (8192, 8192), (8193, 16384)])
def test_few_lengths_compile(length: int, padded: int) -> None:
    assert flex_length(length) == padded


@pytest.fixture
def without_compiling() -> Iterator[None]:
    """FlexAttention runs in plain torch: compiling takes 20 seconds on a processor."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (3, 1), (4, 4)])
def test_flex_gives_the_dense_result(heads: tuple[int, int]) -> None:
    parents = [i - 1 for i in range(100)] + [49, *range(100, 149)] + [-1, *range(150, 170)]
    inputs = [tensor.detach() for tensor in states(len(parents), heads=heads[0], key_heads=heads[1])]
    tree = TreeAttention(last_of(parents), "flex")
    for reach in (FULL_REACH, Reach(window=20), Reach(chunk=30)):
        output = attend(tree, inputs, scaling=1.5, reach=reach)  # no backward pass on a processor
        torch.testing.assert_close(output, dense(parents, inputs, 1.5, reach), atol=1e-5, rtol=1e-5)


# In front of transformers' own


SINKS = torch.ones(1)


def test_serving_trees_twice_wraps_once_and_leaves_plain_calls_alone() -> None:
    serve_trees("sdpa")
    wrapped: Any = AttentionInterface()["sdpa"]
    serve_trees("sdpa")
    assert AttentionInterface()["sdpa"] is wrapped
    assert wrapped.plain is sdpa_attention_forward
    module = make_model().model.layers[0].self_attn
    inputs = [tensor.detach() for tensor in states(5, heads=2, key_heads=1)]
    assert torch.equal(wrapped(module, *inputs, None)[0], sdpa_attention_forward(module, *inputs, None)[0])


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({}, LayerAttention()),
        ({"dropout": 0.25, "scaling": 1.5}, LayerAttention(Scores(0.25, 1.5))),
        ({"sliding_window": 4}, LayerAttention(reach=Reach(window=4))),
        ({"softcap": 5.0}, LayerAttention()),  # SDPA of transformers has none in plain rows either
        ({"s_aux": SINKS}, LayerAttention(sinks=SINKS)),
    ],
)
def test_what_a_layer_gives_its_attention_is_handed_on(keywords: dict[str, Any], expected: LayerAttention) -> None:
    serve_trees("sdpa")
    given: list[LayerAttention] = []
    attention: Any = AttentionInterface()["sdpa"]
    attention(nn.Module(), *states(3), None, tree_attention=lambda *values: given.append(values[-1]), **keywords)
    assert given == [expected]


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((), {"position_bias": 1}, r"`position_bias`\. Set"),
        ((0.5,), {}, r"Module gives its attention function arguments without names\. Set"),
    ],
)
def test_attention_with_more_than_a_mask_or_nameless_arguments_is_refused(
    arguments: tuple[float, ...], keywords: dict[str, Any], message: str
) -> None:
    serve_trees("sdpa")
    keywords = {"tree_attention": TreeAttention(torch.tensor([2, 2, 2]), "sdpa"), **keywords}
    with pytest.raises(ValueError, match=f"{message} `tree_packing='off'`"):
        AttentionInterface()["sdpa"](nn.Module(), *states(3), None, *arguments, **keywords)
