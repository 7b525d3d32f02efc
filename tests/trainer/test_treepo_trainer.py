"""TreePOTrainer against stock GRPOTrainer, against hand arithmetic, and with TRL's features; a tiny model on CPU."""

import asyncio
import json
import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BitsAndBytesConfig,
    Qwen2ForSequenceClassification,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from tests.support.models import make_model, make_tokenizer
from treepo_trl import SegmentTree, TreePOConfig, TreePOTrainer
from treepo_trl.checks import check_packing


NUM_GENERATIONS = 4
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


def parity_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Differs between most completions: share of even tokens, plus a little for length."""
    return [sum(t % 2 == 0 for t in ids) / len(ids) + 0.01 * len(ids) for ids in completion_ids]


def length_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text.split())) for text in texts]


def plain_prompts(count: int = 16) -> Dataset:
    """Prompts of different lengths, each a different text."""
    return Dataset.from_dict(
        {"prompt": [" ".join(f"w{(7 * i + j) % 60}" for j in range(1 + i % 5)) for i in range(count)]}
    )


def chat_prompts(count: int = 16) -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": f"w{i} w{i + 1}"}] for i in range(count)]})


SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "per_device_train_batch_size": 2 * NUM_GENERATIONS,
    "num_generations": NUM_GENERATIONS,
    "max_completion_length": 12,
    "max_steps": 2,
    "optim": "sgd",  # unlike Adam it does not blow rounding errors up to the size of a step
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 7,
}


def make_config(folder: Path, **changes: Any) -> TreePOConfig:
    return TreePOConfig(output_dir=str(folder), **{**SETTINGS, "segment_length": 4, **changes})


class SpyTrainer(TreePOTrainer):
    """Records what was sampled and what came out of the scoring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generations: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.raw_rewards: torch.Tensor | None = None
        self.all_trees: list[list[SegmentTree]] = []
        self.completions: list[Any] = []
        sample = self.sampler.sample

        def recording_sample(*args: Any, **kwargs: Any) -> list[SegmentTree]:
            self.all_trees.append(sample(*args, **kwargs))
            return self.all_trees[-1]

        self.sampler.sample = recording_sample

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._generate_single_turn(*args, **kwargs)
        if self.model.training:
            self.completions.append(result)
            torch.manual_seed(len(self.completions))  # so that the shuffle that follows can be repeated
        return result

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.raw_rewards = super()._calculate_rewards(*args, **kwargs)
        return self.raw_rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        record = {
            "inputs": inputs,
            "output": {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in output.items()},
            "rewards": self.raw_rewards.clone(),
            "logged": list(self._logs["advantages"]),
        }
        if self.model.training:
            self.generations.append({**record, "trees": self.all_trees[-1]})
        else:
            self.evaluations.append(record)
        return output


class ReplayTrainer(TreePOTrainer):
    """Uses the trees that another trainer has sampled."""

    recorded: list[list[SegmentTree]]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            self.num_replayed = getattr(self, "num_replayed", 0) + 1
            self.sampler.sample = lambda prompts, seed, **_: self.recorded[self.num_replayed - 1]
        result = super()._generate_single_turn(*args, **kwargs)
        if self.model.training:
            torch.manual_seed(self.num_replayed)
        return result


class ReplayStockTrainer(GRPOTrainer):
    """Stock GRPOTrainer on the completions that another trainer has sampled."""

    recorded: list[Any]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if not self.model.training:
            return super()._generate_single_turn(*args, **kwargs)
        self.num_replayed = getattr(self, "num_replayed", 0) + 1
        torch.manual_seed(self.num_replayed)
        return self.recorded[self.num_replayed - 1]


def build(cls: type, model: Any, config: Any, **changes: Any) -> Any:
    arguments = {
        "reward_funcs": parity_reward,
        "train_dataset": plain_prompts(),
        "processing_class": make_tokenizer(),
        **changes,
    }
    return cls(model=model, args=config, **arguments)


def parameters_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same_parameters(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert a.keys() == b.keys()
    worst = max((a[name] - b[name]).abs().max().item() for name in a)
    assert worst <= tolerance, f"parameters differ by {worst}"


def largest_change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    return max((before[name] - after[name]).abs().max().item() for name in before)


def logs_of(trainer: Any, key: str) -> list[float]:
    return [log[key] for log in trainer.state.log_history if key in log]


def assert_same_run(
    a: Any,
    b: Any,
    keys: tuple[str, ...] = ("loss", "grad_norm", "reward", "reward_std", "entropy"),
    parameter_tolerance: float = 1e-4,
) -> None:
    for key in keys:
        assert logs_of(a, key) == pytest.approx(logs_of(b, key), abs=1e-4, rel=1e-4), key
    assert len(logs_of(a, "loss")) == a.state.max_steps
    assert_same_parameters(parameters_of(a), parameters_of(b), parameter_tolerance)


# Equality with stock GRPO


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_iterations": 2, "loss_type": "grpo", "scale_rewards": "batch"},
        {"loss_type": "bnpo", "scale_rewards": "none", "beta": 0.1},
        {"mask_truncated_completions": True, "num_iterations": 2},
        {"top_entropy_quantile": 0.5},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 2},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1},
        {"pad_to_multiple_of": 8},
        {"off_policy_mask_threshold": 0.001, "num_iterations": 2},
        {"entropy_coef": 0.1},
    ],
    ids=lambda changes: "-".join(changes) or "defaults",
)
def test_without_branching_equals_stock_grpo(tmp_path: Path, tiny_model_dir: str, changes: dict[str, Any]) -> None:
    config = make_config(
        tmp_path / "tree", branching_factor=1, advantage_estimator="grpo", tree_packing="off", **changes
    )
    ours = build(SpyTrainer, tiny_model_dir, config)
    before = parameters_of(ours)
    ours.train()
    stock = build(
        ReplayStockTrainer, tiny_model_dir, GRPOConfig(output_dir=str(tmp_path / "stock"), **{**SETTINGS, **changes})
    )
    stock.recorded = ours.completions
    stock.train()
    assert_same_run(ours, stock)
    assert largest_change(before, parameters_of(ours)) > 1e-2
    # Every metric of GRPOTrainer is logged, with the same value, and only `tree/` is new.
    for a, b in zip(ours.state.log_history, stock.state.log_history, strict=True):
        assert {k for k in set(a) ^ set(b) if not k.startswith(("tree/", "profiling/"))} == set()
        for key in set(a) & set(b):
            if "time" in key or "runtime" in key or "per_second" in key or key.startswith("profiling/"):
                continue
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4, nan_ok=True), key


