"""Recipes to start from: valid, explained, and the same methods as the examples'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sqft import Orchestrator, Recipe, Registry
from sqft.cli import main
from sqft.errors import SqftError
from sqft.tools.presets import GENERAL_TEXT, PAPER, PIPELINES, Choices, as_text, explanation, starting_recipe

EXAMPLES = {file.stem: file for file in (Path(__file__).parents[2] / "examples" / "recipes").glob("*.json")}
QUICKSTART = "quickstart"
"""hira with a search, measured at every step: the tutorial's own."""


def methods(raw: dict[str, Any]) -> dict[str, Any]:
    """A recipe without its model, data, and how long it trains: those are the user's."""
    kept = {key: raw[key] for key in ("sparsify", "quantize", "merge", "search", "export") if key in raw}
    if "finetune" in raw:
        kept["finetune"] = {key: raw["finetune"].get(key) for key in ("adapter", "merger", "base", "mask", "targets")}
    return kept | {"of": raw["evaluate"]["of"]}


TASKS = {"chat", "mawps", "arc-easy", "piqa"}  # one pipeline on other data


REFINED = "qa-sparsepeft-refined"
"""qa-sparsepeft from refined codes."""


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - TASKS - {QUICKSTART, REFINED}))
def test_the_methods_are_those_of_the_example_of_that_name(name: str) -> None:
    assert methods(starting_recipe(name, Path("r.json"), paper=True)) == methods(json.loads(EXAMPLES[name].read_text()))


def test_the_quickstart_is_hira_with_a_search() -> None:
    quickstart, hira = (methods(json.loads(EXAMPLES[name].read_text())) for name in (QUICKSTART, "hira"))
    assert quickstart.pop("search")
    assert quickstart | {"of": hira["of"]} == hira


def test_ours_and_the_papers_differ_where_codes_of_a_sparse_model_are_used() -> None:
    differ = {name for name in PIPELINES if PIPELINES[name] != PAPER[name]}
    assert PIPELINES.keys() == PAPER.keys()
    assert differ == {"gptq", "gptq-lora", "sqft", "qa-sparsepeft-low-memory"}
    for name in PIPELINES:
        ours, papers = (methods(starting_recipe(name, Path("r.json"), paper=paper)) for paper in (False, True))
        for key in ("refine", "refine_damp", "target") if name in differ else ():
            del ours["quantize"]["quantizer"]["options"][key]
        assert ours == papers


def test_the_refined_example_is_qa_sparsepeft_on_codes_of_ours() -> None:
    raw, ours = json.loads(EXAMPLES[REFINED].read_text()), starting_recipe("sqft", Path("r.json"))
    expected = methods(starting_recipe("qa-sparsepeft", Path("r.json"))) | {"quantize": ours["quantize"]}
    expected["finetune"]["base"] = "compensated"
    assert methods(raw) == expected


def test_an_example_for_each_pipeline_that_has_more_than_one_stage() -> None:
    assert PIPELINES.keys() - EXAMPLES.keys() == {"sparsify", "quantize"}


