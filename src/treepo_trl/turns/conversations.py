"""
Conversations in trees: turns become messages, calls become answers, leaves become the rows that TRL's loop would give.

Messages and tokens are made in the sampler's thread alone, because tokenizers are not safe in threads; only calls run
beside it. Model tokens are never tokenized again. Standard library only.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, cast

from treepo_trl.sampling.nodes import Message
from treepo_trl.sampling.tree import SegmentTree
from treepo_trl.sampling.turns import Answer, TurnEnd

from .environments import EnvironmentTree, Execution
from .tool_runner import CallResults, EnvironmentLostError, Tool, ToolRunner


LONGEST_TOKEN = 256
"""Characters, and more than vocabularies have: to tokenize a long text takes seconds, in which the engine waits."""


class Parse(Protocol):
    """A turn's tokens as the model's message; knows which tools the prompt has named."""

    def __call__(self, token_ids: list[int], before: list[int], tools: Sequence[Tool]) -> Message: ...


@dataclass
class _ToolAnswer(Answer):
    """An answer, and what the calls have made of the environment."""

    execution: Execution | None = None


@dataclass
class _Pending:
    """Calls that run, or a turn without any."""

    future: Future[object]
    finish: Callable[[], Answer]

    def result(self) -> Answer:
        return self.finish()


@dataclass
class Conversation:
    """What the turns of one tree may call."""

    schemas: Sequence[Tool]
    """Tools that the prompt names."""
    tools: dict[str, Tool]
    """Tools that keep nothing between calls, by name."""
    environment: EnvironmentTree | None = None
    """State that calls change, one for each path."""
    name: str | None = None
    """Name of the environment, where there are several kinds."""


@dataclass
class Rows:
    """The leaves of trees as rows, depth-first: what TRL's own loop over tools would give for the same turns."""

    masks: list[list[int]] = field(default_factory=list[list[int]])
    """1 for each sampled completion token, 0 for those of answers."""
    completions: list[list[Message]] = field(default_factory=list[list[Message]])
    """Messages of each completion, of its own."""
    num_calls: int = 0
    """Calls on the paths of all leaves; a shared call counts for each."""
    num_failures: int = 0
    """Those of them that failed."""


