"""Files and data sets that a recipe names: which are found, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import RecipeError
from sqft.planning.data_sets import find_data_set
from sqft.recipe.data import CalibrationData
from sqft.stages.inputs import StepData


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A data set of two files, of which only one has text."""
    folder = tmp_path / "set"
    (folder / "en").mkdir(parents=True)
    (folder / "en" / "part-0.jsonl").write_text("".join(json.dumps({"text": f"{n} words"}) + "\n" for n in range(9)))
    (folder / "part-1.jsonl").write_text('{"nothing": 0}\n')
    (folder / "notes.md").write_text("some words")
    return folder


def found(folder: Path, **how: Any) -> tuple[Path, list[str]]:
    path, problems = find_data_set(CalibrationData(path="set", **how), "at", lambda name: folder.parent / name)
    return path, [str(problem) for problem in problems]


def test_one_file_of_a_data_set(data_set: Path) -> None:
    assert found(data_set) == (data_set, [])
    assert found(data_set, file="en/part-0.jsonl") == (data_set / "en" / "part-0.jsonl", [])
    assert found(data_set, file="en/part-0.jsonl", split="train[:3]")[1] == []


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"file": "en/part-9.jsonl"}, "at.file: set has no file 'en/part-9.jsonl'"),
        *(
            ({"file": file}, f"at.file: '{file}' is no path of a file inside the data set")
            for file in ("../secret.jsonl", "/etc/passwd", "", ".", "en/", "./part-1.jsonl", "en//part-0.jsonl")
        ),
        ({"file": "part-1.jsonl", "config": "en"}, "at.file: is a single file and has no config"),
        ({"file": "part-1.jsonl", "split": "test"}, "at.split: a single file has only the split 'train'"),
    ],
)
def test_mistakes(data_set: Path, how: dict[str, Any], said: str) -> None:
    (problem,) = found(data_set, **how)[1]
    assert problem.startswith(said)


def test_a_file_has_no_file_in_it(data_set: Path) -> None:
    data = CalibrationData(path="part-1.jsonl", file="x")
    (problem,) = find_data_set(data, "at", lambda name: data_set / name)[1]
    assert str(problem).startswith("at.file: ") and "is a single file itself" in str(problem)


def test_a_folder_that_is_not_there(data_set: Path) -> None:
    data = CalibrationData(path="nowhere", file="x")
    (problem,) = find_data_set(data, "at", lambda name: data_set / name)[1]
    assert str(problem) == f"at.path: there is no folder {data_set / 'nowhere'}"


