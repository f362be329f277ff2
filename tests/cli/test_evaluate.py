"""sqft eval: what its options make of a run's recipe or a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sqft.cli import main
from sqft.recipe.recipe import Recipe


class Recorder:
    """An orchestrator that runs nothing: it keeps the recipe, and finds what `made` names."""

    made: tuple[str, ...] = ()
    store = None

    def __init__(self) -> None:
        self.recipes: list[Recipe] = []

    def plan(self, recipe: Recipe) -> Any:
        self.recipes.append(recipe)
        return SimpleNamespace(reused=self.made, recipe=recipe, steps=())

    def run(self, plan: Any) -> None: ...


@pytest.fixture
def orchestrator(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr("sqft.cli.evaluate.open_orchestrator", lambda *_: (None, recorder))
    monkeypatch.setattr("sqft.cli.evaluate.print_report", lambda *_: None)
    return recorder


@pytest.fixture
def run(raw: dict[str, Any], tmp_path: Path) -> Path:
    folder = tmp_path / "store" / "runs" / "tiny-00000000"
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(raw))
    return folder


def measured(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def test_a_run_is_measured_as_its_recipe_says(orchestrator: Recorder, run: Path, raw: dict[str, Any]) -> None:
    done = measured(run, "--of", "merge")
    assert done.exit_code == 0, done.output
    evaluate = orchestrator.recipes[-1].evaluate
    assert evaluate and evaluate.of == ("merge",)
    assert evaluate.perplexity and evaluate.perplexity.text == raw["evaluate"]["perplexity"]["text"]


def test_options_replace_what_the_recipe_measures(orchestrator: Recorder, run: Path, data: Path) -> None:
    options = ["--perplexity", data / "heldout.txt", "--tasks", "a, b", "--set", "evaluate.limit=3"]
    done = measured(run, "--of", "sparsify", "--of", "finetune:maximal", *options)
    assert done.exit_code == 0, done.output
    evaluate = orchestrator.recipes[-1].evaluate
    assert evaluate and evaluate.of == ("sparsify", "finetune:maximal")
    assert (evaluate.tasks, evaluate.limit, evaluate.exact_match) == (("a", "b"), 3, None)
    assert evaluate.perplexity and Path(evaluate.perplexity.text) == (data / "heldout.txt").resolve()


def test_a_models_folder_is_measured_as_it_is(orchestrator: Recorder, model_folder: Path, data: Path) -> None:
    done = measured(model_folder, "--of", "model", "--exact-match", data / "test.jsonl")
    assert done.exit_code == 0, done.output
    recipe = orchestrator.recipes[-1]
    assert recipe.model.path == str(model_folder) and recipe.sparsify is None
    assert recipe.evaluate and recipe.evaluate.exact_match


def test_a_run_that_made_nothing_yet(orchestrator: Recorder, run: Path) -> None:
    done = measured(run)
    assert done.exit_code == 2 and f"no step of {run} that could be measured is done" in done.stderr