class ToolTurns:
    """
    [`TurnHandler`] that runs the tools which turns call.

    Args:
        conversations (sequence of [`Conversation`]):
            One per prompt.
        runner ([`ToolRunner`]):
            Runs the calls.
        parse (`Callable`):
            Tokens of a turn, tokens before it and the tools to the model's message.
        suffix_ids (`Callable[[list[Message]], list[int]]`):
            Tokens of an answer's messages, from the end of the model's turn to the start of its next one.
        shorten (`Callable[[str], str]`):
            What is left of the text of one tool's answer.
        max_turns (`int`):
            Turns of a path whose calls are run.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        runner: ToolRunner,
        parse: Parse,
        suffix_ids: Callable[[list[Message]], list[int]],
        shorten: Callable[[str], str],
        max_turns: int,
    ) -> None:
        self.conversations, self.max_turns = conversations, max_turns
        self._runner, self._parse, self._suffix_ids, self._shorten = runner, parse, suffix_ids, shorten

    def may_branch(self, index: int) -> bool:
        """Not where a path cannot be given an environment in the state of its prefix."""
        environment = self.conversations[index].environment
        return environment is None or environment.can_part

    def begin(self, end: TurnEnd) -> _Pending:
        """Start the calls of a turn."""
        before, turn = end.split()
        message = self._parse(turn, before, self.conversations[end.index].schemas)
        calls = cast("list[Message] | None", message.get("tool_calls"))
        if not calls or end.num_turns >= self.max_turns:
            future: Future[object] = Future()
            future.set_result(None)
            answer = Answer(turn_message=message, finish_reason="turns" if calls else "stop")
            return _Pending(future, lambda: answer)
        work = self._work(end, calls)
        running = self._runner.submit(work)
        return _Pending(cast("Future[object]", running), lambda: self._answered(end, message, calls, running))

    def _work(self, end: TurnEnd, calls: list[Message]) -> Callable[[], CallResults | Execution]:
        """What runs the calls of a turn."""
        conversation = self.conversations[end.index]
        environment = conversation.environment
        if environment is None or not environment.is_called(calls):
            return lambda: self._runner.run(calls, conversation.tools)
        state = environment.state_of(end.tree, end.parent)
        return lambda: environment.execute(state, calls)

    def _answered(
        self, end: TurnEnd, message: Message, calls: list[Message], running: "Future[CallResults | Execution]"
    ) -> Answer:
        """The answer to a turn whose calls are done."""
        try:
            done = running.result()
        except EnvironmentLostError:
            return Answer([], [], message, "timeout", len(calls), len(calls))
        execution = done if isinstance(done, Execution) else None
        found = done.found if isinstance(done, Execution) else done
        messages = [_tool_message(name, value, self._shorten) for name, value in found.results]
        answer = _ToolAnswer([], [], message, "overlong", len(calls), found.num_failures, execution)
        if sum(len(cast(str, each["content"])) for each in messages) > end.room * LONGEST_TOKEN:
            return answer
        token_ids = self._suffix_ids(messages)
        if len(token_ids) < end.room:  # a sampled token follows
            answer.token_ids, answer.messages = token_ids, messages
        return answer

    def stored(self, index: int, node: int, answer: Answer) -> None:
        """Keep the environment that the calls of a segment have changed."""
        environment = self.conversations[index].environment
        if environment is not None and isinstance(answer, _ToolAnswer) and answer.execution is not None:
            environment.keep(node, answer.execution)
        elif environment is not None and answer.finish_reason == "timeout" and answer.num_calls:
            environment.lose(node)

    def abort(self) -> None:
        """End the calls that run."""
        self._runner.end()

    def rows(self, trees: Sequence[SegmentTree], width: int) -> Rows:
        """The leaves of trees, which are those of the conversations, as `width` rows each, the last ones vacant."""
        found = Rows()
        for tree, conversation in zip(trees, self.conversations, strict=True):
            for leaf in tree.leaves:
                nodes = [tree.nodes[node] for node in tree.path(leaf)]
                messages = [message for node in nodes for message in node.messages]
                if not nodes[-1].messages:  # cut off in its turn
                    before = tree.sequence_ids(tree.turn_start(leaf))
                    turn = tree.sequence_ids(leaf)[len(before) :]
                    messages.append(self._parse(turn, before, conversation.schemas))
                found.masks.append(tree.sampled_mask(leaf))
                found.completions.append(copy.deepcopy(messages))
                found.num_calls += sum(node.num_calls for node in nodes)
                found.num_failures += sum(node.num_failures for node in nodes)
            for _ in range(width - len(tree.leaves)):
                found.masks.append([0])
                found.completions.append([{"role": "assistant", "content": ""}])
        return found


def first_turn(tree: SegmentTree, leaf: int) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of the first turn on the path to a leaf."""
    token_ids: list[int] = []
    logprobs: list[float] = []
    for node in tree.path(leaf):
        if not tree.nodes[node].is_sampled:
            break
        token_ids += tree.nodes[node].token_ids
        logprobs += tree.nodes[node].logprobs or ()
    return token_ids, logprobs


def _tool_message(name: str, value: object, shorten: Callable[[str], str]) -> Message:
    """
    The message of one call's answer.

    Raises:
        ValueError: for an answer that holds an image.
    """
    return {"role": "tool", "name": _encodable(name), "content": shorten(_encodable(_text_of(name, value)))}


def _text_of(name: str, value: object) -> str:
    """An answer as text, lists too: templates of text models show nothing of them."""
    blocks = cast("list[object]", value) if isinstance(value, list) else []
    kinds = [cast(Message, block).get("type") if isinstance(block, dict) else None for block in blocks]
    if "image" in kinds:
        raise ValueError(
            f"The tool '{name}' has returned an image, which trees cannot train on yet. Return text, or use "
            "`GRPOTrainer`."
        )
    if kinds and all(kind == "text" for kind in kinds):
        return "".join(str(cast(Message, block).get("text", "")) for block in blocks)
    return str(value)


def _encodable(text: str) -> str:
    """Text without halves of surrogate pairs, which JSON can name and no tokenizer takes."""
    return text.encode(errors="replace").decode()
