"""
`TreePOTrainer`: wiring between TRL's `GRPOTrainer`, the sampler, the advantages, the packed forward and the engines.

The only file that overrides private methods of TRL (1.16): `_generate_single_turn`, `_generate_and_score_completions`,
`_get_per_token_logps_and_entropies`, `_prepare_inputs` and `_save_checkpoint`.
`tests/test_trl_seams.py` pins their signatures.
"""

import copy
import json
import os
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model, send_to_device
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl.extras.profiling import profiling_context, profiling_decorator
from trl.models.utils import unwrap_model_for_generation
from trl.trainer import grpo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer, RewardFunc
from trl.trainer.utils import get_config_model_id

from .checks import (
    check_arguments,
    check_datasets,
    check_dynamic_sampling,
    check_engine_weights,
    check_packing,
)
from .dynamic_sampling import (
    Candidate,
    DynamicBatch,
    EndlessPlaceholders,
    Placeholders,
    PromptStream,
    fill_batch,
    without_signal,
)
from .engines import SamplingOptions
from .logs import add_totals, reduce_totals, tree_metrics, tree_totals
from .model_support import why_not_packable
from .policy.adapter_sync import AdapterVLLMGeneration, awake, check_adapter, gather_prompts, replaced, same_draws
from .sampling.sampler import TreeSampler
from .sampling.tree import SegmentTree
from .treepo_config import TreePOConfig
from .update.advantages import depth_first_weights, expand_to_tokens, leaf_paths, tree_advantages
from .update.packed_forward import PackedForward
from .update.rewards import combine_rewards
from .update.tree_attention import why_no_trees


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


logger = get_logger(__name__)

# Keys in the trainer's state, which checkpoints save.
_EXPECTED_LENGTH = "treepo_expected_length"  # mean completion of the last batch, in tokens
_PROMPTS_DRAWN = "treepo_prompts_drawn"  # pass over the dataset and examples of it that dynamic sampling has drawn


