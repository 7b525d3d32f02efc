"""
A `GRPOTrainer` as the rooms of this package know it: typed, and without its private names.

TRL 1.16 keeps these in attributes that are private or declared as less than they are. `tests/trl/test_seams.py` tests
that TRL still has them.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from trl.chat_template_utils import parse_response
from trl.trainer.grpo_trainer import GRPOTrainer

from treepo_trl.treepo_config import TreePOConfig

from .seams import metrics_aside


Rows = list[dict[str, object]]
"""A row of the dataset for each completion."""


class Host:
    """
    A trainer's settings and state under names of their own.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Whose `args` are a [`TreePOConfig`]. It may be under construction: names are looked up when they are used.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer

    # What never changes

    def gathered(self, own: torch.Tensor) -> torch.Tensor:
        """A tensor of this process with those of all others before and behind it, along the first dimension."""
        return cast(torch.Tensor, self.accelerator.gather(own.to(self.accelerator.device)))

    @property
    def args(self) -> TreePOConfig:
        """Settings of the training."""
        return cast(TreePOConfig, self.trainer.args)

    @property
    def accelerator(self) -> Accelerator:
        """The processes of the training."""
        return self.trainer.accelerator

    @property
    def num_generations(self) -> int:
        """Completions per prompt in training."""
        return cast(int, self.trainer.num_generations)

    @property
    def num_generations_eval(self) -> int:
        """Completions per prompt in evaluation."""
        return cast(int, self.trainer.num_generations_eval)

    @property
    def reward_weights(self) -> torch.Tensor:
        """`(num_reward_funcs,)` on the device of the process."""
        return self.trainer.reward_weights.to(self.accelerator.device)

    @property
    def train_dataset(self) -> Dataset | IterableDataset:
        """Where prompts come from."""
        return cast("Dataset | IterableDataset", self.trainer.train_dataset)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's, also where a processor is around it."""
        return self.trainer._tokenizer

    # The policy

    @property
    def model(self) -> PreTrainedModel:
        """The policy as `GRPOTrainer` holds it; a [`~peft.PeftModel`] for adapters."""
        return cast(PreTrainedModel, self.trainer.model)

    @property
    def wrapped_model(self) -> torch.nn.Module:
        """The policy as it is trained: sharded, or copied to several processes."""
        return cast(torch.nn.Module, self.trainer.model_wrapped)

    @property
    def policy(self) -> PreTrainedModel:
        """The policy without what is wrapped around it to train it."""
        unwrapped = self.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        return cast(PreTrainedModel, unwrapped)

    def whole_parameters(self) -> AbstractContextManager[object]:
        """Context in which FSDP's root holds its parameters whole."""
        return self.trainer._dist.summon_full_params(self.trainer.model_wrapped, recurse=False)

    # Where the training is

    @property
    def state(self) -> TrainerState:
        """Of the training that runs: each has another."""
        return self.trainer.state

    @property
    def micro_steps(self) -> int:
        """Micro-batches so far, also of the optimizer step that is under way."""
        return cast(int, self.trainer._step)

    @micro_steps.setter
    def micro_steps(self, value: int) -> None:
        self.trainer._step = value

    @property
    def buffered_rows(self) -> list[dict[str, torch.Tensor]] | None:
        """Micro-batches of the generation batch that is under way; `None` before the first."""
        return cast("list[dict[str, torch.Tensor]] | None", self.trainer._buffered_inputs)

    @buffered_rows.setter
    def buffered_rows(self, value: list[dict[str, torch.Tensor]] | None) -> None:
        self.trainer._buffered_inputs = value

    @property
    def is_loaded(self) -> bool:
        """Whether the engine has been given the policy of this global step."""
        return self.state.global_step == self.trainer._last_loaded_step

    @is_loaded.setter
    def is_loaded(self, value: bool) -> None:
        self.trainer._last_loaded_step = self.state.global_step if value else -1

    def checkpoint_parent(self, trial: object) -> str:
        """Folder that checkpoints are written below."""
        return self.trainer._get_output_dir(trial)

    # Logs

    def log(self, metrics: Mapping[str, float | Iterable[float]], mode: Literal["train", "eval"] = "train") -> None:
        """Let the next log have the mean of these values and others of the same name."""
        for name, values in metrics.items():
            self.trainer._metrics[mode][name].extend([values] if isinstance(values, int | float) else values)

    def log_again(self, metrics: Mapping[str, float]) -> None:
        """Put these values in place of those that were logged last, in training."""
        for name, value in metrics.items():
            self.trainer._metrics["train"][name][-1] = value

    def last_logged(self, name: str) -> float | None:
        """The value that was logged last under a name in training, if there is one."""
        return next(reversed(self.trainer._metrics["train"][name]), None)

    def count_tokens(self, number: int) -> None:
        """Add to the tokens that the training has seen."""
        self.state.num_input_tokens_seen += number
        self.trainer._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]

    def forget_rows(self, is_forgotten: Sequence[bool]) -> None:
        """Take rows out of the table of completions, among as many rows of all processes that it has last."""
        logs = self.trainer._logs
        for column in (
            logs["prompt"],
            logs["completion"],
            logs["advantages"],
            *logs["rewards"].values(),
            *logs["extra"].values(),
        ):
            last = [column.pop() for _ in range(min(len(is_forgotten), len(column)))][::-1]
            flags = is_forgotten[len(is_forgotten) - len(last) :]
            column.extend(value for value, forgotten in zip(last, flags, strict=True) if not forgotten)

    @property
    def extra_columns(self) -> dict[str, list[object]]:
        """Columns that reward functions have logged about the completions under way."""
        return cast("dict[str, list[object]]", self.trainer._pending_extra_logs)

    def log_advantages(self, advantages: torch.Tensor) -> None:
        """Log these advantages of all processes' rows in place of those that TRL has logged for them."""
        column = self.trainer._logs["advantages"]  # which holds a certain number at most
        values = advantages.tolist()
        for _ in range(min(len(values), len(column))):
            column.pop()
        column.extend(values)

    def forget_window(self) -> None:
        """Drop what is collected for the next log: an error leaves that of the accumulation window it came in."""
        trainer = self.trainer
        for collected in (*trainer._metrics.values(), *trainer._logs.values()):
            collected.clear()
        trainer._pending_metrics.clear()
        trainer._pending_extra_logs.clear()
        trainer._entropy_window_stats = None
        trainer._current_train_step_time = 0.0

    # Prompts, completions, rewards

    def collated(self, examples: list[dict[str, object]]) -> Rows:
        """Examples as the data loader gives them, on the device; they are not shared with those given."""
        trainer = self.trainer
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")
        return cast(Rows, send_to_device(collate(copy.deepcopy(examples)), self.accelerator.device))

    def tokenized(self, prompts: Sequence[object]) -> list[list[int]]:
        """Token ids of prompts, which are text."""
        prompt_ids, _, _ = self.trainer._tokenize_prompts(list(prompts))
        return prompt_ids

    def generated(self, prompts: list[object]) -> tuple[list[list[int]], list[object]]:
        """Token ids of completions, and the completions as reward functions take them; no metric is logged of them."""
        with metrics_aside(self.trainer):
            _, completion_ids, _, completions, *_ = self.trainer._generate(prompts)
        return completion_ids, list(completions)

    def rewards(
        self, rows: Rows, prompts: list[object], completions: list[object], completion_ids: list[list[int]]
    ) -> torch.Tensor:
        """`(rows of all processes, num_reward_funcs)`: what `GRPOTrainer` takes as rewards."""
        return self.trainer._calculate_rewards(rows, prompts, completions, completion_ids)

    # Tools and environments

    @property
    def standalone_tools(self) -> list[Callable[..., Any]]:
        """Tools that are no methods of an environment."""
        return cast("list[Callable[..., Any]]", self.trainer._standalone_tools)

    @property
    def environment_factories(self) -> Mapping[str | None, Callable[[], Any]]:
        """What makes environments, by the name in the column `environment`; `None` where there is one kind."""
        return cast("Mapping[str | None, Callable[[], Any]]", self.trainer.environment_factories or {})

    def idle_environments(self, name: str | None) -> list[Any]:
        """Environments that `GRPOTrainer` has made."""
        return cast("list[Any]", self.trainer._environment_pool[name])

    @property
    def has_several_environments(self) -> bool:
        """Whether a row names its environment."""
        return self.trainer._multi_environment

    @property
    def row_environments(self) -> list[Any]:
        """Environment of each row under way, which reward functions are given."""
        return cast("list[Any]", self.trainer.environments)

    @row_environments.setter
    def row_environments(self, environments: list[Any] | None) -> None:
        self.trainer.environments = environments

    @property
    def row_environment_names(self) -> list[str | None]:
        """Name of each row's environment, whose tools its prompt is rendered with."""
        return cast("list[str | None]", self.trainer._batch_environments)

    @row_environment_names.setter
    def row_environment_names(self, names: list[str | None]) -> None:
        self.trainer._batch_environments = names

    def tools(self, environment: str | None = None, is_in_environment: bool = False) -> list[Callable[..., Any]]:
        """What a prompt names as tools: those of its environment, or those that all have."""
        return self.trainer._env_tools[environment] if is_in_environment else self.trainer.tools

    def parsed(self, token_ids: list[int], before: list[int], tools: Sequence[Any]) -> Any:
        """A turn's tokens as the model's message; knows which tools the prompt has named."""
        return parse_response(self.tokenizer, token_ids, before, list(tools))

    def tool_suffix_ids(self, messages: list[Any]) -> list[int]:
        """Tokens of tools' answers, as the chat template puts them behind a turn."""
        return self.trainer._get_tool_suffix_ids(messages)


def tokenizes_as_trl(trainer: GRPOTrainer) -> bool:
    """Whether no subclass tokenizes prompts in a way of its own."""
    return type(trainer)._tokenize_prompts is GRPOTrainer._tokenize_prompts
