"""The factors of a LoRA adapter that are zero at the start: moved by noise, and given back as they were."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

import torch


if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer


class MovableFactors:
    """
    The factor of each LoRA layer that is zero at the start, and how it is moved.

    The noise gives the products of both factors the same size in all layers, as base weights are of a size.
    """

    def __init__(self, model: "PeftModel", seed: int) -> None:
        self._seed = seed
        self._parameters: dict[str, torch.Tensor] = {}
        self._units: dict[str, float] = {}  # size of the noise for products of size 1
        self._scale = 0.0
        self.kinds: dict[str, list[str]] = defaultdict(list)
        for name, layer, adapter in _lora_layers(model):
            zero, other = _both_factors(layer, adapter)
            size = float(other.float().square().mean().sqrt()) * min(other.shape) ** 0.5 * layer.scaling[adapter]
            if size == 0.0:
                continue
            self._parameters[name], self._units[name] = zero, 1.0 / size
            self.kinds[f"*.{name.rpartition('.')[2]}"].append(name)
        if not self._parameters:
            raise ValueError("The model has no LoRA layer that could be moved. Pass a PEFT model with a LoRA adapter.")
        self.names = list(self._parameters)
        self._order = {name: i for i, name in enumerate(self.names)}
        self._saved = {name: parameter.detach().cpu().clone() for name, parameter in self._parameters.items()}
        self._start = self._saved

    @property
    def are_zero(self) -> bool:
        return not any(bool(factor.any()) for factor in self._start.values())

    def start_from_zero(self) -> None:
        """Let the adapter compute nothing, and be moved from there."""
        self._start = {name: torch.zeros_like(factor) for name, factor in self._saved.items()}
        self.restore(self.names)

    def move(self, names: Iterable[str], scale: float | None = None) -> None:
        """Set factors to what they start from plus noise of this size, or of the last one."""
        self._scale = self._scale if scale is None else scale
        for name in names:
            start = self._start[name]
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._order[name])
            noise = torch.randn(start.shape, generator=generator) * (self._scale * abs(self._units[name]))
            self._parameters[name].copy_(start.float() + noise)

    def restore(self, names: Iterable[str]) -> None:
        """Set factors to what they start from."""
        for name in names:
            self._parameters[name].copy_(self._start[name])

    def give_back(self) -> None:
        """Set all factors to what they were, bit for bit."""
        for name, saved in self._saved.items():
            self._parameters[name].copy_(saved)


def _lora_layers(model: "PeftModel") -> Iterator[tuple[str, "LoraLayer", str]]:
    """Name in the base, layer and adapter of each layer with an active LoRA adapter."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
                    yield name, layer, adapter


def _both_factors(layer: "LoraLayer", adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor that PEFT sets to zero, and the other."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return cast(torch.Tensor, layer.lora_B[adapter].weight), cast(torch.Tensor, layer.lora_A[adapter].weight)
