"""A training that chooses its prompts itself, with `dynamic_sampling_rounds`, `prompt_selection` or both."""

import copy
from functools import partial
from typing import cast

import torch
from accelerate.logging import get_logger
from datasets import IterableDataset
from transformers import TrainerState

from treepo_trl.checkpoints import saved_values
from treepo_trl.sampling import SegmentTree
from treepo_trl.settings.data import check_rows
from treepo_trl.trl.host import Rows
from treepo_trl.turns.conversations import Conversation

from .fill import Candidate, fill_batch, without_signal
from .prompt_selection import PassRates, Saved, SelectedPrompts
from .prompt_stream import EndlessPlaceholders, Placeholders, PromptStream
from .source import PASS_RATES, PROMPTS_DRAWN, TreeSource
from .tree_batch import TreeBatch


logger = get_logger(__name__)


class DynamicSource(TreeSource):
    """
    Chooses the prompts of each batch, whose trees and rewards are there before `GRPOTrainer` asks for them.

    The place in the dataset and the prompts' pass rates are part of checkpoints.
    """

    _stream: PromptStream | SelectedPrompts | None = None
    _state: TrainerState | None = None  # of the training that the stream belongs to
    _batch: TreeBatch | None = None  # what follows is of this one
    _trees: list[SegmentTree] | None = None
    _rewards: torch.Tensor | None = None

    def rows_for(self, batch: TreeBatch, rows: Rows) -> Rows:
        """Choose as many prompts of this process as the data loader has given placeholders for; see [`fill_batch`]."""
        host, args = self._host, self._host.args
        stream = self._current_stream()
        host.extra_columns.clear()  # of a batch that failed
        self._batch, self._trees, self._rewards = batch, None, None
        weights, aggregation = host.reward_weights, host.trainer.multi_objective_aggregation
        chosen = fill_batch(
            stream,
            len(rows) // host.num_generations,
            args.dynamic_sampling_rounds,
            partial(self._score, batch),
            lambda rewards: without_signal(rewards, weights, aggregation),
            host.accelerator.process_index,
            host.accelerator.num_processes,
        )
        metrics = chosen.metrics() if args.dynamic_sampling_rounds > 0 else {}
        if isinstance(stream, SelectedPrompts):
            metrics |= stream.learn(chosen.drawn, chosen.drawn_rewards)
            saved_values(host.state)[PASS_RATES] = stream.rates.saved
        saved_values(host.state)[PROMPTS_DRAWN] = stream.position
        self._trees, self._rewards = chosen.trees, chosen.rewards
        self._turns.show(conversations_of(chosen.candidates))
        for column, values in chosen.extra_columns(host.num_generations).items():
            host.extra_columns[column] += values
        host.log(metrics)
        return self._rows(chosen.candidates)

    def trees_for(self, batch: TreeBatch, prompts: list[list[int]]) -> list[SegmentTree]:
        if batch is not self._batch or self._trees is None:  # a subclass samples on its own
            return super().trees_for(batch, prompts)
        self._turns.of_rows(len(prompts))
        return self._trees

    def rewards_for(self, batch: TreeBatch) -> torch.Tensor | None:
        return self._rewards if batch is self._batch else None

    def _score(self, batch: TreeBatch, candidates: list[Candidate], round_number: int) -> torch.Tensor:
        """Rewards of all processes' candidates; see [`fill_batch`]. Logs nothing, as most may yet be replaced."""
        host, num_generations = self._host, self._host.num_generations
        missing = [candidate for candidate in candidates if candidate.tree is None]
        prompt_ids: list[list[int]] = []
        check_rows(host.trainer, [candidate.example for candidate in missing])
        if missing:
            opened = self._turns.open(self._rows(missing)[::num_generations])
            for candidate, prompt, conversation in zip(missing, *opened, strict=True):
                candidate.prompt, candidate.conversation = prompt, conversation
            prompt_ids = host.tokenized([candidate.prompt for candidate in missing])
        # Also without any: processes that share an engine sample together.
        trees = self.sample(batch, prompt_ids, conversations_of(missing), round_number)
        for candidate, tree in zip(missing, trees, strict=True):
            candidate.tree = tree
        self._trees = [candidate.tree for candidate in candidates if candidate.tree is not None]
        self._turns.show(conversations_of(candidates))
        prompts = [copy.deepcopy(each.prompt) for each in candidates for _ in range(num_generations)]
        num_tokens_seen = host.state.num_input_tokens_seen
        completion_ids, completions = host.generated(prompts)
        rewards = host.rewards(self._rows(candidates), prompts, completions, completion_ids)
        rewards = batch.without_missing(rewards, host.accelerator)
        host.state.num_input_tokens_seen = num_tokens_seen  # the chosen ones are counted when they are trained on
        for i, candidate in enumerate(candidates):
            if candidate in missing:  # the others fill up the number of candidates; their rewards are there
                own = slice(i * num_generations, (i + 1) * num_generations)
                candidate.extra = {column: values[own] for column, values in host.extra_columns.items()}
        host.extra_columns.clear()
        return rewards.view(host.accelerator.num_processes, len(candidates), num_generations, -1)

    def _rows(self, candidates: list[Candidate]) -> Rows:
        """A row for each completion, of its own: reward functions may change what they are given."""
        return self._host.collated([each.example for each in candidates for _ in range(self._host.num_generations)])

    # The place in the dataset

    def loader_dataset(self) -> torch.utils.data.Dataset:
        dataset = self._host.train_dataset
        return EndlessPlaceholders() if isinstance(dataset, IterableDataset) else Placeholders(len(dataset))

    def _current_stream(self) -> PromptStream | SelectedPrompts:
        """The stream of this training, at the position of the checkpoint that it resumes."""
        host, state, args = self._host, self._host.state, self._host.args
        if self._stream is not None and self._state is state:
            return self._stream
        position = None
        if not args.ignore_data_skip:
            position = cast("tuple[int, int] | None", saved_values(state).get(PROMPTS_DRAWN))
            if position is None and state.global_step > 0:
                logger.warning(
                    "The checkpoint comes from a training without `dynamic_sampling_rounds` or "
                    "`prompt_selection`: it does not say which prompts that has drawn, so they are drawn from "
                    "the start of the dataset."
                )
        number, row = position or (0, 0)  # JSON makes lists of tuples
        self._stream = PromptStream(host.train_dataset, bool(host.trainer.shuffle_dataset), args.seed, (number, row))
        saved_rates = cast("Saved | None", saved_values(state).pop(PASS_RATES, None))
        if args.prompt_selection == "pass_rate":
            self._stream = SelectedPrompts(self._stream, PassRates(saved_rates), args.seed)
        self._state = state
        return self._stream


def conversations_of(candidates: list[Candidate]) -> list[Conversation]:
    """What the trees of candidates may call, as far as they were prepared."""
    return [candidate.conversation for candidate in candidates if candidate.conversation is not None]
