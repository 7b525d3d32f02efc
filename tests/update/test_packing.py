"""A packed row is the plain rows: structure by hypothesis, log-probabilities and gradients on tiny models."""

import copy
import dataclasses
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from trl.trainer.utils import add_fused_lm_head

from treepo_trl.model_support import why_not_packable
from treepo_trl.update import tree_attention
from treepo_trl.update.packed_forward import is_worth_packing, model_inputs
from treepo_trl.update.packing import PackedRows, cut_rows, pack_rows
from treepo_trl.update.tree_attention import serve_trees, why_no_trees


PAD = 1


def batch_of(prompts: list[list[int]], completions: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rows as GRPOTrainer builds them: prompts padded on the left, completions on the right, T completion columns."""
    prompt_width, num_scored = max(map(len, prompts)), max(map(len, completions))
    ids, mask = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        left, right = prompt_width - len(prompt), num_scored - len(completion)
        ids.append([PAD] * left + prompt + completion + [PAD] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(completion)) + [0] * right)
    return torch.tensor(ids), torch.tensor(mask), num_scored


def prefixes_of(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def slow_keys(rows: list[list[int]]) -> set[tuple[Any, ...]]:
    """What a packed position stands for: a prefix together with its next token, `None` at the end of the row."""
    return {(tuple(row[: i + 1]), row[i + 1] if i + 1 < len(row) else None) for row in rows for i in range(len(row))}


def check_structure(ids: torch.Tensor, mask: torch.Tensor, num_scored: int) -> PackedRows:
    """Every promise of `PackedRows`, with loops."""
    packed = pack_rows(ids, mask, num_scored)
    rows = prefixes_of(ids, mask)
    num_packed = packed.input_ids.size(1)
    tokens, depths, labels = packed.input_ids[0], packed.position_ids[0], packed.shift_labels[0]
    for tensor in (packed.input_ids, packed.position_ids, packed.shift_labels, packed.last_descendants, packed.index):
        assert tensor.dtype == torch.int64
    assert packed.input_ids.shape == packed.position_ids.shape == packed.shift_labels.shape == (1, num_packed)
    assert packed.index.shape == packed.is_scored.shape == (len(ids), num_scored)
    attends = packed.attention_mask()
    assert attends.shape == (1, 1, num_packed, num_packed)
    assert attends.dtype == torch.bool

    # Ancestors of a position, itself included and in order, spell its prefix; its position is how many come before it.
    spelled = [tuple(tokens[attends[0, 0, p]].tolist()) for p in range(num_packed)]
    assert all(attends[0, 0].diagonal())
    if sum(map(len, rows)) > 0:
        assert [len(prefix) - 1 for prefix in spelled] == depths.tolist()
        # Each prefix with each of its next tokens exactly once: nothing is missing, nothing is there twice.
        assert num_packed == len(slow_keys(rows))
        assert sorted(spelled) == sorted(prefix for prefix, _ in slow_keys(rows))
    assert packed.num_row_tokens == sum(map(len, rows))
    assert packed.num_padded_tokens == ids.numel()
    if packed.num_row_tokens > 0:
        counts = Counter(
            (tuple(row[: i + 1]), row[i + 1] if i + 1 < len(row) else None) for row in rows for i in range(len(row))
        )
        assert sorted(packed.num_rows[0].tolist()) == sorted(counts.values())
        of_prefix = Counter()
        for (prefix, _), count in counts.items():
            of_prefix[prefix] += count
        summed = Counter()
        for prefix, count in zip(spelled, packed.num_rows[0].tolist(), strict=True):
            summed[prefix] += count
        assert summed == of_prefix
    assert packed.ratio == packed.num_row_tokens / num_packed

    first_scored = ids.size(1) - num_scored
    scored_positions = set()
    for i in range(len(ids)):
        for t in range(num_scored):
            column = first_scored + t
            prefix = ids[i, :column][mask[i, :column].bool()].tolist()
            assert packed.is_scored[i, t].item() == bool(mask[i, column] and prefix)
            if packed.is_scored[i, t]:
                p = int(packed.index[i, t])
                scored_positions.add(p)
                assert spelled[p] == tuple(prefix)
                assert labels[p] == ids[i, column]
            else:
                assert packed.index[i, t] == 0
    assert [p for p in range(num_packed) if labels[p] != -100] == sorted(scored_positions)
    return packed


# Structure


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rows over few tokens, so that prefixes are shared in every way, of prompts and completions of any length."""
    vocabulary = draw(st.integers(1, 3))
    token = st.integers(2, 1 + vocabulary)
    trunks = draw(st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=3))
    prompts, completions = [], []
    for _ in range(draw(st.integers(1, 7))):
        prompts.append(draw(st.sampled_from(trunks)))
        completions.append(draw(st.sampled_from(trunks)) + draw(st.lists(token, max_size=4)))
    return batch_of(prompts, completions)