def test_without_branching_every_estimator_is_grpo(tmp_path: Path, tiny_model_dir: str) -> None:
    """A tree whose leaves share nothing but the prompt has one group."""
    advantages = {}
    for estimator in ("grpo", "treepo", "treepo_size_weighted"):
        config = make_config(
            tmp_path, branching_factor=1, advantage_estimator=estimator, max_steps=1, learning_rate=0.0
        )
        trainer = build(SpyTrainer, tiny_model_dir, config)
        trainer.train()
        output = trainer.generations[0]["output"]
        a = output["advantages"]
        advantages[estimator] = a if a.dim() == 2 else a[:, None] * output["completion_mask"]
    assert advantages["grpo"].abs().max() > 0.1
    torch.testing.assert_close(advantages["treepo"], advantages["grpo"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(advantages["treepo_size_weighted"], advantages["grpo"], atol=1e-5, rtol=1e-5)


# Packing


def run_packed_and_plain(
    tmp_path: Path,
    model: Any,
    packing: str = "sdpa",
    trainer_changes: Callable[[], dict[str, Any]] = dict,
    **changes: Any,
) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    without_budget = {k: v for k, v in changes.items() if k != "max_tokens_per_micro_batch"}
    plain = build(
        SpyTrainer, model, make_config(tmp_path / "off", tree_packing="off", **without_budget), **trainer_changes()
    )
    before = parameters_of(plain)
    plain.train()
    packed = build(
        ReplayTrainer, model, make_config(tmp_path / packing, tree_packing=packing, **changes), **trainer_changes()
    )
    packed.recorded = plain.all_trees
    packed.train()
    return plain, packed, before


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_packing_changes_no_loss(tmp_path: Path, tiny_model_dir: str, loss_type: str) -> None:
    plain, packed, before = run_packed_and_plain(tmp_path, tiny_model_dir, loss_type=loss_type, num_iterations=2)
    assert_same_run(plain, packed)
    assert largest_change(before, parameters_of(packed)) > 1e-2
    assert logs_of(packed, "tree/packing_ratio")[0] > 1.2
    assert not logs_of(plain, "tree/packing_ratio")


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_truncated_completions": True},
        {"top_entropy_quantile": 0.5},
        {"importance_sampling_level": "sequence", "loss_type": "luspo", "num_iterations": 2},
        {"beta": 0.1},
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "loss_type": "dapo"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "loss_type": "grpo"},
        {"temperature": 0.7, "pad_to_multiple_of": 8},
        {"model_init_kwargs": {"attn_implementation": "eager", "dtype": "float32"}},
        {"cast_lm_head_to_fp32": True, "entropy_coef": 0.1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_packing_changes_no_option(tmp_path: Path, tiny_model_dir: str, changes: dict[str, Any]) -> None:
    plain, packed, before = run_packed_and_plain(tmp_path, tiny_model_dir, **changes)
    keys = ("loss", "grad_norm", "reward")
    if "gradient_accumulation_steps" in changes:  # the loss that is logged is a mean over other micro-batches
        keys = ("grad_norm", "reward")
    assert_same_run(plain, packed, keys)
    assert largest_change(before, parameters_of(packed)) > 1e-2


def test_packing_auto_decides_by_sharing(tmp_path: Path, tiny_model_dir: str) -> None:
    plain, packed, _ = run_packed_and_plain(tmp_path, tiny_model_dir, packing="auto")
    assert_same_run(plain, packed)
    assert logs_of(packed, "tree/packing_ratio")[0] > 1.15
    assert packed._packed_forward.checked


def test_packing_with_lora(tmp_path: Path, tiny_model_dir: str) -> None:
    plain, packed, before = run_packed_and_plain(
        tmp_path,
        tiny_model_dir,
        trainer_changes=lambda: {"peft_config": LoraConfig(r=4, target_modules="all-linear")},
        beta=0.1,
        num_iterations=2,
        max_steps=4,
    )
    assert_same_run(plain, packed, ("loss", "grad_norm", "kl"))
    assert largest_change(before, parameters_of(packed)) > 1e-2


@pytest.mark.parametrize("changes", [{}, {"max_tokens_per_micro_batch": 20}], ids=["one row", "pieces"])
def test_packing_with_qlora(tmp_path: Path, tiny_model_dir: str, changes: dict[str, Any]) -> None:
    """The base model in 4 bits, an adapter on top, and gradient checkpointing as the recipe has it."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain, packed, before = run_packed_and_plain(
        tmp_path,
        tiny_model_dir,
        trainer_changes=lambda: {
            "peft_config": LoraConfig(r=4, target_modules="all-linear"),
            "quantization_config": four_bits,
        },
        gradient_checkpointing=True,
        max_steps=4,
        **changes,
    )
    assert type(packed.model.base_model.model.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    # TRL keeps the adapter of a 4-bit model in bfloat16: a weight near 0.1 moves in steps of 2^-11.
    assert_same_run(plain, packed, ("loss", "grad_norm"), parameter_tolerance=2**-10)
    after = parameters_of(packed)
    adapter = [name for name in before if "lora_" in name]  # the base takes its 4-bit form with the first forward
    assert len(adapter) == 2 * 7 * 2  # two layers, seven linear ones in each, A and B
    assert max((before[name] - after[name]).abs().max().item() for name in adapter) > 1e-2


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_token_budget_changes_no_loss(
    tmp_path: Path, tiny_model_dir: str, loss_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trees per micro-batch, cut into pieces of a few rows; the attention's blocks are smaller than pieces."""
    monkeypatch.setattr("treepo_trl.update.tree_attention._QUERY_BLOCK", 8)
    plain, packed, before = run_packed_and_plain(
        tmp_path, tiny_model_dir, loss_type=loss_type, num_iterations=2, max_tokens_per_micro_batch=20
    )
    assert_same_run(plain, packed)
    assert largest_change(before, parameters_of(packed)) > 1e-2


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_the_token_budget_goes_with_gradient_checkpointing(
    tmp_path: Path, tiny_model_dir: str, use_reentrant: bool, lora: bool
) -> None:
    plain, packed, before = run_packed_and_plain(
        tmp_path,
        tiny_model_dir,
        trainer_changes=lambda: {"peft_config": LoraConfig(r=4, target_modules="all-linear") if lora else None},
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        max_tokens_per_micro_batch=20,
        max_steps=4,
    )
    assert_same_run(plain, packed, ("loss", "grad_norm"))
    assert largest_change(before, parameters_of(packed)) > 1e-2


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
    auto = run_packed_and_plain(tmp_path, str(tmp_path / "model"), packing="auto", **changes)
    assert_same_run(*auto[:2], ("loss", "grad_norm", "aux_loss"))
    assert logs_of(auto[1], "aux_loss")[0] > 0
    is_eager = bool(changes)
    assert (auto[1]._packed_forward is None) == is_eager
    if not is_eager:
        assert auto[1]._packed_forward.checked
        with pytest.raises(ValueError, match=r"not supported with a load-balancing loss.*router_aux_loss_coef=0"):
            build(
                TreePOTrainer, str(tmp_path / "model"), make_config(tmp_path, max_tokens_per_micro_batch=9, **changes)
            )


def test_the_reference_model_may_have_another_attention(tmp_path: Path) -> None:
    """TRL loads the reference of a policy that is given as a model with `model_init_kwargs`."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    runs = []
    for packing in ("off", "sdpa"):
        policy = Qwen3ForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="sdpa", dtype="float32")
        config = make_config(
            tmp_path / packing,
            tree_packing=packing,
            beta=0.1,
            num_iterations=2,
            model_init_kwargs={"attn_implementation": "eager", "dtype": "float32"},
        )
        runs.append(build(SpyTrainer if packing == "off" else ReplayTrainer, policy, config))
        assert runs[-1].ref_model.config._attn_implementation == "eager"
        if packing == "sdpa":
            runs[1].recorded = runs[0].all_trees
        runs[-1].train()
    assert_same_run(*runs, ("loss", "grad_norm", "kl"))
    assert logs_of(runs[1], "kl")[0] == pytest.approx(0, abs=1e-6)


def test_packing_keeps_trees_together_in_micro_batches(tmp_path: Path, tiny_model_dir: str) -> None:
    """Micro-batches of one tree each: every row of a micro-batch has the same prompt, and all prompts come up."""
    config = make_config(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4, tree_packing="auto", max_steps=1
    )
    trainer = build(SpyTrainer, tiny_model_dir, config)
    seen = []
    compute_loss = trainer._compute_loss

    def spy(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        seen.append(inputs["prompt_ids"].clone())
        return compute_loss(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    assert len(seen) == 4
    assert all((prompts == prompts[0]).all() for prompts in seen)
    assert len({tuple(prompts[0].tolist()) for prompts in seen}) == 4


def test_rows_stay_with_their_advantages_when_shuffled(tmp_path: Path, tiny_model_dir: str) -> None:
    config = make_config(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        tree_packing="sdpa",
        max_steps=1,
        beta=0.1,
    )
    trainer = build(SpyTrainer, tiny_model_dir, config)
    seen = []
    compute_loss = trainer._compute_loss

    def spy(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        seen.append({k: v.clone() for k, v in inputs.items()})
        return compute_loss(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    output = trainer.generations[0]["output"]

    def rows(batches: list[dict[str, torch.Tensor]]) -> list[tuple]:
        names = ("prompt_ids", "completion_ids", "completion_mask", "advantages", "ref_per_token_logps")
        return sorted(
            tuple(tuple(batch[n][i].tolist()) for n in names)
            for batch in batches
            for i in range(len(batch["prompt_ids"]))
        )

    assert rows(seen) == rows([output])


def with_window() -> Any:
    model = make_model()
    model.config.layer_types = ["full_attention", "sliding_attention"]
    return model


def with_prompt_tuning() -> Any:
    return get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def with_dropout() -> Any:
    return make_model(attention_dropout=0.1)


def eager() -> Any:
    model = make_model()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (with_window, {"tree_packing": "sdpa"}, r"has layers of type sliding_attention.*Set it to 'off'"),
        (
            with_window,
            {"max_tokens_per_micro_batch": 99},
            r"`max_tokens_per_micro_batch` counts.*sliding.*Leave it out",
        ),
        (with_prompt_tuning, {"tree_packing": "sdpa"}, r"virtual tokens before each row.*Set it to 'off'"),
        (
            make_model,
            {"tree_packing": "flex"},
            r"'flex'` needs a CUDA device, this is 'cpu'.*Set `tree_packing='sdpa'`",
        ),
    ],
)
def test_packing_refuses_what_it_cannot_do(
    tmp_path: Path, model: Callable[[], Any], changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TreePOTrainer, "_build_engine", lambda self: None)  # it has opinions of its own on windows
    with pytest.raises(ValueError, match=message):
        build(TreePOTrainer, model(), make_config(tmp_path, **changes))


CUDA = SimpleNamespace(device=torch.device("cuda"), num_processes=1)


@pytest.mark.parametrize(
    ("model", "message"),
    [(eager, r"this one has 'eager'"), (with_dropout, r"has no dropout, but.*`attention_dropout=0.1`")],
)
def test_flex_refuses_models_that_it_does_not_serve(tmp_path: Path, model: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_packing(make_config(tmp_path, tree_packing="flex"), model().config, CUDA, False, False)


def test_the_token_budget_is_refused_where_forwards_are_collective(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_tokens_per_micro_batch=99)
    with pytest.raises(ValueError, match=r"not supported with FSDP and DeepSpeed.*per_device_train_batch_size"):
        check_packing(config, make_model().config, CUDA, True, False)


def test_the_token_budget_is_refused_with_reentrant_checkpoints_in_several_processes(tmp_path: Path) -> None:
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    config = make_config(tmp_path, max_tokens_per_micro_batch=99, **reentrant)
    check_packing(config, make_model().config, CUDA, False, False)
    with pytest.raises(ValueError, match=r"several processes and `use_reentrant=True`.*Set it to False"):
        check_packing(config, make_model().config, SimpleNamespace(num_processes=2), False, False)


def test_auto_packing_falls_back_to_plain_rows_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treepo_trl.treepo_trainer.why_no_trees", lambda model: "it does not hand keywords on")
    trainer = build(TreePOTrainer, make_model(), make_config(tmp_path, tree_packing="auto"))
    trainer.train()
    assert trainer._packed_forward is None
    warnings = [r.message.removeprefix("[RANK 0] ") for r in caplog.records if "not packed" in r.message]
    assert warnings == [
        "Shared prefixes are not packed for Qwen3ForCausalLM: it does not hand keywords on. Training forwards plain "
        "rows, as GRPOTrainer does."
    ]


# Advantages


def slow_advantages(
    tree: SegmentTree, rewards: list[float | None], estimator: str = "treepo", rejection: bool = False
) -> list[float]:
    """Eq. 5 to 7 for the leaves in depth-first order, in loops; not yet divided. `None` is unscorable."""
    leaves = tree.depth_first_leaves()
    result = []
    for leaf, reward in zip(leaves, rewards, strict=True):
        if reward is None:
            result.append(0.0)
            continue
        groups = [[r for r in rewards if r is not None]]
        for node in tree.path(leaf):
            group = [r for other, r in zip(leaves, rewards, strict=True) if r is not None and node in tree.path(other)]
            if len(group) > 1 and not (rejection and max(group) == min(group)):
                groups.append(group)
        if estimator == "grpo":
            groups = groups[:1]
        terms = [reward - sum(group) / len(group) for group in groups]
        weights = [len(group) if estimator == "treepo_size_weighted" else 1 for group in groups]
        result.append(sum(t * w for t, w in zip(terms, weights, strict=True)) / sum(weights))
    return result


def expected_advantages(generation: dict[str, Any], scale: str, **options: Any) -> torch.Tensor:
    """(B, T) by hand: tree advantages over the deviation that `scale_rewards` names, on each token of a leaf."""
    output, rewards = generation["output"], generation["rewards"].double()
    totals = [None if all(r != r for r in row) else sum(r for r in row if r == r) for row in rewards.tolist()]
    result = torch.zeros(output["completion_ids"].shape)
    for i, tree in enumerate(generation["trees"]):
        group = totals[i * NUM_GENERATIONS : (i + 1) * NUM_GENERATIONS]
        pool = [r for r in (group if scale == "group" else totals) if r is not None]
        divisor = 1.0 if scale == "none" else statistics.stdev(pool) + 1e-4
        for j, (leaf, value) in enumerate(
            zip(tree.depth_first_leaves(), slow_advantages(tree, group, **options), strict=True)
        ):
            result[i * NUM_GENERATIONS + j, : len(tree.completion_ids(leaf))] = value / divisor
    return result


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("estimator", ["treepo", "treepo_size_weighted"])
def test_advantages_are_those_of_the_trees(tmp_path: Path, tiny_model_dir: str, scale: str, estimator: str) -> None:
    config = make_config(
        tmp_path, scale_rewards=scale, advantage_estimator=estimator, num_generations=4, log_completions=True
    )
    trainer = build(SpyTrainer, tiny_model_dir, config)
    trainer.train()
    assert len(trainer.generations) == 2
    for generation in trainer.generations:
        output, trees = generation["output"], generation["trees"]
        assert output["advantages"].shape == output["completion_ids"].shape
        expected = expected_advantages(generation, scale, estimator=estimator)
        torch.testing.assert_close(output["advantages"], expected, atol=1e-5, rtol=1e-4)
        assert (output["advantages"] * (1 - output["completion_mask"])).abs().max() == 0
        # The rows are the leaves of the trees, and the trees branch below the root.
        rows = [tree.completion_ids(leaf) for tree in trees for leaf in tree.depth_first_leaves()]
        lengths = output["completion_mask"].sum(1).tolist()
        assert [ids[:n] for ids, n in zip(output["completion_ids"].tolist(), lengths, strict=True)] == rows
        plain = expected_advantages(generation, scale, estimator="grpo")
        assert (expected - plain).abs().max() > 0.01, "the trees must make a difference for this test to see it"


def slow_segment_value(
    tree: SegmentTree, values: dict[int, float], weights: dict[int, float], node: int, estimator: str
) -> float:
    """`value_difference` or `leave_one_out` of a node from the rewards and weights of the leaves, in loops."""

    def mean(leaves: list[int]) -> float:
        return sum(weights[leaf] * values[leaf] for leaf in leaves) / sum(weights[leaf] for leaf in leaves)

    def below(ancestor: int | None) -> list[int]:
        return [leaf for leaf in tree.leaves if ancestor is None or ancestor in tree.path(leaf)]

    above = [None, *tree.path(tree.nodes[node].parent)]
    if estimator == "value_difference":
        return mean(below(node)) - mean(below(above[-1]))
    others = [leaf for ancestor in above for leaf in below(ancestor) if leaf not in below(node)]
    return mean(below(node)) - mean(others) if others else 0.0


@pytest.mark.parametrize("weighting", ["uniform", "inverse_branching"])
@pytest.mark.parametrize("estimator", ["value_difference", "leave_one_out"])
def test_each_segment_has_its_own_advantage(
    tmp_path: Path, tiny_model_dir: str, estimator: str, weighting: str
) -> None:
    config = make_config(
        tmp_path, scale_rewards="none", advantage_estimator=estimator, leaf_weighting=weighting, max_steps=1
    )
    trainer = build(SpyTrainer, tiny_model_dir, config)
    trainer.train()
    (generation,) = trainer.generations
    rewards = iter(generation["rewards"].nansum(1).tolist())
    advantages = iter(generation["output"]["advantages"])
    num_values = set()
    for tree in generation["trees"]:
        leaves = tree.depth_first_leaves()
        values = {leaf: next(rewards) for leaf in leaves}
        shares = dict(zip(tree.leaves, tree.leaf_weights(), strict=True))
        weights = shares if weighting == "inverse_branching" else dict.fromkeys(leaves, 1 / len(leaves))
        for leaf in leaves:
            expected = [
                slow_segment_value(tree, values, weights, node, estimator) * weights[leaf] * len(leaves)
                for node in tree.path(leaf)
                for _ in tree.nodes[node].token_ids
            ]
            row = next(advantages).tolist()
            assert row[: len(expected)] == pytest.approx(expected, abs=1e-5)
            assert not any(row[len(expected) :])
            num_values.add(len({round(value, 6) for value in expected}))
    assert max(num_values) > 1


def test_subgroup_rejection_leaves_out_equal_subgroups(tmp_path: Path, tiny_model_dir: str) -> None:
    def coarse(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(ids[0] % 2) if len(ids) % 3 else 0.5 for ids in completion_ids]  # often equal in a subgroup

    config = make_config(tmp_path, subgroup_rejection=True, scale_rewards="none", max_steps=4)
    trainer = build(SpyTrainer, tiny_model_dir, config, reward_funcs=coarse)
    trainer.train()
    differs = False
    for generation in trainer.generations:
        expected = expected_advantages(generation, "none", rejection=True)
        torch.testing.assert_close(generation["output"]["advantages"], expected, atol=1e-5, rtol=1e-4)
        differs |= not torch.allclose(expected, expected_advantages(generation, "none"))
    assert differs


def test_leaf_weighting_weights_the_loss(tmp_path: Path, tiny_model_dir: str) -> None:
    """`inverse_branching`: weighted group mean, and W times the weight on each leaf's advantage."""
    config = make_config(
        tmp_path, leaf_weighting="inverse_branching", advantage_estimator="grpo", scale_rewards="none", max_steps=4
    )
    trainer = build(SpyTrainer, tiny_model_dir, config)
    trainer.train()
    uneven = False
    for generation in trainer.generations:
        advantages = generation["output"]["advantages"]
        assert advantages.dim() == 2
        for i, tree in enumerate(generation["trees"]):
            rewards = generation["rewards"][i * 4 : i * 4 + 4, 0].tolist()
            weights = []
            for leaf in tree.depth_first_leaves():
                weight = 1.0
                for node in tree.path(leaf):
                    parent = tree.nodes[node].parent
                    weight /= len(tree.root_children if parent is None else tree.nodes[parent].children)
                weights.append(weight)
            assert sum(weights) == pytest.approx(1)
            uneven |= len(set(weights)) > 1
            mean = sum(w * r for w, r in zip(weights, rewards, strict=True))
            expected = [4 * w * (r - mean) for w, r in zip(weights, rewards, strict=True)]
            assert advantages[i * 4 : i * 4 + 4, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert uneven


def test_logged_advantages_are_the_trees(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, log_completions=True, scale_rewards="group"))
    trainer.train()
    for step, generation in enumerate(trainer.generations, start=1):
        expected = expected_advantages(generation, "group")[:, 0].tolist()
        assert generation["logged"] == pytest.approx(expected, abs=1e-4)
        table = pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        assert len(table) == 2 * NUM_GENERATIONS
        assert table["advantage"].tolist() == pytest.approx(expected, abs=1e-4)
        assert table["parity_reward"].tolist() == pytest.approx(generation["rewards"][:, 0].tolist(), abs=1e-6)
    assert list(trainer._logs["advantages"]) == pytest.approx(trainer.generations[-1]["logged"])


def test_logged_advantages_keep_their_place_over_generations(tmp_path: Path, tiny_model_dir: str) -> None:
    """One generation for two logged steps, then the next: old entries are neither lost nor doubled."""
    config = make_config(
        tmp_path, log_completions=True, per_device_train_batch_size=4, steps_per_generation=2, max_steps=4
    )
    trainer = build(SpyTrainer, tiny_model_dir, config)
    trainer.train()
    assert len(trainer.generations) == 2
    for log in ("prompt", "completion", "advantages"):
        assert len(trainer._logs[log]) == 8
    expected = expected_advantages(trainer.generations[-1], "group")[:, 0].tolist()
    assert list(trainer._logs["advantages"]) == pytest.approx(expected, abs=1e-4)


# Rewards


def test_several_rewards_are_weighted(tmp_path: Path, tiny_model_dir: str) -> None:
    config = make_config(tmp_path, reward_weights=[0.5, 2.0], scale_rewards="none")
    trainer = build(SpyTrainer, tiny_model_dir, config, reward_funcs=[parity_reward, length_reward])
    trainer.train()
    for generation in trainer.generations:
        assert generation["rewards"].shape == (8, 2)
        generation["rewards"] = generation["rewards"] * torch.tensor([0.5, 2.0])
        expected = expected_advantages(generation, "none")
        torch.testing.assert_close(generation["output"]["advantages"], expected, atol=1e-4, rtol=1e-4)
    assert all(log["rewards/length_reward/mean"] > 0 for log in trainer.state.log_history if "loss" in log)


def test_normalize_then_sum(tmp_path: Path, tiny_model_dir: str) -> None:
    """TRL's other aggregation: without branching below the root it must give stock's advantages."""
    changes = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.3]}
    config = make_config(tmp_path / "a", branching_factor=1, advantage_estimator="treepo", **changes)
    rewards = [parity_reward, length_reward]
    ours = build(SpyTrainer, tiny_model_dir, config, reward_funcs=rewards)
    ours.train()
    stock_config = GRPOConfig(output_dir=str(tmp_path / "b"), **SETTINGS, **changes)
    stock = build(ReplayStockTrainer, tiny_model_dir, stock_config, reward_funcs=rewards)
    stock.recorded = ours.completions
    stock.train()
    assert_same_run(ours, stock)


