"""Packed rows make the same update as plain rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.support.models import make_model
from tests.support.trainers import (
    ReplayTrainer,
    SpyTrainer,
    assert_same_run,
    build,
    change,
    logs_of,
    make_config,
    parameters_of,
    trained,
    watch_loss,
)
from treepo_trl import TreePOTrainer


def lora() -> dict[str, Any]:
    return {"peft_config": LoraConfig(r=4, target_modules="all-linear")}


def run_plain(folder: Path, model: Any, arguments: dict[str, Any], **changes: Any) -> Any:
    """A run on plain rows."""
    plain = trained(SpyTrainer, model, make_config(folder / "plain", tree_packing="off", **changes), **arguments)
    assert not logs_of(plain, "tree/packing_ratio")
    return plain


def run_packed(folder: Path, model: Any, plain: Any, arguments: dict[str, Any], **changes: Any) -> Any:
    """A run on packed rows of the trees of `plain`."""
    config = make_config(folder / "packed", **{"tree_packing": "sdpa", **changes})
    packed = build(ReplayTrainer, model, config, **arguments)
    packed.recorded = plain.all_trees
    packed.train()
    return packed


def run_packed_and_plain(
    folder: Path, model: Any, trainer_changes: Callable[[], dict[str, Any]] = dict, **changes: Any
) -> tuple[Any, Any]:
    """Both, with `trainer_changes()` as further arguments of each trainer."""
    of_plain = {k: v for k, v in changes.items() if k not in ("max_tokens_per_micro_batch", "tree_packing")}
    plain = run_plain(folder, model, trainer_changes(), **of_plain)
    return plain, run_packed(folder, model, plain, trainer_changes(), **changes)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_packing_changes_no_loss(
    tmp_path: Path, tiny_model_dir: str, loss_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Whole micro-batches of two trees, and the same cut into pieces of a few rows; there the attention's blocks are
    smaller than pieces.
    """
    changes = {"loss_type": loss_type, "num_iterations": 2}
    plain = run_plain(tmp_path, tiny_model_dir, {}, **changes)
    packed = run_packed(tmp_path, tiny_model_dir, plain, {}, **changes)
    monkeypatch.setattr("treepo_trl.update.tree_attention._QUERY_BLOCK", 8)
    pieces = run_packed(tmp_path, tiny_model_dir, plain, {}, max_tokens_per_micro_batch=20, **changes)
    for run, least in ((packed, 1.2), (pieces, 1.0)):  # a piece repeats the tokens before its rows
        assert_same_run(plain, run)
        assert change(run) > 1e-2
        assert logs_of(run, "tree/packing_ratio")[0] > least


PIECES = {"gradient_checkpointing": True, "max_tokens_per_micro_batch": 20, "max_steps": 4}