_LARGE_DIFFERENCE = 0.1  # nats per token; bfloat16 rounding was seen to give 0.04, a quantized base 0.7


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
    generation_kwargs: Any
    model: Any
    accelerator: Any
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
        tools: list[Callable] | None = None,
        rollout_func: Callable[..., Any] | None = None,
        environment_factory: Any | None = None,
    ) -> None:
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TreePOConfig(f"{model_name.split('/')[-1]}-TreePO")
        check_arguments(args, tools, rollout_func, environment_factory)
        check_dynamic_sampling(args, type(self), TreePOTrainer)
        check_datasets(train_dataset, eval_dataset)
        uses_adapter_sync = bool(
            args.use_vllm
            and args.vllm_lora_sync == "adapter"
            and (peft_config is not None or (not isinstance(model, str) and is_peft_model(model)))
        )
        if uses_adapter_sync:
            wrapped: Any = model
            check_adapter(peft_config if peft_config is not None else wrapped.peft_config[wrapped.active_adapter])
        check_engine_weights(args, uses_adapter_sync)
        vllm_generation: Any = grpo_trainer.VLLMGeneration
        if uses_adapter_sync:
            vllm_generation = partial(
                AdapterVLLMGeneration,
                base_weights=args.vllm_base_weights,
                share_base_weights=args.vllm_share_base_weights,
                sleep_keeps_weights=args.vllm_sleep_keeps_weights,
            )
        with replaced(grpo_trainer, "VLLMGeneration", vllm_generation):
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        self._engine = self._build_engine()
        self.sampler = TreeSampler(self._engine, args, self.eos_token_ids, self._decode)
        self._trees: list[SegmentTree] = []
        self._totals: list[dict[str, float]] = []  # of the samplings since the last log
        self._given_trees: list[SegmentTree] | None = None  # to take instead of sampling, in dynamic sampling
        self._given_rewards: torch.Tensor | None = None
        self._stream: PromptStream | None = None
        self._stream_state: Any = None  # state of the training that the stream belongs to
        self._batch_start = (0, 0)  # the stream's position before the last batch
        self._prepared_at = -1  # global step of the last inputs: behind once they have moved the policy
        self._rewards_per_func: torch.Tensor | None = None
        self._sampled_at = (-1, 0)  # global step of the last generation batch and how many it has seen
        self._has_compared = False  # the engine's log-probabilities with the policy's
        self._num_evaluated = 0  # batches of completions that were sampled in evaluation
        self._processes_per_engine = args.vllm_tensor_parallel_size if args.use_vllm else 1
        self._packed_forward = self._build_packed_forward()

    # Sampling

    def _build_engine(self) -> Any:
        with_entropies = self.args.branching_policy == "entropy"
        if self.use_vllm:
            from .engines.vllm import VLLMEngine

            return VLLMEngine(
                self.vllm_generation.llm,
                self.eos_token_ids,
                self._sampling_options(),
                self._generation_kwargs(),
                with_entropies=with_entropies,
            )
        from .engines.transformers import TransformersEngine

        return TransformersEngine(
            self.accelerator.unwrap_model(self.model),
            self.eos_token_ids,
            self._sampling_options(),
            with_entropies=with_entropies,
        )

    def _sampling_options(self) -> SamplingOptions:
        options = {field.name: getattr(self.args, field.name) for field in fields(SamplingOptions)}
        if not self.use_vllm:
            options |= self._generation_kwargs()
        return SamplingOptions(**options)

    def _generation_kwargs(self) -> dict[str, Any]:
        kwargs: Any = self.args.generation_kwargs or {}  # a string only before the config has parsed it
        return dict(kwargs)

    def _decode(self, token_ids: list[int]) -> str:
        # Cleaning up would take characters away again that earlier segments have shown.
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        if not self.model.training:
            with self._same_draws_in_evaluation():
                return super()._generate_single_turn(
                    prompt_ids, images, multimodal_fields, num_generations, has_tool_images=has_tool_images
                )
        if images is not None:
            raise ValueError("Image prompts are not supported yet by `TreePOTrainer`. Use text prompts.")
        prompts = prompt_ids[::num_generations]
        if any(ids != prompts[i // num_generations] for i, ids in enumerate(prompt_ids)):
            raise RuntimeError("A group of `num_generations` rows holds different prompts: a tree has only one.")
        if self._given_trees is None:
            self._start_batch()
            self._trees = self._sample(prompts)
        else:
            self._trees = self._given_trees
        leaves = [(tree, leaf) for tree in self._trees for leaf in tree.depth_first_leaves()]
        completion_ids = [tree.completion_ids(leaf) for tree, leaf in leaves]
        # Like GRPOTrainer's own sampling with transformers, which gives none: the policy itself has sampled.
        logprobs = [tree.logprobs(leaf) for tree, leaf in leaves] if self.use_vllm else None
        return completion_ids, logprobs

    def _same_draws_in_evaluation(self) -> Any:
        """Context in which ranks that share an engine draw alike; nothing for an engine per process."""
        if not self.use_vllm:
            return nullcontext()
        self._num_evaluated += 1
        return same_draws(self.vllm_generation, f"{self.args.seed}/evaluation/{self._num_evaluated}")

    def _start_batch(self) -> None:
        step, count = self._sampled_at
        self._sampled_at = (self.state.global_step, count + 1 if step == self.state.global_step else 0)

    def _sample(self, prompts: list[list[int]], round_number: int = 0) -> list[SegmentTree]:
        """Sample the trees of this process's prompts; of all its prompts where a group of processes has one engine."""
        group = self.accelerator.process_index // self._processes_per_engine
        seed = f"{self.args.seed}/{self.state.global_step}/{self._sampled_at[1]}/{group}"
        if round_number > 0:
            seed += f"/{round_number}"
        own = slice(0, len(prompts))
        if self.use_vllm:
            prompts, own = gather_prompts(self.vllm_generation, prompts)
        saved: Any = self.state.stateful_callbacks
        with self._engine_ready(seed):
            trees = self.sampler.sample(
                prompts,
                seed,
                progress=self.state.global_step / max(self.state.max_steps, 1),
                expected_length=saved.get(_EXPECTED_LENGTH),
            )
        self._totals.append(tree_totals(trees[own], self.sampler.stats, self._processes_per_engine))
        return trees[own]

    def _engine_ready(self, seed: str) -> Any:
        """Context in which the engine samples from the current policy."""
        return self._vllm_ready(seed) if self.use_vllm else self._transformers_ready()

    @contextmanager
    def _vllm_ready(self, seed: str) -> Iterator[None]:
        if self.state.global_step != self._last_loaded_step:
            with profiling_context(self, "sync_weights"):
                self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        generation = self.vllm_generation
        with awake(generation), same_draws(generation, seed), profiling_context(self, "vLLM.generate"):
            if isinstance(self.vllm_generation, AdapterVLLMGeneration):
                self._engine.lora_request = self.vllm_generation.llm.lora_request
            yield

    @contextmanager
    def _transformers_ready(self) -> Iterator[None]:
        with (
            profiling_context(self, "transformers.generate"),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,  # pyright: ignore[reportArgumentType]
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            self._engine.model = model
            model.eval()  # dropout off, as in vLLM
            try:
                yield
            finally:
                self._engine.reset_prefix_cache()
                model.train()

    # Rewards and advantages

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._totals.clear()  # what a sampling that failed has left
        try:
            if self.args.dynamic_sampling_rounds > 0:
                inputs = self._sample_dynamically(len(inputs) // self.num_generations)
            # Put around the method from outside: a subclass may shape rewards in an override of it.
            with replaced(self, "_calculate_rewards", self._recording_rewards(self._calculate_rewards)):
                output = super()._generate_and_score_completions(inputs)
        finally:
            self._given_trees = self._given_rewards = None
        self._log_tree_metrics()
        if self.use_vllm and not self._has_compared:
            self._compare_with_engine()
        num_completions, num_tokens = output["completion_ids"].shape
        local = slice(
            self.accelerator.process_index * num_completions, (self.accelerator.process_index + 1) * num_completions
        )
        assert self._rewards_per_func is not None, "GRPOTrainer scores every completion"
        rewards, divisors = combine_rewards(
            _finite(self._rewards_per_func),
            self.reward_weights.to(self.accelerator.device),
            self.num_generations,
            self.multi_objective_aggregation,
            self.scale_rewards,
        )
        rewards = rewards[local]
        if self.args.advantage_estimator != "grpo" or self.args.leaf_weighting != "uniform":
            output["advantages"] = self._tree_advantages(rewards, divisors[local], num_tokens)
            self._replace_logged_advantages(output)
        if self.args.log_trees:
            self._write_trees(rewards.tolist(), output)
        return output

    def _compare_with_engine(self) -> None:
        """Warn if the engine did not compute the policy in the first batch; TRL logs the difference of each."""
        self._has_compared = True
        differences = self._metrics["train"].get("sampling/sampling_logp_difference/mean", [])
        if differences and differences[-1] > _LARGE_DIFFERENCE:
            logger.warning(
                f"vLLM's log-probabilities of the first batch differ from the policy's by {differences[-1]:.3f} nats "
                "on average, far more than rounding: the engine does not compute the policy. With a quantized model "
                "see `vllm_base_weights`; else compare the model's revision and dtype in both."
            )

    def _recording_rewards(self, calculate_rewards: Any) -> Any:
        """`calculate_rewards` that keeps its result, and gives the rewards that dynamic sampling has already."""

        def record(*args: Any, **kwargs: Any) -> torch.Tensor:
            rewards = self._given_rewards
            if rewards is None:
                rewards = calculate_rewards(*args, **kwargs)
            self._rewards_per_func = rewards
            return rewards

        return record

    def _tree_advantages(self, rewards: torch.Tensor, divisors: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Advantages `(num_completions, num_tokens)` of this process's completions, scaled."""
        # Small tensors and a few dozen operations: not on the device.
        shape = (len(self._trees), self.num_generations)
        ids, lengths = leaf_paths(self._trees)
        weights = None
        if self.args.leaf_weighting == "inverse_branching":
            weights = torch.tensor([depth_first_weights(tree) for tree in self._trees])
        advantages = tree_advantages(
            rewards.cpu().view(shape),
            ids,
            self.args.advantage_estimator,
            subgroup_rejection=self.args.subgroup_rejection,
            leaf_weights=weights,
        )
        if weights is not None:  # the loss averages over leaves, so a weight of 1/W is neutral
            advantages = advantages * (weights * self.num_generations)[:, :, None]
        advantages = advantages / torch.nan_to_num(divisors.cpu().view(*shape, 1), nan=1.0)
        return expand_to_tokens(advantages, lengths, num_tokens).to(rewards.device)

    def _replace_logged_advantages(self, output: dict[str, Any]) -> None:
        """Put each completion's mean advantage over its tokens where GRPOTrainer has logged the group advantages."""
        # Not the completion mask: TRL clears it for truncated completions, whose advantage is logged all the same.
        ends = [tree.nodes[leaf].end for tree in self._trees for leaf in tree.depth_first_leaves()]
        means = output["advantages"].sum(1) / torch.tensor(ends, device=output["advantages"].device)
        values = self.accelerator.gather(means).tolist()
        logged = self._logs["advantages"]
        for _ in range(min(len(values), len(logged))):
            logged.pop()
        logged.extend(values)

    # Dynamic sampling

    def _sample_dynamically(self, num_prompts: int) -> list[dict[str, Any]]:
        """
        Fill this process's batch and keep its trees and rewards for `GRPOTrainer`, which handles and logs them once.

        Returns the rows, as the data loader would give them.
        """
        stream = self._prompt_stream()
        self._batch_start = stream.position
        self._start_batch()
        self._pending_extra_logs.clear()  # of a batch that failed
        weights = self.reward_weights.to(self.accelerator.device)
        batch = fill_batch(
            stream,
            num_prompts,
            self.args.dynamic_sampling_rounds,
            self._score_candidates,
            lambda rewards: without_signal(_finite(rewards), weights, self.multi_objective_aggregation),
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        saved: Any = self.state.stateful_callbacks
        saved[_PROMPTS_DRAWN] = stream.position
        self._given_trees = [candidate.tree for candidate in batch.candidates if candidate.tree is not None]
        self._given_rewards = batch.rewards
        for column in {column: None for candidate in batch.candidates for column in candidate.extra}:
            for candidate in batch.candidates:
                self._pending_extra_logs[column] += candidate.extra.get(column, [None] * self.num_generations)
        self._log_dynamic_sampling(batch)
        return self._rows(batch.candidates)

    def _prompt_stream(self) -> PromptStream:
        """The stream of this training, at the position of the checkpoint that it resumes."""
        if self._stream is None or self._stream_state is not self.state:
            saved: Any = self.state.stateful_callbacks
            position = None if self.args.ignore_data_skip else saved.get(_PROMPTS_DRAWN)  # JSON makes lists of tuples
            if position is None and self.state.global_step > 0 and not self.args.ignore_data_skip:
                logger.warning(
                    "The checkpoint comes from a training without `dynamic_sampling_rounds`: it does not say which "
                    "prompts that has drawn, so they are drawn from the start of the dataset."
                )
            dataset: Any = self.train_dataset
            number, row = position or (0, 0)
            self._stream = PromptStream(dataset, bool(self.shuffle_dataset), self.args.seed, (number, row))
            self._stream_state = self.state
        return self._stream

    def _rows(self, candidates: list[Candidate]) -> list[dict[str, Any]]:
        """A row for each completion, of its own: reward functions may change what they are given."""
        collate: Any = self._get_collator_with_removed_columns(self.data_collator, description="training")
        examples = [candidate.example for candidate in candidates for _ in range(self.num_generations)]
        rows: Any = send_to_device(collate(copy.deepcopy(examples)), self.accelerator.device)
        return rows

    def _score_candidates(self, candidates: list[Candidate], round_number: int) -> torch.Tensor:
        """Rewards of all processes' candidates; see [`fill_batch`]. Logs nothing, as most may yet be replaced."""
        missing = [candidate for candidate in candidates if candidate.tree is None]
        prompt_ids: list[list[int]] = []
        if missing:
            prompt_ids, _, _ = self._tokenize_prompts([candidate.example["prompt"] for candidate in missing])
        # Also without any: processes that share an engine sample together.
        for candidate, tree in zip(missing, self._sample(prompt_ids, round_number), strict=True):
            candidate.tree = tree
        self._given_trees = [candidate.tree for candidate in candidates if candidate.tree is not None]
        rows = self._rows(candidates)
        prompts = [row["prompt"] for row in rows]
        num_tokens_seen = self.state.num_input_tokens_seen
        with replaced(self, "_metrics", {"train": defaultdict(list)}):
            _, completion_ids, _, completions, *_ = self._generate(prompts)
        rewards = self._calculate_rewards(rows, prompts, completions, completion_ids)
        self.state.num_input_tokens_seen = num_tokens_seen
        for column, values in self._pending_extra_logs.items():
            for i, candidate in enumerate(candidates):
                if candidate in missing:  # the others are scored for company, their rewards are there
                    candidate.extra[column] = values[i * self.num_generations : (i + 1) * self.num_generations]
        self._pending_extra_logs.clear()
        return rewards.view(self.accelerator.num_processes, len(candidates), self.num_generations, -1)

    def _log_dynamic_sampling(self, batch: DynamicBatch) -> None:
        metrics = self._metrics["train"]
        metrics["dynamic_sampling/rounds"].append(batch.num_rounds)
        metrics["dynamic_sampling/replaced_prompts"].append(batch.num_replaced)
        metrics["dynamic_sampling/frac_without_signal"].append(batch.frac_without_signal)
        metrics["dynamic_sampling/reward"].append(batch.mean_reward)

    def get_train_dataloader(self) -> DataLoader:
        """Data loader of the training; with dynamic sampling, which draws prompts itself, it only counts."""
        if self.args.dynamic_sampling_rounds == 0:
            return super().get_train_dataloader()
        dataset: Any = self.train_dataset
        is_endless = isinstance(dataset, IterableDataset)
        with replaced(self, "train_dataset", EndlessPlaceholders() if is_endless else Placeholders(len(dataset))):
            return super().get_train_dataloader()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        saved: Any = self.state.stateful_callbacks
        if self.args.dynamic_sampling_rounds == 0:
            saved.pop(_PROMPTS_DRAWN, None)  # of an earlier part of the training; since then others were drawn
        drawn = saved.get(_PROMPTS_DRAWN)
        is_last = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        if drawn is None or (is_last and self.state.global_step > self._prepared_at):
            super()._save_checkpoint(model, trial)
            return
        # Completions are not saved: a resumed training samples the batch that is under way again.
        saved[_PROMPTS_DRAWN] = self._batch_start
        try:
            super()._save_checkpoint(model, trial)
        finally:
            saved[_PROMPTS_DRAWN] = drawn

    # Update

    @profiling_decorator
    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal_inputs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        plain = super()._get_per_token_logps_and_entropies
        if self._packed_forward is None or any(value is not None for value in multimodal_inputs.values()):
            return plain(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal_inputs,
            )
        logps, entropies, aux_loss, log = self._packed_forward(
            model,
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size or len(input_ids),
            compute_entropy,
            compute_aux_loss,
            plain,
        )
        for name, values in log.items():
            self._metrics["train" if self.model.training else "eval"][name].extend(values)
        return logps, entropies, aux_loss

    def _build_packed_forward(self) -> PackedForward | None:
        if self.args.tree_packing == "off":
            return None
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        config = base.config.get_text_config()
        reason = self._why_not_packed(base)
        if reason is None:
            check_packing(self.args, config, self.accelerator, is_sharded, self.aux_loss_enabled)
            return PackedForward(
                self.args.tree_packing, self.accelerator, is_sharded, self.args.max_tokens_per_micro_batch
            )
        message = f"Shared prefixes are not packed for {type(base).__name__}: {reason}."
        if self.args.tree_packing != "auto":
            raise ValueError(f"`tree_packing` is {self.args.tree_packing!r}, but {message} Set it to 'off'.")
        if self.args.max_tokens_per_micro_batch is not None:
            raise ValueError(f"`max_tokens_per_micro_batch` counts tokens of packed rows, but {message} Leave it out.")
        logger.warning(f"{message} Training forwards plain rows, as GRPOTrainer does.")
        return None

    def _why_not_packed(self, base: Any) -> str | None:
        config = base.config.get_text_config()
        reason = why_not_packable(config)
        if reason is None and not base._supports_attention_backend:
            reason = "its attention does not go through transformers' common interface"
        if reason is None and is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            reason = "its adapter puts virtual tokens before each row"
        if reason is None and config._attn_implementation == "eager" and self.aux_loss_enabled:
            reason = "its load-balancing loss does not go with the mask of eager attention"
        if reason is None and config._attn_implementation != "eager":
            reason = why_no_trees(base)
        return reason

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        self._prepared_at = self.state.global_step
        if self._packed_forward is None:
            return super()._prepare_inputs(generation_batch)
        # GRPOTrainer shuffles single rows before it cuts micro-batches, which would part rows that share prefixes.
        with replaced(grpo_trainer, "shuffle_sequence_dict", self._shuffle_trees):
            return super()._prepare_inputs(generation_batch)

    def _shuffle_trees(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Shuffle whole trees; the rows of a tree stay together, in depth-first order."""
        num_trees = len(batch["completion_ids"]) // self.num_generations
        order = torch.randperm(num_trees)[:, None] * self.num_generations + torch.arange(self.num_generations)
        rows = order.flatten()

        def permute(value: Any) -> Any:
            if value is None or (isinstance(value, torch.Tensor) and value.ndim == 0):
                return value
            return value[rows.to(value.device)] if isinstance(value, torch.Tensor) else [value[i] for i in rows]

        return {key: permute(value) for key, value in batch.items()}

    # Logs

    def _log_tree_metrics(self) -> None:
        totals = add_totals(self._totals)
        totals["kept_tokens"] = sum(tree.num_unique_tokens for tree in self._trees)
        self._totals.clear()
        totals = reduce_totals(totals, self.accelerator.gather, self.accelerator.device)
        metrics = tree_metrics(totals)
        if self.args.dynamic_sampling_rounds > 0:
            metrics["dynamic_sampling/discarded_tokens"] = totals["unique_tokens"] - totals["kept_tokens"]
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        # Part of what checkpoints save and every process knows: a resumed run branches as an uninterrupted one.
        saved: Any = self.state.stateful_callbacks
        saved[_EXPECTED_LENGTH] = max(round(metrics["tree/mean_length"]), 1)

    def _write_trees(self, rewards: list[float], output: dict[str, Any]) -> None:
        """Append this generation's trees of all processes to `output_dir/trees/trees_<step>.jsonl`."""
        advantages = output["advantages"]
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand_as(output["completion_mask"])
        records = []
        for i, tree in enumerate(self._trees):
            leaves = tree.depth_first_leaves()
            rows = slice(i * self.num_generations, (i + 1) * self.num_generations)
            last_tokens = [tree.nodes[leaf].end - 1 for leaf in leaves]
            records.append(
                {
                    "step": self.state.global_step,
                    "prompt": self._decode(tree.prompt_ids),
                    "rows": leaves,
                    "rewards": [None if reward != reward else reward for reward in rewards[rows]],
                    "advantages": advantages[rows][range(len(leaves)), last_tokens].tolist(),
                    "tree": tree.to_dict(),
                }
            )
        records = gather_object(records)
        if not self.accelerator.is_main_process:
            return
        folder = os.path.join(str(self.args.output_dir), "trees")
        os.makedirs(folder, exist_ok=True)
        mode = "w" if self._sampled_at[1] == 0 else "a"  # a resumed run writes its steps again
        with open(os.path.join(folder, f"trees_{self.state.global_step:06d}.jsonl"), mode) as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def _finite(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards in which an infinite one counts as a completion that could not be scored."""
    return rewards.masked_fill(rewards.isinf(), torch.nan)
