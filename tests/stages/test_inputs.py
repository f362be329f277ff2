"""What a stage is given is what was planned."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
from sqft_nls.adapter import Nls

from sqft import Orchestrator, Recipe, Registry
from sqft.api import InputPath
from sqft.errors import StageError
from sqft.planning.plan import ResolvedComponent
from sqft.stages.inputs import StepData
from sqft.utils import digests

SECTIONS = {
    "calibration.data": "sparsify.calibration",
    "finetune.data": "finetune.data",
    "finetune.validation": "finetune.validation",
    "search.data": "search.data",
    "evaluate.perplexity.text": "evaluate.perplexity.text",
    "evaluate.exact_match.data": "evaluate.exact_match.data",
}


@pytest.fixture
def own(raw: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe whose data may be edited, each a file of its own."""
    raw["finetune"] |= {"steps": 1, "validation": raw["finetune"]["data"]}
    raw["evaluate"]["of"] = ["sparsify"]
    for place in SECTIONS:
        section, name = inside(raw, place)
        section[name] = str(shutil.copy(section[name], tmp_path / f"{place}{Path(section[name]).suffix}"))
    return raw


def inside(raw: dict[str, Any], place: str) -> tuple[dict[str, Any], str]:
    *parts, name = place.split(".")
    for part in parts:
        raw = raw[part]
    return raw, name


@pytest.mark.parametrize("place", SECTIONS)
def test_data_that_changed_since_the_plan(own: dict[str, Any], registry: Registry, tmp_path: Path, place: str) -> None:
    orchestrator = Orchestrator(registry, tmp_path / "store")
    plan = orchestrator.plan(Recipe.parse(own))
    section, name = inside(own, place)
    file = Path(section[name])
    first, _, rest = file.read_text().partition("\n")
    file.write_text(rest + "\n" + first)
    stage = SECTIONS[place].partition(".")[0]
    until = "evaluate:sparsify" if stage == "evaluate" else stage
    with pytest.raises(StageError, match=rf"{SECTIONS[place]}: .*{file.name} has changed since the plan; run again"):
        orchestrator.run(plan, until=until)
    assert not list((tmp_path / "store" / "artifacts").glob(f"{stage}-*"))


@pytest.fixture
def step_data(own: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StepData:
    monkeypatch.setattr(digests, "SETTLED", 0)
    orchestrator = Orchestrator(registry, tmp_path / "store")
    orchestrator.store.root.mkdir()
    plan = orchestrator.plan(Recipe.parse(own))
    step = plan.step("finetune")
    return StepData(plan, step, orchestrator.store.digests)


def test_files_of_finetunes_options_count_wherever_its_components_run_again(
    step_data: StepData, registry: Registry, tmp_path: Path
) -> None:
    class WithFile(Nls):
        file: Annotated[str, InputPath()]

    (tmp_path / "file.txt").write_text("planned")
    adapter = ResolvedComponent(registry.get("adapter", "nls"), WithFile(ranks=[4], file=str(tmp_path / "file.txt")))
    tune = replace(
        step_data.step,
        components={"adapter": adapter},
        files={"adapter.file": tmp_path / "file.txt"},
        digests={"adapter.file": step_data.digests.path(tmp_path / "file.txt")},
    )
    steps = tuple(tune if step.name == "finetune" else step for step in step_data.plan.steps)
    search = replace(step_data, plan=replace(step_data.plan, steps=steps)).of("search")
    search.check_options()
    (tmp_path / "file.txt").write_text("another")
    with pytest.raises(StageError, match=r"finetune\.adapter\.file: .*file\.txt has changed since the plan"):
        search.check_options()


def test_data_that_change_while_they_are_read(step_data: StepData) -> None:
    with pytest.raises(StageError, match=r"finetune\.data: .* has changed"), step_data.reading("data") as file:
        before = file.stat()
        file.write_text(file.read_text().replace("=", "~"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_data_that_stay_are_not_read_for_their_digest_again(
    step_data: StepData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("the file was read"))
    assert len(step_data.training_records()[0]) == 64


def test_a_file_that_was_only_touched_is_the_same(step_data: StepData) -> None:
    file = step_data.step.files["data"]
    os.utime(file)
    file.write_text(file.read_text())
    assert step_data.file("data") == file


def test_a_file_of_a_data_set_in_a_folder(own: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    shutil.copy(own["finetune"]["data"], tmp_path / "set" / "train.jsonl")
    own["finetune"]["data"] = str(tmp_path / "set")
    plan = Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(own))
    step_data = StepData(plan, plan.step("search"))
    assert len(step_data.training_records()[0]) == 64
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "other"}')
    with pytest.raises(StageError, match=r"finetune\.data: .*set has changed"):  # the search reads it too
        step_data.training_records()
