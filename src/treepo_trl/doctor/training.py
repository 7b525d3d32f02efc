"""
A small training as the trainer runs it: its engine, what engine and policy compute, one step and its memory.

The checks stand on one trainer, in this order. What the trainer cannot be built without is the first check's finding,
and the others then cannot run.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from trl import GRPOTrainer, ModelConfig, get_quantization_config

from treepo_trl.engines import SegmentResult
from treepo_trl.engines.vllm import VLLMEngine
from treepo_trl.memory import GIB, plan_memory
from treepo_trl.policy.adapter_probe import AdapterProbe, probe_adapter, segments_of
from treepo_trl.policy.adapter_sync import AdapterVLLMGeneration
from treepo_trl.policy.engine import awake
from treepo_trl.policy.engine_check import bound_of, computing_dtype
from treepo_trl.policy.starting_adapter import new_adapter_config
from treepo_trl.sampling import SegmentTree
from treepo_trl.treepo_config import TreePOConfig
from treepo_trl.treepo_trainer import TreePOTrainer
from treepo_trl.trl.host import Host

from .engine_errors import engine_error
from .findings import BrokenError, CannotRunError, Check
from .needs import Needs
from .number_type import training_device, why_not
from .target_modules import with_modules_of_model


if TYPE_CHECKING:
    from peft import PeftModel


PROMPTS = (
    "Add the numbers and say how you did it: 3 + 4 + 5 =",
    "The three largest rivers of the world, and where they begin:",
    "A recipe for a soup of carrots and potatoes, step by step:",
    "def median(values: list[float]) -> float:",
)
_NUM_LEAVES, _COMPLETION, _SEGMENT = 8, 32, 8
_SHARE = 0.3  # of the card's memory, for the engine
_CONTEXT = 512  # tokens that the engine can hold in one sequence
_LARGEST_RATIO = 1.5
"""Measured over planned memory above which the plan misleads."""


class MeasuredTrainer(TreePOTrainer):
    """[`TreePOTrainer`] that notes what a card's memory held before the update."""

    before_update: int | None = None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.before_update is None and self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before_update = torch.cuda.memory_allocated()
        return super().compute_loss(*args, **kwargs)


