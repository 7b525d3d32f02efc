"""
Tools and environments of a trainer, in the trees of its batches.

`GRPOTrainer` calls tools in a loop over rows, after their first turn. Here they run while trees grow, and
`_tool_call_loop` hands out what that loop would give for the same turns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from accelerate.logging import get_logger

from treepo_trl.sampling.nodes import Message
from treepo_trl.trl.host import Host
from treepo_trl.trl.seams import environment_pools
from treepo_trl.turns import EnvironmentPool, EnvironmentTree, ToolRunner, ToolTurns, forking_of
from treepo_trl.turns.conversations import LONGEST_TOKEN, Conversation, Rows
from treepo_trl.turns.environments import Forking, ForkingCounts
from treepo_trl.turns.tool_runner import Tool, public_methods, tools_by_name

from .tree_batch import TreeBatch


logger = get_logger(__name__)


class _RowEnvironment:
    """What `GRPOTrainer` resets for each row of a tree: they share one reset."""

    def __init__(self, tree: EnvironmentTree) -> None:
        self._tree = tree

    def reset(self, **kwargs: object) -> object:
        """The observation of the tree's one reset."""
        return self._tree.observation(kwargs)


class _TreePool:
    """
    Stands in for a list of environments in `GRPOTrainer._environment_pool`: row by row, a tree's own.

    Args:
        make (`Callable[[], EnvironmentTree]`):
            Makes the environments of a tree.
        num_generations (`int`):
            Rows per tree.
    """

    def __init__(self, make: Callable[[], EnvironmentTree], num_generations: int) -> None:
        self._make, self._num_generations = make, num_generations
        self.trees: list[EnvironmentTree] = []

    def __len__(self) -> int:
        return 2**62  # GRPOTrainer never makes an instance itself

    def __getitem__(self, row: int) -> _RowEnvironment:
        index = row // self._num_generations
        if index == len(self.trees):
            self.trees.append(self._make())
        return _RowEnvironment(self.trees[index])


