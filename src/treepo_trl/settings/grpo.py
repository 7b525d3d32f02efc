"""What [`~trl.GRPOConfig`] takes in its fields though it stops or changes learning without a word, or says so late."""

import json
import math
from collections.abc import Collection, Iterable
from dataclasses import fields
from functools import cache
from numbers import Real
from typing import get_type_hints

from trl.trainer.grpo_config import GRPOConfig

from .values import Ranges, check_bool, check_choice, check_int, check_number, check_ranges, members


_COUNTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "generation_batch_size",
    "num_iterations",
)
"""The numbers of GRPOConfig that batches are made of."""
_RANGES: Ranges = {
    "temperature": (
        lambda value: value > 0,
        "above 0, because training samples. Sample the most likely completion outside the trainer",
    ),
    "beta": (lambda value: value >= 0, "at least 0"),
    "epsilon": (lambda value: value >= 0, "at least 0"),
    "epsilon_high": (lambda value: value >= 0, "at least 0"),
    **dict.fromkeys(_COUNTS, (lambda value: value >= 1, "at least 1")),
}
_BOUNDS = frozenset(
    {
        "delta",
        "epsilon",
        "epsilon_high",
        "max_grad_norm",
        "off_policy_mask_threshold",
        "entropy_coef_max",
        "entropy_target",
        "eval_delay",
        "vllm_importance_sampling_cap",
        "vllm_importance_sampling_clip_max",
        "vllm_server_timeout",
    }
)
"""Numbers of GRPOConfig that may be infinite: that is no bound."""


CHOICES: dict[str, tuple[object, ...]] = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("auto", "vllm", "transformers"),
}
"""Values that GRPOTrainer knows. Another one ends its training in the first step, after the sampling."""


def check_grpo_fields(settings: GRPOConfig, but: Collection[str]) -> None:
    """
    Raise for a value of GRPOConfig's own fields that is no finite number, boolean or JSON where they have one.

    Args:
        settings ([`~trl.GRPOConfig`]):
            The values, before its own `__post_init__`.
        but (`Collection[str]`):
            Names of fields that a subclass declares anew.
    """
    for name, options in _kinds().items():
        value = getattr(settings, name)
        if name in but:
            continue
        if name in CHOICES and not (name == "scale_rewards" and value in (True, False)):  # of older versions of TRL
            check_choice(name, value, CHOICES[name])
        if value is None:
            continue
        if list[float] in options:
            for i, each in enumerate(_as_list(name, value)):
                check_number(f"{name}[{i}]", each)
        elif name in settings._VALID_DICT_FIELDS:
            check_dictionary(name, value)
        elif str in options:
            continue
        elif {int, float} & set(options) and not (name in _BOUNDS and value == math.inf):
            check_number(name, value)
        elif bool in options and value not in (False, True):  # nor 0 and 1
            check_bool(name, value)
        if name in _COUNTS:
            check_int(name, value)
    check_ranges(settings, _RANGES)


@cache
def _kinds() -> dict[str, tuple[object, ...]]:
    """The types of GRPOConfig's own fields. The fields themselves hold what a parser has made of their types."""
    hints = get_type_hints(GRPOConfig)
    return {each.name: members(hints[each.name]) for each in fields(GRPOConfig) if each.init}


def _as_list(name: str, value: object) -> Iterable[object]:
    value = getattr(value, "tolist", lambda: value)()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"`{name}` is {value!r} ({type(value).__name__}); it must be a list of numbers.")
    return value


def check_dictionary(name: str, value: object) -> None:
    """Raise for a number, which opens the file of that descriptor, and for text with a brace that is no JSON."""
    if isinstance(value, Real):
        raise TypeError(f"`{name}` is {value!r} ({type(value).__name__}); it must be a dictionary, or a file or JSON.")
    if isinstance(value, str) and value.startswith("{"):
        try:
            json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{name}` is {value!r}, which is no JSON object: {error}.") from error


def check_parsed(name: str, value: object, example: str) -> None:
    """Raise for what the field's own parser has made no dictionary of."""
    if not isinstance(value, dict | None):
        raise TypeError(
            f"`{name}` is {value!r}; give a dictionary, on the command line a JSON object such as '{example}'."
        )