def test_async_reward(tmp_path: Path, tiny_model_dir: str) -> None:
    async def slow_parity(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0.01)
        return parity_reward(completion_ids)

    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path), reward_funcs=[slow_parity, parity_reward])
    trainer.train()
    for generation in trainer.generations:
        rewards = generation["rewards"]
        assert torch.equal(rewards[:, 0], rewards[:, 1])
        torch.testing.assert_close(
            generation["output"]["advantages"], expected_advantages(generation, "group"), atol=1e-4, rtol=1e-3
        )


@pytest.mark.parametrize("dataset", [plain_prompts, chat_prompts])
def test_reward_model(tmp_path: Path, tiny_model_dir: str, dataset: Callable[[], Dataset]) -> None:
    policy = make_model()
    torch.manual_seed(1)
    reward_model = Qwen2ForSequenceClassification(
        policy.config.__class__(**{**policy.config.to_dict(), "num_labels": 1})
    )
    reward_tokenizer = make_tokenizer()
    trainer = build(
        SpyTrainer,
        tiny_model_dir,
        make_config(tmp_path),
        reward_funcs=reward_model,
        reward_processing_classes=reward_tokenizer,
        train_dataset=dataset(),
    )
    trainer.train()
    for generation in trainer.generations:
        rewards = generation["rewards"][:, 0]
        assert rewards.std() > 0
        torch.testing.assert_close(
            generation["output"]["advantages"], expected_advantages(generation, "group"), atol=1e-4, rtol=1e-3
        )
        if dataset is chat_prompts:
            continue
        tree = generation["trees"][0]
        leaf = tree.depth_first_leaves()[0]
        text = generation["inputs"][0]["prompt"] + reward_tokenizer.decode(
            tree.completion_ids(leaf), skip_special_tokens=True
        )
        ids = reward_tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            assert reward_model(ids).logits.item() == pytest.approx(rewards[0].item(), abs=1e-4)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_rewards_are_left_out(tmp_path: Path, tiny_model_dir: str, missing: float | None) -> None:
    """The first leaf of each tree is scored by no function, the second by one of two."""

    def first(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [missing if i % 4 < 2 else r for i, r in enumerate(parity_reward(completion_ids))]

    def second(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [missing if i % 4 == 0 else 2 * r for i, r in enumerate(parity_reward(completion_ids))]

    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, log_trees=True), reward_funcs=[first, second])
    trainer.train()
    for generation in trainer.generations:
        assert torch.isnan(generation["rewards"]).sum() == 6
        advantages = generation["output"]["advantages"]
        torch.testing.assert_close(advantages, expected_advantages(generation, "group"), atol=1e-4, rtol=1e-3)
        assert (advantages[::4] == 0).all()
        assert advantages[1::4, 0].abs().min() > 0
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    record = json.loads((tmp_path / "trees/trees_000000.jsonl").read_text().splitlines()[0])
    assert record["rewards"][0] is None


