"""
A causal language model's log-probabilities and entropies over rows, each shared prefix forwarded once.

Stands in for `GRPOTrainer._get_per_token_logps_and_entropies` with the same results up to rounding.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, cast, get_args

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from treepo_trl.model_support import Reach, has_attention_dropout, layer_reaches

from .flex_trial import why_flex_fails, why_too_small
from .packing import PackedRows, TreePacking, cut_rows, pack_rows
from .tree_attention import AttentionBackend, TreeAttention, flex_length, serve_trees


logger = get_logger(__name__)

_MIN_RATIO = 1.15
"""Tokens that plain rows forward per packed token, below which `auto` keeps plain rows."""
_MIN_FLEX_LENGTH = 8192
"""Shortest row for FlexAttention under `auto`: below it, compiling costs more than the kernel saves."""
_MAX_EAGER_LENGTH = 8192
"""Longest row for eager attention under `auto`: its mask and scores are quadratic in the row."""

_CHOICES = {"flex": "packed rows with FlexAttention", "sdpa": "packed rows with SDPA", None: "plain rows"}

_TOLERANCE = 1e-3  # nats, mean over a tree, in float32
_HALF_PRECISION_TOLERANCE = 0.1  # bfloat16 rounding alone gives about 0.03 (SmolLM2)


PlainForward = Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]
"""`GRPOTrainer._get_per_token_logps_and_entropies`: log-probabilities, entropies and load-balancing loss."""


class _Forwarded(NamedTuple):
    """Log-probabilities and entropies `(B, T)`, and the load-balancing loss of a mixture of experts."""

    logps: torch.Tensor
    entropies: torch.Tensor | None
    aux_loss: torch.Tensor | None


@dataclass(frozen=True)
class _Call:
    """What a call of [`PackedForward`] asks for, whatever the rows."""

    model: torch.nn.Module
    num_scored: int
    compute_entropy: bool
    compute_aux_loss: bool
    plain: PlainForward


class PackedForward:
    """
    Forwards chunks of rows as packed rows where that pays.

    Args:
        tree_packing (`str`):
            `"sdpa"` and `"flex"` pack every chunk, for that attention backend; `"auto"` packs those that share enough.
        accelerator ([`~accelerate.Accelerator`]):
            Gives autocast and unwraps the model.
        is_sharded (`bool`):
            Whether a forward is collective (FSDP, DeepSpeed): all processes must run as many. Then every process
            compares rows of its first batch with plain ones, whether it packs that batch or not.
        max_tokens (`int`, *optional*):
            Unique tokens per forward. A chunk that has more is cut into pieces, each of them packed. Only the largest
            keeps what the backward pass needs. The others are forwarded again there.

    Attributes:
        checked (`set[tuple[int, str]]`):
            Models (by `id`) and attention backends whose packed rows were compared with plain rows. That happens once
            for each.
    """

    def __init__(
        self,
        tree_packing: TreePacking,
        accelerator: Accelerator,
        is_sharded: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        self.tree_packing = tree_packing
        self.accelerator = accelerator
        self.is_sharded = is_sharded
        self.max_tokens = max_tokens
        self.checked: set[tuple[int, str]] = set()
        self._announced: set[str] = set()
        self._compiled: set[tuple[int, bool]] = set()
        self._flex_runs: bool | None = None  # not tried yet

    def __call__(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int,
        compute_entropy: bool,
        compute_aux_loss: bool,
        plain: PlainForward,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, dict[str, list[float]]]:
        """
        Log-probabilities and entropies `(B, logits_to_keep)` of the last tokens of each row.

        Args:
            model:
                Policy or reference with TRL's fused LM head, wrapped or not.
            input_ids (`torch.Tensor` of shape `(B, L)`), attention_mask (`torch.Tensor` of shape `(B, L)`):
                Padded rows.
            logits_to_keep (`int`):
                Completion columns at the end of the rows.
            batch_size (`int`):
                Rows per chunk.
            compute_entropy (`bool`), compute_aux_loss (`bool`):
                Whether to return entropies and the load-balancing loss; otherwise they are `None`.
            plain (`Callable`):
                TRL's own method, for chunks that are not packed and for the check.

        Returns:
            Log-probabilities, entropies, load-balancing loss, and one value per chunk of `tree/packing_seconds` and
            `tree/packing_ratio`.

        Raises:
            RuntimeError: if the packed log-probabilities of the first packed tree are not those of its plain rows.
        """
        call = _Call(model, logits_to_keep, compute_entropy, compute_aux_loss, plain)
        if self.is_sharded:  # whatever is chosen below, which may differ between processes
            self._check_once(call, "flex" if self.tree_packing == "flex" else "sdpa", input_ids, attention_mask)
        results: list[_Forwarded] = []
        log: dict[str, list[float]] = {"tree/packing_seconds": [], "tree/packing_ratio": []}
        for ids, mask in zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True):
            results += self._forward_chunk(call, ids, mask, log)
        logps = torch.cat([result.logps for result in results])
        entropies = torch.cat([cast(torch.Tensor, each.entropies) for each in results]) if compute_entropy else None
        losses = [cast(torch.Tensor, each.aux_loss) for each in results]
        return logps, entropies, torch.stack(losses).mean() if compute_aux_loss else None, log

    def _forward_chunk(
        self, call: _Call, ids: torch.Tensor, mask: torch.Tensor, log: dict[str, list[float]]
    ) -> list[_Forwarded]:
        """Rows packed, in pieces if they are too many tokens, or plain."""
        started = time.perf_counter()
        pieces = [slice(None)]
        if self.max_tokens is not None:
            pieces = cut_rows(ids, mask, call.num_scored, self.max_tokens)
        packed = [pack_rows(ids[piece], mask[piece], call.num_scored) for piece in pieces]
        log["tree/packing_seconds"].append(time.perf_counter() - started)
        num_unique = sum(each.input_ids.size(1) for each in packed)
        log["tree/packing_ratio"].append(sum(each.num_row_tokens for each in packed) / num_unique)
        config = self._base_of(call.model).config.get_text_config()
        backends: list[AttentionBackend | None] = [
            self._that_runs(self._choose(each, config), each, config, call.model) for each in packed
        ]
        if backends == [None]:
            options = {"compute_entropy": call.compute_entropy, "compute_aux_loss": call.compute_aux_loss}
            return [_Forwarded(*call.plain(call.model, ids, mask, call.num_scored, **options))]
        for piece, backend in zip(pieces, backends, strict=True):
            if backend is not None and not self.is_sharded:
                self._check_once(call, backend, ids[piece], mask[piece])
        return self._forward_pieces(call, packed, backends)

    def _forward_pieces(
        self, call: _Call, packed: list[PackedRows], backends: list[AttentionBackend | None]
    ) -> list[_Forwarded]:
        """Every piece forwarded; all but the largest keep nothing for the backward pass."""
        results: dict[int, _Forwarded] = {}
        # The backward pass starts with the last forward. The largest is last, so that nothing else is kept beside it.
        for i in sorted(range(len(packed)), key=lambda i: packed[i].input_ids.size(1)):
            backend = backends[i]
            assert backend is not None, "with a token budget every piece is packed"
            if len(results) == len(packed) - 1 or not torch.is_grad_enabled():
                results[i] = self._forward(call.model, packed[i], backend, call.compute_aux_loss)
                continue
            # Not the wrapped model: a forward of it inside the backward pass counts as a new step.
            base = self._base_of(call.model)
            again = checkpoint(self._forward, base, packed[i], backend, call.compute_aux_loss, use_reentrant=False)
            results[i] = cast(_Forwarded, again)
        return [results[i] for i in range(len(packed))]

    def _base_of(self, model: torch.nn.Module) -> PreTrainedModel:
        """The model without the wrappers of the training."""
        return cast(PreTrainedModel, self.accelerator.unwrap_model(model))

    def _choose(self, packed: PackedRows, config: PreTrainedConfig) -> AttentionBackend | None:
        """The attention backend for a packed row; `None` for plain rows."""
        if self.tree_packing in get_args(AttentionBackend):
            return cast(AttentionBackend, self.tree_packing)
        length = packed.input_ids.size(1)
        backend: AttentionBackend | None = "sdpa"
        why = f"below {_MIN_FLEX_LENGTH} tokens" if packed.input_ids.is_cuda else "FlexAttention needs a CUDA device"
        if self.max_tokens is None and not is_worth_packing(packed):
            backend, why = None, f"packing pays from {_MIN_RATIO} forwarded tokens per unique token on"
        elif config._attn_implementation == "eager":
            why = "eager attention with a dense mask"
            if self.max_tokens is None and length > _MAX_EAGER_LENGTH:
                backend, why = None, f"a dense mask is too large above {_MAX_EAGER_LENGTH} tokens"
        elif packed.input_ids.is_cuda and length >= _MIN_FLEX_LENGTH:
            obstacle = _flex_obstacle(packed.input_ids.device, config)
            backend, why = ("flex", f"{_MIN_FLEX_LENGTH} tokens or more") if obstacle is None else ("sdpa", obstacle)
        choice = _CHOICES[backend]
        if choice not in self._announced:
            self._announced.add(choice)
            logger.warning(
                f"tree_packing='auto' forwards {choice} ({why}): {packed.num_padded_tokens} tokens in rows, of them "
                f"{packed.num_row_tokens} no padding, {length} unique. It decides for each micro-batch."
            )
        return backend

    def _that_runs(
        self,
        backend: AttentionBackend | None,
        packed: PackedRows,
        config: PreTrainedConfig,
        model: torch.nn.Module,
    ) -> AttentionBackend | None:
        """The backend, or `"sdpa"` in place of a FlexAttention whose kernels this card cannot run."""
        if backend != "flex":
            return backend
        if self._flex_runs is None:
            ids = packed.input_ids
            with self.accelerator.autocast(), self._compile_notice(packed, backend):
                kind, dtype = ids.device.type, self._base_of(model).dtype
                if torch.is_autocast_enabled(kind):
                    dtype = torch.get_autocast_dtype(kind)
                like = torch.empty(0, dtype=dtype, device=ids.device)
                attention = TreeAttention(packed.last_descendants, "flex")
                obstacle = why_flex_fails(attention, ids.size(1), config, like)
            self._flex_runs = obstacle is None
            if obstacle is not None:
                logger.warning(
                    f"FlexAttention does not run on this card ({obstacle}): packed rows are forwarded with SDPA for "
                    "the rest of this run. `tree_packing='sdpa'` leaves out the trial."
                )
        return "flex" if self._flex_runs else "sdpa"

    def _forward(
        self, model: torch.nn.Module, packed: PackedRows, backend: AttentionBackend, compute_aux_loss: bool = False
    ) -> _Forwarded:
        base = self._base_of(model)
        config = base.config.get_text_config()
        inputs = model_inputs(
            packed, cast(str, config._attn_implementation), base.dtype, backend, layer_reaches(config)
        )
        if compute_aux_loss:
            inputs["output_router_logits"] = True
        with self.accelerator.autocast(), self._compile_notice(packed, backend):
            outputs = model(**inputs, fused_lm_head=True)
        entropies = None if outputs.entropy is None else packed.unpack(outputs.entropy)
        return _Forwarded(packed.unpack(outputs.log_probs), entropies, outputs.aux_loss)

    @contextmanager
    def _compile_notice(self, packed: PackedRows, backend: AttentionBackend) -> Iterator[None]:
        """Say when FlexAttention compiles for a row length that it has not seen, and how long that took."""
        kind = (flex_length(packed.input_ids.size(1)), torch.is_grad_enabled())
        if backend != "flex" or kind in self._compiled:
            yield
            return
        self._compiled.add(kind)
        logger.warning(f"FlexAttention compiles for rows of up to {kind[0]} tokens; this can take a minute or two.")
        started = time.perf_counter()
        yield
        if packed.input_ids.is_cuda:
            torch.cuda.synchronize()
        later = " The backward pass compiles when it first runs." if kind[1] else ""
        logger.warning(f"The first forward of that length took {time.perf_counter() - started:.1f} s.{later}")

    @torch.no_grad()
    def _check_once(
        self, call: _Call, backend: AttentionBackend, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> None:
        """Compare the first tree of these rows with its plain rows; two rows of it where forwards are collective."""
        module = call.model if self.is_sharded else self._base_of(call.model)
        key = (id(module), "any" if self.is_sharded else backend)
        if key in self.checked:
            return
        is_first_tree = _is_first_tree(input_ids, attention_mask, call.num_scored)
        input_ids, attention_mask = input_ids[is_first_tree], attention_mask[is_first_tree]
        if self.is_sharded:
            input_ids, attention_mask = input_ids[:2], attention_mask[:2]
        packed = pack_rows(input_ids, attention_mask, call.num_scored)
        if not packed.is_scored.any() and not self.is_sharded:
            return
        self.checked.add(key)
        config = self._base_of(call.model).config.get_text_config()
        runs = self._that_runs(backend, packed, config, call.model)
        assert runs is not None, "a backend was given"
        batch_size = len(input_ids) if self.is_sharded else 1
        with _evaluated(module):  # dropout would make the two differ
            logps = self._forward(module, packed, runs).logps
            expected = call.plain(module, input_ids, attention_mask, call.num_scored, batch_size=batch_size)[0]
        if packed.is_scored.any():
            self._compare(module, logps[packed.is_scored], expected[packed.is_scored])

    def _compare(self, module: torch.nn.Module, logps: torch.Tensor, expected: torch.Tensor) -> None:
        difference = (logps - expected).abs().mean().item()
        tolerance = _TOLERANCE if self._is_exact(module) else _HALF_PRECISION_TOLERANCE
        if not difference <= tolerance:  # so that a difference that is no number stops the run too
            raise RuntimeError(
                "The packed forward does not reproduce this model's plain rows: the mean log-probability of a tree's "
                f"completion tokens is {logps.mean().item():.4g} packed and {expected.mean().item():.4g} in plain "
                f"rows; tokens differ by {difference:.2g} nats on average, where rounding explains {tolerance:.2g}. "
                "Set `tree_packing='off'`."
            )

    def _is_exact(self, module: torch.nn.Module) -> bool:
        """Whether all of the model computes in float32: no half precision, no quantised weights, no TF32."""
        return (
            self.accelerator.mixed_precision == "no"
            and all(parameter.dtype == torch.float32 for parameter in module.parameters())
            and (
                cast(PreTrainedModel, module).device.type != "cuda"
                or torch.get_float32_matmul_precision() == "highest"
            )
        )


def _is_first_tree(input_ids: torch.Tensor, attention_mask: torch.Tensor, num_scored: int) -> torch.Tensor:
    """`(B,)` bool: the rows that have the first row's prompt."""
    prompts = input_ids[:, :-num_scored], attention_mask[:, :-num_scored]
    return torch.stack([(part == part[0]).all(1) for part in prompts]).all(0)


