"""`max_tree_tokens`: how many paths a tree opens and continues, by hand."""

import pytest

from tests.support.fakes import EOS, FakeEngine, RecordingEngine, ScriptedEngine, endless, memoryless
from tests.support.sampling import fingerprint, make_config, reasons, tree_of, trees_of


def test_a_tree_opens_no_more_paths_than_its_budget_can_finish() -> None:
    """Paths of 12 tokens, known beforehand: a budget of 5 paths opens no more than 5 and cuts none."""
    for budget, most in ((12, 1), (24, 2), (40, 3), (60, 5), (1000, 16)):
        engine = FakeEngine(lambda path, rng: EOS if len(path) == 14 else 5)
        config = make_config(16, max_completion_length=12, max_tree_tokens=budget, fallback_policy="none")
        (tree,) = trees_of(engine, config, 1, expected_length=12)
        assert set(reasons(tree)) == {"stop"}
        assert tree.num_unique_tokens <= budget
        assert min(most, 2) <= len(tree.leaves) <= 16
        if budget <= 24:
            assert len(tree.leaves) == most


def test_lengths_seen_so_far_guide_the_budget() -> None:
    """Paths of 10 tokens, not known beforehand, and 60 tokens for the tree."""
    engine = FakeEngine(lambda path, rng: EOS if len(path) == 10 else 5)
    tree = tree_of(engine, 16, segment_length=3, max_completion_length=30, max_tree_tokens=60, fallback_policy="root")
    # Levels of 2, 4, 4 and 4 paths: 6 + 12 + 12 + 4 tokens (42 // 9 and 30 // 12 afford no more). 26 are left, which
    # two more paths of 10 fit into, and 6 at the end, into which none does.
    assert tree.num_unique_tokens == 34 + 2 * 10
    assert len(tree.leaves) == 6
    assert set(reasons(tree)) == {"stop"}


@pytest.mark.parametrize(("budget", "ends"), [(7, [3, 3]), (8, [4, 4]), (10, [5, 5]), (12, [6, 6])])
def test_paths_go_on_while_each_can_have_a_token(budget: int, ends: list[int]) -> None:
    # Two paths of 3 tokens. Of 1 token that is left neither has any, of 2 each has one, of 4 two.
    tree = tree_of(FakeEngine(endless), 2, max_completion_length=6, max_tree_tokens=budget)
    assert [tree.nodes[leaf].end for leaf in tree.leaves] == ends
    assert set(reasons(tree)) == {"length"}


@pytest.mark.parametrize(("budget", "num_leaves"), [(4, 1), (5, 2)])
def test_a_fallback_may_use_the_last_tokens_up(budget: int, num_leaves: int) -> None:
    # A path of 2 tokens ends; the next one may need the cap of 3.
    changes = {"max_completion_length": 3, "fallback_policy": "root", "initial_branching_factor": [1, 1]}
    tree = tree_of(ScriptedEngine([[5, EOS], [5, 6, 7]]), 2, max_tree_tokens=budget, **changes)
    assert len(tree.leaves) == num_leaves


@pytest.mark.parametrize(("budget", "num_leaves"), [(10, 1), (11, 2)])
def test_a_fallback_expects_what_the_mean_leaf_has_behind_its_stem(budget: int, num_leaves: int) -> None:
    # A path of 1 + 3 + 2 tokens, of which the 3 are the least likely (mean -2). Cut in front of them it needs 6 - 1.
    engine = ScriptedEngine([[1], [2, 2, 2], [3, EOS], [4, 4, 4], [5, EOS]])
    changes = {"branching_factor": 1, "initial_branching_factor": [1, 1], "fallback_policy": "low_prob"}
    tree = tree_of(engine, 2, max_completion_length=9, max_tree_tokens=budget, **changes)
    assert len(tree.leaves) == num_leaves
    assert tree.num_unique_tokens in (6, 11)


def test_a_level_is_as_wide_as_its_longest_path_can_be_afforded() -> None:
    # Paths of 1 and of 3 tokens, expected to need as much again and a segment: 4 and 6. Of 28 tokens 24 are left,
    # which are 4 paths of 6.
    changes = {"branching_factor": 4, "initial_branching_factor": [2, 2], "fallback_policy": "none"}
    tree = tree_of(ScriptedEngine([[1], [2, 2, 2], *[[EOS]] * 6]), 8, max_tree_tokens=28, **changes)
    assert len(tree.leaves) == 4


def test_no_path_is_expected_to_need_more_than_its_cap() -> None:
    # Two paths of 3 tokens need 1 more; of the 10 tokens 4 are left, which are 4 paths.
    tree = tree_of(FakeEngine(endless), 4, max_completion_length=4, max_tree_tokens=10, fallback_policy="none")
    assert [tree.nodes[leaf].end for leaf in tree.leaves] == [4] * 4


def test_what_a_path_has_is_not_expected_again() -> None:
    # Paths of 9 tokens, known beforehand. Two first segments of 3 leave 24 of 30 tokens, which are 4 rests of 6; their
    # segments leave 12, which are 4 rests of 3.
    engine = RecordingEngine(lambda path, rng: EOS if len(path) == 3 + 8 else 5)
    changes = {"branching_factor": 4, "initial_branching_factor": [2, 2], "fallback_policy": "none"}
    (tree,) = trees_of(engine, make_config(16, max_tree_tokens=30, **changes), 1, expected_length=9)
    assert engine.levels == [2, 4, 4]
    assert set(reasons(tree)) == {"stop"}


def test_a_large_budget_changes_nothing() -> None:
    configs = [make_config(8, max_tree_tokens=budget) for budget in (None, 10**6)]
    runs = [trees_of(FakeEngine(memoryless(0.1)), config) for config in configs]
    assert fingerprint(runs[0]) == fingerprint(runs[1])
