"""The recipes and the README say what is true of them."""

import ast
import re
from pathlib import Path

import pytest
import torch

from treepo_trl import TreePOConfig
from treepo_trl.cli import make_parser


ROOT = Path(__file__).parent.parent
RECIPES = sorted(
    path.name for path in (ROOT / "examples/cli_configs").glob("*.yaml") if path.name != "quickstart.yaml"
)


def parse(name: str) -> tuple:
    arguments = ["--config", str(ROOT / "examples/cli_configs" / name), "--use_cpu", "true", "--bf16", "false"]
    return make_parser().parse_args_and_config(arguments, fail_with_unknown_args=True)


def test_there_are_recipes() -> None:
    assert RECIPES == ["paper-qwen2.5-7b.yaml", "qwen2.5-1.5b-lora-24gb.yaml", "qwen2.5-7b-qlora-24gb.yaml"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_papers_fourteen_segments(name: str) -> None:
    _, training_args, _, _ = parse(name)
    assert training_args.max_tree_depth == 14


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_prompt_and_completion_fill_the_context(name: str) -> None:
    _, training_args, _, _ = parse(name)
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


def test_a_small_step_moves_the_papers_weights() -> None:
    _, training_args, model_args, _ = parse("paper-qwen2.5-7b.yaml")
    weight = torch.tensor(0.02, dtype=getattr(torch, model_args.dtype))
    assert weight - training_args.learning_rate != weight


def test_readme_example_parses_and_its_config_is_valid(tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    (config,) = [call for call in calls if getattr(call.func, "id", "") == "TreePOConfig"]
    keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in config.keywords}
    assert len(source.strip().splitlines()) <= 13
    TreePOConfig(**{**keywords, "output_dir": str(tmp_path)}, use_cpu=True, bf16=False)
