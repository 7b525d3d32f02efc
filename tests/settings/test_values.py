"""TreePOConfig: types and ranges of all fields, of TRL's and of those of trees."""

import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from tests.support.config import NEW_FIELDS, make
from treepo_trl import TreePOConfig


KINDS = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(TreePOConfig).items()}
NUMBERS = [name for name, kind in KINDS.items() if float in kind]
UNBOUNDED = [
    *("delta", "epsilon", "epsilon_high", "max_grad_norm", "off_policy_mask_threshold", "entropy_coef_max"),
    *("entropy_target", "eval_delay", "vllm_server_timeout"),
    *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"),
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, "1", True, [1.0], 1j])
def test_every_number_of_trl_and_of_trees_is_a_finite_number(tmp_path: Path, name: str, value: Any) -> None:
    """But no bound is a bound too."""
    if name in UNBOUNDED and value == math.inf:
        assert getattr(make(tmp_path, **{name: value}), name) == value
        return
    with pytest.raises((TypeError, ValueError), match=rf"^`{name}` is .*; it must be "):
        make(tmp_path, **{name: value})


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if bool in kind and str not in kind])
def test_a_text_is_no_boolean(tmp_path: Path, name: str) -> None:
    """Python takes `"false"` for true."""
    for value in ("false", [False], 0.5):
        with pytest.raises(TypeError, match=rf"^`{name}` is .*; it must be true or false"):
            make(tmp_path, **{name: value})