@given(batches())
@settings(deadline=None)
def test_packed_positions_spell_the_rows(batch: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    check_structure(*batch)


@given(batches(), st.data())
@settings(deadline=None)
def test_any_mask_and_any_number_of_scored_columns(
    batch: tuple[torch.Tensor, torch.Tensor, int], data: st.DataObject
) -> None:
    """Holes, completely masked rows and completions, rows without a prompt."""
    ids, mask, _ = batch
    bits = data.draw(st.lists(st.sampled_from([0, 1, 1, 1]), min_size=mask.numel(), max_size=mask.numel()))
    check_structure(ids, mask * torch.tensor(bits).view_as(mask), data.draw(st.integers(1, ids.size(1))))


@given(batches(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_the_rows_does_not_matter(
    batch: tuple[torch.Tensor, torch.Tensor, int], rng: random.Random
) -> None:
    ids, mask, num_scored = batch
    order = list(range(len(ids)))
    rng.shuffle(order)
    one, other = pack_rows(ids, mask, num_scored), pack_rows(ids[order], mask[order], num_scored)
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.shift_labels, other.shift_labels)
    assert torch.equal(one.index[order], other.index)


@given(batches(), st.integers(0, 3), st.integers(0, 3))
@settings(deadline=None)
def test_padding_does_not_matter(batch: tuple[torch.Tensor, torch.Tensor, int], left: int, right: int) -> None:
    ids, mask, num_scored = batch
    wide_ids = torch.nn.functional.pad(ids, (left, right), value=PAD)
    wide_mask = torch.nn.functional.pad(mask, (left, right))
    one, wide = pack_rows(ids, mask, num_scored), pack_rows(wide_ids, wide_mask, num_scored + right)
    assert torch.equal(one.input_ids, wide.input_ids)
    assert torch.equal(one.index, wide.index[:, :num_scored])
    assert not wide.is_scored[:, num_scored:].any()


ODD_SHAPES = {
    "one row": ([[5, 6]], [[7, 8, 9]]),
    "one scored token": ([[5]], [[7]]),
    "identical rows": ([[5, 6]] * 3, [[7, 8]] * 3),
    "a leaf that is a prefix of another": ([[5, 6]] * 3, [[7], [7, 8], [7, 8, 9, 4]]),
    "a leaf that is a prefix of another and occurs twice": ([[5]] * 4, [[7], [7], [7, 8], [7, 8]]),
    "rows that differ in the first completion token": ([[5, 6]] * 3, [[7, 4], [8, 4], [9, 4]]),
    "rows that differ in the first prompt token": ([[5, 6], [6, 6], [7, 6]], [[8, 9]] * 3),
    "prompts of different length": ([[5], [5, 6, 7, 8], [5, 6]], [[4, 4], [4, 4, 4], [4]]),
    "a prompt that continues like another's completion": ([[5, 6], [5, 6, 7]], [[7, 8], [8]]),
    "several trees": ([[5, 6]] * 2 + [[6, 5]] * 2 + [[5, 7]] * 2, [[7, 8], [7, 9], [7, 8], [7, 9], [8, 8], [8, 9]]),
    "trees whose rows are mixed": ([[5], [6], [5], [6]], [[7, 8], [7, 8], [7, 9], [7, 9]]),
    "tokens beyond one byte": ([[300, 70_000]] * 2, [[255, 256], [256, 255]]),
}


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_odd_shapes(name: str) -> None:
    check_structure(*batch_of(*ODD_SHAPES[name]))


def test_a_small_tree_by_hand() -> None:
    # Rows 5 7 8 and 5 7 9 with prompt 5: nodes (5|7), (7|8), 8, (7|9), 9 in depth-first order. The 7 is there twice:
    # it has two next tokens.
    packed = pack_rows(*batch_of([[5], [5]], [[7, 9], [7, 8]]))
    assert packed.input_ids.tolist() == [[5, 7, 8, 7, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 1, 2]]
    assert packed.shift_labels.tolist() == [[7, 8, -100, 9, -100]]
    assert packed.last_descendants.tolist() == [4, 2, 2, 4, 4]
    assert packed.index.tolist() == [[0, 3], [0, 1]]
    assert packed.is_scored.all()
    assert packed.num_row_tokens == 6
    assert packed.ratio == 6 / 5


def test_completely_masked_rows_have_nothing_scored() -> None:
    ids, mask, num_scored = batch_of([[5, 6]] * 3, [[7, 8]] * 3)
    mask[1] = 0
    packed = check_structure(ids, mask, num_scored)
    assert packed.is_scored.tolist() == [[True, True], [False, False], [True, True]]


def test_a_batch_without_any_token_is_a_valid_input() -> None:
    ids, mask, num_scored = batch_of([[5, 6]], [[7, 8]])
    packed = check_structure(ids, mask * 0, num_scored)
    assert packed.input_ids.shape == (1, 1)
    assert packed.shift_labels.tolist() == [[-100]]
    assert packed.attention_mask().all()
    assert packed.unpack(torch.tensor([[3.0]])).tolist() == [[0.0, 0.0]]


def test_masked_completions_leave_the_prompt_unscored() -> None:
    # What GRPOTrainer does with truncated completions under mask_truncated_completions.
    ids, mask, num_scored = batch_of([[5, 6]] * 2, [[7, 8]] * 2)
    mask[1, 2:] = 0
    packed = check_structure(ids, mask, num_scored)
    assert packed.is_scored.tolist() == [[True, True], [False, False]]


def test_boolean_masks_and_padding_tokens_of_any_value_serve() -> None:
    ids, mask, num_scored = batch_of([[5], [5, 6]], [[7], [7, 8]])
    changed = torch.where(mask.bool(), ids, torch.randint(0, 99, ids.shape))
    one, other = pack_rows(ids, mask, num_scored), pack_rows(changed, mask.bool(), num_scored)
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.index, other.index)


def test_inputs_are_not_changed() -> None:
    ids, mask, num_scored = batch_of([[5], [5, 6]], [[7], [7, 8]])
    before = ids.clone(), mask.clone()
    pack_rows(ids, mask, num_scored)
    assert torch.equal(ids, before[0])
    assert torch.equal(mask, before[1])


def test_nodes_are_linear_in_the_unique_tokens() -> None:
    # 16 leaves of 4 segments, doubling: 2 + 4 + 8 + 16 = 30 segments of 50 tokens, 100 prompt tokens. A token at which
    # rows part is there once per child: at most one extra position per segment.
    rng = random.Random(0)

    def grow(path: list[int], depth: int) -> list[list[int]]:
        if depth == 0:
            return [path]
        return [
            leaf for _ in range(2) for leaf in grow([*path, *(rng.randint(5, 9999) for _ in range(50))], depth - 1)
        ]

    completions = grow([], 4)
    packed = pack_rows(*batch_of([[7] * 100] * 16, completions))
    assert 100 + 30 * 50 <= packed.input_ids.size(1) <= 100 + 30 * 50 + 30
    assert packed.num_row_tokens == 16 * (100 + 200)


def test_unpack_puts_values_where_they_are_scored_and_adds_up_gradients() -> None:
    packed = pack_rows(*batch_of([[5], [5], [5]], [[7, 9], [7, 8], [7]]))
    # Sorted rows: 5 7, then 5 7 8, then 5 7 9. Positions: 0 (5|7), 1 (7|end), 2 (7|8), 3 8, 4 (7|9), 5 9.
    assert packed.input_ids.tolist() == [[5, 7, 7, 8, 7, 9]]
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], requires_grad=True)
    rows = packed.unpack(values)
    assert rows.tolist() == [[1.0, 5.0], [1.0, 3.0], [1.0, 0.0]]
    # Weights 1, 2, 4 for the rows: position 0 serves all three, 4 the first, 2 the second.
    (rows * torch.tensor([[1.0], [2.0], [4.0]])).sum().backward()
    assert values.grad.tolist() == [[7.0, 0.0, 2.0, 0.0, 1.0, 0.0]]