class TrainerTurns:
    """
    What the turns of a trainer's paths may call.

    Args:
        host ([`Host`]):
            Has the tools, the environments and the chat template.
    """

    def __init__(self, host: Host) -> None:
        self._host, self._args = host, host.args
        loop = getattr(host.trainer, "async_loop", None)  # GRPOTrainer has one only if something is asynchronous
        self._runner = ToolRunner(self._args.tool_workers, self._args.tool_timeout, loop)
        self._num_generations = host.num_generations
        self._standalone: list[Tool] = host.standalone_tools
        self._open: list[EnvironmentTree] = []
        self._conversations: list[Conversation] = []
        self._rows_of: dict[str | None, _TreePool] = {}
        self._pools: dict[str | None, EnvironmentPool] = {}
        self._forkings: dict[str | None, Forking] = {}
        for name, factory in host.environment_factories.items():
            idle = host.idle_environments(name)
            self._pools[name] = EnvironmentPool(factory, idle)
            self._forkings[name] = self._forking(type(idle[0]))
        self._unchecked = set(self._pools)  # environments whose reset was not seen to repeat itself

    @property
    def is_used(self) -> bool:
        """Whether turns can call something."""
        return bool(self._host.tools())

    def _forking(self, environment: type) -> Forking:
        forking = forking_of(environment, self._args.environment_forking)
        if forking == "none" and self._args.environment_forking == "auto" and public_methods(environment):
            logger.warning(
                f"{environment.__name__} has no `_fork`: the paths of a tree share its prompt alone, and each has an "
                "environment of its own. Define `_fork(self)`, which returns a copy in the same state, or set "
                "`environment_forking` to 'deepcopy' or 'replay' if that is right for it."
            )
        return forking

    # A batch

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Context in which `GRPOTrainer` prepares a batch: rows of a tree share a reset, and all is released after."""
        is_failed = True
        for pool in self._pools.values():
            pool.counts = ForkingCounts()
        self._rows_of = {name: _TreePool(self._maker(name), self._num_generations) for name in self._pools}
        try:
            with environment_pools(self._host.trainer, self._rows_of) if self._pools else nullcontext():
                yield
            is_failed = False
        finally:
            self._runner.end()
            for tree in self._open:
                tree.release(is_failed)
            self._open, self._conversations = [], []
            self._host.row_environments = None

    def _maker(self, name: str | None) -> Callable[[], EnvironmentTree]:
        def make() -> EnvironmentTree:
            made = EnvironmentTree(self._pools[name], self._forkings[name], self._runner, self._standalone)
            self._open.append(made)
            return made

        return make

    def of_rows(self, num_trees: int) -> list[Conversation]:
        """What the trees may call whose rows `GRPOTrainer` is about to sample."""
        environments: list[EnvironmentTree | None] = [None] * num_trees
        names: list[str | None] = [None] * num_trees
        if self._pools:
            rows: list[_RowEnvironment] = self._host.row_environments[:: self._num_generations]
            names = self._host.row_environment_names[:: self._num_generations]
            environments = [row._tree for row in rows]
        self._conversations = [self._conversation(*pair) for pair in zip(names, environments, strict=True)]
        return self._conversations

    def _conversation(self, name: str | None, environment: EnvironmentTree | None) -> Conversation:
        if environment is not None and name in self._unchecked:
            self._unchecked.remove(name)
            environment.check_reset()
        schemas = self._host.tools(name, is_in_environment=environment is not None)
        return Conversation(schemas, tools_by_name(self._standalone), environment, name)

    def handler(self, conversations: Sequence[Conversation]) -> ToolTurns | None:
        """What answers the turns of some trees; `None` where they can call nothing."""
        if not self.is_used:
            return None
        host, most_turns = self._host, cast(int, self._host.trainer.max_tool_calling_iterations)
        return ToolTurns(conversations, self._runner, host.parsed, host.tool_suffix_ids, self._shortened, most_turns)

    def _shortened(self, text: str) -> str:
        limit, tokenizer = self._args.max_tool_answer_tokens, self._host.tokenizer
        if limit is None or len(text.encode()) <= limit:  # a token has at least a byte
            return text
        start = text[: limit * LONGEST_TOKEN]
        token_ids = cast("list[int]", tokenizer(start, add_special_tokens=False)["input_ids"])
        if len(token_ids) <= limit and start == text:
            return text
        return f"{tokenizer.decode(token_ids[:limit])} [cut off]"

    def sampled(self, batch: TreeBatch) -> None:
        """Give `GRPOTrainer` the environments at the ends of the trees' paths, which its reward functions read."""
        if self._pools:
            environments = [each.environment for each in self._conversations for _ in range(batch.width)]
            self._host.row_environments = [
                cast(EnvironmentTree, own).leaf_environment(tree, tree.leaves[0] if leaf is None else leaf)
                for own, (tree, leaf) in zip(environments, batch.rows(), strict=True)
            ]

    def rows(self, batch: TreeBatch) -> Rows:
        """The rows of a batch of trees, with their masks and messages."""
        handler = self.handler(self._conversations)
        assert handler is not None, "GRPOTrainer asks only where there are tools"
        return handler.rows(batch.trees, batch.width)

    def totals(self) -> dict[str, float]:
        """What the environments of the last batch have cost; nothing where there are none."""
        if not self._pools:
            return {}
        counts = [pool.counts for pool in self._pools.values()]
        return {
            "environment_resets": sum(each.num_resets for each in counts),
            "environment_forks": sum(each.num_forks for each in counts),
            "environment_replayed_calls": sum(each.num_replayed_calls for each in counts),
        }

    # Dynamic sampling, which has prompts before it has rows

    def open(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Conversation]]:
        """Prompts with what their environments show, and what their trees may call, from a row of each."""
        prompts = [row.get("prompt", [{"role": "user", "content": ""}]) for row in rows]
        if not self._pools:
            return prompts, [self._conversation(None, None) for _ in rows]
        conversations: list[Conversation] = []
        for i, row in enumerate(rows):
            name = row.get("environment") if self._host.has_several_environments else None
            if name not in self._pools:
                raise ValueError(
                    f"An example has `environment={name!r}`, which is not among those of `environment_factory`: "
                    f"{', '.join(map(str, self._pools))}. Correct the column, or add the environment."
                )
            kwargs = {key: value for key, value in row.items() if name is None or key != "environment"}
            environment = self._maker(name)()
            prompts[i] = _with_observation(prompts[i], environment.observation(kwargs))
            conversations.append(self._conversation(name, environment))
        self._host.row_environment_names = [each.name for each in conversations]
        return prompts, conversations

    def show(self, conversations: Sequence[Conversation]) -> None:
        """Let `GRPOTrainer` take rows of trees that are there, now or when it asks for environments."""
        if not self._pools:
            return
        for name, pool in self._rows_of.items():
            pool.trees = [cast(EnvironmentTree, each.environment) for each in conversations if each.name == name]
        rows = [each for each in conversations for _ in range(self._num_generations)]
        self._host.row_environment_names = [each.name for each in rows]
        self._host.row_environments = [_RowEnvironment(cast(EnvironmentTree, each.environment)) for each in rows]


def _with_observation(prompt: list[Message], observation: object) -> list[Message]:
    """A prompt with what an environment shows behind its last message, as `GRPOTrainer` puts it there."""
    if observation is None:
        return prompt
    content = prompt[-1]["content"]
    if isinstance(observation, list) and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if isinstance(observation, str) and isinstance(content, list):
        observation = [{"type": "text", "text": observation}]
    return [*prompt[:-1], {**prompt[-1], "content": cast(Any, content) + observation}]
