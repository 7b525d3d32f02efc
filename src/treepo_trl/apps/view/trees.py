"""Lines of tree logs as the page reads them: an object per tree with the text of each segment, and an index."""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NotRequired, TypedDict, cast

from treepo_trl.tree_log import SampledLine, TreeLogLine

from .sources import Source


Decode = Callable[[list[int]], str]
"""Text of a list of tokens, special tokens included."""

_CONTEXT = 8
"""Tokens before a segment that are decoded with it. A character has at most 4 bytes, so a cut one begins in here."""
_EXCERPT = 200
"""Characters of a prompt in the index."""


class NodeView(TypedDict):
    """A segment for the page. What is not known is left out."""

    parent: int | None
    tokens: int
    """How many."""
    text: str
    logprob: NotRequired[float]
    """Mean of its tokens."""
    entropy: NotRequired[float]
    wave: NotRequired[int]
    is_sampled: NotRequired[bool]
    """Only if it is `False`: the segment is the answer of a tool, or another's message."""
    calls: NotRequired[list[str]]
    """Tool calls in the message that ends with the segment, as `name(arguments)`."""
    answers: NotRequired[list[str]]
    """Messages that a segment that was not sampled consists of, each with its role and name."""
    failures: NotRequired[int]
    """How many of the calls have failed."""
    finish: NotRequired[str]
    reward: NotRequired[float]
    advantage: NotRequired[float]
    weight: NotRequired[float]
    completion: NotRequired[str]
    """Text of a leaf's whole path, if there is no tokenizer and the file has it."""


class TreeView(TypedDict):
    """A tree for the page."""

    prompt: str
    nodes: list[NodeView]


class TreeSummary(TypedDict):
    """A tree in the index."""

    source: int
    """Position of its source."""
    step: int | None
    """`None` in files of `treepo-trl sample`."""
    number: int
    """Of the prompt: in its step, or in the file of `treepo-trl sample`."""
    prompt: str
    """What tells the prompt from the others, in one short line."""
    key: int
    """The same for equal prompts."""
    rewards: list[tuple[float, int]]
    """Rewards of the leaves, rising, and how many leaves have each; unscored leaves are left out."""
    leaves: int
    tokens: int
    """Unique completion tokens."""


class Index(TypedDict):
    """What the page knows before it reads a tree."""

    sources: list[str]
    """Names."""
    is_text: bool
    """Whether there was a tokenizer for every source; else some segments have token ids for a text."""
    trees: list[TreeSummary]


def packed_trees(sources: Sequence[Source], decoders: Sequence[Decode | None], index: Index) -> Iterator[bytes]:
    """
    Each tree of the sources as the gzip of its JSON, in turn.

    Args:
        sources (sequence of [`Source`]):
            Where the trees come from.
        decoders (sequence of `Decode`):
            A decoder for each source, or `None`, with which token ids stand for the text.
        index ([`Index`]):
            Is filled; complete after the last tree.

    Raises:
        ValueError: at a line that is no tree, and if a source has none. `OSError` if a file cannot be read.
    """
    index["sources"] = [source.name for source in sources]
    index["is_text"] = None not in decoders
    prompts: list[str] = []
    for i, (source, decode) in enumerate(zip(sources, decoders, strict=True)):
        in_step = Counter[int]()
        for line in source.lines():
            view = tree_view(line, decode)
            step, number = None, cast(SampledLine, line).get("index", 0)
            if "step" in line:
                step, number = line["step"], in_step[line["step"]]
                in_step[step] += 1
            index["trees"].append(_summary(view, i, step, number))
            prompts.append(view["prompt"])
            yield gzip.compress(to_json(view), compresslevel=6, mtime=0)
    keys = {prompt: key for key, prompt in enumerate(dict.fromkeys(prompts))}
    for summary, prompt, excerpt in zip(index["trees"], prompts, excerpts(prompts), strict=True):
        summary["key"], summary["prompt"] = keys[prompt], excerpt