@dataclass
class SmallTraining:
    """
    Attributes:
        needs ([`Needs`]):
            What is to be checked.
        folder (`Path`):
            For what the trainer writes.
    """

    needs: Needs
    folder: Path
    _trainer: MeasuredTrainer | None = None
    _tree: SegmentTree | None = None

    @property
    def trainer(self) -> MeasuredTrainer:
        if self._trainer is None:
            raise CannotRunError("there is no engine")
        return self._trainer

    def checks(self) -> dict[str, Check]:
        """The checks by their names."""
        return {
            "engine": self.check_engine,
            "same model": self.check_same_model,
            "adapter moves the engine": self.check_adapter,
            "sleep and wake": self.check_sleep,
            "planner": self.check_planner,
        }

    # The engine

    def check_engine(self) -> str:
        """Start the engine, and grow one tree of eight leaves."""
        started = time.perf_counter()
        try:
            self.needs, change = with_modules_of_model(self.needs)
            self._trainer = _build(self.needs, self.folder)
            ready = time.perf_counter() - started
            self._tree = tree = _grown(self._trainer)
        except Exception as error:  # vLLM's own classes differ between its versions
            self._trainer = None
            raise engine_error(error, self.needs) from error
        if len(tree.leaves) != _NUM_LEAVES:
            raise BrokenError(f"A tree of {len(tree.leaves)} leaves grew, not {_NUM_LEAVES}.", "Please report this.")
        sampled, kept = sum(len(node.token_ids) for node in tree.nodes), _leaf_tokens(tree)
        name = "vLLM" if self.needs.uses_vllm else "the transformers engine"
        seen = f"{name} started in {ready:.0f} s and grew {_NUM_LEAVES} leaves: {kept} tokens from {sampled} sampled"
        return seen if change is None else f"{seen}; {change}"

    # Engine and policy

    def check_same_model(self) -> str:
        """Compare the log-probabilities that the engine gave that tree's tokens with the policy's."""
        return _compared(self.trainer, cast(SegmentTree, self._tree))

    def check_adapter(self) -> str:
        """Move adapter and engine by the same random values, and compare."""
        trainer = self.trainer
        generation = getattr(trainer, "vllm_generation", None)
        if not isinstance(generation, AdapterVLLMGeneration):
            raise CannotRunError("no adapter goes to vLLM by itself here")
        found = _probed(trainer, generation)
        if found.cause is not None:
            raise BrokenError(f"{found}.", _ADAPTER_REMEDY)
        return f"all modules follow: {found.moved:.3f} nats apart after a move of {found.movement:.2f}"

    # Memory

    def check_sleep(self) -> str:
        """Compare a card's memory with the engine awake and asleep, and the engine with the policy after waking."""
        device = self.trainer.accelerator.device
        if device.type != "cuda":
            raise CannotRunError(f"vLLM sleeps on CUDA only, this is {device.type}")
        if not self.trainer.args.vllm_enable_sleep_mode:
            raise CannotRunError("the engine of this training does not sleep")
        with awake(self.trainer.vllm_generation):
            while_awake = torch.cuda.mem_get_info()[0]
        asleep = torch.cuda.mem_get_info()[0]
        freed = (asleep - while_awake) / GIB
        if freed <= 0:
            raise BrokenError(
                f"Asleep, the engine frees nothing ({freed:.2f} GiB).",
                "Leave `vllm_enable_sleep_mode` out, and lower `vllm_gpu_memory_utilization`.",
            )
        return f"{freed:.2f} GiB free while it sleeps; awake again: {_compared(self.trainer, _grown(self.trainer))}"

    def check_planner(self) -> str:
        """Train for one step, and compare what it took with what the plan says it takes."""
        trainer = self.trainer
        if trainer.accelerator.device.type != "cuda":
            raise CannotRunError("the plan is about a card's memory, and no card trains here")
        trainer.train()
        assert trainer.before_update is not None, "a step computes its loss"
        measured = torch.cuda.max_memory_allocated() - trainer.before_update
        return compared_memory(_planned(self.needs, trainer.args), measured)


_ADAPTER_REMEDY = (
    "Set `lora_target_modules` to modules that the engine serves, or `vllm_lora_sync: merge`, or leave `use_vllm` out."
)


def compared_memory(planned: float, measured: float) -> str:
    """
    Say how far a plan is from what was measured, both in bytes.

    Raises:
        BrokenError: if the step took much more than planned.
    """
    seen = f"the update added {measured / 2**20:.0f} MiB, planned were {planned / 2**20:.0f}"
    if measured > _LARGEST_RATIO * planned:
        raise BrokenError(
            f"{seen}.", "Leave as much more room on the card than `treepo-trl plan` says, and report it."
        )
    return seen


