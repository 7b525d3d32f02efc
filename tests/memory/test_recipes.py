"""The recipes and the README say what is true of them."""

import re
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.support.architectures import QWEN3_4B, QWEN25_1_5B, QWEN25_7B
from tests.support.paths import ROOT
from treepo_trl.command_line.arguments import make_parser
from treepo_trl.memory import GIB, plan_memory


DOCUMENTATION = (ROOT / "docs/recipes.md").read_text()
EXAMPLES = (ROOT / "examples/README.md").read_text()
RECIPES = sorted(path.name for path in (ROOT / "examples/cli_configs").glob("*.yaml"))


def parse(name: str) -> tuple:
    arguments = ["--config", str(ROOT / "examples/cli_configs" / name), "--use_cpu", "true", "--bf16", "false"]
    return make_parser().parse_args_and_config(arguments, fail_with_unknown_args=True)


HALF = {"num_generations": 16, "per_device_train_batch_size": 16, "vllm_gpu_memory_utilization": 0.5}
LONG = {**HALF, "max_completion_length": 2048, "vllm_max_model_length": 2560}


def documented(row: str) -> list[tuple[str, str]]:
    """GiB without and with a shared base, in the tables of docs/recipes.md."""
    return re.findall(rf"\| {re.escape(row)} \| ([\d.]+) GiB \| ([\d.]+) GiB \|", DOCUMENTATION)


@pytest.mark.parametrize(
    ("name", "config", "card", "changes", "row"),
    [
        ("qwen2.5-1.5b-lora-12gb", QWEN25_1_5B, 12, {}, "`qwen2.5-1.5b-lora-12gb`"),
        ("qwen3-4b-lora-24gb", QWEN3_4B, 24, {}, "`qwen3-4b-lora-24gb`"),
        ("qwen2.5-7b-qlora-24gb", QWEN25_7B, 24, {}, "`qwen2.5-7b-qlora-24gb`"),
        ("qwen2.5-1.5b-lora-t4", QWEN25_1_5B, 15, {}, "`qwen2.5-1.5b-lora-t4`"),
        ("qwen2.5-7b-qlora-t4", QWEN25_7B, 15, {}, "`qwen2.5-7b-qlora-t4`"),
        ("qwen2.5-1.5b-lora-12gb", QWEN25_1_5B, 8, LONG, "1.5B LoRA, 16 x 2048, card of 8 GiB"),
        ("qwen2.5-7b-qlora-24gb", QWEN25_7B, 18, LONG, "7B QLoRA, 16 x 2048, card of 18 GiB"),
    ],
)
def test_the_documentations_plans(name: str, config: Any, card: int, changes: dict[str, Any], row: str) -> None:
    """The figures are the plan's. A recipe fits the card in its name as it stands, a longer run with a shared base."""
    ((alone, shared),) = documented(row)
    for figure, shares in ((alone, False), (shared, True)):
        _, training_args, model_args, _ = parse(f"{name}.yaml")
        for key, value in {**changes, "vllm_share_base_weights": shares}.items():
            setattr(training_args, key, value)
        plan = plan_memory(config, training_args, model_args, card * GIB)
        assert float(figure) == pytest.approx(max(plan.update, plan.rollout) / GIB, abs=0.06)
        assert plan.problems() == [] or (changes and not shares)
    assert changes or name.endswith({15: "-t4"}.get(card, f"-{card}gb"))


@pytest.mark.parametrize(("config", "billions"), [(QWEN25_1_5B, 1.54), (QWEN25_7B, 7.62), (QWEN3_4B, 4.02)])
def test_the_models_of_the_plans_have_their_sizes(config: Any, billions: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == pytest.approx(1e9 * billions, rel=0.01)


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("paper")])
def test_a_recipe_and_the_page_of_the_examples_say_what_the_documentation_says(name: str) -> None:
    text, recipe = (ROOT / "examples/cli_configs" / name).read_text(), name.removesuffix(".yaml")
    (plans,) = documented(f"`{recipe}`")
    assert re.findall(r"`treepo-trl plan` counts ([\d.]+) GiB,\n# and ([\d.]+) GiB with", text) == [plans]
    assert re.findall(rf"\| `{re.escape(recipe)}` \|[^|]*\|[^|]*\| ([\d.]+) GiB \|", EXAMPLES) == [plans[0]]
    assert f"treepo-trl train --config examples/cli_configs/{name}" in EXAMPLES
    assert len(RECIPES) == 6


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_papers_fourteen_segments_and_fills_the_context(name: str) -> None:
    _, training_args, _, _ = parse(name)
    assert training_args.max_tree_depth == 14
    assert training_args.vllm_max_model_length == 1024 + training_args.max_completion_length


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("text", "matches"),
    [
        (r"so \boxed{12}.", True),
        (r"so \boxed{\frac{1}{2}}", True),
        (r"so \boxed{\frac{1}{2}", False),  # not closed yet
        ("so boxed{12}", False),
    ],
)
def test_stop_pattern_of_the_recipes_is_a_closed_box(name: str, text: str, matches: bool) -> None:
    _, training_args, _, _ = parse(name)
    assert bool(re.search(training_args.stop_pattern, text)) == matches


@pytest.mark.parametrize("name", [name for name in RECIPES if "-t4" in name])
def test_a_recipe_for_a_t4_has_no_bfloat16(name: str) -> None:
    settings = yaml.safe_load((ROOT / "examples/cli_configs" / name).read_text())
    assert (settings["fp16"], settings["bf16"], settings["dtype"]) == (True, False, "float16")
    assert "bfloat16" not in map(str, settings.values())


def test_a_small_step_moves_the_papers_weights() -> None:
    _, training_args, model_args, _ = parse("paper-qwen2.5-7b.yaml")
    weight = torch.tensor(0.02, dtype=getattr(torch, model_args.dtype))
    assert weight - training_args.learning_rate != weight
