"""Imports go one way, and the rooms that know no model load none. The table is section 2 of the design."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import treepo_trl


PACKAGE = Path(treepo_trl.__file__).parent

# What each room may import of this package. A new file has to be given a place here.
ALLOWED = {
    "tree": set(),
    "stopping": set(),
    "packing": set(),
    "model_support": set(),
    "tree_attention": set(),
    "rewards": set(),
    "progress": set(),
    "embedded": set(),
    "data": set(),
    "user_errors": set(),
    "base_weights": set(),
    "shared_weights": set(),
    "engine_worker": set(),
    "weight_sync": {"base_weights", "shared_weights"},
    "engines.base": set(),
    "branching": {"tree"},
    "advantages": {"tree"},
    "engines": {"engines.base"},
    "engines.row_states": set(),
    "engines.transformers": {"engines.base", "engines.row_states", "tree", "model_support"},
    "engines.vllm": {"engines.base", "tree"},
    "sampling_config": {"branching"},  # the choices of its fields
    "growing_tree": {"branching", "sampling_config", "stopping", "tree", "engines.base"},
    "sampler": {"growing_tree", "sampling_config", "tree", "engines.base"},
    "metrics": {"sampler", "tree"},
    "dynamic_sampling": {"rewards", "tree"},
    "packed_forward": {"packing", "model_support", "tree_attention"},
    "evaluation": {"engines", "engines.transformers"},
    "treepo_config": {"sampling_config", "advantages", "packing", "base_weights"},  # the choices of their fields
    "activation_memory": set(),
    "memory_plan": {"activation_memory", "base_weights", "treepo_config"},
    "validation": {"engines", "model_support", "treepo_config"},
    "treepo_trainer": {
        *("treepo_config", "validation", "sampler", "tree", "advantages", "rewards", "model_support"),
        *("metrics", "packed_forward", "weight_sync", "engines", "engines.transformers", "engines.vllm"),
        *("tree_attention", "dynamic_sampling"),
    },
    "offline": {"engines", "engines.transformers", "engines.vllm", "sampling_config", "weight_sync"},
    "rollouts": {"engines", "sampler", "sampling_config", "tree"},
    "sample_command": {
        *("data", "engines", "offline", "rollouts", "sampler", "sampling_config", "tree", "user_errors"),
    },
    "cli": {
        *("", "data", "user_errors", "sample_command", "treepo_config"),  # the version is in __init__
        *("treepo_trainer", "evaluation", "progress", "memory_plan"),
    },
    "": {"sampler", "sampling_config", "tree", "treepo_config", "treepo_trainer"},
}

HEAVY = {"torch", "transformers", "trl", "vllm", "accelerate", "peft", "datasets", "numpy"}
# Heavy packages that a room may name at all, in functions and for type checkers included.
HEAVY_ALLOWED = {
    "tree": set(),
    "stopping": set(),
    "branching": set(),
    "sampling_config": set(),
    "growing_tree": set(),
    "sampler": set(),
    "engines.base": set(),
    "engines": set(),
    "advantages": {"torch"},
    "packing": {"torch", "numpy"},
    "packed_forward": {"torch", "accelerate"},
    "tree_attention": {"torch", "transformers"},
    "model_support": {"transformers"},
    "base_weights": {"torch", "transformers", "vllm"},
    "shared_weights": {"torch"},
    "activation_memory": {"torch", "transformers"},
    "engine_worker": {"vllm"},
    "metrics": {"torch"},
    "engines.vllm": {"vllm", "torch", "numpy"},
    "engines.row_states": {"torch", "transformers"},
    "engines.transformers": {"torch", "transformers", "accelerate"},
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str, for_type_checkers: bool) -> list[tuple[str, str]]:
    """Absolute names `(package.module, imported name or "")` of every import statement, in functions too."""
    tree = ast.parse(MODULES[module].read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            skipped.update(child for statement in node.body for child in ast.walk(statement))
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if node in skipped and not for_type_checkers:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".") if package else []
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join(["treepo_trl", *parents, *([node.module] if node.module else [])])
            found += [(base, alias.name) for alias in node.names]
    return found


def rooms_imported_by(module: str) -> set[str]:
    rooms = set()
    for base, name in imports_of(module, for_type_checkers=False):
        if base.split(".")[0] == "treepo_trl":
            inner = base.removeprefix("treepo_trl").removeprefix(".")
            as_module = f"{inner}.{name}".strip(".")
            rooms.add(as_module if as_module in MODULES else inner)
    return rooms


def test_every_file_has_a_place_in_the_table() -> None:
    assert set(MODULES) == set(ALLOWED)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    assert rooms_imported_by(module) <= ALLOWED.get(module, set())


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {module for module, rooms in ALLOWED.items() if module not in done and rooms <= done}
        assert ready, f"a cycle among {set(ALLOWED) - done}"
        done |= ready


@pytest.mark.parametrize("module", HEAVY_ALLOWED)
def test_rooms_without_a_model_name_no_heavy_package(module: str) -> None:
    packages = {base.split(".")[0] for base, _ in imports_of(module, for_type_checkers=False)}
    assert packages & HEAVY <= HEAVY_ALLOWED[module]


@pytest.mark.parametrize(
    "module",
    ["tree", "branching", "stopping", "sampling_config", "growing_tree", "sampler", "engines", "engines.base"],
)
def test_rooms_without_a_model_use_the_standard_library_alone(module: str) -> None:
    packages = {base.split(".")[0] for base, _ in imports_of(module, for_type_checkers=False)}
    assert packages <= set(sys.stdlib_module_names) | {"treepo_trl"}


@pytest.mark.parametrize(
    ("module", "may_load"),
    [
        ("treepo_trl", set()),
        ("treepo_trl.tree", set()),
        ("treepo_trl.branching", set()),
        ("treepo_trl.stopping", set()),
        ("treepo_trl.sampling_config", set()),
        ("treepo_trl.sampler", set()),
        ("treepo_trl.engines", set()),
        ("treepo_trl.advantages", {"torch"}),
        ("treepo_trl.packing", {"torch"}),
    ],
)
def test_a_fresh_interpreter_loads_no_more_than_it_must(module: str, may_load: set[str]) -> None:
    heavy = ("trl", "vllm", "transformers", "torch")
    code = f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) <= may_load


def test_public_names_are_found_without_loading_the_trainer() -> None:
    code = (
        "import sys, treepo_trl; treepo_trl.SegmentTree, treepo_trl.TreeSampler; "
        "print('trl' in sys.modules, 'torch' in sys.modules, sorted(treepo_trl.__all__))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names = ["SegmentTree", "TreePOConfig", "TreePOTrainer", "TreeSampler", "TreeSamplingConfig", "__version__"]
    assert printed.strip() == f"False False {names}"


def test_unknown_public_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'TreeSamplr'"):
        treepo_trl.TreeSamplr  # noqa: B018
