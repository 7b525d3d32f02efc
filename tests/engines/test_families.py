"""The transformers engine samples from each family of `docs/models.md`, and its numbers are a plain forward's."""

from pathlib import Path

import pytest

from tests.support.families import FAMILIES, Family
from tests.support.family_checks import adapter_gradients, quantized, sample_segments, with_adapter
from treepo_trl.engines.for_model import why_no_slots
from treepo_trl.engines.transformers import TransformersEngine


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_log_probabilities_are_those_of_a_plain_forward(family: Family) -> None:
    model = family.model()
    engine, difference = sample_segments(model)
    assert difference < 1e-4
    assert engine.num_prefilled_tokens < 0.2 * engine.num_prompt_tokens  # states are kept, whatever they are
    assert isinstance(engine, TransformersEngine) == (why_no_slots(model) is None)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_adapters_on_four_bits_train_and_are_sampled_from(family: Family, tmp_path: Path) -> None:
    policy = with_adapter(family, quantized(family, tmp_path))
    gradients = adapter_gradients(policy)
    assert gradients
    assert all("lora_" in name for name in gradients)
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert any(gradient is not None and bool((gradient != 0).any()) for gradient in gradients.values())
    assert sample_segments(policy)[1] < 1e-3