def test_unpack_hides_what_is_not_a_number_at_unscored_places() -> None:
    packed = pack_rows(*batch_of([[5], [5]], [[7, 8], [7]]))
    values = torch.full((1, packed.input_ids.size(1)), 2.0)
    values[0, 0] = torch.nan  # unscored entries of `index` point here, and so does each row's first scored token
    assert packed.unpack(values)[1, 1] == 0


# Pieces


def sizes_of(pieces: list[slice], ids: torch.Tensor, mask: torch.Tensor, num_scored: int) -> list[int]:
    return [pack_rows(ids[piece], mask[piece], num_scored).input_ids.size(1) for piece in pieces]


@given(batches(), st.integers(1, 30))
@settings(deadline=None)
def test_pieces_hold_every_row_once_and_as_many_tokens_as_allowed(
    batch: tuple[torch.Tensor, torch.Tensor, int], max_tokens: int
) -> None:
    pieces = cut_rows(*batch, max_tokens)
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(len(batch[0])))
    for piece, size in zip(pieces, sizes_of(pieces, *batch), strict=True):
        assert size <= max_tokens or piece.stop - piece.start == 1


# Two trees of two leaves. First: prompt 5, completions 7 8 and 7 9, which pack to (5|7) (7|8) 8 (7|9) 9: 5 tokens.
# Second: prompt 6 and the same completions, 5 tokens.
TWO_TREES = ([[5], [5], [6], [6]], [[7, 8], [7, 9], [7, 8], [7, 9]])