def test_no_reward_at_all_moves_nothing(tmp_path: Path, tiny_model_dir: str) -> None:
    def nothing(completions: list[str], **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path), reward_funcs=nothing)
    before = parameters_of(trainer)
    trainer.train()
    assert largest_change(before, parameters_of(trainer)) == 0


def test_dataset_columns_reach_the_reward(tmp_path: Path, tiny_model_dir: str) -> None:
    calls = []

    def check(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[str], **kwargs: Any
    ) -> list[float]:
        calls.append((prompts, completions, completion_ids, answer, kwargs["trainer_state"].global_step))
        return parity_reward(completion_ids)

    dataset = plain_prompts()
    dataset = dataset.add_column("answer", [f"answer to {p}" for p in dataset["prompt"]])
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path), reward_funcs=check, train_dataset=dataset)
    trainer.train()
    tokenizer = make_tokenizer()
    assert [call[-1] for call in calls] == [0, 1]
    for (prompts, completions, completion_ids, answers, _), trees in zip(calls, trainer.all_trees, strict=True):
        assert answers == [f"answer to {p}" for p in prompts]
        for i, (tree, leaf) in enumerate((t, leaf) for t in trees for leaf in t.depth_first_leaves()):
            assert tokenizer(prompts[i])["input_ids"] == tree.prompt_ids
            assert completion_ids[i] == tree.completion_ids(leaf)
            assert completions[i] == tokenizer.decode(completion_ids[i], skip_special_tokens=True)


