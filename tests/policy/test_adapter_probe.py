"""Engines that do not compute the policy, each wrong in one way, and what the probe says of them."""

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support.models import make_model
from treepo_trl.engines import SegmentResult
from treepo_trl.engines.transformers import TransformersEngine
from treepo_trl.policy.adapter_probe import AdapterProbe, probe_adapter, segments_of


PROMPTS = [[10 + i, *(20 + (i * 7 + j * j) % 40 for j in range(11))] for i in range(4)]
ROUNDING = 0.01


def make_policy(**changes: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.1)
    model = get_peft_model(make_model(initializer_range=0.1, **changes), config)
    return model.train()


def make_trained_policy() -> Any:
    """A policy whose adapter is not zero, as after a resume: it moves the base by more than rounding."""
    policy = make_policy()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


class Engine:
    """A copy of the policy that `sync` brings up to date, as a wrapped one does it."""

    def __init__(self, policy: Any, copied: Callable[[str], bool] = lambda name: True) -> None:
        self.policy, self.copied = policy, copied
        self.model = copy.deepcopy(policy).eval()
        self.segments = TransformersEngine(self.model, [])
        self.num_synchronized = 0

    def sync(self) -> None:
        self.num_synchronized += 1
        theirs = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.policy.named_parameters():
                if parameter.requires_grad and self.copied(name):
                    theirs[name].copy_(parameter)

    def sample(self, prompts: list[list[int]]) -> list[SegmentResult]:
        results = segments_of(self.segments, prompts)
        self.segments.reset_prefix_cache()
        return results


def probe(engine: Engine) -> AdapterProbe:
    return probe_adapter(engine.policy, engine.sync, engine.sample, PROMPTS, bound=ROUNDING, seed=3)


def test_an_engine_that_computes_the_policy() -> None:
    found = probe(Engine(make_policy()))
    assert found.cause is None
    assert max(found.before, found.moved) < 1e-4
    assert found.movement > 0.2


@pytest.mark.parametrize(
    ("left_out", "cause", "ignored"),
    [
        ("o_proj", "modules", ("*.o_proj",)),
        ("q_proj", "modules", ("*.q_proj",)),
        ("layers.1.mlp.down_proj", "modules", ("model.layers.1.mlp.down_proj",)),
        ("lora_", "adapter", ()),
    ],
)
@pytest.mark.parametrize("is_trained", [False, True])
def test_what_the_engine_ignores_is_named(
    left_out: str, cause: str, ignored: tuple[str, ...], is_trained: bool
) -> None:
    policy = make_trained_policy() if is_trained else make_policy()
    engine = Engine(make_policy(), copied=lambda name: left_out not in name)  # it has loaded nothing yet
    engine.policy = policy
    trained = {name: each.detach().clone() for name, each in policy.named_parameters()}
    found = probe(engine)
    assert found.before > ROUNDING if is_trained else found.before < 1e-4  # a fresh adapter hides it
    assert (found.cause, found.ignored) == (cause, ignored)
    assert all(name in str(found) for name in ignored)
    assert all(torch.equal(trained[name], each) for name, each in policy.named_parameters())
    theirs = dict(engine.model.named_parameters())
    assert all(torch.equal(trained[name], theirs[name]) for name in trained if left_out not in name)


def test_an_engine_that_serves_a_trained_adapter_otherwise_than_a_zero_one() -> None:
    """It divides what it is given by 2, and takes an adapter for its own once it was zero."""
    engine = Engine(make_trained_policy())
    original, was_zero = engine.sync, False

    def sync() -> None:
        nonlocal was_zero
        original()
        factors = [each for name, each in engine.model.named_parameters() if "lora_B" in name]
        was_zero = was_zero or not any(each.any() for each in factors)
        with torch.no_grad():
            for each in factors:
                each.mul_(1.0 if was_zero else 0.5)

    engine.sync = sync
    assert probe(engine).cause == "unknown"


def test_an_engine_that_keeps_an_old_adapter() -> None:
    policy = make_policy()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    engine = Engine(policy)
    engine.copied = lambda name: engine.num_synchronized < 2  # the first is loaded, and none after it
    found = probe(engine)
    assert found.before < 1e-4
    assert found.cause == "adapter"
    assert "keeps an old one" in str(found)


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("std", [0.05, 0.2])  # a little and far from what the policy computes
def test_an_engine_that_keeps_the_adapter_of_another_training(is_trained: bool, std: float) -> None:
    """It was right about the base, and nothing that it is given arrives: it is not on another base."""
    engine = Engine(make_trained_policy() if is_trained else make_policy())
    torch.manual_seed(5)
    for name, parameter in engine.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    engine.copied = lambda name: False
    found = probe(engine)
    assert found.before > ROUNDING
    assert found.cause == "adapter"
    assert "keeps an old one" in str(found)