@pytest.mark.parametrize(
    ("max_tokens", "pieces"),
    [
        (10, [(0, 4)]),
        (9, [(0, 2), (2, 4)]),  # no row of the second tree, though its first (3 tokens) would fit
        (5, [(0, 2), (2, 4)]),
        (4, [(0, 1), (1, 2), (2, 3), (3, 4)]),  # a tree that fits no piece: rows of 3 tokens
        (1, [(0, 1), (1, 2), (2, 3), (3, 4)]),
    ],
)
def test_whole_trees_where_they_fit(max_tokens: int, pieces: list[tuple[int, int]]) -> None:
    cut = cut_rows(*batch_of(*TWO_TREES), max_tokens)
    assert [(piece.start, piece.stop) for piece in cut] == pieces


def test_a_tree_may_join_what_is_left_of_a_larger_one() -> None:
    # A tree of 3 leaves, 5 | 7 8, 7 9, 8 8: (5|7) (7|8) 8 (7|9) 9 (5|8) (8|8) 8 = 8 tokens, more than 6. Its last row
    # has 3 of its own, and the next tree, one row of 3, joins it.
    batch = batch_of([[5], [5], [5], [6]], [[7, 8], [7, 9], [8, 8], [7, 8]])
    assert [(piece.start, piece.stop) for piece in cut_rows(*batch, 6)] == [(0, 2), (2, 4)]