# Prompts and datasets


def test_conversational_prompts(tmp_path: Path, tiny_model_dir: str) -> None:
    seen = []

    def reward(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return parity_reward(completion_ids)

    trainer = build(
        SpyTrainer, tiny_model_dir, make_config(tmp_path), train_dataset=chat_prompts(), reward_funcs=reward
    )
    trainer.train()
    tokenizer = make_tokenizer()
    for prompt, completion in seen:
        assert prompt[0]["role"] == "user"
        assert completion[0]["role"] == "assistant"
        assert isinstance(completion[0]["content"], str)
    expected = tokenizer.apply_chat_template(seen[0][0], add_generation_prompt=True, return_dict=False)
    assert trainer.all_trees[0][0].prompt_ids == expected


def test_stop_pattern_ends_conversational_paths(tmp_path: Path, tiny_model_dir: str) -> None:
    pattern = r"w\d*5\b"
    config = make_config(tmp_path, stop_pattern=pattern, log_trees=True, max_steps=3)
    seen = []

    def reward(completions: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        seen.extend(completion[0]["content"] for completion in completions)
        return parity_reward(completion_ids)

    trainer = build(SpyTrainer, tiny_model_dir, config, train_dataset=chat_prompts(), reward_funcs=reward)
    trainer.train()
    tokenizer = make_tokenizer()
    ended = 0
    for tree in (tree for trees in trainer.all_trees for tree in trees):
        for leaf in tree.leaves:
            words = tokenizer.decode(tree.completion_ids(leaf), skip_special_tokens=True).split()
            matches = [i for i, word in enumerate(words) if word.startswith("w") and word.endswith("5")]
            if tree.nodes[leaf].finish_reason == "pattern":
                ended += 1
                assert matches == [len(words) - 1], words
            else:
                assert not [i for i in matches if i < len(words) - 1], words
    assert ended > 3
    assert seen
    for log in trainer.state.log_history:
        if "loss" in log:
            assert log["tree/decoded_tokens"] >= log["tree/unique_tokens"]
    assert sum(logs_of(trainer, "tree/finish_pattern_frac")) > 0
    assert sum(logs_of(trainer, "tree/decoded_tokens")) > sum(logs_of(trainer, "tree/unique_tokens"))


@pytest.mark.parametrize("kind", ["map", "generator"])
def test_iterable_dataset(tmp_path: Path, tiny_model_dir: str, kind: str) -> None:
    if kind == "map":
        dataset = plain_prompts(4).to_iterable_dataset()
    else:
        dataset = IterableDataset.from_generator(lambda: ({"prompt": p} for p in plain_prompts(4)["prompt"]))
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, max_steps=3), train_dataset=dataset)
    trainer.train()
    assert trainer.state.global_step == 3
    for generation in trainer.generations:
        assert [g["prompt"] for g in generation["inputs"][:4]] == [generation["inputs"][0]["prompt"]] * 4
        assert len(generation["trees"]) == 2
        torch.testing.assert_close(
            generation["output"]["advantages"], expected_advantages(generation, "group"), atol=1e-4, rtol=1e-3
        )


