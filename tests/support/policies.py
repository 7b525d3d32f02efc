"""A trainer's engine without a model, beside which the policy is trained all the same."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from trl.trainer.grpo_trainer import GRPOTrainer

from tests.support.fakes import FakeEngine, memoryless
from treepo_trl import TreePOConfig, treepo_trainer
from treepo_trl.engines import SegmentEngine
from treepo_trl.policy.engine import PolicyEngine, Sampled
from treepo_trl.servers.generation import gathered_rows
from treepo_trl.servers.main_process import from_main_process


class FakePolicy(PolicyEngine):
    """
    Samples from a `FakeEngine`, whatever the policy.

    `synchronize` is called with the trainer where an engine would get the policy's weights.
    """

    gives_logprobs = True

    def __init__(
        self,
        args: TreePOConfig,
        synchronize: Callable[[Any], object] = lambda _: None,
        engine: SegmentEngine | None = None,
    ) -> None:
        super().__init__(args)
        self.engine = engine or FakeEngine(memoryless(0.1))
        self._synchronize = synchronize

    def connect(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer

    @contextmanager
    def ready(self, seed: str, prompts: list[list[int]], in_batch: bool = False) -> Iterator[None]:
        self._synchronize(self._trainer)
        yield


class SharedPolicy(FakePolicy):
    """One that the main process asks for all processes, as it does with servers."""

    def connect(self, trainer: GRPOTrainer) -> None:
        super().connect(trainer)
        self.processes_per_engine = trainer.accelerator.num_processes
        self.samples_here = trainer.accelerator.is_main_process

    def gather(self, prompts: list[list[int]]) -> tuple[list[list[int]], slice]:
        return gathered_rows(prompts)[self._trainer.accelerator.process_index]

    def shared(self, sample: Callable[[], Sampled]) -> Sampled:
        return from_main_process(self._trainer.accelerator, sample)


def use_fake_policy(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[TreePOConfig], PolicyEngine] = FakePolicy
) -> None:
    """Let trainers that are made from now on have this engine."""
    monkeypatch.setattr(treepo_trainer, "policy_engine_for", lambda args, *_: build(args))
