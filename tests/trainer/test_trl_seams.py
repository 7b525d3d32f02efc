"""
The private parts of TRL that this package relies on. A failure here means: TRL has moved, read its diff before the
version bound in pyproject.toml is widened.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import trl
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

from treepo_trl import TreePOConfig, TreePOTrainer
from treepo_trl.policy.adapter_sync import AdapterVLLMGeneration


EMPTY = inspect.Parameter.empty

SIGNATURES: dict[str, dict[str, Any]] = {
    "_generate_single_turn": {
        "self": EMPTY,
        "prompt_ids": EMPTY,
        "images": EMPTY,
        "multimodal_fields": EMPTY,
        "num_generations": EMPTY,
        "has_tool_images": False,
    },
    "_generate_and_score_completions": {"self": EMPTY, "inputs": EMPTY},
    "_get_per_token_logps_and_entropies": {
        "self": EMPTY,
        "model": EMPTY,
        "input_ids": EMPTY,
        "attention_mask": EMPTY,
        "logits_to_keep": EMPTY,
        "batch_size": None,
        "compute_entropy": False,
        "compute_aux_loss": False,
        "pixel_values": None,
        "image_grid_thw": None,
        "num_images": None,
        "pixel_attention_mask": None,
        "spatial_shapes": None,
        "num_tiles": None,
        "image_sizes": None,
        "token_type_ids": None,
        "mm_token_type_ids": None,
        "image_position_ids": None,
    },
    "_prepare_inputs": {"self": EMPTY, "generation_batch": EMPTY},
    "_save_checkpoint": {"self": EMPTY, "model": EMPTY, "trial": EMPTY},
    "get_train_dataloader": {"self": EMPTY},
}
# What dynamic sampling calls, or replaces for a call.
CALLED = {
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_generate": ["self", "prompts"],
    "_tokenize_prompts": ["self", "prompts"],
    "_get_train_sampler": ["self", "dataset"],
    "_get_collator_with_removed_columns": ["self", "data_collator", "description"],
}
INIT_PARAMETERS = [
    "self",
    "model",
    "reward_funcs",
    "args",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "reward_processing_classes",
    "callbacks",
    "optimizers",
    "quantization_config",
    "peft_config",
    "tools",
    "rollout_func",
    "environment_factory",
]


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def overridden_methods(cls: type, base: type) -> set[str]:
    return {name for name, value in vars(cls).items() if inspect.isfunction(value) and hasattr(base, name)}


def test_version() -> None:
    assert trl.__version__.startswith("1.16.")


def test_every_override_is_pinned() -> None:
    assert overridden_methods(TreePOTrainer, GRPOTrainer) == {*SIGNATURES, "__init__"}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_in_trl(name: str) -> None:
    assert parameters(getattr(GRPOTrainer, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_override_takes_what_trl_passes(name: str) -> None:
    """Same names, order and defaults; a `**kwargs` may take the rest."""
    ours = inspect.signature(getattr(TreePOTrainer, name)).parameters
    takes_rest = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in ours.values())
    named = {n: p.default for n, p in ours.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    theirs = SIGNATURES[name]
    assert list(named.items()) == list(theirs.items())[: len(named)]
    assert takes_rest or len(named) == len(theirs)


@pytest.mark.parametrize("name", CALLED)
def test_signature_of_what_is_called(name: str) -> None:
    assert list(parameters(getattr(GRPOTrainer, name))) == CALLED[name]


def test_results_of_what_is_called() -> None:
    """By position: the third of what `_generate` returns is the tool mask, the fourth are the completions."""
    source = inspect.getsource(GRPOTrainer._generate)
    assert "return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields" in source


def test_init_parameters() -> None:
    assert list(parameters(GRPOTrainer.__init__)) == INIT_PARAMETERS
    assert parameters(TreePOTrainer.__init__) == parameters(GRPOTrainer.__init__)


def test_config_takes_every_field_of_trl() -> None:
    theirs, ours = parameters(GRPOConfig), parameters(TreePOConfig)
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {name: ours[name] for name in theirs} == theirs


def called_names(function: Callable[..., Any]) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {
        call.id if isinstance(call, ast.Name) else call.attr
        for call in calls
        if isinstance(call, ast.Name | ast.Attribute)
    }


@pytest.mark.parametrize(
    ("name", "user"),
    [("VLLMGeneration", GRPOTrainer.__init__), ("shuffle_sequence_dict", GRPOTrainer._prepare_inputs)],
)
def test_replaced_names_are_looked_up_in_the_module(name: str, user: Callable[..., Any]) -> None:
    """`replaced` puts something else under these names: they must exist and be called by that name."""
    assert hasattr(grpo_trainer, name)
    assert name in called_names(user)


def test_replaced_llm_is_looked_up_in_the_module() -> None:
    assert "LLM" in called_names(VLLMGeneration._init_vllm)
    assert "LLM" in inspect.getsource(vllm_generation)


def test_replaced_shuffle_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is resolved when the method runs, not bound earlier."""
    seen = []
    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", lambda batch: seen.append(batch) or batch)

    class Fake:
        model = torch.nn.Linear(1, 1)
        num_iterations = 1
        _step = 0
        _buffered_inputs = None
        args = type("Args", (), {"steps_per_generation": 1})()

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            return {"completion_ids": torch.zeros(2, 1)}

    inspect.unwrap(GRPOTrainer._prepare_inputs)(Fake(), {})
    assert len(seen) == 1