# Evaluation


@pytest.mark.parametrize("packing", ["auto", "sdpa", "off"])
def test_evaluation_samples_independently(tmp_path: Path, tiny_model_dir: str, packing: str) -> None:
    config = make_config(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        tree_packing=packing,
        max_steps=3,
        beta=0.1,
    )
    trainer = build(SpyTrainer, tiny_model_dir, config, eval_dataset=plain_prompts(4))
    trainer.train()
    assert len(trainer.all_trees) == len(trainer.generations) == 3  # trees for training alone
    assert len(trainer.evaluations) == 3 * 2  # 4 prompts x 2 completions in batches of 4
    for evaluation in trainer.evaluations:
        assert evaluation["output"]["advantages"].shape == (4,)
    for key in ("eval_reward", "eval_loss", "eval_rewards/parity_reward/mean", "eval_completions/mean_length"):
        values = logs_of(trainer, key)
        assert len(values) == 3
        assert all(value == value for value in values)
    evaluated = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert not [key for log in evaluated for key in log if "tree/" in key and "packing" not in key]
    rewards = [e["rewards"].mean().item() for e in trainer.evaluations]
    assert logs_of(trainer, "eval_reward")[0] == pytest.approx((rewards[0] + rewards[1]) / 2, abs=1e-5)
    assert all(len(tree.leaves) == 4 for trees in trainer.all_trees for tree in trees)


def test_evaluation_does_not_disturb_training(tmp_path: Path, tiny_model_dir: str) -> None:
    """With two steps per generation an evaluation falls between the sampling and the use of a batch."""
    changes = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "max_steps": 4, "loss_type": "grpo"}
    alone = build(SpyTrainer, tiny_model_dir, make_config(tmp_path / "a", **changes))
    alone.train()
    config = make_config(tmp_path / "b", eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, **changes)
    evaluated = build(ReplayTrainer, tiny_model_dir, config, eval_dataset=plain_prompts(2))
    evaluated.recorded = alone.all_trees
    evaluated.train()
    assert_same_parameters(parameters_of(alone), parameters_of(evaluated))
    assert len(logs_of(evaluated, "eval_reward")) == 4


def test_evaluate_before_training(tmp_path: Path, tiny_model_dir: str) -> None:
    config = make_config(tmp_path, per_device_eval_batch_size=4)
    trainer = build(SpyTrainer, tiny_model_dir, config, eval_dataset=plain_prompts(2))
    metrics = trainer.evaluate()
    assert trainer.all_trees == []
    assert "eval_loss" in metrics
    assert len(trainer.evaluations) == 2


# Sampling from the current policy


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_logprobs_are_those_of_the_current_weights(tmp_path: Path, tiny_model_dir: str, kind: str) -> None:
    """No state of older weights is reused: after each of several large steps the engine agrees with a full forward."""
    peft = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3) if kind == "lora" else None
    config = make_config(tmp_path, max_steps=4, learning_rate=2.0, temperature=0.8)
    trainer = build(SpyTrainer, tiny_model_dir, config, train_dataset=plain_prompts(2), peft_config=peft)
    generate = trainer._generate_single_turn
    differences, firsts = [], []

    def checked(*args: Any, **kwargs: Any) -> Any:
        result = generate(*args, **kwargs)
        assert trainer.model.training
        trainer.model.eval()
        for tree in trainer._trees:
            for leaf in tree.leaves:
                completion = tree.completion_ids(leaf)
                ids = torch.tensor([tree.prompt_ids + completion])
                with torch.no_grad():
                    logits = trainer.model(ids).logits[0, len(tree.prompt_ids) - 1 : -1] / 0.8
                expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
                differences.append((expected - torch.tensor(tree.logprobs(leaf))).abs().max().item())
        firsts.append(trainer.model(torch.tensor([[5, 6, 7]])).logits[0, -1].detach())
        trainer.model.train()
        return result

    trainer._generate_single_turn = checked
    trainer.train()
    assert len(firsts) == 4
    assert max(differences) < 1e-4
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(firsts)), "the policy moved"


def test_dropout_is_off_in_sampling_and_on_in_training(tmp_path: Path) -> None:
    model = make_model(attention_dropout=0.5)
    trainer = build(SpyTrainer, model, make_config(tmp_path, model_init_kwargs=None))
    modes, in_loss = [], []
    collect = trainer.sampler.engine.collect
    trainer.sampler.engine.collect = lambda: (modes.append(trainer.model.training), collect())[1]
    compute_loss = trainer._compute_loss
    trainer._compute_loss = lambda m, i: (in_loss.append(m.training), compute_loss(m, i))[1]
    trainer.train()
    assert modes
    assert not any(modes)
    assert in_loss == [True, True]


def test_model_is_back_in_train_mode_after_a_failed_sampling(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path))
    engine = trainer.sampler.engine
    collect = engine.collect

    def fail() -> Any:
        raise RuntimeError("engine failure")

    engine.collect = fail
    with pytest.raises(RuntimeError, match="engine failure"):
        trainer.train()
    assert trainer.model.training
    engine.collect = collect
    trainer.train()
    assert trainer.state.global_step == 2


def test_sampling_leaves_attention_and_checkpointing_as_they_were(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, gradient_checkpointing=True))
    states = []
    compute_loss = trainer._compute_loss

    def spy(model: Any, inputs: Any) -> torch.Tensor:
        states.append((model.is_gradient_checkpointing, model.config._attn_implementation, model.training))
        return compute_loss(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    assert states == [(True, "sdpa", True)] * 2


def test_same_seed_same_run(tmp_path: Path, tiny_model_dir: str) -> None:
    runs = []
    for seed in (7, 7, 8):
        trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, seed=seed))
        trainer.train()
        runs.append([tree.to_dict() for trees in trainer.all_trees for tree in trees])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_steps_of_a_run_branch_differently(tmp_path: Path, tiny_model_dir: str) -> None:
    """The sampler's seed is a new one for each generation, also within one optimizer step."""
    trainer = build(
        SpyTrainer, tiny_model_dir, make_config(tmp_path, gradient_accumulation_steps=2, steps_per_generation=1)
    )
    seeds = []
    sample = trainer.sampler.sample
    trainer.sampler.sample = lambda prompts, seed, **k: (seeds.append(seed), sample(prompts, seed, **k))[1]
    trainer.train()
    assert len(seeds) == 4
    assert len(set(seeds)) == 4


