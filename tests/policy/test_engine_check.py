"""What is told of an engine that does not compute the policy, and what is not."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from peft import LoraConfig

from tests.support.models import make_tokenizer
from treepo_trl import TreePOConfig
from treepo_trl.engines import SamplingOptions
from treepo_trl.policy.adapter_probe import AdapterProbe
from treepo_trl.policy.engine_check import (
    BOUNDS,
    EngineWatch,
    check_dropout,
    different_tokens,
    dropout_of,
    logprob_difference,
)


FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


def watch(mode: Any = "warn", engine: torch.dtype = FLOAT32, facts: Any = (), **options: float) -> EngineWatch:
    PartialState()  # accelerate's logger wants it
    return EngineWatch(mode, FLOAT32, engine, SamplingOptions(**options), lambda: facts)  # pyright: ignore


def test_the_difference_is_that_of_the_tokens_that_were_sampled_and_scored() -> None:
    rows = {
        "old_per_token_logps": torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]]),
        "sampling_per_token_logps": torch.tensor([[-1.5, -2.0, -9.0], [-1.0, float("nan"), 1.0]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    accelerator = Accelerator(cpu=True)
    difference = logprob_difference(rows, accelerator)
    assert difference is not None
    assert difference.tolist() == [0.5, 0.0, 0.0, 2.0]
    answered = logprob_difference({**rows, "tool_mask": torch.tensor([[1, 0, 1], [1, 1, 0]])}, accelerator)
    assert answered is not None
    assert answered.tolist() == [0.5, 0.0]
    assert logprob_difference({name: rows[name] for name in rows if "old" not in name}, accelerator) is None


def test_a_policy_that_gives_no_number_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """float16 that overflows. Where the engine gives no number there is nothing to compare."""
    nan = float("nan")
    rows = {
        "old_per_token_logps": torch.tensor([[nan, nan, nan]]),
        "sampling_per_token_logps": torch.tensor([[-1.0, -2.0, nan]]),
        "completion_mask": torch.tensor([[1, 1, 1]]),
    }
    difference = logprob_difference(rows, Accelerator(cpu=True))
    assert difference is not None
    assert difference.isnan().tolist() == [True, True]
    with pytest.raises(RuntimeError, match=r"no number for 100\.0% of the tokens"):
        watch("error").batch(difference)
    of_run = watch()
    assert of_run.batch(torch.tensor([0.0, nan]))["engine/logp_difference_above_1"] == 0.5
    of_run.batch(torch.tensor([0.2]))  # and it hides no later fault
    assert len(caplog.records) == 2


def test_a_batch_without_a_comparable_token_has_no_metrics() -> None:
    rows = {
        "old_per_token_logps": torch.tensor([[-1.0]]),
        "sampling_per_token_logps": torch.tensor([[float("nan")]]),
        "completion_mask": torch.tensor([[1]]),
    }
    assert watch("error").batch(logprob_difference(rows, Accelerator(cpu=True))) == {}


def test_metrics_need_nothing_that_is_not_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA `full_determinism` refuses `kthvalue`."""

    def refused(*_: object) -> None:
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation")

    monkeypatch.setattr(torch.Tensor, "kthvalue", refused)
    monkeypatch.setattr(torch, "kthvalue", refused)
    assert watch().batch(torch.tensor([0.0, 0.001]))["engine/logp_difference_p99"] == pytest.approx(0.001)


def test_metrics_of_a_batch() -> None:
    """Of 200 tokens one differs by 3 nats and two by 2: the 99th percentile is the 198th largest."""
    difference = torch.tensor([0.0] * 197 + [2.0, 2.0, 3.0])
    assert watch("off").batch(difference[torch.randperm(200)]) == pytest.approx(
        {
            "engine/logp_difference_mean": 7 / 200,
            "engine/logp_difference_p99": 2.0,
            "engine/logp_difference_above_1": 3 / 200,
        }
    )
    assert watch("error").batch(None) == {}