@pytest.mark.parametrize(
    ("trainer_changes", "changes"),
    [
        (dict, {"tree_packing": "auto"}),
        (dict, {"mask_truncated_completions": True}),
        (dict, {"top_entropy_quantile": 0.5}),
        (dict, {"importance_sampling_level": "sequence", "loss_type": "luspo", "num_iterations": 2}),
        (dict, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "loss_type": "dapo"}),
        (dict, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "loss_type": "grpo"}),
        (dict, {"temperature": 0.7, "pad_to_multiple_of": 8}),
        (dict, {"model_init_kwargs": {"attn_implementation": "eager", "dtype": "float32"}}),
        (dict, {"cast_lm_head_to_fp32": True, "entropy_coef": 0.1, "beta": 0.1}),
        (lora, {"beta": 0.1, "num_iterations": 2, "max_steps": 4}),
        (dict, {**PIECES, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
        (dict, {**PIECES, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        (lora, {**PIECES, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
        (lora, {**PIECES, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value.__name__.replace("dict", "full"),
)
def test_packing_changes_no_option(
    tmp_path: Path, tiny_model_dir: str, trainer_changes: Callable[[], dict[str, Any]], changes: dict[str, Any]
) -> None:
    plain, packed = run_packed_and_plain(tmp_path, tiny_model_dir, trainer_changes, **changes)
    keys = ["grad_norm", "reward"]
    if "gradient_accumulation_steps" not in changes:  # otherwise the loss that is logged is a mean over others
        keys.append("loss")
    if "beta" in changes:
        keys.append("kl")
    assert_same_run(plain, packed, tuple(keys))
    assert change(packed) > 1e-2
    assert len(logs_of(packed, "tree/packing_ratio")) == packed.state.max_steps


@pytest.mark.parametrize("changes", [{}, {"max_tokens_per_micro_batch": 20}], ids=["one row", "pieces"])
def test_packing_with_qlora(tmp_path: Path, tiny_model_dir: str, changes: dict[str, Any]) -> None:
    """The base model in 4 bits, an adapter on top, and gradient checkpointing as the recipe has it."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    qlora = lambda: {**lora(), "quantization_config": four_bits}  # noqa: E731
    changes = {"gradient_checkpointing": True, "max_steps": 4, **changes}
    plain, packed = run_packed_and_plain(tmp_path, tiny_model_dir, qlora, **changes)
    assert type(packed.model.base_model.model.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    # TRL keeps the adapter of a 4-bit model in bfloat16: a weight near 0.1 moves in steps of 2^-11.
    assert_same_run(plain, packed, ("loss", "grad_norm"), parameter_tolerance=2**-10)
    before, after = packed.initial_parameters, parameters_of(packed)
    adapter = [name for name in before if "lora_" in name]  # the base takes its 4-bit form with the first forward
    assert len(adapter) == 2 * 7 * 2  # two layers, seven linear ones in each, A and B
    assert max((before[name] - after[name]).abs().max().item() for name in adapter) > 1e-2


def test_no_forward_has_more_tokens_than_the_budget(tmp_path: Path, tiny_model_dir: str) -> None:
    config = make_config(
        tmp_path, tree_packing="auto", max_tokens_per_micro_batch=24, beta=0.1, num_iterations=2, max_steps=3
    )
    trainer = build(SpyTrainer, tiny_model_dir, config)
    lengths: list[int] = []
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            lengths.append(kwargs["input_ids"].size(1)) if "tree_attention" in kwargs else None
        ),
        with_kwargs=True,
    )
    trainer.train()
    assert len(lengths) > 20
    assert max(lengths) <= 24


@pytest.mark.parametrize("changes", [{}, {"model_init_kwargs": {"attn_implementation": "eager"}}])
def test_packing_a_mixture_of_experts(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The load-balancing loss counts a shared token once per row, as plain rows do."""
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "output_router_logits": True}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**{**make_model().config.to_dict(), **settings, "router_aux_loss_coef": 0.5})
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    plain, auto = run_packed_and_plain(tmp_path, str(tmp_path / "model"), tree_packing="auto", **changes)
    assert_same_run(plain, auto, ("loss", "grad_norm", "aux_loss"))
    assert logs_of(auto, "aux_loss")[0] > 0
    is_eager = bool(changes)
    assert (not logs_of(auto, "tree/packing_ratio")) == is_eager
    if not is_eager:
        with pytest.raises(ValueError, match=r"not supported with a load-balancing loss.*router_aux_loss_coef=0"):
            build(
                TreePOTrainer, str(tmp_path / "model"), make_config(tmp_path, max_tokens_per_micro_batch=9, **changes)
            )


def test_shuffled_rows_stay_with_their_tree_and_their_advantages(tmp_path: Path, tiny_model_dir: str) -> None:
    """Micro-batches of one tree each: every row of a micro-batch has the same prompt, and all prompts come up."""
    config = make_config(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        beta=0.1,
        tree_packing="auto",
        max_steps=1,
    )
    trainer = build(SpyTrainer, tiny_model_dir, config)
    seen: list[dict[str, torch.Tensor]] = []
    watch_loss(trainer, lambda model, inputs: seen.append({k: v.clone() for k, v in inputs.items()}))
    trainer.train()
    prompts = [batch["prompt_ids"] for batch in seen]
    assert len(prompts) == 4
    assert all((rows == rows[0]).all() for rows in prompts)
    assert len({tuple(rows[0].tolist()) for rows in prompts}) == 4

    def rows_of(batches: list[dict[str, torch.Tensor]]) -> list[tuple]:
        names = ("prompt_ids", "completion_ids", "completion_mask", "advantages", "ref_per_token_logps")
        return sorted(
            tuple(tuple(batch[n][i].tolist()) for n in names)
            for batch in batches
            for i in range(len(batch["prompt_ids"]))
        )

    assert rows_of(seen) == rows_of([trainer.generations[0]["output"]])
