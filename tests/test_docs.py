"""Docs that cannot rot: generated pages are current, code blocks run, links lead somewhere, recipes validate."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sqft import Recipe, errors

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["hooks", "components", "commands", "recipe"])
def test_reference_is_current(name: str) -> None:
    generate = load(ROOT / "docs" / "generate.py")
    page = (ROOT / "docs" / "reference" / f"{name}.md").read_text()
    assert page == generate.page(name), "run: .venv/bin/python docs/generate.py"


def test_every_error_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, errors.SqftError):
            assert f"`{name}`" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page}: {target}"


def test_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    command = ["-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d", str(tmp_path / "trees")]
    site = tmp_path / "site"
    done = subprocess.run([sys.executable, *command, str(ROOT / "docs"), str(site)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loads = re.compile(r"""src="(https?:)?//|<link[^>]+href="(https?:)?//|url\(["']?(https?:)?//|@import""")
    for file in (*site.rglob("*.html"), *site.rglob("*.css")):
        assert not loads.search(file.read_text("utf-8")), f"{file} loads something from elsewhere"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = 0
    for page in PAGES:
        scope: dict[str, object] = {"__name__": "docs"}
        for block in blocks(page, "python"):
            if "quickstart.json" in block and not (ROOT / "examples/quickstart/data/test.jsonl").is_file():
                continue  # needs the model that `make quickstart` fetches
            monkeypatch.chdir(ROOT)
            exec(compile(block, str(page), "exec"), scope)
            ran += 1
    assert ran >= 2


def test_recipes_validate() -> None:
    recipes = sorted(ROOT.glob("examples/recipes/*.json"))
    assert recipes
    for recipe in recipes:
        Recipe.load(recipe)
    shown = [json.loads(block) for page in PAGES for block in blocks(page, "json")]
    assert shown
    for content in shown:
        Recipe.parse(content)
