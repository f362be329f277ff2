"""The shape of the house: who may import what, how large a module may be, what starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASIC = {"errors", "contracts"}
PLANNING = BASIC | {
    "hookspecs",
    "registry",
    "recipe",
    "sections",
    "source",
    "plan",
    "planner",
    "store",
    "progress",
    "processes",
    "report",
}
DEEP = PLANNING | {"layers", "kernels", "data", "modeling", "checks", "folders"}
MAY: dict[str, set[str]] = {
    "errors": set(),
    "contracts": set(),
    "progress": set(),
    "processes": {"errors"},
    "hookspecs": {"contracts", "plan", "store"},  # plan and store for type checkers only
    "api": {"contracts", "errors", "folders", "hookspecs"},
    "folders": {"contracts", "layers"},
    "registry": BASIC | {"hookspecs", ""},
    "mistakes": {"errors"},
    "raw": {"errors"},
    "sections": {"data"},
    "recipe": {"errors", "mistakes", "raw", "sections"},
    "layers": {"contracts"},
    "source": BASIC | {"layers"},
    "plan": BASIC | {"recipe", "sections", "registry", "source"},
    "fingerprint": {"recipe", "registry", "sections"},
    "resolver": BASIC | {"data", "mistakes", "plan", "recipe", "sections", "registry", "source"},
    "fitting": BASIC | {"plan", "recipe", "resolver"},
    "planner": BASIC | {"checks", "fingerprint", "fitting", "plan", "recipe", "sections", "registry", "source"},
    "blame": {"errors", "registry"},
    "store": {"errors", "source"},
    "report": {"plan", "store"},
    "schema": {"contracts", "recipe", "registry"},
    "checks": BASIC | {"kernels"},
    "testing": BASIC | {"checks", "kernels"},
    "kernels": BASIC,
    "data": {"errors"} | {"data"},
    "modeling": DEEP,
    "stages": DEEP | {"stages", ""},
    "orchestrator": PLANNING | {"blame", "mistakes", "stages", "modeling", "stored", ""},
    "preview": PLANNING | {"data", "modeling", "stages"},
    "bench": PLANNING | {"orchestrator", "stages", "modeling", ""},
    "inspection": BASIC | {"kernels", "layers", "modeling", "plan", "progress", "source"},
    "status": {"errors", "plan", "store"},
    "doctor": {"contracts", "kernels", "modeling", "registry", ""},
    "pipelines": BASIC | {"mistakes", "recipe", "registry", "source"},
    "stored": {"errors", "raw", "recipe", "source"},
    "__main__": {"cli"},
    "cli": PLANNING
    | {
        "bench",
        "doctor",
        "inspection",
        "orchestrator",
        "pipelines",
        "preview",
        "raw",
        "schema",
        "status",
        "stored",
        "",
    },
    "": {"orchestrator", "recipe", "registry"},
}


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"sqft.{alias.name}" for alias in node.names if (ROOT / "sqft" / f"{alias.name}.py").is_file()}
            found |= names if node.module == "sqft" and names else {node.module}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("file", sorted((ROOT / "sqft").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_core_imports(file: Path) -> None:
    parts = file.relative_to(ROOT / "sqft").with_suffix("").parts
    here = "" if parts == ("__init__",) else parts[0]
    ours = {room(name) for name in imports(file) if name.split(".")[0] == "sqft"}
    assert ours <= MAY[here] | {here}, f"{file} imports {ours - MAY[here]}"
    assert not {name for name in imports(file) if name.startswith("sqft_")}, "core imports a plugin"


@pytest.mark.parametrize("file", sorted((ROOT / "plugins").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_plugin_imports(file: Path) -> None:
    allowed = {"sqft.api", "sqft.kernels"}
    ours = {name for name in imports(file) if name.split(".")[0] == "sqft"}
    assert all(any(name == a or name.startswith(f"{a}.") for a in allowed) for name in ours)
    others = {name.split(".")[0] for name in imports(file) if name.startswith("sqft_")}
    assert others <= {file.parent.name}


@pytest.mark.parametrize("file", sorted([*ROOT.glob("sqft/**/*.py"), *ROOT.glob("plugins/**/*.py")]), ids=str)
def test_sizes(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


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
    code = (
        "import sys; from sqft.cli import main\n"
        f"main({[str(recipe) if c == 'RECIPE' else c for c in command]!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
