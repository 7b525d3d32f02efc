"""Imports go one way, and the rooms that know no model load none."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import treepo_trl


PACKAGE = Path(treepo_trl.__file__).parent

# From the ground up: a room imports from its own floor's folder and from floors below, never from beside or above.
# Two files of `settings` are named by themselves: they read the finished config, so they stand above it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("preflight",),
    ("model_support", "settings", "file_lock", "model_card"),
    ("engines", "checkpoints"),
    ("sampling",),
    ("turns", "evaluation"),
    ("update",),
    ("treepo_config",),
    ("trl",),
    ("policy", "metrics", "tree_log", "settings.arguments", "settings.data"),
    ("servers", "batch", "health"),
    ("scoring", "engine_choice"),
    ("memory",),
    ("treepo_trainer",),
    ("quickstart",),
    ("command_line",),
    ("apps", "quickstart.command"),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

HEAVY = {"torch", "transformers", "trl", "vllm", "accelerate", "peft", "datasets", "numpy"}
# Heavy packages that a room may name at all, in functions included.
HEAVY_ALLOWED = {
    "preflight": set(),
    "settings.addresses": set(),
    "settings.exclusions": set(),
    "settings.values": set(),
    "sampling": set(),
    "turns": set(),
    "engines.base": set(),
    "engines.vllm": {"vllm", "numpy"},
    "engines.vllm_sampling": {"numpy"},
    "servers.connection": set(),
    "servers.facts": set(),
    "servers.engine": set(),
    "update.advantages": {"torch"},
    "update.packing": {"torch", "numpy"},
    "apps.view.trees": set(),
    "evaluation.answers": set(),
    "evaluation.estimators": {"numpy"},
    "evaluation.intervals": {"numpy"},
    "health": {"transformers"},
    "health.examination": set(),
    "health.rules": set(),
    "health.reward_signal": set(),
    "health.runs": set(),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str) -> list[tuple[str, str]]:
    """Names `(package.module, imported name or "")` of every import, in functions and for types alone too."""
    return _imports_of(module, set())


def loaded_imports_of(module: str) -> list[tuple[str, str]]:
    """Those of them that happen when the module runs."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return _imports_of(module, skipped)


def _imports_of(module: str, skipped: set[int]) -> list[tuple[str, str]]:
    tree = ast.parse(MODULES[module].read_text())
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if getattr(node, "lineno", 0) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, "ruff's TID252"
            parts = ["treepo_trl", package, node.module] if node.level else [node.module]
            base = ".".join(part for part in parts if part)
            found += [(base, alias.name) for alias in node.names]
    return found


def rooms_imported_by(module: str) -> set[str]:
    rooms = set()
    for base, name in imports_of(module):
        if base.split(".")[0] == "treepo_trl":
            inner = base.removeprefix("treepo_trl").removeprefix(".")
            as_module = f"{inner}.{name}".strip(".")
            rooms.add(as_module if as_module in MODULES else inner)
    return rooms


def room_of(module: str) -> str:
    """Its room; or itself, where it stands higher than the rest of its room."""
    return module if module in FLOOR_OF else module.split(".")[0]


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in MODULES} - {""} == set(FLOOR_OF)


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_go_down(module: str) -> None:
    room = room_of(module)
    above = {
        other
        for other in map(room_of, rooms_imported_by(module))
        if other and other != room and FLOOR_OF[other] >= FLOOR_OF[room]
    }
    assert not above, f"{module} imports from {above}: move what both need down, or hand it over as an argument"


def test_no_module_leads_back_to_itself() -> None:
    """By imports for types alone neither: who reads one must not have to read the other first."""
    steps = {module: rooms_imported_by(module) & set(MODULES) - {"", module} for module in MODULES if module}
    circles = []
    for module in steps:
        seen, ahead = set[str](), set(steps[module])
        while ahead:
            step = ahead.pop()
            seen.add(step)
            ahead |= steps.get(step, set()) - seen
        if module in seen:
            circles.append(module)
    assert circles == []


def modules_in(room: str) -> list[str]:
    return [module for module in MODULES if module == room or module.startswith(f"{room}.")]


@pytest.mark.parametrize("room", HEAVY_ALLOWED)
def test_rooms_without_a_model_name_no_heavy_package(room: str) -> None:
    packages = {base.split(".")[0] for module in modules_in(room) for base, _ in loaded_imports_of(module)}
    assert packages & HEAVY <= HEAVY_ALLOWED[room]


@pytest.mark.parametrize(
    ("module", "may_load"),
    [
        ("treepo_trl", set()),
        ("treepo_trl.settings", set()),
        ("treepo_trl.sampling", set()),
        ("treepo_trl.turns", set()),
        ("treepo_trl.engines", set()),
        ("treepo_trl.evaluation", set()),
        ("treepo_trl.update.advantages", {"torch"}),
        ("treepo_trl.update.packing", {"torch"}),
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
