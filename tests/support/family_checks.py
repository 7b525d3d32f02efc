"""What `docs/models.md` says about a family, found out on a tiny random model of it."""

import copy
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from tests.support.families import Family
from tests.support.models import make_tokenizer
from tests.support.rows import Batch, batch_of, plain, trees
from tests.support.segments import EOS, PROMPTS, complete, drain, full_logprobs
from treepo_trl import TreeSampler, TreeSamplingConfig
from treepo_trl.engines import SamplingOptions, SegmentEngine, SegmentRequest
from treepo_trl.engines.for_model import engine_for_model, why_no_slots
from treepo_trl.engines.own_model import OwnModelEngine
from treepo_trl.model_support import layer_reaches
from treepo_trl.update.packable import why_no_trees, why_not_packable
from treepo_trl.update.packed_forward import model_inputs
from treepo_trl.update.packing import pack_rows


@dataclass(frozen=True)
class Facts:
    """What `docs/models.json` has of a family beside vLLM's part."""

    no_slots: str | None
    """Why the transformers engine copies whole states."""
    not_packed: str | None
    """Why rows stay plain."""
    not_trained: str | None
    """Why the trainer cannot take the family."""
    padding: bool
    """Whether plain rows depend on their padding."""
    experts_stay: bool
    """Whether QLoRA leaves experts as they are; everything else of weight is in 4 bits."""


def facts_of(family: Family, folder: Path) -> Facts:
    """What can be said without sampling; `folder` gets the model in 4 bits."""
    model, in_four_bits = family.model(), quantized(family, folder)
    linear = [p.dtype for name, p in in_four_bits.named_parameters() if name.endswith("_proj.weight")]
    assert torch.uint8 in linear or not linear
    return Facts(
        why_no_slots(model),
        why_not_packed(model),
        why_not_trained(family),
        padding_error(model) > 1e-3,
        any("experts" in name and p.dtype != torch.uint8 for name, p in in_four_bits.named_parameters()),
    )


@dataclass(frozen=True)
class Packed:
    """How far packed rows are from plain ones."""

    logps: float
    """Largest difference of a log-probability, in nats."""
    gradients: float
    """Norm of the difference of the gradients, over that of the plain ones."""


# Sampling with transformers


def sample_segments(model: PreTrainedModel) -> tuple[OwnModelEngine, float]:
    """The engine of a model, and how far what it samples is from a plain forward: segments, forks, a cut path."""
    torch.manual_seed(1)
    engine = engine_for_model(model, [EOS], SamplingOptions())
    completions, logprobs = complete(engine, PROMPTS, 3, 12)
    worst = max(_distance(model, prompt, *rows) for prompt, *rows in zip(PROMPTS, completions, logprobs, strict=True))
    path = [*PROMPTS[-1], 3, 4]  # behind a prefix that is kept, and not to the end of a segment
    forks = drain(engine, [SegmentRequest(i, path, 6) for i in range(4)])
    return engine, max(worst, *(_distance(model, path, fork.token_ids, fork.logprobs) for fork in forks.values()))


def _distance(model: PreTrainedModel, prompt: list[int], completion: list[int], logprobs: list[float]) -> float:
    return (torch.tensor(logprobs) - full_logprobs(model, prompt, completion)).abs().max().item()


# The packed update

LONG = [(7 * i) % 60 + 5 for i in range(24)]


