"""Lines of tree logs as the page gets them."""

import gzip
import json
import random
from pathlib import Path

import pytest

from tests.support.tree_logs import logged_line, sampled_line, small_tree, write_lines, write_run
from treepo_trl.apps.view import Index, find_sources, packed_trees
from treepo_trl.apps.view.trees import excerpts, segment_texts
from treepo_trl.sampling import SegmentTree


def packed(*names: Path, is_text: bool = True) -> tuple[list[dict], Index]:
    """Trees and index of runs and files, with token ids in brackets for a text."""
    index: Index = {"sources": [], "is_text": True, "trees": []}
    sources = find_sources(map(str, names))
    decode = (lambda ids: "".join(f"<{i}>" for i in ids)) if is_text else None
    trees = packed_trees(sources, [decode] * len(sources), index)
    return [json.loads(gzip.decompress(tree)) for tree in trees], index


def test_a_logged_tree(tmp_path: Path) -> None:
    run = write_run(tmp_path, {4: [logged_line(small_tree(), "Question", [1.0, None, 0.0], step=4)]})
    (tree,), index = packed(run)
    assert tree["prompt"] == "Question"
    assert tree["nodes"] == [
        {"parent": None, "tokens": 2, "text": "<5><6>", "logprob": -1.0, "entropy": 1.25},
        {
            "parent": 0,
            "tokens": 2,
            "text": "<7><8>",
            "logprob": -1.5,
            "entropy": 0.5,
            "finish": "stop",
            "advantage": 0.5,
            "reward": 1.0,
        },
        {
            "parent": 0,
            "tokens": 1,
            "text": "<9>",
            "logprob": -3.0,
            "entropy": 2.0,
            "finish": "length",
            "advantage": 0.0,
        },
        {"parent": None, "tokens": 1, "text": "<10>", "logprob": -0.25, "wave": 1},
        {
            "parent": 3,
            "tokens": 3,
            "text": "<11><12><13>",
            "logprob": -1.0,
            "wave": 1,
            "finish": "pattern",
            "advantage": -0.5,
            "reward": 0.0,
        },
    ]
    (summary,) = index["trees"]
    assert summary == {
        "source": 0,
        "step": 4,
        "number": 0,
        "prompt": "Question",
        "key": 0,
        "rewards": [(0.0, 1), (1.0, 1)],
        "leaves": 3,
        "tokens": 9,
    }


def test_a_sampled_tree_without_a_tokenizer_has_the_texts_of_the_file(tmp_path: Path) -> None:
    lines = [sampled_line(small_tree(), "Question", ["one", "two", "three"], index=7)]
    (tree,), index = packed(write_lines(tmp_path / "trees.jsonl", lines), is_text=False)
    assert not index["is_text"]
    assert [node["text"] for node in tree["nodes"]] == ["5 6 ", "7 8 ", "9 ", "10 ", "11 12 13 "]
    leaves = {i: (node["weight"], node["completion"]) for i, node in enumerate(tree["nodes"]) if "finish" in node}
    assert leaves == {1: (0.5, "one"), 2: (0.5, "two"), 4: (0.0, "three")}  # a fallback has no weight
    assert [(each["step"], each["number"], each["rewards"]) for each in index["trees"]] == [(None, 7, [])]


def test_prompts_are_counted_in_their_step_and_equal_ones_have_one_key(tmp_path: Path) -> None:
    prompts = {0: ["a", "b"], 1: ["b", "c"]}
    steps = {
        step: [logged_line(small_tree(), prompt, [0.0, 0.0, 1.0], step) for prompt in each]
        for step, each in prompts.items()
    }
    _, index = packed(write_run(tmp_path / "run", steps), write_run(tmp_path / "other", {1: steps[1]}))
    places = [(each["source"], each["step"], each["number"]) for each in index["trees"]]
    assert places == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1)]
    assert [each["key"] for each in index["trees"]] == [0, 1, 1, 2, 1, 2]


def test_calls_and_answers_of_turns() -> None:
    from treepo_trl.apps.view.trees import tree_view

    line = logged_line(small_tree(), "Question", [0.0, 0.0, 0.0])
    nodes = line["tree"]["nodes"]
    function = {"name": "add", "arguments": {"a": 1, "b": "é"}}
    calls = [{"type": "function", "function": function}, {"name": "bare", "arguments": "{}"}, "odd"]
    nodes[0] |= {"messages": [{"role": "assistant", "content": "", "tool_calls": calls}], "num_calls": 3}
    nodes[0]["num_failures"] = 2
    given = [{"role": "tool", "name": "add", "content": "3"}, {"role": "user", "content": [{"type": "text"}]}, {}]
    nodes[1] |= {"is_sampled": False, "messages": given}
    nodes[2]["messages"] = [{"role": "assistant", "content": "its text is the segment's", "tool_calls": None}]
    first, second, third, *_ = tree_view(line, None)["nodes"]  # pyright: ignore[reportArgumentType]
    assert first.get("calls") == ['add({"a": 1, "b": "é"})', "bare({})", "odd"]
    assert first.get("failures") == 2
    assert (first.get("is_sampled"), second.get("is_sampled")) == (None, False)
    assert second.get("answers") == ["tool add: 3", 'user: [{"type": "text"}]', ": "]
    assert not {"calls", "answers", "failures"} & third.keys()


def bytes_decoder(token_ids: list[int]) -> str:
    """A token per byte: characters are cut between segments."""
    return bytes(token_ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("seed", range(50))
def test_texts_along_a_path_are_the_text_of_the_completion(seed: int) -> None:
    rng = random.Random(seed)
    letters = "a \nß€😀"
    tree = SegmentTree(list(b"Frage: "))
    texts = {"".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(4)}
    for text in texts:
        data, parent = text.encode(), None
        while data:
            length = rng.randint(1, 5)
            segment, data = data[:length], data[length:]
            parent = tree.add(parent, list(segment), finish_reason=None if data else "stop")
    nodes = [dict(node) for node in tree.to_dict()["nodes"]]
    parts = segment_texts(tree.prompt_ids, nodes, bytes_decoder)
    for leaf in tree.leaves:
        assert "".join(parts[node] for node in tree.path(leaf)) == bytes_decoder(tree.completion_ids(leaf))


def test_a_space_that_a_decoder_drops_at_the_start_is_kept() -> None:
    nodes = [{"parent": None, "token_ids": [1]}, {"parent": 0, "token_ids": [2]}]
    assert segment_texts([0], nodes, lambda ids: " ".join(f"w{i}" for i in ids)) == [" w1", " w2"]


def test_what_all_prompts_have_is_left_out_of_their_lines() -> None:
    template = "system\nAdd.\nuser\n{}\nassistant\n"
    assert excerpts([template.format("1 + 2"), template.format("3 +  4\n+ 5")]) == ["1 + 2", "3 + 4 + 5"]
    assert excerpts([template.format("1 + 2")] * 2) == ["system Add. user 1 + 2 assistant"] * 2
    assert excerpts(["a\nb", "a"]) == ["b", "a"]
    assert excerpts(["", "x" * 300]) == ["(empty)", "x" * 200]