@contextmanager
def _evaluated(module: torch.nn.Module) -> Iterator[None]:
    """All of a model in evaluation mode for a block."""
    was_training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in was_training.items():
            part.training = mode


def _flex_obstacle(device: torch.device, config: PreTrainedConfig) -> str | None:
    """Why FlexAttention may not serve a model on a CUDA device; `None` if it does."""
    if has_attention_dropout(config):
        return "FlexAttention has no dropout"
    if not has_triton():
        return "FlexAttention needs Triton"
    properties = torch.cuda.get_device_properties(device)
    # Of AMD's cards torch does not say it.
    return why_too_small(getattr(properties, "shared_memory_per_block_optin", 0), config)


def is_worth_packing(packed: PackedRows) -> bool:
    """Whether the packed row is expected to cost less than the plain rows: the rule behind `tree_packing="auto"`."""
    return packed.num_padded_tokens >= _MIN_RATIO * packed.input_ids.size(1)


def model_inputs(
    packed: PackedRows,
    attn_implementation: str,
    dtype: torch.dtype,
    backend: AttentionBackend,
    reaches: dict[str, Reach],
) -> dict[str, object]:
    """Keyword arguments for a causal language model's forward over the packed row; `reaches` are of its layers."""
    inputs: dict[str, object] = {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "shift_labels": packed.shift_labels,
    }
    if attn_implementation == "eager":  # adds the mask to the scores
        masks = {kind: _additive(packed.attention_mask(reach), dtype) for kind, reach in reaches.items()}
        # Models with layers of several kinds take a mask for each.
        return {**inputs, "attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}
    serve_trees(attn_implementation)
    # Models do not change a mask of four dimensions. The attention reads `tree_attention` in its place. A
    # load-balancing loss reads from it how often each token counts.
    return {
        **inputs,
        "attention_mask": packed.num_rows[None, None],
        "tree_attention": TreeAttention(packed.last_descendants, backend),
    }


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(~mask, torch.finfo(dtype).min)
