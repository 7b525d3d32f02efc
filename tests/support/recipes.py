"""Recipes as `treepo-trl doctor` reads them, from a file or from settings."""

from pathlib import Path
from typing import Any

import yaml

from treepo_trl.apps.doctor.command import command_parser
from treepo_trl.apps.doctor.recipe import Recipe, read


def written(folder: Path, **settings: Any) -> Path:
    """A recipe with these settings as a file."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(folder / "out"), "report_to": "none", **settings}))
    return file


def recipe_of(file: Path, model: str, *options: str) -> Recipe:
    """The recipe of a file, whose small step is made on a model."""
    return read(command_parser(), ["--config", str(file), "--model_name_or_path", model, *options])


def everything(model: str) -> Recipe:
    """What is checked without a recipe."""
    return read(command_parser(), ["--model_name_or_path", model])
