"""Laws and hand arithmetic of `SegmentTree`, also of one that is made of rows."""

import json
import random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from treepo_trl.sampling.tree import SegmentTree


# The tree of the hand cases:
#
#   prompt [7, 8]
#   ├── 0: [1, 2]
#   │   ├── 2: [3]          leaf
#   │   ├── 3: [4, 5, 6]
#   │   │   └── 6: [2]      leaf
#   │   └── 4: [9]          leaf
#   └── 1: [1]
#       └── 5: [0]          leaf


def hand_tree() -> SegmentTree:
    tree = SegmentTree([7, 8])
    tree.add(None, [1, 2], [-0.1, -0.2])  # 0
    tree.add(None, [1], [-0.3])  # 1
    tree.add(0, [3], [-0.4], "stop")  # 2
    tree.add(0, [4, 5, 6], [-0.5, -0.6, -0.7])  # 3
    tree.add(0, [9], [-0.8], "pattern")  # 4
    tree.add(1, [0], [-0.9], "repetition")  # 5
    tree.add(3, [2], [-1.0], "length")  # 6
    return tree


@st.composite
def trees(draw: st.DrawFn) -> SegmentTree:
    """Random trees in which every node without children is a leaf."""
    seed, num_nodes = draw(st.integers(0, 2**32)), draw(st.integers(1, 20))
    rng = random.Random(seed)
    parents: list[int | None] = [None, *(rng.choice([None, *range(i)]) for i in range(1, num_nodes))]
    tree = SegmentTree([rng.randint(0, 9) for _ in range(rng.randint(0, 3))])
    for i, parent in enumerate(parents):
        tokens = [rng.randint(0, 9) for _ in range(rng.randint(1, 4))]
        reason, entropy = None if i in parents[i + 1 :] else "stop", rng.choice([None, rng.random()])
        tree.add(parent, tokens, [-rng.random() for _ in tokens], reason, entropy)
    return tree


def test_paths_tokens_and_depths_by_hand() -> None:
    tree = hand_tree()
    assert [tree.path(node) for node in (6, 5, 0, None)] == [[0, 3, 6], [1, 5], [0], []]
    # A completion is the concatenation of the path without the prompt.
    assert tree.completion_ids(6) == [1, 2, 4, 5, 6, 2]
    assert tree.logprobs(6) == [-0.1, -0.2, -0.5, -0.6, -0.7, -1.0]
    assert (tree.completion_ids(5), tree.completion_ids(None)) == ([1, 0], [])
    assert tree.sequence_ids(6) == [7, 8, 1, 2, 4, 5, 6, 2]
    assert tree.sequence_ids(None) == tree.prompt_ids == [7, 8]
    assert [node.depth for node in tree.nodes] == [0, 0, 1, 1, 1, 1, 2]
    # Tokens up to and including the node: 2, 1, 2 + 1, 2 + 3, 2 + 1, 1 + 1, 2 + 3 + 1.
    assert [node.end for node in tree.nodes] == [2, 1, 3, 5, 3, 2, 6]
    # Unique tokens count each node once, leaf tokens each leaf in full.
    assert tree.num_unique_tokens == 2 + 1 + 1 + 3 + 1 + 1 + 1
    assert tree.num_leaf_tokens == 3 + 3 + 2 + 6


def test_leaves_are_the_finished_nodes_in_order_of_completion_until_they_are_sorted() -> None:
    tree = hand_tree()
    assert tree.leaves == [2, 4, 5, 6]
    # The root has 2 children, node 0 has 3, nodes 1 and 3 have one each: 1/2 * 1/3 for 2, 4 and 6, and 1/2 for 5.
    assert tree.leaf_weights() == pytest.approx([1 / 6, 1 / 6, 1 / 2, 1 / 6])
    assert tree.mean_length() == pytest.approx(3 / 6 + 3 / 6 + 2 / 2 + 6 / 6)
    tree.sort_leaves()
    assert tree.leaves == [2, 6, 4, 5]  # children in order of creation
    assert tree.leaf_weights() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert tree.mean_length() == hand_tree().mean_length()
    tree.sort_leaves()
    assert tree.leaves == [2, 6, 4, 5]


