"""The shape of the house: who may import what, what starts without torch, how large a class may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from sqft import Orchestrator, Registry

ROOT = Path(__file__).parents[1]
CORE = ROOT / "sqft"
ROOMS = {  # what each package, or module at the root, may import besides itself; no more than it does import
    "errors": "",
    "types": "",
    "ranks": "",
    "utils": "errors",
    "kernels": "types",
    "components": "errors types ranks utils kernels",
    "checkpoints": "errors types utils kernels",
    "data": "errors utils",
    "recipe": "errors types utils data",
    "planning": "errors types utils components checkpoints data recipe",
    "store": "errors utils",
    "modeling": "errors types ranks utils kernels components checkpoints data",
    "stages": "errors types ranks utils kernels components checkpoints data recipe planning modeling",
    "execution": "errors utils components checkpoints recipe planning store modeling stages",
    "tools": "errors types utils kernels components checkpoints data recipe planning store modeling stages execution",
    "cli": "errors utils components recipe store execution tools",
    "api": "errors types ranks components checkpoints",
    "testing": "errors types kernels components modeling",
    "__init__": "components recipe planning store execution",
    "__main__": "cli",
}
WITHOUT_TORCH = ("utils", "components", "checkpoints", "data", "recipe", "planning", "store", "api", "cli")
"""Rooms that can be imported whole without torch, transformers or peft; `NEEDS_TORCH` in them is imported lazily."""
NEEDS_TORCH = {"sqft.data.collators", "sqft.data.windows"}

LARGEST_CLASS, LARGEST_MODULE = 250, 400
NEEDS_A_TEST = 60
"""A module of so many lines has a test file of its own: `sqft/data/hub.py` has `tests/data/test_hub.py`."""


def imports(file: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it, those for type checkers included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inner if name in MODULES]
            yield from modules
            if len(modules) < len(inner):
                yield node.module


def module_name(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(file): file for file in sorted(CORE.rglob("*.py"))}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def lines_of(file: Path) -> int:
    return len(file.read_text("utf-8").splitlines())


@cache
def core_imports(module: str) -> frozenset[str]:
    return frozenset(name for name in imports(MODULES[module]) if name.split(".")[0] == "sqft")


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_what_it_may_and_no_less(name: str) -> None:
    found = {room(other): module for module in MODULES if room(module) == name for other in core_imports(module)}
    found = {other: module for other, module in found.items() if other not in (name, "__init__")}
    assert set(found) == set(ROOMS[name].split()), found


def test_every_module_is_in_a_room() -> None:
    assert {room(module) for module in MODULES} == set(ROOMS)


def test_no_circle() -> None:
    """Not even one that only type checkers see."""
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " → ".join((*above[above.index(module) :], module))
        if module not in done:
            for other in sorted(core_imports(module) - {module, "sqft"}):
                visit(other, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_the_core_imports_no_plugin() -> None:
    for file in MODULES.values():
        assert not {name for name in imports(file) if name.startswith("sqft_")}, file


@pytest.mark.parametrize("file", sorted((ROOT / "plugins").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_a_plugin_imports_the_public_names_only(file: Path) -> None:
    ours = {name for name in imports(file) if name.split(".")[0] == "sqft"}
    assert all(name == "sqft.api" or name.split(".")[:2] == ["sqft", "kernels"] for name in ours), ours
    others = {name.split(".")[0] for name in imports(file) if name.startswith("sqft_")}
    assert others <= {file.parent.name}


@pytest.mark.parametrize("module", [name for name, file in MODULES.items() if lines_of(file) >= NEEDS_A_TEST])
def test_a_module_has_its_test_at_its_path(module: str) -> None:
    *rooms, name = MODULES[module].relative_to(CORE).with_suffix("").parts
    assert ROOT.joinpath("tests", *rooms, f"test_{name}.py").is_file()


def test_no_module_is_too_large() -> None:
    for file in [*MODULES.values(), *ROOT.glob("plugins/**/*.py")]:
        assert len(file.read_text().splitlines()) <= LARGEST_MODULE, file


def test_no_class_is_too_large() -> None:
    """Bases of ours count: inheritance must not be a way to split a file."""
    classes = {node.name: node for node in definitions()}

    def lines(name: str) -> int:
        node = classes[name]
        bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
        return (node.end_lineno or 0) - node.lineno + 1 + sum(map(lines, bases))

    assert not {name: count for name in classes if (count := lines(name)) > LARGEST_CLASS}


def definitions() -> Iterator[ast.ClassDef]:
    for file in [*MODULES.values(), *ROOT.glob("plugins/**/*.py")]:
        yield from (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef))


def test_light_rooms_import_no_torch() -> None:
    light = [name for name in MODULES if room(name) in WITHOUT_TORCH and name not in NEEDS_TORCH]
    assert_light(f"import importlib\nfor name in {light!r}: importlib.import_module(name)\n")


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["plugins"],
        ["schema"],
        ["show", "scorer", "wanda"],
        ["plan", "RECIPE"],
        ["status"],
        ["init", "qa-sparsepeft"],
    ],
    ids=str,
)
def test_light_commands_import_no_torch(command: list[str], tmp_path: Path, model_folder: Path) -> None:
    recipe = tmp_path / "r.json"
    (tmp_path / "store" / "runs").mkdir(parents=True)
    recipe.write_text(f'{{"name": "x", "model": {{"path": "{model_folder}"}}, "sparsify": {{"scorer": "magnitude"}}}}')
    if "plan" in command:  # the first plan of a model looks at its modules
        Orchestrator(Registry.discover(), tmp_path / "store").load(recipe)
    words = [str(recipe) if word == "RECIPE" else word for word in command]
    assert_light(f"from sqft.cli import main\nmain({words!r}, standalone_mode=False)\n", tmp_path)


def assert_light(code: str, folder: Path = ROOT) -> None:
    code = (
        f"{code}import sys\nheavy = {{'torch', 'transformers', 'peft'}} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