def to_json(value: object) -> bytes:
    """The JSON of a value, without spaces. Not escaped for HTML: it goes into a page as base64 alone."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode(errors="replace")


def tree_view(line: TreeLogLine | SampledLine, decode: Decode | None) -> TreeView:
    """A line of a tree log for the page; without a decoder the token ids are the text."""
    tree = line["tree"]
    nodes = cast("list[dict[str, Any]]", tree["nodes"])  # later logs have further fields
    texts = segment_texts(tree["prompt_ids"], nodes, decode) if decode else [_ids(node["token_ids"]) for node in nodes]
    views = [_node_view(node, text) for node, text in zip(nodes, texts, strict=True)]
    for leaf, values in _leaf_values(line, with_text=decode is None):
        views[leaf].update(cast(NodeView, values))
    return {"prompt": line["prompt"], "nodes": views}


def _node_view(node: dict[str, Any], text: str) -> NodeView:
    view: NodeView = {"parent": node["parent"], "tokens": len(node["token_ids"]), "text": text}
    if node["logprobs"]:
        view["logprob"] = round(sum(node["logprobs"]) / len(node["logprobs"]), 4)
    if node.get("entropy") is not None:
        view["entropy"] = round(node["entropy"], 4)
    if node.get("wave"):
        view["wave"] = node["wave"]
    if not node.get("is_sampled", True):
        view["is_sampled"] = False
    messages = node.get("messages", [])
    if calls := [_call(call) for message in messages for call in _list(message.get("tool_calls"))]:
        view["calls"] = calls
    if messages and not node.get("is_sampled", True):
        view["answers"] = [_answer(message) for message in messages]
    if node.get("num_failures"):
        view["failures"] = node["num_failures"]
    if node["finish_reason"] is not None:
        view["finish"] = node["finish_reason"]
    return view


def _list(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []


def _call(call: object) -> str:
    """A call of a message in the form of chat templates, in one line; of another form, as it is."""
    function = cast("dict[str, object]", call).get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or "name" not in function:
        return _shown(call)
    named = cast("dict[str, object]", function)
    return f"{named['name']}({_shown(named.get('arguments', {}))})"


def _answer(message: dict[str, object]) -> str:
    who = " ".join(str(message[key]) for key in ("role", "name") if message.get(key))
    return f"{who}: {_shown(message.get('content', ''))}"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _leaf_values(line: TreeLogLine | SampledLine, with_text: bool) -> Iterator[tuple[int, dict[str, object]]]:
    """Node id of each leaf, and what the line says of it."""
    if "rows" in line:
        for leaf, reward, advantage in zip(line["rows"], line["rewards"], line["advantages"], strict=True):
            values: dict[str, object] = {"advantage": round(advantage, 5)}
            yield leaf, values if reward is None else {**values, "reward": round(reward, 5)}
        return
    sampled = cast(SampledLine, line)
    for leaf, weight, text in zip(sampled["tree"]["leaves"], sampled["weights"], sampled["completions"], strict=True):
        yield leaf, {"weight": round(weight, 5), **({"completion": text} if with_text else {})}


def _ids(token_ids: list[int]) -> str:
    return "".join(f"{token} " for token in token_ids)


def segment_texts(prompt_ids: list[int], nodes: list[dict[str, Any]], decode: Decode) -> list[str]:
    """
    The text that each node adds to its path, so that the texts along a path are the text of the completion.

    A character whose bytes lie in two segments belongs to the second one. Decoders of one segment alone would lose it,
    and some lose a space at the start.
    """
    inner = {node["parent"] for node in nodes}
    contexts: dict[int | None, tuple[list[int], int]] = {}

    def remember(node: int | None, tail: list[int]) -> None:
        contexts[node] = tail, len(decode(tail).rstrip("\ufffd"))

    remember(None, prompt_ids[-_CONTEXT:])
    texts: list[str] = []
    for i, node in enumerate(nodes):  # parents come before children
        before, start = contexts[node["parent"]]
        token_ids = before + node["token_ids"]
        text = decode(token_ids)[start:]
        if i in inner:
            remember(i, token_ids[-_CONTEXT:])
            text = text.rstrip("\ufffd")
        texts.append(text)
    return texts


def _summary(view: TreeView, source: int, step: int | None, number: int) -> TreeSummary:
    rewards = Counter(node["reward"] for node in view["nodes"] if "reward" in node)
    return {
        "source": source,
        "step": step,
        "number": number,
        "prompt": "",  # what tells it from the others is known at the end
        "key": 0,
        "rewards": sorted(rewards.items()),
        "leaves": sum("finish" in node for node in view["nodes"]),
        "tokens": sum(node["tokens"] for node in view["nodes"]),
    }


def excerpts(prompts: list[str]) -> list[str]:
    """Prompts in a line each, without the first and last lines that all of them have, such as those of a template."""
    lines = [prompt.splitlines() for prompt in prompts]
    if len(set(prompts)) > 1:
        start = _num_shared(lines)
        lines = [each[start:] for each in lines]
        end = _num_shared([each[::-1] for each in lines])
        lines = [each[: len(each) - end] for each in lines]
    short = (" ".join(" ".join(each or [prompt]).split()) for each, prompt in zip(lines, prompts, strict=True))
    return [text[:_EXCERPT] or "(empty)" for text in short]


def _num_shared(texts: list[list[str]]) -> int:
    """With how many lines all texts begin."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))