def test_depth_first_order_survives_deep_trees() -> None:
    tree = SegmentTree([1])
    parent = None
    for _ in range(5000):  # more than Python's recursion limit
        parent = tree.add(parent, [2], [-1.0])
    leaf = tree.add(parent, [0], [-1.0], "stop")
    tree.sort_leaves()
    assert tree.leaves == [leaf]
    assert len(tree.path(leaf)) == 5001
    assert tree.leaf_weights() == [1.0]


@given(trees())
def test_leaf_weights_are_positive_and_sum_to_one(tree: SegmentTree) -> None:
    assert all(weight > 0 for weight in tree.leaf_weights())
    assert sum(tree.leaf_weights()) == pytest.approx(1.0)


@given(trees())
def test_sorted_leaves_are_the_leaves_and_neighbours_share_most(tree: SegmentTree) -> None:
    before = dict(zip(tree.leaves, tree.leaf_weights(), strict=True))
    tree.sort_leaves()
    order = tree.leaves
    assert dict(zip(order, tree.leaf_weights(), strict=True)) == before
    # Leaves below one node are consecutive, for every node.
    for node in range(len(tree.nodes)):
        places = [place for place, leaf in enumerate(order) if node in tree.path(leaf)]
        assert places == list(range(places[0], places[0] + len(places)))


@given(trees())
def test_json_round_trip_gives_an_equal_tree(tree: SegmentTree) -> None:
    back = SegmentTree.from_dict(json.loads(json.dumps(tree.to_dict())))
    assert back.prompt_ids == tree.prompt_ids
    assert back.nodes == tree.nodes  # parents, tokens, log-probabilities, entropies, reasons, depths, ends, children
    assert back.root_children == tree.root_children
    assert back.leaves == tree.leaves
    assert back.to_dict() == tree.to_dict()


def test_a_file_from_before_leaves_were_sorted_is_read_in_its_own_order() -> None:
    """Leaves in order of completion, and no entropies: what lies beside the tree in the file is in that order."""
    record = json.loads(
        """{"prompt_ids": [7], "leaves": [2, 3, 1], "nodes": [
            {"parent": null, "token_ids": [1, 2], "logprobs": null, "finish_reason": null},
            {"parent": 0, "token_ids": [3, 4], "logprobs": [-0.5, -0.25], "finish_reason": "length"},
            {"parent": null, "token_ids": [5, 0], "logprobs": [-1.0, -2.0], "finish_reason": "stop"},
            {"parent": 0, "token_ids": [6], "logprobs": [-3.0], "finish_reason": "pattern"}]}"""
    )
    tree = SegmentTree.from_dict(record)
    assert tree.leaves == [2, 3, 1]
    assert tree.leaf_weights() == [0.5, 0.25, 0.25]
    assert [tree.completion_ids(leaf) for leaf in tree.leaves] == [[5, 0], [1, 2, 6], [1, 2, 3, 4]]
    assert tree.nodes[0].logprobs is None
    assert tree.to_dict() == record
    tree.sort_leaves()
    assert tree.leaves == [1, 3, 2]


def test_a_rebuilt_tree_can_be_grown_without_changing_the_original() -> None:
    tree = hand_tree()
    before = json.dumps(tree.to_dict())
    back = SegmentTree.from_dict(tree.to_dict())
    back.add(3, [5], [-2.0], "stop")
    back.finish(back.add(None, [6]), "length")
    assert json.dumps(tree.to_dict()) == before


