"""Docs that cannot rot: generated pages are current, every page works as it reads, links lead somewhere."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

import sqft
from sqft import Orchestrator, Recipe, Registry, api, errors
from sqft.cli import main
from sqft.recipe.data import TrainingData
from sqft.tools.sweep import Sweep, plan_cells

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["hooks", "components", "commands", "recipe", "python"])
def test_reference_is_current(name: str) -> None:
    generate = load(ROOT / "docs" / "generate.py")
    page = (ROOT / "docs" / "reference" / f"{name}.md").read_text()
    assert page == generate.page(name), "run: .venv/bin/python docs/generate.py"


@pytest.mark.parametrize("place", ["how-to/models.md", "results/families.md"])
def test_tables_of_families_are_current(place: str) -> None:
    generate = load(ROOT / "docs" / "generate.py")
    page = (ROOT / "docs" / place).read_text()
    assert page == generate.with_part(place, page), "run: .venv/bin/python docs/generate.py"


def test_every_public_name_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    taken = {name for name, value in vars(api).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert taken == set(api.__all__)
    for name in {*api.__all__, *sqft.__all__} - {"__version__"}:
        assert f"### `{name}`\n" in page


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


FENCE = re.compile(r"(?:`([^`\n]+)`[^`\n]*:\n\n)?^```(\w+)(?: needs (\w+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
"""A block: the file that the line above names it, its language, the package it needs, its text."""


def json_blocks() -> list[Any]:
    found = [FENCE.findall(page.read_text()) for page in PAGES]
    return [json.loads(text) for of_page in found for _, language, _, text in of_page if language == "json"]


def small(raw: dict[str, Any], model: Path) -> dict[str, Any]:
    """A recipe with less of everything, on a model of two layers."""
    raw = json.loads(json.dumps(raw))
    raw["model"] = raw["model"] | {"path": str(model)}
    raw.get("calibration", {}).update(samples=4, length=32)
    quantizer = raw.get("quantize", {}).get("quantizer")
    if isinstance(quantizer, dict):
        quantizer["options"]["group_size"] = 32
    if "finetune" in raw:
        raw["finetune"].update(steps=3, batch_size=4, save_every=2)
        raw["finetune"] |= {} if "warmup_ratio" in raw["finetune"] else {"warmup_steps": 1}
        raw["finetune"].pop("report_to", None)  # its packages are not installed
    raw.get("evaluate", {}).get("perplexity", {}).update(tokens=128, length=64)
    return raw


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def here(
    model_folder: Path, data: Path, shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A folder that has what the pages speak of: data, the example recipes, a store; all of it small."""
    quickstart, recipes = tmp_path / "examples" / "quickstart" / "data", tmp_path / "examples" / "recipes"
    recipes.mkdir(parents=True)
    shutil.copytree(data, quickstart)
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "examples" / "paper", recipes.parent / "paper")
    for file in ROOT.glob("examples/recipes/*.json"):
        (recipes / file.name).write_text(json.dumps(small(json.loads(file.read_text()), model_folder)))
    (tmp_path / "store").symlink_to(shared_store)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_works_from_top_to_bottom(page: Path, here: Path, model_folder: Path) -> None:
    scope: dict[str, object] = {"__name__": "docs"}
    for file, language, needed, text in FENCE.findall(page.read_text()):
        if language == "json":
            raw = json.loads(text)
            if "axes" in raw:
                Sweep.parse(raw, here)
            elif whole(raw) is not raw:  # its data are nobody's
                continue
            else:
                raw = small(raw, model_folder)
                Orchestrator(Registry.discover(), here / "store").plan(Recipe.parse(raw, here))
            text = json.dumps(raw)
        if file:
            (here / file).parent.mkdir(parents=True, exist_ok=True)
            (here / file).write_text(text)
        if language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                command(shlex.split(line, comments=True), here)
        if language == "python" and not (needed and importlib.util.find_spec(needed) is None):
            exec(compile(text, file or str(page), "exec"), scope)


