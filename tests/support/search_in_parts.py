"""A search that reads no weight of the base, held against the same search over a base that is there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sqft import Orchestrator, Recipe, Registry, Run
from sqft.stages.inputs import StageInputs
from sqft.stages.search import SearchStage


def searched(raw: dict[str, Any], registry: Registry, store: Path) -> Run:
    """Run a recipe up to its search, which evaluates nothing; what the store has is reused."""
    orchestrator = Orchestrator(registry, store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw | {"search": {}})), "search")


def search_in_parts(run: Run, folder: Path) -> SearchStage:
    """The run's search once more, into another folder."""
    step = dataclasses.replace(run.plan.step("search"), streamed=True)
    return SearchStage(StageInputs(run.plan, step, run.inputs("search"), folder, "cpu"))


def assert_search_alike(run: Run, folder: Path) -> None:
    """Every file is the same, byte for byte, and so is the report."""
    folder.mkdir(exist_ok=True)
    stage = search_in_parts(run, folder)
    report, whole = stage.run(), run["search"]
    stage.verify()
    assert {key: whole.report[key] for key in report} == report

    def files(made: Path) -> set[Path]:
        return {file.relative_to(made) for part in ("choice.json", "adapter/*") for file in made.glob(part)}

    assert len(files(folder)) >= 3 and files(folder) == files(whole.folder)
    for file in files(folder):
        assert (folder / file).read_bytes() == (whole.folder / file).read_bytes(), file
