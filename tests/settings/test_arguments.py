"""Arguments that the trainer cannot serve, for the settings of the engine or for what is installed."""

from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig

from tests.support.models import make_model
from tests.support.trainers import SETTINGS, build, make_config
from treepo_trl import TreePOConfig, TreePOTrainer
from treepo_trl.settings.arguments import check_arguments


@pytest.fixture(autouse=True)
def vllm_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treepo_trl.settings.arguments.is_vllm_available", lambda: True)


def check(folder: Path, **changes: Any) -> TreePOConfig:
    config = make_config(folder, **changes)
    check_arguments(config, [], None, None)  # no tools are no tools
    return config


def test_plain_grpo_config(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"`args` is a `GRPOConfig`\. Pass a `TreePOConfig`"):
        build(TreePOTrainer, make_model(), GRPOConfig(output_dir=str(tmp_path), **SETTINGS))


@pytest.mark.parametrize(
    ("use_vllm", "kwargs", "message"),
    [
        (False, {"do_sample": False}, "has do_sample, which .* and `do_sample=True`"),
        (False, {"num_beams": 4}, "has num_beams, which .*Remove the others, or set `use_vllm"),
        (False, {"top_k": 3, "seed": 1, "eta_cutoff": 0.1}, "`generation_kwargs` has eta_cutoff, seed, which"),
        *(
            (True, {name: 1, "best_of": 3}, f"`generation_kwargs` has {name}, which the tree sampler sets itself")
            for name in (
                *("n", "max_tokens", "logprobs", "stop", "detokenize", "ignore_eos", "structured_outputs"),
                # One seed for every request would make all siblings equal; penalties would forget the path.
                *("seed", "presence_penalty", "bad_words", "truncate_prompt_tokens"),
            )
        ),
    ],
)
def test_generation_kwargs_that_segments_cannot_have(
    tmp_path: Path, use_vllm: bool, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(tmp_path, use_vllm=use_vllm, generation_kwargs=kwargs)


@pytest.mark.parametrize("kwargs", [{"do_sample": True}, {"num_beams": 3}], ids=repr)
def test_generation_kwargs_that_vllm_refuses(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(
        ValueError, match=rf"(?s)`generation_kwargs` is .*{next(iter(kwargs))}.* `SamplingParams` refuses: .*Remove"
    ):
        check(tmp_path, use_vllm=True, generation_kwargs=kwargs)


def test_known_generation_kwargs_are_used(tmp_path: Path) -> None:
    config = check(tmp_path, generation_kwargs={"top_k": 3, "min_p": 0.1, "do_sample": True})
    engine: Any = build(TreePOTrainer, make_model(), config).sampler.engine
    assert (engine.options.top_k, engine.options.min_p) == (3, 0.1)


def test_vllm_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treepo_trl.settings.arguments.is_vllm_available", lambda: False)
    with pytest.raises(
        ImportError, match=r"`use_vllm=True`, but vLLM is not installed.*pip install treepo-trl\[vllm\]"
    ):
        check(tmp_path, use_vllm=True)


def test_a_logger_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is loaded, which transformers does first."""
    monkeypatch.setattr("treepo_trl.settings.arguments.get_available_reporting_integrations", lambda: ["trackio"])
    with pytest.raises(ValueError, match=r"`report_to` has wandb, which is not installed"):
        check(tmp_path, report_to=["trackio", "wandb", "flyte", "azure_ml"])