@pytest.mark.parametrize(("policy", "engine"), [(FLOAT32, FLOAT32), (FLOAT16, FLOAT16), (FLOAT32, BFLOAT16)])
def test_a_batch_beyond_rounding_is_told_of(
    policy: torch.dtype, engine: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    PartialState()
    bound = max(BOUNDS[policy], BOUNDS[engine])
    for mode in ("warn", "error", "off"):
        of_mode = EngineWatch(mode, policy, engine, SamplingOptions(), lambda: [])
        caplog.clear()
        of_mode.batch(torch.full((8,), 0.99 * bound))
        assert not caplog.records
        too_much = torch.full((8,), 1.01 * bound)
        if mode == "error":
            with pytest.raises(RuntimeError, match=f"{1.01 * bound:.3f} nats per token.*`engine_check`"):
                of_mode.batch(too_much)
        else:
            of_mode.batch(too_much)
        assert len(caplog.records) == (mode == "warn")


def test_no_number_is_no_agreement() -> None:
    with pytest.raises(RuntimeError, match="inf nats"):
        watch("error").batch(torch.tensor([0.0, float("inf")]))


def test_a_warning_is_said_again_when_it_gets_worse(caplog: pytest.LogCaptureFixture) -> None:
    of_run = watch()
    counts = []
    for value in (0.2, 0.2, 0.21, 0.3, 0.1, 0.6):
        of_run.batch(torch.tensor([value]))
        counts.append(len(caplog.records))
    assert counts == [1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.2}])
def test_what_is_left_out_of_sampling_is_no_difference_of_models(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert watch("error", **options).batch(torch.tensor([0.5]))["engine/logp_difference_mean"] == 0.5
    assert not caplog.records


def test_another_number_type_is_told_of_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    """Rounding hides it from every later comparison."""
    PartialState()
    with pytest.raises(ValueError, match=r"float16 and the engine in bfloat16.*`vllm_engine_kwargs"):
        EngineWatch("error", FLOAT16, BFLOAT16, SamplingOptions(), lambda: [])
    EngineWatch("warn", BFLOAT16, FLOAT16, SamplingOptions(), lambda: [])
    assert "bfloat16 and the engine in float16" in caplog.text
    caplog.clear()
    EngineWatch("error", FLOAT32, BFLOAT16, SamplingOptions(), lambda: [])  # as vLLM loads a float32 checkpoint
    EngineWatch("error", BFLOAT16, BFLOAT16, SamplingOptions(), lambda: [])
    assert not caplog.records


def test_what_differs_is_named() -> None:
    """Another tokenizer: the same words under other ids."""
    ours, theirs = make_tokenizer(), make_tokenizer()
    assert different_tokens(ours, theirs) == []
    theirs.add_tokens(["new"])  # one has more tokens: no id means two things
    assert different_tokens(ours, theirs) == []
    vocabulary = theirs.get_vocab()
    theirs.get_vocab = lambda: {**vocabulary, "w1": vocabulary["w2"], "w2": vocabulary["w1"]}
    facts = different_tokens(ours, theirs)
    with pytest.raises(
        RuntimeError, match="float32 and the engine in bfloat16; the tokenizers, in the ids of 2 tokens"
    ):
        watch("error", engine=BFLOAT16, facts=facts).batch(torch.tensor([5.0]))


def test_dropout_is_named_where_there_is_some() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.0))
    assert dropout_of(layers) == []
    layers.append(torch.nn.Dropout(0.1))
    (fact,) = dropout_of(layers)
    assert "(2 and 0 more)" in fact
    assert "disable_dropout=True" in fact


def test_an_error_for_each_difference_and_dropout_do_not_go_together() -> None:
    settings: dict[str, Any] = {"output_dir": "", "bf16": False, "use_vllm": True}
    settings |= {"engine_check": "error", "disable_dropout": False, "top_p": 1.0}
    adapter = LoraConfig(lora_dropout=0.05)
    with pytest.raises(ValueError, match=r"engine_check='error'.*`lora_dropout` is 0\.05.*disable_dropout=True"):
        check_dropout(TreePOConfig(**settings), adapter)
    check_dropout(TreePOConfig(**settings), LoraConfig(lora_dropout=0.0))
    for change in ({"engine_check": "warn"}, {"disable_dropout": True}, {"use_vllm": False}, {"top_p": 0.9}):
        check_dropout(TreePOConfig(**settings | change), adapter)


def test_what_a_probe_finds_is_told() -> None:
    good = AdapterProbe(0.001, 0.002, 0.5, None)
    bad = AdapterProbe(0.001, 0.2, 0.5, "modules", ("*.o_proj",))
    watch("error").probed(good)
    watch("warn").probed(bad)
    with pytest.raises(RuntimeError, match=r"leaves out a part of the adapter: \*\.o_proj .*0\.2000 .*'warn' goes on"):
        watch("error").probed(bad)
