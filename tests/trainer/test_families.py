"""Whole trainings of models with windows and with recurrent layers, on the transformers engine."""

import math
from pathlib import Path

import pytest

from tests.support.families import FAMILY
from tests.support.trainers import (
    ReplayTrainer,
    SpyTrainer,
    assert_same_run,
    build,
    change,
    logs_of,
    make_config,
    trained,
)
from treepo_trl.engines.forked_caches import ForkedCacheEngine


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["Gemma 3", "gpt-oss"])
def test_a_model_with_windows_learns_the_same_from_packed_rows(tmp_path: Path, name: str) -> None:
    """The window of 4 tokens is shorter than completions of 12; gpt-oss has sinks and eager attention."""
    changes = {"router_aux_loss_coef": 0.0}  # a load-balancing loss does not go with eager attention
    plain = trained(SpyTrainer, FAMILY[name].model(), make_config(tmp_path / "plain", tree_packing="off", **changes))
    config = make_config(tmp_path / "packed", tree_packing="sdpa", **changes)
    packed = build(ReplayTrainer, FAMILY[name].model(), config)
    packed.recorded = plain.all_trees
    packed.train()
    assert_same_run(plain, packed)
    assert change(packed) > 1e-3
    assert logs_of(packed, "tree/packing_ratio")[0] > 1.2


def test_a_recurrent_model_trains_on_plain_rows_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trained(SpyTrainer, FAMILY["Qwen3.5"].model(), make_config(tmp_path))
    assert isinstance(trainer.policy_engine.engine, ForkedCacheEngine)
    assert change(trainer) > 1e-3
    assert all(math.isfinite(loss) for loss in logs_of(trainer, "loss"))
    assert not logs_of(trainer, "tree/packing_ratio")
    said = [record.message for record in caplog.records]
    what = "layers of type linear_attention"
    assert sum(f"not packed for Qwen3_5ForCausalLM: it has {what}" in message for message in said) == 1
    assert any(f"The model has {what}: the transformers engine copies" in message for message in said)
