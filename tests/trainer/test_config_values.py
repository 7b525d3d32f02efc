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
    ("name", "value"),
    [
        ("segment_length", "8"),
        ("branching_factor", True),
        ("initial_branching_factor", 2.0),
        ("initial_branching_factor", [2, 2.5]),
        ("max_completion_length", None),
        ("num_generations", None),
        ("num_generations", 8.0),
        ("per_device_train_batch_size", 8.0),
        ("steps_per_generation", 1.5),
    ],
)
def test_a_wrong_whole_number_is_named(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^`{name}` is .*; it must be a whole number"):
        make(tmp_path, **{name: value})


@pytest.mark.parametrize("name", ["temperature", "branching_temperature", "branching_temperature_end"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_temperatures_are_positive(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is {value}; it must be above 0"):
        make(tmp_path, **{name: value})


def test_generation_kwargs_go_before_settings_of_the_same_name(tmp_path: Path) -> None:
    config = make(tmp_path, temperature=0.7, top_p=0.9, generation_kwargs={"top_p": 0.5, "temperature": 0.7})
    options = config.sampling_options()
    assert (options.temperature, options.top_p) == (0.7, 0.5)


def test_values_of_numpy_torch_and_none_are_those_of_stock(tmp_path: Path) -> None:
    config = make(tmp_path, top_k=None, top_p=None, max_completion_length=np.int64(12), reward_weights=torch.ones(2))
    assert (config.sampling_options().top_k, config.sampling_options().top_p) == (0, 1.0)
    assert config.max_tree_depth == 12
