"""Rows of trees as GRPOTrainer builds them, and tiny models' values over them, plain and packed."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma2ForCausalLM, PreTrainedConfig, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from tests.support.models import make_model
from treepo_trl.model_support import layer_reaches
from treepo_trl.update.packed_forward import PackedForward, model_inputs
from treepo_trl.update.packing import PackedRows, pack_rows
from treepo_trl.update.tree_attention import serve_trees


PAD = 1
ALONE = [[5]] * 3, [[7] * 9, [8] * 9, [9] * 9]
"""Prompts and completions that share little."""
TINY: dict[str, Any] = {  # settings of a config of any architecture
    "vocab_size": 65,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": PAD,
}

Batch = tuple[torch.Tensor, torch.Tensor, int]
"""Token ids `(B, L)`, mask `(B, L)` and the number of completion columns."""
Values = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, dict[str, list[float]]]


def batch_of(prompts: list[list[int]], completions: list[list[int]]) -> Batch:
    """Rows as GRPOTrainer builds them: prompts padded on the left, completions on the right, T completion columns."""
    prompt_width, num_scored = max(map(len, prompts)), max(map(len, completions))
    ids, mask = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        left, right = prompt_width - len(prompt), num_scored - len(completion)
        ids.append([PAD] * left + prompt + completion + [PAD] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(completion)) + [0] * right)
    return torch.tensor(ids), torch.tensor(mask), num_scored


def rows_with(shared: int, own: int, count: int) -> PackedRows:
    """`count` rows of `shared` common tokens and `own` tokens of their own."""
    completions = [[2] * (shared - 1) + [3 + i] * own for i in range(count)]
    return pack_rows(*batch_of([[2]] * count, completions))


def packed_sizes(pieces: list[slice], batch: Batch) -> list[int]:
    """Unique tokens of each piece of a batch."""
    ids, mask, num_scored = batch
    return [pack_rows(ids[piece], mask[piece], num_scored).input_ids.size(1) for piece in pieces]


def trees(count: int = 3) -> Batch:
    """Trees of four leaves of different length, with prompts of different length."""
    prompts, completions = [], []
    for tree in range(count):
        for leaf in range(4):
            prompts.append([5 + tree] * (3 + 2 * tree))
            completions.append([20 + tree, 30 + leaf // 2, 31, *[40 + leaf] * (1 + leaf)])
    return batch_of(prompts, completions)


def ready_model(**changes: Any) -> Any:
    """`make_model` with TRL's fused LM head."""
    model = make_model(**changes)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


def skip_if_refused(attention: str) -> None:
    """Skip a test of soft caps with SDPA, where transformers refuses the pair: from 5.21 on."""
    if attention == "sdpa" and not Gemma2ForCausalLM._supports_sdpa:
        pytest.skip("this transformers refuses SDPA for models with soft caps")


def tiny_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    """The config of any architecture, such as "llama", with those of `TINY`'s settings that it has."""
    config_class = CONFIG_MAPPING[architecture]
    defaults = config_class()
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    settings = {name: value for name, value in {**TINY, **experts}.items() if hasattr(defaults, name)}
    if architecture == "falcon":
        del settings["head_dim"]  # a property
    return config_class(**{**settings, **changes})


def tiny_model(config: PreTrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    """A random model of any architecture that takes packed rows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().float()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if attention != "eager":
        serve_trees(attention)
    return model


def plain(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Log-probabilities and entropies as `GRPOTrainer._get_per_token_logps_and_entropies` computes them."""
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :-logits_to_keep] = -100
    outputs = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    return outputs.log_probs[:, -logits_to_keep:], outputs.entropy[:, -logits_to_keep:], None


def forward_packed(model: Any, packed: PackedRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of a packed row, as rows."""
    config = model.config
    inputs = model_inputs(packed, config._attn_implementation, torch.float32, "sdpa", layer_reaches(config))
    outputs = model(**inputs, fused_lm_head=True)
    return packed.unpack(outputs.log_probs), packed.unpack(outputs.entropy)


def make_forward(tree_packing: Any = "auto", **changes: Any) -> PackedForward:
    AcceleratorState._reset_state()  # a trainer of an earlier test may have set its precision
    return PackedForward(tree_packing, Accelerator(cpu=True), **changes)


def run(forward: PackedForward, model: Any, batch: Batch, batch_size: int = 99, **changes: bool) -> Values:
    options = {"compute_entropy": True, "compute_aux_loss": False, **changes}
    return forward(model, *batch, batch_size=batch_size, plain=plain, **options)
