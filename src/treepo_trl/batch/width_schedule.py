"""The widths of a training's trees: learned from its batches, kept in its checkpoints."""

from typing import cast

from accelerate import Accelerator
from transformers import TrainerState

from treepo_trl.checkpoints import saved_values
from treepo_trl.metrics import sum_over_processes
from treepo_trl.sampling import SegmentTree
from treepo_trl.sampling.resolved_variance import DepthStatistics
from treepo_trl.treepo_config import TreePOConfig


# In the state that checkpoints save, and equal on every process: a resumed run branches as an uninterrupted one.
_EXPECTED_LENGTH = "treepo_expected_length"  # mean completion of the last batch in tokens
_DEPTHS = "treepo_depths"  # `DepthStatistics.flat`


class WidthSchedule:
    """
    What the batches of a training have shown about each depth, and the widths that follow.

    Args:
        args ([`TreePOConfig`]):
            Settings of the training.
    """

    def __init__(self, args: TreePOConfig) -> None:
        self.args = args

    def expected_length(self, state: TrainerState) -> int | None:
        """Tokens that a completion of the next batch can be expected to have; `None` in the first one."""
        return cast("int | None", saved_values(state).get(_EXPECTED_LENGTH))

    def widths(self, state: TrainerState) -> list[float] | None:
        """Widths by depth for the next trees; `None` in the first batch, and with schedules of their own."""
        seen = self._seen(state)
        return None if seen is None else self._widths_after(seen)

    def learn(
        self,
        state: TrainerState,
        mean_length: float,
        trees: list[SegmentTree],
        rewards: list[list[float]],
        accelerator: Accelerator,
    ) -> dict[str, float]:
        """
        Count a batch, and tell what has been seen so far.

        Args:
            state ([`~transformers.TrainerState`]):
                Keeps the counts.
            mean_length (`float`):
                Mean tokens of the batch's completions, over all processes.
            trees (`list[SegmentTree]`):
                Trees of this process.
            rewards (`list[list[float]]`):
                Reward of each of their leaves over what its advantage is divided by; `nan` if it could not be scored.
            accelerator ([`~accelerate.Accelerator`]):
                Adds up the processes.

        Returns:
            Metrics under `tree/`: resolved variance and width of each depth.
        """
        saved_values(state)[_EXPECTED_LENGTH] = max(round(mean_length), 1)
        depth = self.args.max_tree_depth
        own = DepthStatistics.of_depth(depth)
        for tree, values in zip(trees, rewards, strict=True):
            own.add(tree, [None if value != value else value for value in values])
        now = DepthStatistics.from_flat(sum_over_processes(own.flat(), accelerator), depth)
        before = self._seen(state)
        seen = now if before is None else before.then(now)
        saved_values(state)[_DEPTHS] = seen.flat()
        return self._metrics(seen)

    def _metrics(self, seen: DepthStatistics) -> dict[str, float]:
        resolved = seen.resolved()
        metrics = {f"tree/resolved_variance/{i}": value for i, value in enumerate(resolved) if value is not None}
        widths = self._widths_after(seen)
        if widths is not None:
            metrics |= {f"tree/width/{i}": width for i, width in enumerate(widths)}
        return metrics

    def _widths_after(self, seen: DepthStatistics) -> list[float] | None:
        own_widths = self.args.own_widths
        return None if own_widths is None else own_widths(*seen.shape(), self.args.num_generations)

    def _seen(self, state: TrainerState) -> DepthStatistics | None:
        flat = cast("list[float] | None", saved_values(state).get(_DEPTHS))
        try:
            return None if flat is None else DepthStatistics.from_flat(flat, self.args.max_tree_depth)
        except ValueError:  # a checkpoint with other lengths of segments or completions, or of an older version
            return None