def test_one_piece_holds_all_rows_that_fit() -> None:
    ids, mask, num_scored = batch_of([[5, 6]] * 4, [[7, 8]] * 4)
    assert cut_rows(ids, mask * 0, num_scored, 1) == [slice(0, 4)]
    assert cut_rows(ids, mask, num_scored, 4) == [slice(0, 4)]


# Models


TINY = {
    "vocab_size": 65,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": PAD,
}


def tiny_model(config: PreTrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().float()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if attention != "eager":
        serve_trees(attention)
    return model


def forward_plain(
    model: PreTrainedModel, batch: tuple[torch.Tensor, torch.Tensor, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As GRPOTrainer._get_per_token_logps_and_entropies does."""
    ids, mask, num_scored = batch
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-num_scored] = -100
    outputs = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return outputs.log_probs[:, -num_scored:], outputs.entropy[:, -num_scored:]


def forward_packed(model: PreTrainedModel, packed: PackedRows) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = model_inputs(packed, model.config._attn_implementation, torch.float32, "sdpa")
    outputs = model(**inputs, fused_lm_head=True)
    return packed.unpack(outputs.log_probs), packed.unpack(outputs.entropy)


def gradients(model: PreTrainedModel, logps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    (logps * weights).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def tree_batch() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Two trees of four leaves with prompts of different length, leaves of different length, a masked completion."""
    rng = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [rng.randint(5, 64) for _ in range(count)]

    prompts, completions = [], []
    for prompt_length in (9, 4):
        prompt = tokens(prompt_length)
        for _ in range(2):
            shared = tokens(7)
            for length in (6, 2):
                prompts.append(prompt)
                completions.append(shared + tokens(length))
    ids, mask, num_scored = batch_of(prompts, completions)
    mask[5, -num_scored:] = 0
    return ids, mask, num_scored


EQUAL_MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**TINY),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY),
    "gemma": GemmaConfig(**TINY),
    "mistral": MistralConfig(**TINY, sliding_window=None),
    "qwen3_moe": Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
}


@pytest.mark.parametrize("query_block", [8, 256])  # several blocks and one
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", EQUAL_MODELS)
def test_log_probabilities_entropies_and_gradients_are_those_of_the_plain_rows(
    name: str, attention: str, query_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_attention, "_QUERY_BLOCK", query_block)
    model = tiny_model(copy.deepcopy(EQUAL_MODELS[name]), attention)
    assert why_not_packable(model.config) is None
    batch = tree_batch()
    packed = pack_rows(*batch)
    assert packed.ratio > 1.3
    assert 8 < packed.input_ids.size(1) < 256
    plain, packed_values = forward_plain(model, batch), forward_packed(model, packed)
    for expected, value in zip(plain, packed_values, strict=True):
        torch.testing.assert_close(value, expected.masked_fill(~packed.is_scored, 0), atol=1e-4, rtol=0)
    weights = torch.randn(packed.index.shape, generator=torch.Generator().manual_seed(0)) * packed.is_scored
    expected, value = gradients(model, plain[0], weights), gradients(model, packed_values[0], weights)
    assert (value - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_odd_shapes_through_a_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_attention, "_QUERY_BLOCK", 3)
    prompts, completions = ODD_SHAPES[name]
    batch = batch_of([[t % 65 for t in row] for row in prompts], [[t % 65 for t in row] for row in completions])
    model, packed = tiny_model(Qwen2Config(**TINY)), pack_rows(*batch)
    with torch.no_grad():
        expected, value = forward_plain(model, batch)[0], forward_packed(model, packed)[0]
    torch.testing.assert_close(value, expected.masked_fill(~packed.is_scored, 0), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_real_model_in_bfloat16_is_off_by_no_more_than_plain_rows_are(small_model_dir: str) -> None:
    """Both against float32: rounding of bfloat16 explains the difference between packed and plain rows."""
    tokenizer = AutoTokenizer.from_pretrained(small_model_dir)
    prompt = tokenizer("A farmer has 17 sheep. All but 9 run away. How many are left?").input_ids
    starts = [" All but 9 ran away, so", " If all but nine run away,"]
    ends = [
        " nine sheep are left.",
        " the farmer keeps 9 of the 17 sheep that he had before.",
        " 17 - 9 = 8.",
        " none!",
    ]
    completions = [tokenizer(start + end).input_ids for start in starts for end in ends]
    batch = batch_of([prompt] * len(completions), completions)
    packed = pack_rows(*batch)
    values = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=dtype, attn_implementation="sdpa").eval()
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        with torch.no_grad():
            values[dtype, "plain"] = forward_plain(model, batch)[0][packed.is_scored]
            values[dtype, "packed"] = forward_packed(model, packed)[0][packed.is_scored]
    truth = values[torch.float32, "plain"]
    torch.testing.assert_close(values[torch.float32, "packed"], truth, atol=2e-4, rtol=0)
    errors = {way: (values[torch.bfloat16, way] - truth).abs().mean().item() for way in ("plain", "packed")}
    assert 0 < errors["packed"] < 1.3 * errors["plain"] < 0.1


