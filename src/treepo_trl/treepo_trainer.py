"""
`TreePOTrainer`: how a training step of TRL's `GRPOTrainer` (1.16) goes with trees.

The only file that overrides private methods of `GRPOTrainer`; `tests/trainer/test_trl_seams.py` pins their signatures.
What the steps are made of lies in the rooms; what TRL has no argument for is replaced in `trl_seams`.
"""

import textwrap
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl.extras.profiling import profiling_decorator
from trl.trainer.grpo_trainer import GRPOTrainer, RewardFunc
from trl.trainer.utils import get_config_model_id

from . import trl_seams
from .checkpoints import checkpoint_to_resume, only_training_in
from .checks import NoStepIsAnError, check_arguments, check_datasets, check_rows, check_tokenizer
from .dynamic_sampling import DynamicSampling, Rows, forget_stream
from .metrics import reduce_totals, replace_last, tree_metrics, tree_totals
from .policy.engine import policy_engine_for
from .resume_point import ResumePoint
from .reward_watch import RewardWatch
from .sampling import SegmentTree, TreeSampler, text_decoder
from .tree_batch import TreeBatch, shuffle_trees
from .tree_log import write_trees
from .treepo_config import TreePOConfig
from .update.packable import packed_forward_for
from .update.packed_forward import PackedForward
from .width_schedule import WidthSchedule


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


logger = get_logger(__name__)


