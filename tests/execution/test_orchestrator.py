"""The loop over a plan's steps: what is made, reused, left out or made anew. Stages here write one file each."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import Problem, RecipeError, StageError
from sqft.execution.orchestrator import more_problems, steps_from, steps_until
from sqft.planning.plan import Plan
from sqft.stages.inputs import StageInputs


class OneFile:
    """A stage that writes its step's name; `made` and `verified` list the steps that came here."""

    made: list[str] = []
    verified: list[str] = []
    failing: str = ""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs = inputs

    def run(self) -> dict[str, Any]:
        name = self.inputs.step.name
        assert all((folder / "name").is_file() for folder in self.inputs.folders.values())
        if name == self.failing:
            raise StageError(f"{name} fails")
        self.made.append(name)
        (self.inputs.scratch / "name").write_text(name)
        return {"sparsity": 0.5} if self.inputs.step.stage != "evaluate" else {"sparsity": 0.5, "trainable": 1}

    def verify(self) -> None:
        assert (self.inputs.scratch / "name").read_text() == self.inputs.step.name
        self.verified.append(self.inputs.step.name)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> type[OneFile]:
    monkeypatch.setattr("sqft.stages.stage.make_stage", OneFile)
    monkeypatch.setattr("sqft.execution.preflight.check_model", lambda *_: None)
    monkeypatch.setattr(OneFile, "made", [])
    monkeypatch.setattr(OneFile, "verified", [])
    monkeypatch.setattr(OneFile, "failing", "")
    return OneFile


@pytest.fixture
def orchestrator(registry: Registry, tmp_path: Path) -> Orchestrator:
    return Orchestrator(registry, tmp_path / "store")


@pytest.fixture
def recipe(raw: dict[str, Any]) -> Recipe:
    return Recipe.parse({key: value for key, value in raw.items() if key != "evaluate"})


NAMES = ["sparsify", "finetune", "search", "merge"]


def test_each_step_is_made_verified_and_reused(
    stages: type[OneFile], orchestrator: Orchestrator, recipe: Recipe
) -> None:
    run = orchestrator.run(orchestrator.plan(recipe))
    assert list(run) == stages.made == stages.verified == NAMES
    manifest = json.loads((run["finetune"].folder / "manifest.json").read_text())
    assert (manifest["stage"], manifest["step"], manifest["device"]) == ("finetune", "finetune", "cpu")
    assert manifest["inputs"] == {"base": run["sparsify"].step.fingerprint} and manifest["seconds"] >= 0
    assert {file.name for file in run.folder.iterdir()} == {
        "recipe.json", "plan.json", "run.json", "report.json", "report.md", "run.log",
    }  # fmt: skip
    again = orchestrator.plan(recipe)
    assert again.reused == frozenset(NAMES)
    assert orchestrator.run(again)["merge"].folder == run["merge"].folder and stages.made == NAMES


def test_no_step_holds_what_the_one_before_left(
    stages: type[OneFile], orchestrator: Orchestrator, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage whose objects refer to one another, as a trainer's do, which Python alone frees some time later."""
    alive: list[int] = []
    models = weakref.WeakSet[OneFile]()

    def begin(self: OneFile, inputs: StageInputs) -> None:
        alive.append(len(models))
        self.inputs, self.trainer = inputs, self  # type: ignore[attr-defined]
        models.add(self)

    monkeypatch.setattr(OneFile, "__init__", begin)
    gc.disable()
    try:
        orchestrator.run(orchestrator.plan(recipe))
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 0]


def test_a_run_goes_on_after_a_step_that_failed(
    stages: type[OneFile], orchestrator: Orchestrator, recipe: Recipe
) -> None:
    stages.failing = "search"
    with pytest.raises(StageError, match="search fails"):
        orchestrator.run(orchestrator.plan(recipe))
    stages.failing = ""
    assert orchestrator.plan(recipe).reused == {"sparsify", "finetune"}
    orchestrator.run(orchestrator.plan(recipe))
    assert stages.made == NAMES


def test_a_run_until_a_stage_and_one_that_makes_a_stage_anew(
    stages: type[OneFile], orchestrator: Orchestrator, recipe: Recipe
) -> None:
    plan = orchestrator.plan(recipe)
    assert list(orchestrator.run(plan, until="finetune")) == stages.made == NAMES[:2]
    orchestrator.run(plan)
    stages.made.clear()
    orchestrator.run(plan, fresh="finetune")
    assert stages.made == ["finetune", "search", "merge"]


def test_a_record_of_a_run_only_grows(stages: type[OneFile], orchestrator: Orchestrator, recipe: Recipe) -> None:
    plan = orchestrator.plan(recipe)
    run = orchestrator.run(plan)
    first = json.loads((run.folder / "run.json").read_text())
    again = orchestrator.run(plan, until="sparsify")
    second = json.loads((run.folder / "run.json").read_text())
    assert list(again) == ["sparsify"] and list(second["artifacts"]) == NAMES
    assert {**second, "finished": ""} == {**first, "finished": ""}
    shutil.rmtree(run["finetune"].folder)  # what was made of it is still there, and cannot be used alone
    orchestrator.run(plan, until="sparsify")
    assert list(json.loads((run.folder / "run.json").read_text())["artifacts"]) == ["sparsify"]