def test_callers_use_the_overrides() -> None:
    """The overridden methods are on the path from a training step to the loss."""
    assert "_generate_single_turn" in called_names(GRPOTrainer._generate)
    scoring = called_names(GRPOTrainer._generate_and_score_completions)
    assert {"_generate", "_calculate_rewards", "_get_per_token_logps_and_entropies"} <= scoring
    assert "_get_per_token_logps_and_entropies" in called_names(GRPOTrainer._compute_loss)
    assert "_generate_and_score_completions" in called_names(GRPOTrainer._prepare_inputs)


def test_loss_takes_advantages_per_token() -> None:
    """TRL keeps two-dimensional advantages as they are."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert 'advantages = inputs["advantages"]' in source
    assert "if advantages.dim() == 1:" in source


def test_attributes_that_the_trainer_reads() -> None:
    source = inspect.getsource(GRPOTrainer.__init__)
    for name in (
        "_last_loaded_step",
        "vllm_generation",
        "generation_kwargs",
        "_dist",
        "_logs",
        "_metrics",
        "_pending_extra_logs",
        "_step",
        "_tokenizer",
        "eos_token_ids",
        "reward_weights",
        "scale_rewards",
        "multi_objective_aggregation",
        "num_generations",
        "use_vllm",
    ):
        assert f"self.{name} = " in source or f"self.{name}:" in source, name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_init_vllm", {"self": EMPTY}),
        ("sync_weights", {"self": EMPTY}),
        (
            "generate",
            {"self": EMPTY, "prompts": EMPTY, "images": EMPTY, "num_generations": EMPTY, "profiler": None},
        ),
    ],
)
def test_vllm_generation_signatures(name: str, expected: dict[str, Any]) -> None:
    assert parameters(getattr(VLLMGeneration, name)) == expected


def test_adapter_generation_overrides_no_more() -> None:
    assert overridden_methods(AdapterVLLMGeneration, VLLMGeneration) == {"__init__", "_init_vllm", "sync_weights"}
    for name in ("_init_vllm", "sync_weights"):
        assert parameters(getattr(AdapterVLLMGeneration, name)) == parameters(getattr(VLLMGeneration, name))
    source = inspect.getsource(VLLMGeneration)
    for name in ("_llm_weights_sleeping", "enable_sleep_mode", "llm", "_dist", "model"):
        assert f"self.{name} = " in source, name


def test_parameters_of_the_vllm_generation_that_the_trainer_builds() -> None:
    names = set(parameters(VLLMGeneration.__init__))
    assert {
        "model",
        "accelerator",
        "mode",
        "enable_sleep_mode",
        "max_model_length",
        "max_num_seqs",
        "logprobs",
    } <= names