def test_the_sampler_knows_the_progress_and_the_last_batchs_mean_length(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, max_steps=4))
    told, trees_of = [], []
    sample = trainer.sampler.sample

    def recording(prompts: list[list[int]], seed: str, **kwargs: Any) -> list[SegmentTree]:
        told.append(kwargs)
        trees_of.append(sample(prompts, seed, **kwargs))
        return trees_of[-1]

    trainer.sampler.sample = recording
    trainer.train()
    assert [kwargs["progress"] for kwargs in told] == [0.0, 0.25, 0.5, 0.75]
    assert told[0]["expected_length"] is None  # nothing is known yet: the cap
    logged = [log["tree/mean_length"] for log in trainer.state.log_history if "tree/mean_length" in log]
    for kwargs, trees, value in zip(told[1:], trees_of, logged, strict=False):
        lengths = [
            sum(w * tree.nodes[leaf].end for w, leaf in zip(tree.leaf_weights(), tree.leaves, strict=True))
            for tree in trees
        ]
        assert value == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)
        assert kwargs["expected_length"] == pytest.approx(value, abs=0.51)


def test_branching_by_entropy_trains(tmp_path: Path, tiny_model_dir: str) -> None:
    args = make_config(tmp_path, branching_policy="entropy", branching_temperature=0.2, branching_temperature_end=1.0)
    trainer = build(SpyTrainer, tiny_model_dir, args)
    trainer.train()
    nodes = [node for trees in trainer.all_trees for tree in trees for node in tree.nodes]
    assert nodes
    # A uniform distribution over the 65 tokens has the largest entropy.
    assert all(node.entropy is not None and 0 < node.entropy <= math.log(65) + 1e-4 for node in nodes)
    assert len({node.entropy for node in nodes}) > len(nodes) // 2


# TRL's features


def test_old_logprobs_for_several_iterations(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, num_iterations=2, max_steps=4))
    trainer.train()
    assert len(trainer.generations) == 2
    for generation in trainer.generations:
        old, mask = generation["output"]["old_per_token_logps"], generation["output"]["completion_mask"]
        for i, (tree, leaf) in enumerate((t, leaf) for t in generation["trees"] for leaf in t.depth_first_leaves()):
            logprobs = tree.logprobs(leaf)  # temperature 1, nothing cut off: the policy's own
            assert old[i, : len(logprobs)].tolist() == pytest.approx(logprobs, abs=1e-4)
            assert mask[i].sum() == len(logprobs)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_kl_to_the_reference_model(tmp_path: Path, tiny_model_dir: str, kind: str) -> None:
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if kind == "lora" else None
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, beta=0.1, max_steps=3), peft_config=peft)
    assert (trainer.ref_model is None) == (kind == "lora")
    trainer.train()
    kl = logs_of(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[2] > 1e-6
    reference = make_model().eval()
    generation = trainer.generations[-1]
    tree = generation["trees"][0]
    completion = tree.completion_ids(tree.depth_first_leaves()[0])
    with torch.no_grad():
        logits = reference(torch.tensor([tree.prompt_ids + completion])).logits[0, len(tree.prompt_ids) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
    got = generation["output"]["ref_per_token_logps"][0, : len(completion)]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_the_adapter_alone(tmp_path: Path, tiny_model_dir: str, checkpointing: bool) -> None:
    config = make_config(tmp_path, gradient_checkpointing=checkpointing)
    trainer = build(SpyTrainer, tiny_model_dir, config, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    before = parameters_of(trainer)
    trainer.train()
    after = parameters_of(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert any("lora_B" in name for name in changed)
    base = {name: p for name, p in after.items() if "lora_" not in name}
    assert all(not p.requires_grad for name, p in trainer.model.named_parameters() if name in base)


def test_peft_model_as_model(tmp_path: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear"))
    trainer = build(SpyTrainer, model, make_config(tmp_path))
    before = parameters_of(trainer)
    trainer.train()
    after = parameters_of(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_mask_truncated_completions(tmp_path: Path, tiny_model_dir: str) -> None:
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, mask_truncated_completions=True, max_steps=3))
    trainer.train()
    num_masked = num_kept = 0
    for generation in trainer.generations:
        mask = generation["output"]["completion_mask"]
        leaves = [(tree, leaf) for tree in generation["trees"] for leaf in tree.depth_first_leaves()]
        for i, (tree, leaf) in enumerate(leaves):
            ids = tree.completion_ids(leaf)
            ended = ids[-1] in (0, 1)  # TRL counts EOS and padding as ended
            assert mask[i].sum() == (len(ids) if ended else 0)
            num_kept, num_masked = num_kept + ended, num_masked + (not ended)
    assert num_masked
    assert num_kept


def test_truncated_rows_are_logged_with_their_advantage(tmp_path: Path, tiny_model_dir: str) -> None:
    """As GRPOTrainer does: the table and the tree log show what a completion was worth, masked or not."""
    for estimator in ("grpo", "treepo"):
        config = make_config(
            tmp_path, mask_truncated_completions=True, log_trees=True, max_steps=1, advantage_estimator=estimator
        )
        trainer = build(SpyTrainer, tiny_model_dir, config)
        trainer.train()
        (generation,) = trainer.generations
        assert (generation["output"]["completion_mask"].sum(1) == 0).any()
        expected = expected_advantages(generation, "group", estimator=estimator)[:, 0].tolist()
        assert generation["logged"] == pytest.approx(expected, abs=1e-4), estimator
        records = [json.loads(line) for line in (tmp_path / "trees/trees_000000.jsonl").read_text().splitlines()]
        assert [a for record in records for a in record["advantages"]] == pytest.approx(expected, abs=1e-4), estimator


def test_all_completions_truncated_moves_nothing(tmp_path: Path, tiny_model_dir: str) -> None:
    config = make_config(
        tmp_path, mask_truncated_completions=True, max_completion_length=2, segment_length=1, max_steps=1
    )
    trainer = build(SpyTrainer, tiny_model_dir, config)
    before = parameters_of(trainer)
    trainer.train()
    assert trainer.generations[0]["output"]["completion_mask"].sum() == 0, "choose a seed without EOS"
    assert largest_change(before, parameters_of(trainer)) == 0


def test_callbacks_see_metrics_and_can_stop(tmp_path: Path, tiny_model_dir: str) -> None:
    class Stop(TrainerCallback):
        def __init__(self) -> None:
            self.logs: list[dict[str, float]] = []
            self.steps = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps += 1
            control.should_training_stop = state.global_step == 2

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.logs.append(dict(logs))

    stop = Stop()
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, max_steps=5), callbacks=[stop])
    trainer.train()
    assert stop.steps == trainer.state.global_step == 2
    assert sum("tree/leaf_tokens" in log for log in stop.logs) == 2


def test_optimizers_are_used(tmp_path: Path, tiny_model_dir: str) -> None:
    model = make_model()
    only = [model.model.norm.weight]
    optimizer = torch.optim.SGD(only, lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = build(SpyTrainer, model, make_config(tmp_path), optimizers=(optimizer, scheduler))
    before = parameters_of(trainer)
    trainer.train()
    after = parameters_of(trainer)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["model.norm.weight"]


@pytest.mark.parametrize("kind", ["full", "lora", "two steps per generation", "spread"])
def test_resume_continues_the_run(tmp_path: Path, tiny_model_dir: str, kind: str) -> None:
    """Four steps in one go, and two steps with a fresh trainer from the checkpoint after the second."""

    def make(folder: str) -> Any:
        peft = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if kind == "lora" else None
        changes: dict[str, Any] = {}
        if "two" in kind:
            changes = {"per_device_train_batch_size": 4, "steps_per_generation": 2}
        if kind == "spread":  # branches over the last batch's mean length
            changes = {"branch_schedule": "spread", "max_completion_length": 40, "segment_length": 3}
        config = make_config(
            tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch",
            learning_rate=1e-2, lr_scheduler_type="linear", **changes,
        )  # fmt: skip
        return build(TreePOTrainer, tiny_model_dir, config, peft_config=peft)

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same_parameters(parameters_of(whole), parameters_of(resumed), 1e-6)
    assert logs_of(whole, "reward") == pytest.approx(logs_of(resumed, "reward"), abs=1e-6)
    card = (tmp_path / "whole/README.md").read_text()
    assert "TreePO" in card
    assert "2508.17445" in card


def test_saved_model_can_be_loaded(tmp_path: Path, tiny_model_dir: str) -> None:
    from transformers import AutoModelForCausalLM

    trainer = build(TreePOTrainer, tiny_model_dir, make_config(tmp_path))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32")
    for (name, a), b in zip(trainer.model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("args", ["default", "bf16"])
def test_default_precision(tmp_path: Path, tiny_model_dir: str, args: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's defaults (bfloat16 autocast, gradient checkpointing, packing by rule) run."""
    monkeypatch.chdir(tmp_path)
    changes = {"bf16": True, "gradient_checkpointing": True}
    if args == "bf16":
        changes["model_init_kwargs"] = {"dtype": "bfloat16"}
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, **changes))
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.isfinite(torch.tensor(logs_of(trainer, "loss"))))
    assert trainer._packed_forward.checked


def test_args_may_be_left_out(tmp_path: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "transformers.training_args.is_torch_bf16_gpu_available", lambda: True
    )  # TRL's default is bf16
    trainer = TreePOTrainer(model=tiny_model_dir, reward_funcs=parity_reward, train_dataset=plain_prompts())
    assert isinstance(trainer.args, TreePOConfig)
    assert trainer.args.output_dir.endswith("-TreePO")
    assert trainer.args.num_generations == 8


# Tree metrics and the tree log


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"branch_schedule": "spread"},
        {"branching_policy": "low_prob", "fallback_policy": "low_prob"},
        {"initial_branching_factor": [1, 3], "branching_factor": 4},
        {"branching_factor": 1},
    ],
    ids=lambda changes: "-".join(changes) or "defaults",
)
def test_tree_metrics_are_those_of_the_trees(tmp_path: Path, tiny_model_dir: str, changes: dict[str, Any]) -> None:
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, stop_repetition=False, **changes))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == len(trainer.all_trees) == 2
    for log, trees in zip(logs, trainer.all_trees, strict=True):
        unique = sum(len(node.token_ids) for tree in trees for node in tree.nodes)
        lengths = [len(tree.completion_ids(leaf)) for tree in trees for leaf in tree.leaves]
        paths = [tree.path(leaf) for tree in trees for leaf in tree.leaves]
        assert len(lengths) == 8
        assert log["tree/unique_tokens"] == unique
        assert log["tree/leaf_tokens"] == sum(lengths)
        assert log["tree/decoded_tokens"] == unique  # nothing is thrown away without a stop pattern
        assert log["tree/leaf_unique_ratio"] == pytest.approx(sum(lengths) / unique)
        assert log["tree/depth_mean"] == pytest.approx(sum(map(len, paths)) / 8)
        reasons = ("stop", "pattern", "repetition", "length")
        assert sum(log[f"tree/finish_{reason}_frac"] for reason in reasons) == pytest.approx(1)
        num_stopped = sum(tree.completion_ids(leaf)[-1] == 0 for tree in trees for leaf in tree.leaves)
        assert log["tree/finish_stop_frac"] == pytest.approx(num_stopped / 8)
        assert 0 <= log["tree/fallback_frac"] <= 1
        assert log["tree/engine_seconds"] > 0
        assert log["tree/sampler_seconds"] >= 0
        assert log["completions/mean_length"] == pytest.approx(sum(lengths) / 8)