def _planned(needs: Needs, args: TreePOConfig) -> float:
    """Bytes that an update adds to the weights, by the plan."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(needs.model)
    policy = plan_memory(config, args, _model_config(needs), 80.0 * GIB).policy
    return policy["gradients"] + policy["optimizer"] + policy["activations"]


def _build(needs: Needs, folder: Path) -> MeasuredTrainer:
    """A trainer with the settings that matter here, on one prompt."""
    args = TreePOConfig(
        str(folder),
        **_settings(needs),
        per_device_train_batch_size=_NUM_LEAVES,
        num_generations=_NUM_LEAVES,
        max_completion_length=_COMPLETION,
        segment_length=_SEGMENT,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        engine_check="off",  # the checks here ask the same
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    model_args = _model_config(needs)
    args.model_init_kwargs = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    return MeasuredTrainer(
        model=needs.model,
        reward_funcs=_share_of_different_tokens,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
        quantization_config=get_quantization_config(model_args),
        peft_config=new_adapter_config(model_args),
    )


def _settings(needs: Needs) -> dict[str, Any]:
    """The settings that are asked for, as this machine and a small model can have them."""
    device = training_device(needs)
    half = {"bf16": False, "fp16": False}
    if device.type == "cuda":
        number_type = needs.number_type or ("float16" if why_not("bfloat16", device) else "bfloat16")
        half = {"bf16": number_type == "bfloat16", "fp16": number_type == "float16"}
    settings: dict[str, Any] = {
        "vllm_gpu_memory_utilization": _SHARE,
        "gradient_checkpointing": False,
        **needs.training,
    }
    if settings["vllm_gpu_memory_utilization"] == "auto":  # planned for the recipe's model, and this one is small
        settings["vllm_gpu_memory_utilization"] = _SHARE
    if settings["use_vllm"]:
        settings |= {"vllm_mode": "colocate", "vllm_max_model_length": _CONTEXT}
        if not needs.is_recipe:
            settings["vllm_enable_sleep_mode"] = device.type == "cuda"
    return {**settings, **half, "use_cpu": device.type == "cpu"}


def _model_config(needs: Needs) -> ModelConfig:
    # 8-bit layers round by what else is in the batch, so engine and policy would differ without a fault.
    settings = {name: value for name, value in needs.model_settings.items() if name != "load_in_8bit"}
    return ModelConfig(needs.model, **settings)


def _share_of_different_tokens(completion_ids: list[list[int]], **_: object) -> list[float | None]:
    """A reward that differs between completions."""
    return [len(set(ids)) / len(ids) for ids in completion_ids]


def _grown(trainer: TreePOTrainer) -> SegmentTree:
    (tree,) = trainer.sample_trees([_token_ids(trainer, PROMPTS[0])])
    return tree


def _token_ids(trainer: TreePOTrainer, text: str) -> list[int]:
    return cast(list[int], Host(trainer).tokenizer(text)["input_ids"])


def _leaf_tokens(tree: SegmentTree) -> int:
    return sum(len(tree.completion_ids(leaf)) for leaf in tree.leaves)


def _compared(trainer: TreePOTrainer, tree: SegmentTree) -> str:
    """How far the engine's log-probabilities of a tree are from the policy's; `BrokenError` if more than rounding."""
    differences = [_differences(trainer, tree, leaf) for leaf in tree.leaves]
    every = torch.cat(differences)
    leaf = max(range(len(differences)), key=lambda i: float(differences[i].max()))
    place = int(differences[leaf].argmax())
    token = Host(trainer).tokenizer.decode([tree.completion_ids(tree.leaves[leaf])[place]])
    bound = _bound(trainer)
    seen = f"engine and policy differ by {every.mean():.4f} nats per token, at most {every.max():.4f} (at {token!r})"
    if not every.mean() <= bound:
        raise BrokenError(
            f"{seen}; rounding explains {bound}.",
            "Compare the model's revision and `dtype` in both, and update vLLM or transformers within their windows. "
            "With a quantized model see `vllm_base_weights`.",
        )
    return seen


def _differences(trainer: TreePOTrainer, tree: SegmentTree, leaf: int) -> torch.Tensor:
    """`(tokens,)`: distance of each of a leaf's log-probabilities from the policy's over its plain row."""
    completion, device = tree.completion_ids(leaf), trainer.accelerator.device
    ids = torch.tensor([tree.prompt_ids + completion], device=device)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with _evaluated(model), torch.no_grad(), trainer.accelerator.autocast():
        logps = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, model, ids, torch.ones_like(ids), len(completion)
        )[0][0]
    return (logps.float().cpu() - torch.tensor(tree.logprobs(leaf))).abs()


@contextmanager
def _evaluated(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _bound(trainer: TreePOTrainer) -> float:
    """Mean difference between engine and policy that rounding explains, in nats per token."""
    types = [computing_dtype(trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator)]
    if trainer.args.use_vllm:
        types.append(trainer.vllm_generation.llm.llm_engine.model_config.dtype)
    return bound_of(*types)


def _probed(trainer: TreePOTrainer, generation: AdapterVLLMGeneration) -> AdapterProbe:
    """The probe that a training starts with too."""

    def sample(prompts: list[list[int]]) -> list[SegmentResult]:
        with awake(generation):
            return segments_of(VLLMEngine(generation.llm, [], lora_request=generation.llm.lora_request), prompts)

    model = cast("PeftModel", trainer.accelerator.unwrap_model(trainer.model))
    prompts = [_token_ids(trainer, text) for text in PROMPTS]
    return probe_adapter(model, generation.sync_weights, sample, prompts, bound=_bound(trainer))