def test_one_file_of_a_hugging_face_id(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that file is asked for, whatever its name means as a pattern; revision and slice are the data set's."""
    asked = []

    def fetch(kind: str, name: str, revision: str | None, patterns: tuple[str, ...], local: Path) -> Path:
        asked.append((kind, name, revision, patterns))
        return data_set

    monkeypatch.setattr("sqft.data.hub.fetch", fetch)
    data = CalibrationData(path="owner/name", file="en/part-0.jsonl", revision="v1", split="train[:3]")
    path, problems = find_data_set(data, "at", lambda name: data_set.parent / name)
    assert (path, problems) == (data_set / "en" / "part-0.jsonl", [])
    find_data_set(data.model_copy(update={"file": "a[0].json"}), "at", lambda name: data_set.parent / name)
    assert asked == [("dataset", "owner/name", "v1", (name,)) for name in ("en/part-0.jsonl", "a[[]0].json")]


def test_calibration_on_a_part_of_a_data_set(
    raw: dict[str, Any], data_set: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """Its windows are of the rows that the recipe names, made text by its template."""
    rows = [{"body": f"these are the words of document {number}, and a few more"} for number in range(60)]
    (data_set / "part-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"bad": 1}, *rows]))
    how = {"path": str(data_set), "file": "part-1.jsonl", "split": "train[1:41]", "limit": 30}
    prompt = {"prompt": "Document: ", "completion": "{{ body }}"}
    raw = {key: raw[key] for key in ("schema", "model", "sparsify")} | {"name": "c"}
    raw["calibration"] = {"data": {**how, "prompt": prompt}, "samples": 2, "length": 16}
    plan = Orchestrator(Registry.discover(), tmp_path / "s").plan(Recipe.parse(raw))
    windows = StepData(plan, plan.step("sparsify")).calibration(tokenizer)
    text = "".join(f"Document: {row['body']}{tokenizer.eos_token}" for row in rows[:30])
    tokens = tokenizer(text)["input_ids"]
    parts = [tokens[start : start + 16] for start in range(0, len(tokens), 16)]
    assert all(window in parts for window in windows.tolist())


def test_a_plain_text_is_one_text(raw: dict[str, Any], data_set: Path, tmp_path: Path) -> None:
    """Whatever its suffix; what says how to read records has no effect there."""
    raw = {key: raw[key] for key in ("schema", "model", "sparsify")} | {"name": "c"}
    (data_set / "notes.md").write_text("{ not JSON\n" + "some words " * 99)
    raw["calibration"] = {"data": str(data_set / "notes.md"), "samples": 2, "length": 16}
    orchestrator = Orchestrator(Registry.discover(), tmp_path / "s")
    plan = orchestrator.plan(Recipe.parse(raw))
    assert plan.step("sparsify").files["calibration"] == data_set / "notes.md"
    for field, value in ("limit", 3), ("split", "train[:9]"):
        raw["calibration"]["data"] = {"path": str(data_set / "notes.md"), field: value}
        with pytest.raises(RecipeError, match=rf"calibration\.data\.{field}: has no effect on a plain text"):
            orchestrator.plan(Recipe.parse(raw))
    raw["calibration"]["data"] = {"path": str(data_set / "notes.md"), "limit": None, "chat_template_kwargs": {}}
    assert orchestrator.plan(Recipe.parse(raw)).step("sparsify").fingerprint == plan.step("sparsify").fingerprint


def test_only_a_table_as_text_has_a_delimiter(raw: dict[str, Any], data_set: Path, tmp_path: Path) -> None:
    (data_set / "d.csv").write_text("prompt;completion\n1;2\n3;4\n")
    orchestrator = Orchestrator(Registry.discover(), tmp_path / "s")
    raw["search"]["data"] = {"path": str(data_set / "d.csv"), "delimiter": ";"}
    assert orchestrator.plan(Recipe.parse(raw))
    raw["search"]["data"] = {"path": str(data_set), "file": "part-1.jsonl", "delimiter": ";"}
    with pytest.raises(RecipeError, match=r"search\.data\.delimiter: only \.csv and \.tsv files have one, and this is"):
        orchestrator.plan(Recipe.parse(raw))
    raw["search"]["data"] = str(data_set / "d.csv")
    with pytest.raises(RecipeError, match=r"search\.data\.path: .*the single column .*set \"delimiter\": \";\""):
        orchestrator.plan(Recipe.parse(raw))
    raw["search"]["data"] = {"path": str(data_set / "d.csv"), "delimiter": ";;"}
    with pytest.raises(RecipeError, match=r"search\.data\.delimiter: "):
        orchestrator.plan(Recipe.parse(raw))


def test_what_is_no_text_is_said_in_the_plan(raw: dict[str, Any], data_set: Path, tmp_path: Path) -> None:
    (data_set / "more.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\xff\xff")
    raw["calibration"]["data"] = {"path": str(data_set), "file": "more.jsonl.zst"}
    with pytest.raises(RecipeError, match=r"calibration\.data\.file: .*UTF-8.*; formats of records: \.jsonl"):
        Orchestrator(Registry.discover(), tmp_path / "s").plan(Recipe.parse(raw))
    raw["calibration"]["data"] = {"path": str(data_set), "file": "x" * 300}
    with pytest.raises(RecipeError, match=r"is not a valid path on this machine: .*too long"):
        Orchestrator(Registry.discover(), tmp_path / "s").plan(Recipe.parse(raw))
    raw["calibration"]["data"] = {"path": str(data_set), "file": "part-1.jsonl"}
    with pytest.raises(RecipeError, match=r"calibration\.data\.file: .*part-1\.jsonl:1: expected"):
        Orchestrator(Registry.discover(), tmp_path / "s").plan(Recipe.parse(raw))


def test_how_a_file_is_read_is_in_the_fingerprint_and_its_name_is_not(
    raw: dict[str, Any], data_set: Path, tmp_path: Path
) -> None:
    """The same bytes, as records and as one text."""
    raw = {key: raw[key] for key in ("schema", "model", "sparsify")} | {"name": "c"}
    rows = "".join(json.dumps({"text": f"these are the words of document {n}"}) + "\n" for n in range(99))
    for name in ("a.jsonl", "b.jsonl", "c.md"):
        (data_set / name).write_text(rows)

    def fingerprint(data: Any) -> str:
        calibration = {"data": data, "samples": 2, "length": 16}
        recipe = Recipe.parse({**raw, "calibration": calibration})
        return Orchestrator(Registry.discover(), tmp_path / "s").plan(recipe).step("sparsify").fingerprint

    records = fingerprint(str(data_set / "a.jsonl"))
    assert records == fingerprint({"path": str(data_set), "file": "b.jsonl"}) != fingerprint(str(data_set / "c.md"))
    assert records != fingerprint({"path": str(data_set / "a.jsonl"), "limit": 90})