class TreePOTrainer(GRPOTrainer):
    """
    Trainer for TreePO, from [TreePO: Bridging the Gap of Policy Optimization and Efficacy and Inference Efficiency
    with Heuristic Tree-based Modeling](https://huggingface.co/papers/2508.17445).

    [`~trl.GRPOTrainer`] with three changes: in training each prompt's completions grow as a tree of segments, the
    group advantages become tree segment advantages, and shared prefixes are forwarded once per unique token.
    Evaluation samples plain independent completions. Everything else, arguments included, is GRPOTrainer's.

    Not supported yet, with an error at construction: tools, environments, `rollout_func`, image prompts and vLLM
    server mode.

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
    _paper: ClassVar = {
        "title": "TreePO: Bridging the Gap of Policy Optimization and Efficacy and Inference Efficiency with "
        "Heuristic Tree-based Modeling",
        "id": "2508.17445",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{li2025treepo,
                title        = {{TreePO: Bridging the Gap of Policy Optimization and Efficacy and Inference Efficiency
                                with Heuristic Tree-based Modeling}},
                author       = {Yizhi Li and others},
                year         = 2025,
                eprint       = {arXiv:2508.17445},
            }"""),
    }

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
        rollout_func: Callable[..., object] | None = None,
        environment_factory: object = None,
    ) -> None:
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TreePOConfig(f"{model_name.split('/')[-1]}-TreePO")
        check_arguments(args, tools, rollout_func, environment_factory)
        check_datasets(args, type(self), TreePOTrainer, train_dataset, eval_dataset)
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
                callbacks=[*(callbacks or []), NoStepIsAnError()],
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        check_tokenizer(self)
        self._reward_watch = RewardWatch(self)
        self.policy_engine.connect(self)
        self._decode = text_decoder(self._tokenizer)
        self.sampler = TreeSampler(self.policy_engine.engine, args, self.eos_token_ids, self._decode)
        self._width_schedule = WidthSchedule(args)
        self.dynamic_sampling = DynamicSampling(self, self._sample) if args.dynamic_sampling_rounds > 0 else None
        self._packed_forward = self._build_packed_forward()
        self._batch = TreeBatch(step=-1)  # under way, or the last one: GRPOTrainer's methods cannot hand it on
        self._resume_point = ResumePoint(self)
        self.add_callback(self._resume_point)

    def _build_packed_forward(self) -> PackedForward | None:
        packed = packed_forward_for(self.model, self.args, self.accelerator, self.aux_loss_enabled)
        if isinstance(packed, str):
            logger.warning(f"{packed} Training forwards plain rows, as GRPOTrainer does.")
            return None
        return packed

    # A training from its start or a checkpoint

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Train as [`~transformers.Trainer`] does; `True` resumes from the newest checkpoint that is intact."""
        args = self.args
        folder = checkpoint_to_resume(resume_from_checkpoint, str(args.output_dir))
        writes = args.save_strategy != "no" or args.enable_jit_checkpoint or args.log_trees
        with only_training_in(str(args.output_dir), writes and self.accelerator.is_main_process):
            self._batch = TreeBatch(step=-1)
            return super().train(self._resume_point.restore(folder), trial, ignore_keys_for_eval)

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        with self._resume_point.saved(trial):
            super()._save_checkpoint(model, trial)

    # A batch: sampled, scored, its advantages taken from its trees

    def _generate_and_score_completions(self, inputs: Rows) -> dict[str, torch.Tensor]:
        check_rows(self, filter(None, inputs))  # with dynamic sampling they are empty placeholders
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        batch, calculated = self._batch.next(self.state.global_step), trl_seams.calculated_rewards
        self._batch = batch
        with batch.opened(), calculated(self, self._reward_watch.usable), calculated(self, batch.keeping_rewards):
            if self.dynamic_sampling is None:
                forget_stream(self.state)
            else:
                inputs = self.dynamic_sampling.fill(batch, len(inputs) // self.num_generations)
            output = super()._generate_and_score_completions(inputs)
        rewards, divisors = batch.combined_rewards(self)
        self._log_metrics(batch, rewards / divisors)
        if self.args.advantage_estimator != "grpo" or self.args.weights_leaves:
            output["advantages"] = batch.advantages(rewards, divisors, self.args, output["completion_ids"].size(1))
            means = self.accelerator.gather(batch.mean_advantages(output["advantages"]))
            replace_last(self._logs["advantages"], cast(torch.Tensor, means).tolist())
        if self.args.log_trees:
            records = gather_object(batch.records(rewards, output["advantages"], self._decode))
            if self.accelerator.is_main_process:
                write_trees(records, str(self.args.output_dir), batch.step, is_first=batch.number == 0)
        return output

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: list[object] | None,
        multimodal_fields: dict[str, object],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        if not self.model.training:
            with self.policy_engine.evaluation():
                return super()._generate_single_turn(
                    prompt_ids, images, multimodal_fields, num_generations, has_tool_images=has_tool_images
                )
        if images is not None:
            raise ValueError("Image prompts are not supported yet by `TreePOTrainer`. Use text prompts.")
        prompts = prompt_ids[::num_generations]
        if any(ids != prompts[i // num_generations] for i, ids in enumerate(prompt_ids)):
            raise RuntimeError("A group of `num_generations` rows holds different prompts: a tree has only one.")
        if not self._batch.is_open:  # a subclass samples for itself
            self._batch = self._batch.next(self.state.global_step)
        batch = self._batch
        batch.take(lambda: self._sample(batch, prompts))
        return batch.completion_ids(), batch.logprobs() if self.policy_engine.gives_logprobs else None

    def _sample(self, batch: TreeBatch, prompts: list[list[int]], round_number: int = 0) -> list[SegmentTree]:
        """Sample the trees of this process's prompts, together with those of processes that share its engine."""
        num_processes = self.policy_engine.processes_per_engine
        seed = f"{self.args.seed}/{batch.name}/{self.accelerator.process_index // num_processes}"
        seed += f"/{round_number}" if round_number > 0 else ""
        prompts, own = self.policy_engine.gather(prompts)
        with self.policy_engine.ready(seed):
            trees = self.sampler.sample(
                prompts,
                seed,
                progress=self.state.global_step / max(self.state.max_steps, 1),
                expected_length=self._width_schedule.expected_length(self.state),
                widths=self._width_schedule.widths(self.state),
            )[own]
        batch.totals.append(tree_totals(trees, self.sampler.stats, num_processes))
        return trees

    def _calculate_rewards(
        self, inputs: Rows, prompts: list[object], completions: list[object], completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        with trl_seams.reward_funcs(self, self._reward_watch.functions(len(prompts))):
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    # Dynamic sampling

    def get_train_dataloader(self) -> DataLoader:
        """Data loader of the training; with dynamic sampling, which draws prompts itself, it only counts."""
        if self.dynamic_sampling is None:
            return self._resume_point.after_epochs(super().get_train_dataloader())
        with trl_seams.train_dataset(self, self.dynamic_sampling.placeholders()):
            return super().get_train_dataloader()

    # The update

    def _prepare_inputs(self, generation_batch: Rows) -> dict[str, torch.Tensor]:
        if self._packed_forward is None:
            return super()._prepare_inputs(generation_batch)
        with trl_seams.row_shuffle(partial(shuffle_trees, num_generations=self.num_generations)):
            return super()._prepare_inputs(generation_batch)

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
        rows, wanted = (model, input_ids, attention_mask, logits_to_keep), (compute_entropy, compute_aux_loss)
        if self._packed_forward is None or any(value is not None for value in multimodal_inputs.values()):
            return plain(*rows, batch_size, *wanted, **multimodal_inputs)
        logps, entropies, aux_loss, log = self._packed_forward(*rows, batch_size or len(input_ids), *wanted, plain)
        for name, values in log.items():
            self._metrics["train" if self.model.training else "eval"][name].extend(values)
        return logps, entropies, aux_loss

    def _log_metrics(self, batch: TreeBatch, scaled_rewards: torch.Tensor) -> None:
        """Log what the batch has cost and shown; tell how far the engine was from the policy."""
        logged = self._metrics["train"]
        totals = reduce_totals(batch.summed_totals(), self.accelerator)
        metrics = tree_metrics(totals)
        if self.dynamic_sampling is not None:
            metrics["dynamic_sampling/discarded_tokens"] = totals["unique_tokens"] - totals["kept_tokens"]
        learn = partial(self._width_schedule.learn, self.state, metrics["tree/mean_length"], batch.trees)
        for name, value in (metrics | learn(scaled_rewards, self.accelerator)).items():
            logged[name].append(value)
        self.policy_engine.compare(logged.get("sampling/sampling_logp_difference/mean", []))