def test_the_tree_does_not_share_the_callers_lists() -> None:
    prompt, tokens, logprobs = [7], [1, 2], [-0.1, -0.2]
    tree = SegmentTree(prompt)
    tree.add(None, tokens, logprobs, "stop")
    prompt.append(0), tokens.append(0), logprobs.append(0.0)
    assert tree.prompt_ids == [7]
    assert tree.completion_ids(0) == [1, 2]
    assert tree.logprobs(0) == [-0.1, -0.2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, []), "at least one token"),
        ((None, [1, 2], [-0.5]), "Got 1 log-probabilities for 2 tokens"),
        ((7, [1]), "Parent 7 does not exist: the tree has 7 nodes"),
        ((-1, [1]), "Parent -1 does not exist"),
        ((4, [1]), r"Parent 4 is a finished path \(pattern\)"),
    ],
)
def test_a_refused_segment_leaves_the_tree_as_it_was(arguments: tuple[Any, ...], message: str) -> None:
    tree = hand_tree()
    before = json.dumps(tree.to_dict())
    with pytest.raises(ValueError, match=message):
        tree.add(*arguments)
    assert json.dumps(tree.to_dict()) == before


def test_logprobs_of_a_path_without_them_are_refused() -> None:
    tree = SegmentTree([1])
    tree.add(None, [1], None)
    tree.add(0, [2], [-0.5], "stop")
    with pytest.raises(ValueError, match="Segment 0 was stored without log-probabilities"):
        tree.logprobs(1)


NOT_COUNTS = [-1, 1.0, True, "1", [1], float("nan"), 2**63]
NOT_NUMBERS = [float("nan"), float("inf"), 10**400, True, "0.5", [0.5]]


@pytest.mark.parametrize(
    ("node", "field", "values", "words"),
    [
        (None, "prompt_ids", [None, "abc", {}, 7], "`prompt_ids` is"),
        (None, "prompt_ids", [[7, value] for value in [None, *NOT_COUNTS]], r"`prompt_ids\[1\]` is"),
        (None, "nodes", [None, "abc", {}], "`nodes` is .* a list"),
        (None, "nodes", [[None], ["abc"], [[]]], r"`nodes\[0\]` is .* an object"),
        (None, "leaves", [None, "abc", {}], "`leaves` is .* a list"),
        (None, "leaves", [[value] for value in [None, *NOT_COUNTS]], r"`leaves\[0\]` is"),
        (None, "leaves", [[2, 4, 5], [2, 4, 5, 6, 3], [2, 4, 5, 6, 6], []], "must be the nodes with a finish reason"),
        (2, "parent", NOT_COUNTS, r"`nodes\[2\]\.parent` is .* null or a whole number"),
        (2, "parent", [2, 3, 2**63 - 1], r"`nodes\[2\]`: Parent \d+ does not exist"),
        (6, "parent", [2], r"`nodes\[6\]`: Parent 2 is a finished path"),
        (2, "token_ids", [None, "abc", {}, 3], r"`nodes\[2\]\.token_ids` is .* a list"),
        (2, "token_ids", [[value] for value in [None, *NOT_COUNTS]], r"`nodes\[2\]\.token_ids\[0\]` is"),
        (2, "token_ids", [[]], r"`nodes\[2\]`: A segment needs at least one token"),
        (2, "logprobs", ["abc", {}, -0.4], r"`nodes\[2\]\.logprobs` is .* a list"),
        (2, "logprobs", [[value] for value in [None, *NOT_NUMBERS]], r"`nodes\[2\]\.logprobs\[0\]` is"),
        (2, "logprobs", [[], [-0.4, -0.5]], r"`nodes\[2\]`: Got \d log-probabilities for 1 tokens"),
        (2, "finish_reason", ["<b>stop</b>", "", "Stop", 1, ["stop"], {}], r"`nodes\[2\]\.finish_reason` .* stop, "),
        (0, "finish_reason", ["stop"], r"`nodes\[2\]`: Parent 0 is a finished path"),
        (2, "entropy", NOT_NUMBERS, r"`nodes\[2\]\.entropy` is .* a finite number"),
        (2, "entropi", [0.5], r"`nodes\[2\]` has an unknown field 'entropi'"),
        (None, "leafs", [[]], "The tree has an unknown field 'leafs'"),
    ],
)
def test_what_no_tree_writes_is_refused_by_node_and_field(
    node: int | None, field: str, values: list[Any], words: str
) -> None:
    for value in values:
        record: dict[str, Any] = json.loads(json.dumps(hand_tree().to_dict()))
        (record if node is None else record["nodes"][node])[field] = value
        with pytest.raises(ValueError, match=words):
            SegmentTree.from_dict(record)