@pytest.mark.parametrize("name", PIPELINES)
def test_written_planned_and_explained(
    name: str, registry: Registry, model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["init", name, "--output", "r.json", "--model", str(model_folder), "--data", str(data)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    Recipe.load("r.json")
    assert Orchestrator(registry, tmp_path / "s").load("r.json").steps
    raw = json.loads(Path("r.json").read_text())
    assert all(f"## {key}" in done.output for key, value in raw.items() if isinstance(value, dict))
    assert ": None" not in done.output and PIPELINES[name].summary in done.output
    assert "not there yet" not in done.output and "next: sqft plan r.json" in done.output
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2 and "r.json exists, and is not overwritten" in again.stderr
    assert json.loads(Path("r.json").read_text()) == raw


@pytest.mark.parametrize("name", PIPELINES)
def test_every_key_is_explained(name: str, registry: Registry) -> None:
    raw = starting_recipe(name, Path("r.json"))
    said = explanation(name, raw, registry)

    def check(section: dict[str, Any]) -> None:
        for key, value in section.items():
            if key not in ("name", "options"):
                assert f"`{key}`" in said
            if isinstance(value, dict):
                check(value)

    for section in raw.values():
        check(section if isinstance(section, dict) else {})


def test_paths_count_from_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "mine.jsonl").write_text("")
    raw = starting_recipe("sparsepeft", Path("recipes/r.json"), "model", "mine.jsonl")
    assert raw["model"]["path"] == "../model"
    assert raw["finetune"]["data"] == "../mine.jsonl"
    assert raw["evaluate"]["exact_match"]["data"] == "../test.jsonl"  # never what it trains on
    whole = starting_recipe("sparsify", Path("r.json"), "someone/model", "/some/folder")
    assert whole["model"]["path"] == "someone/model"
    assert whole["evaluate"]["perplexity"]["text"] == "/some/folder/heldout.txt"


@pytest.mark.parametrize("validation", [True, False])
def test_a_search_judges_as_the_evaluation_does(validation: bool, registry: Registry, tmp_path: Path) -> None:
    """On validation.jsonl where there is one, else on records that are kept out of training."""
    if validation:
        (tmp_path / "validation.jsonl").write_text("")

    def made(searcher: str, **more: Any) -> dict[str, Any]:
        choices = Choices(registry.get("searcher", searcher).component(), **more)  # type: ignore[arg-type]
        return starting_recipe("hira", tmp_path / "r.json", data=str(tmp_path), choices=choices)

    raw = made("hill-climbing", answer="last_number")
    own = {"data": str(tmp_path / "validation.jsonl")} if validation else {}
    measured = {"max_new_tokens": 16, "answer": "last_number"}
    assert raw["search"] == {"searcher": "hill-climbing", **measured, **own}
    assert raw["finetune"].get("holdout") == (None if validation else 0.1)
    assert raw["evaluate"]["exact_match"] == {"data": str(tmp_path / "test.jsonl"), **measured}
    assert list(raw)[-4:] == ["finetune", "search", "merge", "evaluate"]
    plain = made("importance")
    assert plain["search"] == {"searcher": "importance"} and "holdout" not in plain["finetune"]


def test_the_dense_model_is_measured_once() -> None:
    for name in PIPELINES:
        plain = starting_recipe(name, Path("r.json"))["evaluate"]["of"]
        of = starting_recipe(name, Path("r.json"), choices=Choices(baseline=True))["evaluate"]["of"]
        assert of == (plain if "model" in plain else ["model", *plain])


def test_choices_without_a_place(registry: Registry) -> None:
    search = Choices(registry.get("searcher", "racing").component())  # type: ignore[arg-type]
    for name in ("lora", "gptq-lora", "quantize"):
        with pytest.raises(SqftError, match=f"'{name}' has no ranks to search; these have some: shears, sparsepeft"):
            starting_recipe(name, Path("r.json"), choices=search)
    with pytest.raises(SqftError, match="'gptq' measures perplexity, and compares no answers"):
        starting_recipe("gptq", Path("r.json"), choices=Choices(answer="last_number"))


def test_general_text_calibrates_unless_there_is_text_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never what it trains on. A data set of the hub is no file that could be missing here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert starting_recipe("lora", Path("r.json"), data="mine.jsonl")["calibration"]["data"] == GENERAL_TEXT
    shown = CliRunner().invoke(main, ["init", "lora", "--output", "r.json", "--data", "mine.jsonl"])
    assert (
        shown.exit_code == 0
        and "c4" in shown.output
        and "not there yet: " + str(tmp_path / "test.jsonl") in shown.output
    )
    assert "allenai" not in shown.output.partition("written:")[2] and "0.3 GB of C4" in shown.output
    (tmp_path / "calibration.jsonl").write_text("")
    assert (
        starting_recipe("lora", Path("sub/r.json"), data="mine.jsonl")["calibration"]["data"] == "../calibration.jsonl"
    )


def test_as_text_is_json() -> None:
    raw = starting_recipe("sqft", Path("r.json"))
    assert json.loads(as_text(raw)) == raw
    assert '"sparsify": {"scorer": "wanda", "sparsity": 0.5, "pattern": "row"}' in as_text(raw)