def batches() -> dict[str, Batch]:
    """Windows of `WINDOW` tokens are shorter than these paths, and longer than some of their segments."""
    return {
        "two trees": trees(2),
        "one leaf": batch_of([LONG[:5]], [LONG[5:14]]),
        "identical leaves": batch_of([LONG[:3]] * 3, [LONG[3:12]] * 3),
        "segments of one token": batch_of([LONG[:2]] * 4, [[9, 8 + i // 2, 30 + i] for i in range(4)]),
        "long trunk": batch_of([LONG[:20]] * 4, [[40, 41 + i // 2, 50 + i, *LONG[:i]] for i in range(4)]),
    }


def why_not_packed(model: PreTrainedModel) -> str | None:
    """As `packed_forward_for` asks."""
    return why_not_packable(model.config.get_text_config()) or why_no_trees(model)


def compare_packed(model: PreTrainedModel, batch: Batch) -> Packed:
    """A model's packed rows beside its plain ones."""
    ids, mask, num_scored = batch
    config = model.config.get_text_config()
    packed = pack_rows(*batch)
    inputs = model_inputs(packed, config._attn_implementation, torch.float32, "sdpa", layer_reaches(config))
    labels = inputs.pop("shift_labels")
    assert isinstance(labels, torch.Tensor)
    rows = _logps(model(input_ids=ids, attention_mask=mask).logits[:, -num_scored - 1 : -1], ids[:, -num_scored:])
    value = packed.unpack(_logps(model(**inputs).logits, labels.clamp(min=0)))
    weights = torch.randn(packed.index.shape, generator=torch.Generator().manual_seed(0)) * packed.is_scored
    expected, gradient = _gradients(model, rows, weights), _gradients(model, value, weights)
    return Packed(
        ((value - rows).masked_fill(~packed.is_scored, 0)).abs().max().item(),
        ((gradient - expected).norm() / expected.norm()).item(),
    )


def _logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(2, labels[:, :, None])[:, :, 0]


def _gradients(model: PreTrainedModel, logps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    (logps * weights).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def why_not_trained(family: Family) -> str | None:
    """Why `GRPOTrainer` cannot take the family's log-probabilities; `None` if it can."""
    model = family.model()
    try:
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        plain(model, *trees(1))
    except AttributeError as error:
        without_class = re.sub(r"^'\w+' object", "it", str(error))  # whose name differs between versions
        return f"TRL's loss cannot read the output of {type(model).__name__} ({without_class})"
    return None


def padding_error(model: Any) -> float:
    """Largest difference that padding makes to a plain row's log-probabilities, in nats."""
    ids, mask, num_scored = batches()["two trees"]
    worst = 0.0
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        for row, row_mask, padded in zip(ids, mask.bool(), logits, strict=True):
            alone = model(input_ids=row[row_mask][None]).logits[0].log_softmax(-1)
            is_scored = row_mask.nonzero()[:, 0] >= len(row) - num_scored
            worst = max(worst, (padded[row_mask] - alone)[is_scored].abs().max().item())
    return worst


# QLoRA


def quantized(family: Family, folder: Path) -> PreTrainedModel:
    """The family's model in 4 bits."""
    family.model().save_pretrained(folder)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four_bits, dtype=torch.float32, attn_implementation=family.attention
    )


def with_adapter(family: Family, model: PreTrainedModel) -> Any:
    """The model with a random adapter; in training mode, as in evaluation bitsandbytes rounds on some CPUs."""
    adapter = LoraConfig(r=4, target_modules=family.adapted, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, adapter).train()


def adapter_gradients(policy: Any) -> dict[str, torch.Tensor | None]:
    """Gradients of everything that is trained, of a sum of log-probabilities."""
    ids, mask, num_scored = trees(1)
    logits = policy(input_ids=ids, attention_mask=mask).logits[:, -num_scored - 1 : -1]
    _logps(logits, ids[:, -num_scored:]).sum().backward()
    return {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.requires_grad}


# vLLM


@dataclass(frozen=True)
class Served:
    """What vLLM makes of a family."""

    base: float
    """Largest difference of a sampled log-probability to the model's plain forward in float32, in nats."""
    rounding: float = 0.0
    """The same of transformers' own log-probabilities of these tokens, in the number type that vLLM computes in."""
    adapter: float | None = None
    """As `base`, with an adapter in the engine."""
    adapter_rounding: float = 0.0
    """As `rounding`, with an adapter."""
    moved: float | None = None
    """How far the adapter moves the model."""
    cached: float = 0.0
    """Part of the tokens of requests that the engine has found in its prefix cache."""


def serve(family: Family, folder: Path, has_adapter: bool) -> Served:
    """Sample trees from the family's model with the real engine, in this process."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    from treepo_trl.engines.vllm import VLLMEngine, cache_options
    from treepo_trl.policy.adapter_sync import lora_engine_options
    from treepo_trl.policy.vllm_classes import give_classes_back

    dtype = getattr(torch, family.served_in)
    model = family.model().to(dtype).float()
    model.save_pretrained(folder)
    config_file = folder / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), **family.served_as}))
    make_tokenizer().save_pretrained(folder)
    llm = LLM(
        str(folder),
        dtype=family.served_in,
        max_model_len=256,
        max_num_seqs=32,
        enforce_eager=True,
        gpu_memory_utilization=0.1,
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        **cache_options(on_processor=True),
        **family.engine_options,
        **(lora_engine_options(4) if has_adapter else {}),
    )
    give_classes_back(model)
    engine = VLLMEngine(llm, [EOS], SamplingOptions())
    base, rounding = _tree_distance(engine, model, dtype)
    cached = engine.num_cached_tokens / max(engine.num_prompt_tokens, 1)
    if not has_adapter:
        return Served(base, rounding, cached=cached)
    torch.manual_seed(2)
    policy = with_adapter(family, model).eval()
    policy.save_pretrained(folder / "adapter")
    engine = VLLMEngine(llm, [EOS], SamplingOptions(), lora_request=LoRARequest("policy", 1, str(folder / "adapter")))
    served, served_rounding = _tree_distance(engine, policy, dtype)
    path = LONG[:12]
    with policy.disable_adapter():
        before = full_logprobs(policy, path[:2], path[2:])
    moved = (full_logprobs(policy, path[:2], path[2:]) - before).abs().max().item()
    return Served(base, rounding, served, served_rounding, moved, cached)


def _tree_distance(engine: SegmentEngine, model: Any, dtype: torch.dtype) -> tuple[float, float]:
    """
    Largest difference of a log-probability of sampled trees to a plain forward in float32.

    And the largest that a plain forward in `dtype` has for the same tokens.
    """
    config = TreeSamplingConfig(num_generations=8, max_completion_length=48, segment_length=16, stop_repetition=False)
    rounded = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    worst = own = 0.0
    for tree in TreeSampler(engine, config, [EOS]).sample([LONG[:9], (LONG * 3)[:40]], seed=0):
        for leaf in tree.leaves:
            path = tree.prompt_ids, tree.completion_ids(leaf)
            expected = full_logprobs(model, *path)
            worst = max(worst, (torch.tensor(tree.logprobs(leaf)) - expected).abs().max().item())
            own = max(own, (full_logprobs(rounded, *path) - expected).abs().max().item())
    return worst, own
