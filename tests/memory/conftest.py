"""Plans of equal updates count their activations once: a count takes seconds and depends on its key alone."""

from collections.abc import Callable, Iterator

import pytest
from transformers import PreTrainedModel

from treepo_trl.memory import plan


@pytest.fixture(autouse=True, scope="package")
def _equal_updates_are_counted_once() -> Iterator[None]:
    count: Callable[[PreTrainedModel, int, bool], int] = plan.activation_bytes
    counted: dict[object, int] = {}

    def activation_bytes(model: PreTrainedModel, num_tokens: int, checkpointing: bool) -> int:
        weights = tuple((name, each.shape, each.dtype, each.requires_grad) for name, each in model.named_parameters())
        key = (weights, repr(model), model.config.to_json_string(), num_tokens, checkpointing)  # dropout is in `repr`
        if key not in counted:
            counted[key] = count(model, num_tokens, checkpointing)
        return counted[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan, "activation_bytes", activation_bytes)
        yield
