"""
`TreePOTrainer`: how a training step of TRL's `GRPOTrainer` (1.16) goes with trees.

The only file that overrides private methods of `GRPOTrainer`; `tests/trl/test_seams.py` pins their signatures.
What the steps are made of lies in the rooms; TRL's other private names are in `trl/`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl.extras.profiling import profiling_decorator
from trl.trainer.grpo_trainer import GRPOTrainer, RewardFunc
from trl.trainer.utils import get_config_model_id

from .batch import ResumePoint, TrainerTurns, TreeBatch, prompts_of_trees, shuffle_trees, tree_source
from .checkpoints import checkpoint_to_resume, only_training_in
from .engine_choice import policy_engine_for
from .health.callback import HealthCallback
from .model_card import PAPER
from .policy.four_bit_base import write_quantization
from .policy.starting_adapter import adapter_resumed_too, keep_master_weights, match_reference
from .sampling import SegmentTree, TreeSampler, text_decoder
from .sampling.turns import TurnHandler
from .scoring import BatchScoring, check_interruptible
from .settings.arguments import check_arguments, check_tools
from .settings.data import NoStepIsAnError, check_datasets, check_rows, check_tokenizer
from .treepo_config import TreePOConfig
from .trl import seams
from .trl.host import Host, Rows
from .turns import TreeRollout
from .update.filled_rows import Forwarded, forward_filled
from .update.packable import packed_forward_or_none


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


class TreePOTrainer(GRPOTrainer):
    """
    Trainer for TreePO, from [TreePO: Bridging the Gap of Policy Optimization and Efficacy and Inference Efficiency
    with Heuristic Tree-based Modeling](https://huggingface.co/papers/2508.17445).

    [`~trl.GRPOTrainer`] with three changes: in training each prompt's completions grow as a tree of segments, the
    group advantages become tree segment advantages, and shared prefixes are forwarded once per unique token.
    Evaluation samples plain independent completions. Everything else, arguments included, is GRPOTrainer's, but for
    image prompts, which are an error.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from treepo_trl import TreePOConfig, TreePOTrainer
    >>> from trl.rewards import accuracy_reward

    >>> trainer = TreePOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=TreePOConfig(output_dir="Qwen2.5-0.5B-TreePO"),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    # Set by the base classes; their annotations say less than is known here.
    args: TreePOConfig
    model: PreTrainedModel
    num_generations: int

    _tag_names: ClassVar = ["trl", "treepo"]
    _name = "TreePO"
    _paper: ClassVar = PAPER

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: TreePOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: list[Callable[..., object]] | None = None,
        rollout_func: Callable[..., dict[str, Any]] | None = None,
        environment_factory: object = None,
    ) -> None:
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TreePOConfig(f"{model_name.split('/')[-1]}-TreePO")
        check_arguments(args, tools, rollout_func, environment_factory)
        check_datasets(args, type(self), TreePOTrainer, train_dataset, eval_dataset, bool(environment_factory))
        self.policy_engine = policy_engine_for(args, model, peft_config)
        with self.policy_engine.construction():
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=[*(callbacks or []), NoStepIsAnError(), HealthCallback()],
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=cast(Any, tools),
                rollout_func=None if rollout_func is None else TreeRollout(rollout_func, self._take_rollout),
                environment_factory=cast(Any, environment_factory),
            )
        match_reference(self.model)
        check_tokenizer(self)
        check_tools(self)
        if args.fp16:
            keep_master_weights(self.model)
        if self.accelerator.device.type == "cpu":
            args.dataloader_pin_memory = False  # there is nothing to pin it for, and torch would say so
        host = self._host = Host(self)
        self.policy_engine.connect(host)
        decode = text_decoder(self._tokenizer)
        self.sampler = TreeSampler(self.policy_engine.engine, args, self.eos_token_ids, decode)
        self._turns = TrainerTurns(host)
        self._source = tree_source(host, self.sampler, self.policy_engine, self._turns)
        self._scoring = BatchScoring(host, self._source, self._turns, self.policy_engine, decode)
        self.packed_forward = packed_forward_or_none(self.model, args, self.accelerator, self.aux_loss_enabled)
        self._batch = self._before_first()  # under way, or the last one: GRPOTrainer's methods cannot hand it on
        self._resume_point = ResumePoint(host, self._source)
        self.add_callback(self._resume_point)

    # A training from its start or a checkpoint

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Train as [`~transformers.Trainer`] does; `True` resumes from the newest checkpoint that is intact."""
        args = self.args
        check_interruptible(args.reward_timeout)
        folder = checkpoint_to_resume(resume_from_checkpoint, str(args.output_dir))
        writes = args.save_strategy != "no" or args.enable_jit_checkpoint or args.log_trees
        with only_training_in(str(args.output_dir), writes and self.accelerator.is_main_process):
            self._batch = self._before_first()
            self.policy_engine.training_starts()
            try:
                return super().train(self._resume_point.restore(folder), trial, ignore_keys_for_eval)
            finally:
                self._source.end()

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        with self._resume_point.saved(trial):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with adapter_resumed_too(model or self.model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        write_quantization(self.accelerator.unwrap_model(self.model), output_dir or str(self.args.output_dir))

    # A batch: sampled, scored, its advantages taken from its trees

    def _generate_and_score_completions(self, inputs: Rows) -> dict[str, torch.Tensor]:
        check_rows(self, filter(None, inputs))  # with dynamic sampling they are empty placeholders
        score = super()._generate_and_score_completions
        if not self.model.training:
            return self._scoring.evaluated(inputs, score)
        self._batch = self._batch.next(self.state.global_step)
        return self._scoring.trained_on(self._batch, inputs, score)

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: list[object] | None,
        multimodal_fields: dict[str, object],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        if not self.model.training:
            given = prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            self._source.wait()
            with self.policy_engine.evaluation():
                return super()._generate_single_turn(*given)
        if images is not None:
            raise ValueError("Image prompts are not supported yet by `TreePOTrainer`. Use text prompts.")
        prompts = prompts_of_trees(prompt_ids, num_generations)
        batch = self._open_batch()
        batch.trees = self._source.trees_for(batch, prompts)
        self._turns.sampled(batch)
        completion_ids, logprobs = batch.first_turns()
        return completion_ids, logprobs if self.policy_engine.gives_logprobs else None

    def _tool_call_loop(
        self,
        prompts: list[object],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        completions: list[object],
        logprobs: list[list[float]] | None,
        images: list[object] | None,
        multimodal_fields: dict[str, object],
    ) -> tuple[object, ...]:
        given = prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields
        if not self.model.training:
            return super()._tool_call_loop(*given)
        batch, rows = self._batch, self._turns.rows(self._batch)
        sampled = batch.completion_ids(), None if logprobs is None else batch.logprobs()
        return rows.masks, rows.completions, *sampled, rows.num_calls, rows.num_failures, [[] for _ in rows.masks]

    def sample_trees(self, prompt_ids: list[list[int]], turns: TurnHandler | None = None) -> list[SegmentTree]:
        """
        Sample trees from the current policy, for a `rollout_func`: one per prompt, of `num_generations` leaves.

        Args:
            prompt_ids (`list[list[int]]`):
                Token ids of the prompts, each once.
            turns ([`~treepo_trl.sampling.turns.TurnHandler`], *optional*):
                Answers turns; without it an EOS token ends a path.
        """
        return self._source.sample_for_user(self._open_batch(), prompt_ids, turns)

    def _take_rollout(self, trees: list[SegmentTree]) -> None:
        self._open_batch().adopt(trees)

    def _before_first(self) -> TreeBatch:
        return TreeBatch(-1, self.num_generations, self.eos_token_ids[0])

    def _open_batch(self) -> TreeBatch:
        if not self._batch.is_open:  # a subclass or a user samples on their own
            self._batch = self._batch.next(self.state.global_step)
        return self._batch

    def _calculate_rewards(
        self, inputs: Rows, prompts: list[object], completions: list[object], completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        with self._scoring.watched_functions(self._batch, len(prompts)):
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    # The prompts of an epoch

    def get_train_dataloader(self) -> DataLoader:
        """Data loader of the training; with dynamic sampling, which draws prompts itself, it only counts."""
        dataset = self._source.loader_dataset()
        if dataset is None:
            return self._resume_point.after_epochs(super().get_train_dataloader())
        with seams.train_dataset(self, dataset):
            return super().get_train_dataloader()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Rows], num_batches: int, device: torch.device
    ) -> tuple[list[Rows], torch.Tensor | int | None]:
        return super().get_batch_samples(self._source.look_ahead(epoch_iterator), num_batches, device)

    # The update

    def _prepare_inputs(self, generation_batch: Rows) -> dict[str, torch.Tensor]:
        if self.packed_forward is None:
            return super()._prepare_inputs(generation_batch)
        with seams.row_shuffle(partial(shuffle_trees, num_generations=self.num_generations)):
            return super()._prepare_inputs(generation_batch)

    def compute_loss(
        self, model: torch.nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The loss of [`~trl.GRPOTrainer`], with a KL term that is no smaller for rows that stand for no leaf."""
        with self._scoring.loss_of(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @profiling_decorator
    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal_inputs: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        plain = super()._get_per_token_logps_and_entropies
        wanted = compute_entropy, compute_aux_loss

        def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, batch_size: int | None) -> Forwarded:
            rows = model, input_ids, attention_mask, logits_to_keep
            if self.packed_forward is None or any(value is not None for value in multimodal_inputs.values()):
                return plain(*rows, batch_size, *wanted, **multimodal_inputs)
            found = self.packed_forward(*rows, batch_size or len(input_ids), *wanted, plain)
            self._host.log(found[3], "train" if self.model.training else "eval")
            return found[:3]

        is_filled = self._scoring.is_filled(self._batch, attention_mask[:, -logits_to_keep:])
        found = forward_filled(forward, is_filled, input_ids, attention_mask, batch_size)
        self._scoring.ratio.see(found[0])
        return found