def test_final_figures_reach_a_tracker(here: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the lines of the page, and a writer in TensorBoard's place."""
    written: dict[str, float] = {}

    class SummaryWriter:
        def __init__(self, folder: str) -> None: ...
        def __enter__(self) -> SummaryWriter:
            return self

        def __exit__(self, *error: object) -> None: ...
        def add_scalar(self, tag: str, value: float, step: int | None = None) -> None:
            written[tag] = value

    for name in ("tensorboard", "torch.utils.tensorboard"):
        module = ModuleType(name)
        module.__spec__ = sys.__spec__
        module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    test_a_page_works_from_top_to_bottom(ROOT / "docs" / "how-to" / "watch-training.md", here, model_folder)
    (report,) = (json.loads(file.read_text()) for file in here.glob("store/runs/watched-*/report.json"))
    for figure in ("perplexity", "sparsity"):
        assert written[f"search (racing)/{figure}"] == report["rows"][0][figure]
    assert written["search/value"] < 0  # of the last trial: a loss, negated


def command(words: list[str], here: Path) -> None:
    """Do what a line of a page says, or see that it could be done: nothing is installed, and no GPU is asked for."""
    if words[:1] == ["sqft"]:
        if "cuda" in " ".join(words) or words[1] == "bench":  # tests/tools/test_bench.py runs that
            main.commands[words[1]].make_context(words[1], words[2:])
            return
        done = CliRunner().invoke(main, words[1:])
        assert done.exit_code == 0, f"{shlex.join(words)}: {done.output}\n{done.exception!r}"
    elif words[:1] == ["make"]:
        rules = (ROOT / "Makefile").read_text()
        for target in [word for word in words[1:] if "=" not in word]:
            assert f"\n{target}:" in rules, f"make {target}"
    elif words[:2] == ["pip", "install"] and (here / words[-1] / "pyproject.toml").is_file():
        pretend_to_install(here / words[-1])
    elif words:
        for word in words[1:]:
            if word.startswith("examples/"):
                assert (ROOT / word).exists(), shlex.join(words)


def pretend_to_install(folder: Path) -> None:
    """Metadata beside its modules: as good as installed to whoever looks for entry points."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    requires = "".join(f"Requires-Dist: {line}\n" for line in project["dependencies"])
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n{requires}"
    )
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    sys.path.insert(0, str(folder))  # the fixture puts it back


def test_recipes_validate() -> None:
    recipes = sorted(ROOT.glob("examples/recipes/*.json"))
    assert recipes
    for recipe in recipes:
        Recipe.load(recipe)
    shown = json_blocks()
    assert len(shown) >= 8
    for content in shown:
        if "axes" in content:
            Sweep.parse(content)
        else:
            Recipe.parse(whole(content))


@pytest.mark.parametrize("file", sorted(ROOT.glob("examples/paper/**/*.json")), ids=lambda file: file.stem)
def test_the_papers_sweeps(file: Path) -> None:
    """Each cell is a recipe; the small ones are planned by the page that names them, or by the test below."""
    if file.name == "base.json":
        Recipe.load(file)
        return
    cells = Sweep.load(file).cells()
    assert len({cell.name for cell in cells}) == len(cells) > 1
    for cell in cells:
        Recipe.load(cell.recipe, cell.changes)


def test_the_small_sweeps_can_be_run(here: Path) -> None:
    orchestrator = Orchestrator(Registry.discover(), here / "store")
    for file in sorted(here.glob("examples/paper/small/*.json")):
        sweep = Sweep.load(file)
        of_hub = isinstance(sweep.set.get("finetune.data"), list)  # no test downloads
        changes = ["finetune.data=../quickstart/data/train.jsonl"] if of_hub else []
        assert len(plan_cells(sweep, orchestrator, changes)) > 1


def whole(content: dict[str, Any]) -> dict[str, Any]:
    """A recipe, or the least one around a data section that is shown alone."""
    if content.keys() <= TrainingData.model_fields.keys():
        content = {"data": content}
    if content.keys() != {"data"}:
        return content
    return {"name": "part", "model": {"path": "m"}, "finetune": {"adapter": "lora", "merger": "unmerged", **content}}