def test_a_missing_field_is_named_and_a_tree_must_be_an_object() -> None:
    record: Any = hand_tree().to_dict()
    for field in record:
        with pytest.raises(ValueError, match=f"The tree has no `{field}`"):
            SegmentTree.from_dict({name: value for name, value in record.items() if name != field})
    for field in ("parent", "token_ids", "logprobs", "finish_reason"):
        broken = hand_tree().to_dict()
        del broken["nodes"][3][field]
        with pytest.raises(ValueError, match=rf"`nodes\[3\]` has no `{field}`"):
            SegmentTree.from_dict(broken)
    for record in (None, [], "tree", 1):
        with pytest.raises(ValueError, match=r"The tree is .* it must be an object"):
            SegmentTree.from_dict(record)


def test_an_inner_node_without_children_can_become_a_leaf_and_no_other() -> None:
    tree = SegmentTree([7])
    inner = tree.add(None, [1, 2], [-1.0, -1.0])
    leaf = tree.add(inner, [3], [-1.0], "stop")
    late = tree.add(None, [4], [-1.0])
    tree.finish(late, "length")
    assert tree.leaves == [leaf, late]
    assert tree.nodes[late].finish_reason == "length"
    for node in (inner, leaf, late):
        with pytest.raises(ValueError, match=f"Segment {node} is finished already or has children"):
            tree.finish(node, "length")
    with pytest.raises(ValueError, match="finished path"):
        tree.add(late, [5])


# Made of rows: equal prefixes are shared, every row stays what it was


ROWS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=7), min_size=1, max_size=6)


@given(ROWS, st.booleans())
@example([[2, 3], [2, 3], [2, 3, 1]], False)  # equal rows are leaves of their own, and a row may begin another one
def test_every_row_is_a_leaf(completions: list[list[int]], has_masks: bool) -> None:
    # A token's place and value say whether it was sampled: equal prefixes have equal masks.
    masks = [[int((i + token) % 3 > 0) for i, token in enumerate(row)] for row in completions] if has_masks else None
    logprobs = [[-float(token) for token in row] for row in completions]
    tree = SegmentTree.from_rows([9], completions, logprobs, masks)
    assert [tree.completion_ids(leaf) for leaf in tree.leaves] == completions
    for i, leaf in enumerate(tree.leaves):
        mask = [1] * len(completions[i]) if masks is None else masks[i]
        assert tree.sampled_mask(leaf) == mask
        assert tree.logprobs(leaf) == [value * flag for value, flag in zip(logprobs[i], mask, strict=True)]
    for siblings in (tree.root_children, *(node.children for node in tree.nodes)):
        inner = [tree.nodes[node] for node in siblings if tree.nodes[node].children]
        starts = [(node.token_ids[0], node.is_sampled) for node in inner]
        assert len(set(starts)) == len(starts)
    assert len(tree.leaves) == sum(node.finish_reason is not None for node in tree.nodes)


def test_no_token_is_stored_twice_that_rows_share() -> None:
    tree = SegmentTree.from_rows([1], [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 4], [3]])
    assert [list(node.token_ids) for node in tree.nodes] == [[5, 6], [3], [7], [9], [8], [4]]
    assert tree.num_unique_tokens == 7


@pytest.mark.parametrize(
    ("completions", "values", "message"),
    [
        ([[5], []], {}, "at least one token"),
        ([[5, 6]], {"logprobs": [[-1.0]]}, "Got 1 log-probabilities for 2 tokens"),
        ([[5, 6]], {"masks": [[1]]}, "Got a mask of 1 values for 2 tokens"),
    ],
)
def test_rows_that_do_not_fit(
    completions: list[list[int]], values: dict[str, list[list[float]]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentTree.from_rows([1], completions, **values)  # pyright: ignore[reportArgumentType]