@pytest.mark.parametrize("name", NEW_FIELDS)
@pytest.mark.parametrize("value", [[], {}, 1.5, object(), b"x"])
def test_a_wrong_type_is_named(tmp_path: Path, name: str, value: Any) -> None:
    if type(value) in KINDS[name]:
        assert getattr(make(tmp_path, **{name: value}), name) == value
        return
    with pytest.raises((TypeError, ValueError), match=rf"^`{name}` is "):
        make(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_length": 0}, "`segment_length` is 0 ... between 1 and ... 512 ... Leave it out"),
        ({"segment_length": 513}, "`segment_length` is 513 ... `max_completion_length` (512)"),
        ({"branching_factor": 0}, "`branching_factor` is 0 ... between 1"),
        ({"branching_factor": 9}, "`branching_factor` is 9 ... `num_generations` (8) ... Lower the one or raise the"),
        ({"num_generations": 2, "branching_factor": 3}, "`branching_factor` is 3 ... `num_generations` (2)"),
        ({"initial_branching_factor": []}, "`initial_branching_factor` is [] ... [low, high]"),
        ({"initial_branching_factor": [5, 2]}, "`initial_branching_factor` is [5, 2] ... low <= high"),
        ({"initial_branching_factor": [0, 2]}, "`initial_branching_factor` is [0, 2] ... 1 <= low"),
        ({"initial_branching_factor": 0}, "`initial_branching_factor` is 0 ... at least 1"),
        ({"initial_branching_factor": [1, 2, 3]}, "`initial_branching_factor` is [1, 2, 3] ... [low, high]"),
        ({"initial_branching_factor": [2, 9]}, "`initial_branching_factor` is [2, 9] ... `num_generations` (8)"),
        ({"expected_completion_length": 0}, "`expected_completion_length` is 0 ... between 1"),
        (
            {"expected_completion_length": 513},
            "`expected_completion_length` is 513 ... `max_completion_length` (512) ... Leave it out",
        ),
        ({"max_tree_tokens": 511}, "`max_tree_tokens` is 511 ... `max_completion_length` (512) ... Raise the one"),
        ({"max_tokens_per_micro_batch": 0}, "`max_tokens_per_micro_batch` is 0 ... from 1 on"),
        (
            {"generation_kwargs": {"temperature": 0.7}},
            "`generation_kwargs` has temperature 0.7 ... `temperature` is 1.0 ... Set `temperature` alone",
        ),
        ({"generation_kwargs": {"top_p": 2}}, "`generation_kwargs`: `top_p` is 2; it must be above 0 and at most 1"),
        ({"generation_kwargs": "{top_p: 2}"}, "`generation_kwargs` is '{top_p: 2}', which is no JSON"),
        ({"dynamic_sampling_rounds": -1}, "`dynamic_sampling_rounds` is -1 ... 0 (train on every prompt"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` is 0; it must be at least 1"),
        ({"steps_per_generation": -1}, "`steps_per_generation` is -1; it must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` is 0; it must be at least 1"),
        ({"num_iterations": 0}, "`num_iterations` is 0; it must be at least 1"),
        ({"reward_timeout": 0}, "`reward_timeout` is 0; it must be above 0"),
        ({"epsilon": -0.2}, "`epsilon` is -0.2; it must be at least 0"),
        ({"reward_weights": [1.0, math.nan]}, "`reward_weights[1]` is nan; it must be a finite number"),
        ({"reward_weights": [-math.inf]}, "`reward_weights[0]` is -inf; it must be a finite number"),
        ({"max_completion_length": -(10**400)}, "`max_completion_length` is -1000"),
        ({"stop_pattern": "x{99999999999999999999}"}, "`stop_pattern` is ... no regular expression"),
        ({"stop_pattern": "[[:alpha:]]"}, "`stop_pattern` is '[[:alpha:]]' ... Possible nested set"),
        ({"stop_pattern": "(unclosed"}, "`stop_pattern` is '(unclosed' ... no regular expression ... boxed"),
        ({"stop_pattern": "x*"}, "`stop_pattern` is 'x*' ... empty text ... at least one character"),
        *(
            (
                {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": urls},
                "several different ones parted by",
            )
            for urls in ("http://a:1, http://a:1/", "http://a:1,")
        ),
        ({"generation_kwargs": "top_p"}, "`generation_kwargs` is 'top_p' ... JSON object"),
        ({"vllm_engine_kwargs": [1]}, "`vllm_engine_kwargs` is [1] ... JSON object"),
        ({"vllm_gpu_memory_utilization": "most"}, "`vllm_gpu_memory_utilization` is 'most'; it must be a number, or"),
        ({"tool_workers": -1}, "`tool_workers` is -1; it must be 0"),
        ({"tool_timeout": 0.0}, "`tool_timeout` is 0.0; it must be above 0"),
        ({"max_tool_answer_tokens": 0}, "`max_tool_answer_tokens` is 0; it must be at least 1"),
        ({"rollout_ahead": 2}, "`rollout_ahead` is 2 ... 0 or 1"),
        *(
            ({name: value}, f"`{name}` is {value}; it must be above 0")
            for name in ("temperature", "branching_temperature", "branching_temperature_end")
            for value in (0.0, -1.0)
        ),
        *(
            ({name: value}, f"`{name}` is {value!r} ... it must be a whole number")
            for name, value in (
                ("segment_length", "8"),
                ("branching_factor", True),
                ("max_completion_length", None),
                ("num_generations", None),
                ("num_generations", 8.0),
                ("per_device_train_batch_size", 8.0),
                ("steps_per_generation", 1.5),
            )
        ),
        ({"initial_branching_factor": 2.0}, "`initial_branching_factor` is 2.0 ... it must be a whole number"),
        ({"initial_branching_factor": [2, 2.5]}, "`initial_branching_factor` is 2.5 ... it must be a whole number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_name_the_value_and_the_fix(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        make(tmp_path, **changes)
    for part in message.split(" ... "):
        assert part in str(error.value)


def test_generation_kwargs_go_before_settings_of_the_same_name(tmp_path: Path) -> None:
    config = make(tmp_path, temperature=0.7, top_p=0.9, generation_kwargs={"top_p": 0.5, "temperature": 0.7})
    options = config.sampling_options()
    assert (options.temperature, options.top_p) == (0.7, 0.5)


def test_values_of_numpy_torch_and_none_are_those_of_stock(tmp_path: Path) -> None:
    config = make(tmp_path, top_k=None, top_p=None, max_completion_length=np.int64(12), reward_weights=torch.ones(2))
    assert (config.sampling_options().top_k, config.sampling_options().top_p) == (0, 1.0)
    assert config.max_tree_depth == 12