@pytest.mark.parametrize("make", [make_policy, make_trained_policy])
def test_an_engine_on_another_base(make: Callable[[], Any]) -> None:
    engine = Engine(make())
    with torch.no_grad():
        engine.model.get_base_model().model.layers[0].mlp.gate_proj.base_layer.weight.mul_(1.5)
    assert probe(engine).cause == "base"


def test_an_ignored_kind_stands_out_of_an_engines_rounding() -> None:
    """The difference is within the bound of bfloat16, and goes along with what the ignored modules do."""
    engine = Engine(make_policy(), copied=lambda name: "q_proj" not in name)
    original, generator = engine.sample, torch.Generator().manual_seed(0)

    def rounded(prompts: list[list[int]]) -> list[SegmentResult]:
        results = original(prompts)
        for result in results:
            noise = 0.02 * torch.randn(len(result.logprobs), generator=generator)
            result.logprobs[:] = [each + float(more) for each, more in zip(result.logprobs, noise, strict=True)]
        return results

    engine.sample = rounded
    found = probe_adapter(engine.policy, engine.sync, engine.sample, PROMPTS, bound=1.0, seed=3)
    assert found.ignored == ("*.q_proj",)
    engine.copied = lambda name: True
    found = probe_adapter(engine.policy, engine.sync, engine.sample, PROMPTS, bound=0.1, seed=3)
    assert found.cause is None


def test_cached_prefixes_of_an_old_adapter() -> None:
    """The engine computes with a copy of the policy from when it saw a prompt's first tokens first."""
    engine = Engine(make_policy())
    old: dict[int, Any] = {}

    def sample(prompts: list[list[int]]) -> list[SegmentResult]:
        results = []
        for i, ids in enumerate(prompts):
            key = ids[0]
            model = old.setdefault(key, copy.deepcopy(engine.model))
            (result,) = segments_of(TransformersEngine(model, []), [ids])
            results.append(SegmentResult(i, result.token_ids, result.logprobs, result.finish_reason))
        return results

    engine.sample = sample
    found = probe(engine)
    assert found.cause == "prefix cache"


@pytest.mark.parametrize("fails", [False, True])
def test_a_probe_leaves_nothing_behind(fails: bool) -> None:
    policy = make_policy()
    policy.get_base_model().model.layers[0].eval()
    engine = Engine(policy)
    weights = {name: (each.data_ptr(), each.detach().clone()) for name, each in policy.named_parameters()}
    modes = [module.training for module in policy.modules()]
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    if fails:
        original = engine.sample

        def broken(prompts: list[list[int]]) -> list[SegmentResult]:
            if engine.num_synchronized == 2:
                raise KeyboardInterrupt
            return original(prompts)

        engine.sample = broken
        with pytest.raises(KeyboardInterrupt):
            probe(engine)
    else:
        probe(engine)
    for name, each in policy.named_parameters():
        assert (each.data_ptr(), each.grad) == (weights[name][0], None)
        assert torch.equal(each, weights[name][1])
    theirs = dict(engine.model.named_parameters())
    assert all(torch.equal(each, theirs[name]) for name, each in policy.named_parameters())
    assert modes == [module.training for module in policy.modules()]
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_model_without_lora_layers_is_refused() -> None:
    policy = make_policy()
    policy.get_base_model = lambda: make_model()
    with pytest.raises(ValueError, match="no LoRA layer"):
        probe_adapter(policy, lambda: None, lambda prompts: [], PROMPTS, bound=ROUNDING)


@pytest.mark.parametrize(
    ("gain", "reached"),
    [
        (lambda size: (size / 0.1) ** 3, (0.25, 1.0)),  # ten times the scale: from 0.02 to 17 nats
        (lambda size: (size / 0.1) ** 3 * (1.1 + math.sin(6 * math.log(size))), (0.25, 1.0)),  # up, down and up
        (lambda size: 50.0 * (size > 0.06), (1.0, math.inf)),  # nothing, or more than is wanted
        (lambda size: math.nan if size > 0.012 else 1.0, (0.05, 0.25)),  # out of range before it is enough
    ],
    ids=["steep", "waves", "jump", "overflow"],
)
def test_a_policy_that_no_fixed_step_of_the_scale_moves_enough(
    gain: Callable[[float], float], reached: tuple[float, float]
) -> None:
    """What an adapter adds grows with its weights in another way than in proportion."""

    def amplify(layer: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        size = float(layer.weight.square().mean().sqrt())
        return output * (gain(size) if size else 0.0)

    policy = make_policy()
    with torch.no_grad():
        policy.get_base_model().lm_head.weight.mul_(10.0)  # likely tokens have far to fall
    for name, module in policy.named_modules():
        if "lora_B" in name and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(amplify)
    found = probe(Engine(policy))
    assert found.cause is None, str(found)
    assert reached[0] <= found.movement <= reached[1]


def test_an_adapter_that_is_off_is_said_to_be() -> None:
    engine = Engine(make_policy())
    engine.policy.base_model.disable_adapter_layers()
    engine.model.base_model.disable_adapter_layers()
    assert probe(engine).cause == "unmoved"