def test_a_batch_without_any_token_goes_through_a_model_and_gives_no_gradient() -> None:
    ids, mask, num_scored = batch_of([[5, 6]], [[7, 8]])
    model, packed = tiny_model(Qwen2Config(**TINY)), pack_rows(ids, mask * 0, num_scored)
    logps, _ = forward_packed(model, packed)
    assert logps.tolist() == [[0.0, 0.0]]
    assert gradients(model, logps, torch.ones(1, 2)).abs().max() == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("query_block", [8, 256])
def test_gradient_checkpointing_changes_nothing(
    use_reentrant: bool, query_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_attention, "_QUERY_BLOCK", query_block)
    model = tiny_model(LlamaConfig(**TINY)).train()
    packed = pack_rows(*tree_batch())
    weights = packed.is_scored.float()
    before = gradients(model, forward_packed(model, packed)[0], weights)
    model.enable_input_require_grads()  # reentrant checkpoints need an input with a gradient
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    torch.testing.assert_close(gradients(model, forward_packed(model, packed)[0], weights), before)


# Which models

# Settings beyond TINY; a window shorter than the rows where there is one.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma", "cohere", "glm4", "granite", "olmo2")},
    **{name: {} for name in ("phi3", "smollm3", "stablelm", "starcoder2", "mixtral", "bloom", "opt")},
    **{name: {"sliding_window": 4} for name in ("mistral", "gemma2", "gemma3_text", "gpt_oss", "ministral")},
    **{name: {"sliding_window": 4} for name in ("exaone4", "olmo3", "cohere2")},
    "qwen2 with windows": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0},
    "phi3 with windows": {"sliding_window": 4},
    "starcoder2 with windows": {"sliding_window": 4},
    "mixtral with windows": {"sliding_window": 4},
    "qwen3_next": {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon with alibi": {"alibi": True, "new_decoder_architecture": False},
    "doge": {"keep_window_size": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "mamba": {},
}


PACKED = {
    *("llama", "qwen2", "qwen3", "qwen3_moe", "gemma", "cohere", "glm4", "granite", "olmo2", "phi3", "smollm3"),
    *("starcoder2", "mixtral", "gpt_neox"),  # opt looks at the values of its mask, which the question has not
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")
def test_no_architecture_passes_as_packable_and_gives_other_values(name: str) -> None:
    config_class = CONFIG_MAPPING[name.split()[0]]
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    settings = {**TINY, **experts, **ARCHITECTURES[name]}
    defaults = config_class()
    settings = {key: value for key, value in settings.items() if hasattr(defaults, key) or key in ARCHITECTURES[name]}
    if name.startswith("falcon"):
        settings.pop("head_dim", None)
    try:
        model = tiny_model(config_class(**settings))
    except ValueError:  # no SDPA attention for this architecture
        model = tiny_model(config_class(**settings), "eager")
    is_packed = why_not_packable(model.config) is None and model._supports_attention_backend
    is_packed = is_packed and why_no_trees(model) is None
    assert is_packed == (name in PACKED)
    if not is_packed:
        pytest.skip("plain rows")
    prompt, shared = list(range(5, 12)), [list(range(20, 28)), list(range(40, 48))]
    batch = batch_of([prompt] * 4, [[*shared[i // 2], *range(30 + 5 * i, 38 + 5 * i)] for i in range(4)])
    with torch.no_grad():
        expected, value = forward_plain(model, batch)[0], forward_packed(model, pack_rows(*batch))[0]
    torch.testing.assert_close(value, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma", "granite", "olmo2", "phi3", "smollm3"]
)
def test_common_models_are_packable(name: str) -> None:
    config = CONFIG_MAPPING[name]()
    for attention in ("sdpa", "eager"):
        config._attn_implementation = attention
        assert why_not_packable(config) is None


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
    config = LlamaConfig(**TINY)
    config._attn_implementation = attention
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"])
def test_a_model_may_have_any_attention_for_its_plain_rows(attention: str) -> None:
    assert why_not_packable(config_with(attention)) is None


def test_attention_that_is_not_registered_is_named_together_with_the_way_out() -> None:
    reason = why_not_packable(config_with("kernels-community/unknown"))
    assert reason is not None
    assert "'kernels-community/unknown'" in reason
    assert "attn_implementation='sdpa'" in reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of type linear_attention"),
        (
            {"layer_types": ["chunked_attention", "sliding_attention"]},
            "layers of type chunked_attention, sliding_attention",
        ),
        ({"sliding_window": 4096}, "a sliding window of 4096 tokens"),
        ({"alibi": True}, "ALiBi"),
    ],
)
def test_reasons_name_what_the_mask_cannot_serve(changes: dict[str, Any], reason: str) -> None:
    assert reason in (why_not_packable(config_with(**changes)) or "")


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None},
        {"layer_types": ["full_attention", "full_attention"]},
        {"sliding_window": 4096, "use_sliding_window": False},  # Qwen2 keeps the number and does not use it
        {"sliding_window": 4096, "layer_types": ["full_attention", "full_attention"]},
    ],
)
def test_a_window_that_no_layer_uses_is_no_reason(changes: dict[str, Any]) -> None:
    assert why_not_packable(config_with(**changes)) is None


def test_mistral_is_refused_with_its_window_and_packable_without() -> None:
    config = MistralConfig(**TINY)
    config._attn_implementation = "sdpa"
    assert "sliding window of 4096" in (why_not_packable(config) or "")
    config.sliding_window = None
    assert why_not_packable(config) is None


# When it pays


def rows_with(shared: int, own: int, count: int) -> PackedRows:
    """`count` rows of `shared` common tokens and `own` tokens of their own."""
    completions = [[2] * (shared - 1) + [3 + i] * own for i in range(count)]
    return pack_rows(*batch_of([[2]] * count, completions))


def test_rows_that_share_enough_are_worth_packing() -> None:
    # 4 rows of 20 tokens, 10 shared: 80 / (10 + 40) = 1.6, three extra positions for the shared tail aside.
    packed = rows_with(shared=10, own=10, count=4)
    assert packed.ratio == 80 / 53
    assert is_worth_packing(packed)


def test_rows_that_share_little_are_not() -> None:
    # 4 rows of 101 tokens, 1 shared, and that one parts at once: 404 / 404
    packed = rows_with(shared=1, own=100, count=4)
    assert packed.ratio == 1.0
    assert not is_worth_packing(packed)


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


# Inputs


def test_eager_attention_gets_the_mask_as_numbers_to_add() -> None:
    packed = pack_rows(*batch_of([[5], [5]], [[7, 9], [7, 8]]))
    mask = model_inputs(packed, "eager", torch.bfloat16, "sdpa")["attention_mask"]
    assert mask.dtype == torch.bfloat16
    attends = packed.attention_mask()
    assert (mask[attends] == 0).all()
    assert (mask[~attends] == torch.finfo(torch.bfloat16).min).all()
