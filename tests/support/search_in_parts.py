"""A search that reads no weight of the base, held against the search of a run, which read them all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sqft import Run
from sqft.stages.inputs import StageInputs
from sqft.stages.search import SearchStage


def search_in_parts(run: Run, folder: Path) -> SearchStage:
    """The run's search once more, into another folder."""
    step = dataclasses.replace(run.plan.step("search"), streamed=True)
    return SearchStage(StageInputs(run.plan, step, run.inputs("search"), folder, "cpu"))


def assert_search_alike(run: Run, folder: Path) -> None:
    """Every file is the same, byte for byte, and so is the report."""
    folder.mkdir()
    stage = search_in_parts(run, folder)
    report, whole = stage.run(), run["search"]
    stage.verify()
    assert {key: whole.report[key] for key in report} == report
    files = [
        file.relative_to(whole.folder) for part in ("choice.json", "adapter/*") for file in whole.folder.glob(part)
    ]
    assert len(files) == 3
    for file in files:
        assert (folder / file).read_bytes() == (whole.folder / file).read_bytes(), file
