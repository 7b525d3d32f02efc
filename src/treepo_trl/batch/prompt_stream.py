"""
The prompts of a dataset one after another, for a training that draws them itself.

A stream says where it is, so that a checkpoint can; the placeholders stand in the data loader, which then only counts.
"""

from collections.abc import Iterator
from itertools import islice, repeat

import torch
from datasets import Dataset, IterableDataset


Example = dict[str, object]
"""A row of a dataset, by column."""


class PromptStream:
    """
    The dataset's examples one after another, without end: each once per pass, in `GRPOTrainer`'s order.

    Every process reads the whole stream. Unlike `GRPOTrainer`'s batches it leaves none out at the end of a pass: a
    batch goes on into the next one.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Where the examples come from.
        shuffle (`bool`):
            Whether each pass has an order of its own; over a buffer for an `IterableDataset`.
        seed (`int`):
            Seed of the orders.
        position (`tuple[int, int]`):
            Where to start: pass, and number of its examples that are already drawn.
    """

    def __init__(
        self, dataset: Dataset | IterableDataset, shuffle: bool, seed: int, position: tuple[int, int] = (0, 0)
    ) -> None:
        self.position = position
        self._dataset, self._shuffle = dataset, shuffle
        self._generator = torch.Generator().manual_seed(seed)
        if isinstance(dataset, IterableDataset):
            self._dataset = dataset.shuffle(seed=seed) if shuffle else dataset
        else:
            for _ in range(position[0]):  # the orders of all passes come from one generator, one after another
                self._next_order()
        self._rest = self._pass(*position)

    def take(self, count: int) -> list[Example]:
        """
        Draw the next `count` examples.

        Raises:
            ValueError: if a whole pass holds none.
        """
        examples: list[Example] = []
        while len(examples) < count:
            number, row = self.position
            part = list(islice(self._rest, count - len(examples)))
            examples += part
            self.position = (number, row + len(part))
            if len(examples) == count:
                break
            if self.position[1] == 0:
                raise ValueError(
                    f"Pass {number + 1} over the training dataset gave no example. Check how it is loaded "
                    "and filtered; a source that can be read only once must hold the prompts of all steps and "
                    "replacements."
                )
            self.position = (number + 1, 0)
            self._rest = self._pass(number + 1, 0)
        return examples

    def _pass(self, number: int, start: int) -> Iterator[Example]:
        dataset = self._dataset
        if isinstance(dataset, IterableDataset):
            dataset.set_epoch(number)
            return islice(dataset, start, None)
        order = self._next_order()
        return (dataset[int(index)] for index in order[start:])

    def _next_order(self) -> torch.Tensor:
        """Order of the next pass, as TRL's `RepeatSampler` draws it."""
        size = len(self._dataset)  # pyright: ignore[reportArgumentType]
        return torch.randperm(size, generator=self._generator) if self._shuffle else torch.arange(size)


class Placeholders(torch.utils.data.Dataset):
    """
    As many empty examples as a dataset has.

    The data loader that counts a training's steps reads these, so that nothing is loaded that is not used.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        return {}


class EndlessPlaceholders(torch.utils.data.IterableDataset):
    """[`Placeholders`] for an `IterableDataset`, whose steps are counted by `max_steps`."""

    def __iter__(self) -> Iterator[Example]:
        return repeat({})