def test_tree_metrics_sum_over_generations(tmp_path: Path, tiny_model_dir: str) -> None:
    """One optimizer step over two generations logs the mean of both, as GRPOTrainer's metrics do."""
    config = make_config(tmp_path, gradient_accumulation_steps=2, steps_per_generation=1, max_steps=1)
    trainer = build(SpyTrainer, tiny_model_dir, config)
    trainer.train()
    totals = [sum(tree.num_leaf_tokens for tree in trees) for trees in trainer.all_trees]
    assert len(totals) == 2
    assert logs_of(trainer, "tree/leaf_tokens") == [pytest.approx(sum(totals) / 2)]


@pytest.mark.parametrize("estimator", ["treepo", "grpo"])
def test_tree_log_reads_back(tmp_path: Path, tiny_model_dir: str, estimator: str) -> None:
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, log_trees=True, advantage_estimator=estimator))
    trainer.train()
    files = sorted((tmp_path / "trees").iterdir())
    assert [file.name for file in files] == ["trees_000000.jsonl", "trees_000001.jsonl"]
    for step, (file, generation) in enumerate(zip(files, trainer.generations, strict=True)):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(records) == 2
        for i, (record, tree) in enumerate(zip(records, generation["trees"], strict=True)):
            assert record["step"] == step
            read = SegmentTree.from_dict(record["tree"])
            assert read.to_dict() == tree.to_dict()
            assert record["prompt"] == generation["inputs"][4 * i]["prompt"]
            assert record["rows"] == tree.depth_first_leaves()
            assert record["rewards"] == pytest.approx(generation["rewards"][4 * i : 4 * i + 4, 0].tolist())
            expected = expected_advantages(generation, "group", estimator=estimator)[4 * i : 4 * i + 4, 0]
            assert record["advantages"] == pytest.approx(expected.tolist(), abs=1e-4)
            for leaf, reward in zip(record["rows"], record["rewards"], strict=True):
                assert parity_reward([read.completion_ids(leaf)])[0] == pytest.approx(reward, abs=1e-5)


def test_tree_log_holds_every_generation_of_a_step(tmp_path: Path, tiny_model_dir: str) -> None:
    config = make_config(tmp_path, log_trees=True, gradient_accumulation_steps=2, steps_per_generation=1, max_steps=1)
    for _ in range(2):  # a second run into the same folder writes its steps anew
        build(SpyTrainer, tiny_model_dir, config).train()
        lines = (tmp_path / "trees/trees_000000.jsonl").read_text().splitlines()
        assert len(lines) == 4


def test_no_tree_log_by_default(tmp_path: Path, tiny_model_dir: str) -> None:
    build(TreePOTrainer, tiny_model_dir, make_config(tmp_path, max_steps=1)).train()
    assert not (tmp_path / "trees").exists()


def test_an_infinite_reward_is_left_out(tmp_path: Path, tiny_model_dir: str) -> None:
    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float("inf"), *(float(len(c.split()) % 3) for c in completions[1:])]

    trainer = TreePOTrainer(
        model=tiny_model_dir,
        reward_funcs=reward,
        args=make_config(tmp_path, max_steps=1),
        train_dataset=plain_prompts(),
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())  # the others count