def test_plugins_are_told_of_every_step(
    stages: type[OneFile], orchestrator: Orchestrator, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []

    def notify(hook: str, **arguments: Any) -> list[tuple[str, Exception]]:
        told.append((hook.removeprefix("sqft_stage_"), arguments["step"].name))
        return [("tracker", ValueError("is down"))]

    monkeypatch.setattr(orchestrator.registry, "notify", notify)
    orchestrator.run(orchestrator.plan(recipe), until="finetune")
    assert told == [(hook, name) for name in NAMES[:2] for hook in ("started", "finished")]
    told.clear()
    orchestrator.run(orchestrator.plan(recipe), until="finetune")
    assert told == [("finished", name) for name in NAMES[:2]]


def test_a_missing_model_is_noticed_before_anything_is_made(
    stages: type[OneFile], orchestrator: Orchestrator, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Plan] = []
    monkeypatch.setattr("sqft.execution.preflight.check_model", lambda plan, _: asked.append(plan))
    plan = orchestrator.plan(recipe)
    orchestrator.run(plan)
    assert asked == [plan]
    orchestrator.run(plan)  # all is done: no model is needed
    assert asked == [plan]


# -- choosing steps -----------------------------------------------------------------------------


@pytest.fixture
def plan(raw: dict[str, Any], orchestrator: Orchestrator) -> Plan:
    return orchestrator.plan(Recipe.parse(raw))


def test_steps_until_a_stage_or_a_step(plan: Plan) -> None:
    def names(until: str | None) -> list[str]:
        return [step.name for step in steps_until(plan, until)]

    whole = [step.name for step in plan.steps]
    assert names(None) == names("evaluate") == whole
    assert names("finetune") == NAMES[:2] and names("evaluate:model") == [*NAMES, "evaluate:model"]
    with pytest.raises(StageError, match=r"this recipe has no stage 'mrge'; it has evaluate, .*merge"):
        steps_until(plan, "mrge")


def test_steps_that_depend_on_a_stage(plan: Plan) -> None:
    def names(fresh: str) -> list[str]:
        return [step.name for step in steps_from(plan, fresh)]

    assert names("sparsify") == [step.name for step in plan.steps if step.name != "evaluate:model"]
    assert names("merge") == ["merge", "evaluate:merge"] and names("evaluate:model") == ["evaluate:model"]
    assert names("evaluate") == [step.name for step in plan.steps if step.stage == "evaluate"]
    with pytest.raises(StageError, match="has no stage 'nothing'"):
        steps_from(plan, "nothing")


# -- mistakes -----------------------------------------------------------------------------------


def test_a_file_is_read_changed_and_planned(raw: dict[str, Any], orchestrator: Orchestrator, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(raw))
    plan = orchestrator.load(tmp_path / "r.json", ["name=other"])
    assert plan.recipe.name == "other" and not (tmp_path / "store").exists()


def test_plain_data_is_changed_and_planned_with_every_mistake_at_once(
    raw: dict[str, Any], orchestrator: Orchestrator
) -> None:
    assert orchestrator.load(raw, ["name=other"]).recipe.name == "other" and raw["name"] != "other"
    with pytest.raises(RecipeError) as caught:
        orchestrator.load(raw, ["sparsify.sparsity=2", "sparsify.scorer=wnda"])
    assert {problem.place for problem in caught.value.problems} == {"sparsify.sparsity", "sparsify.scorer"}
    with pytest.raises(RecipeError, match="expected a JSON object, found list"):
        orchestrator.load([raw])  # type: ignore[arg-type]


def test_problems_near_known_ones_are_not_repeated(recipe: Recipe) -> None:
    def plan(rest: Recipe) -> Plan:
        assert rest is recipe
        found = ("sparsify", "sparsify.scorer.options", "sparsifyx", "finetune.data", "")
        raise RecipeError([Problem(place, "is wrong") for place in found])

    known = [Problem("sparsify.scorer", "is missing")]
    more = more_problems(RecipeError(known, "r.json", recipe), plan)
    assert [problem.place for problem in more] == ["sparsifyx", "finetune.data", ""]
    assert more_problems(RecipeError(known, "r.json", None), plan) == []


def test_what_the_plan_notes_is_said_before_the_first_step(
    stages: type[OneFile], orchestrator: Orchestrator, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    plan = dataclasses.replace(orchestrator.plan(recipe), notes=("model: a tower is left out",))
    caplog.set_level("INFO", "sqft")
    orchestrator.run(plan)
    first = next(index for index, line in enumerate(caplog.messages) if line.startswith("[1/"))
    assert "note: model: a tower is left out" in caplog.messages[:first]
