"""Runs gone on with from the store alone: the merge, and measurements."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sqft import Orchestrator, Recipe, Registry
from sqft.cli import main
from sqft.recipe.rerun import evaluation_overrides, paths, recipe_of_model, with_absolute_paths


def sqft(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def artifacts(store: Path) -> set[str]:
    return {path.name for path in (store / "artifacts").iterdir() if not path.name.startswith(".")}


@pytest.fixture
def project(raw: dict[str, Any], model_folder: Path, data: Path, tmp_path: Path) -> Path:
    """A folder with a recipe whose paths are relative to it, without a merge and without measurements."""
    folder = tmp_path / "project"
    folder.mkdir()
    raw["search"] = {}
    raw.pop("merge"), raw.pop("evaluate")

    def relative(section: dict[str, Any]) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                relative(value)
            elif key in ("path", "data"):
                section[key] = os.path.relpath(value, folder)

    relative(raw)
    (folder / "recipe.json").write_text(json.dumps(raw))
    return folder


def test_merge_and_eval_without_the_recipe_at_hand(
    project: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, elsewhere = tmp_path / "store", tmp_path / "else" / "where"
    assert sqft("run", project / "recipe.json", "--store", store).exit_code == 0
    shutil.rmtree(project)
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    made = artifacts(store)

    (folder,) = (store / "runs").iterdir()
    repeated = sqft("run", folder / "recipe.json", "--store", store)
    assert repeated.exit_code == 0 and repeated.output.count("reused") == 3, repeated.output
    assert len(list((store / "runs").iterdir())) == 1

    nothing = sqft("eval", "tiny", "--store", store)
    assert nothing.exit_code == 2 and "say what to measure" in nothing.stderr
    text = os.path.relpath(data / "heldout.txt")
    measured = sqft("eval", folder, "--perplexity", text)  # the store is the folder's own
    assert measured.exit_code == 0, measured.output
    assert "| sparsify | " in measured.output and "| search (heuristic) | " in measured.output
    assert {name.partition("-")[0] for name in artifacts(store) - made} == {"evaluate"}

    merged = sqft("merge", "tiny", "--store", store, "--output", "model")
    assert merged.exit_code == 0, merged.output
    assert merged.output.count("reused") == 3 and Path("model/model.safetensors").is_file()
    assert sqft("merge", "tiny", "--store", store).output.count("reused") == 4
    records = data / "test.jsonl"
    more = ["--of", "merge", "--of", "finetune:maximal", "--exact-match", records]
    measured = sqft("eval", "tiny", "--store", store, *more, "--set", "evaluate.exact_match.max_new_tokens=2")
    assert measured.exit_code == 0 and "| merge | " in measured.output and "| finetune:maximal | " in measured.output
    whole = sqft("eval", "model", "--store", store, "--perplexity", text)
    assert whole.exit_code == 0 and "\n| model | " in whole.output, whole.output


def test_an_adapter_that_does_not_merge(project: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    unmerged = ["--set", "finetune.merger=unmerged", "--store", store]
    assert sqft("run", project / "recipe.json", *unmerged).exit_code == 0
    done = sqft("merge", "tiny", "--store", store)
    assert done.exit_code == 2 and "so there is nothing to merge" in done.stderr


def test_a_quantized_models_folder(quantized_folder: Path, data: Path, tmp_path: Path) -> None:
    done = sqft("eval", quantized_folder, "--perplexity", data / "heldout.txt", "--store", tmp_path)
    assert done.exit_code == 0 and "| configuration | perplexity | " in done.output, done.output


def test_the_precision_of_a_model_is_its_own(tmp_path: Path) -> None:
    model = tmp_path / "merge-0" / "model"
    model.mkdir(parents=True)
    (model.parent / "manifest.json").write_text("{}")
    raw = recipe_of_model(model.parent)  # an artifact's folder
    assert raw["model"] == {"path": str(model), "dtype": "auto"}


def test_what_is_not_there(model_folder: Path, tmp_path: Path) -> None:
    for command in ("merge", "eval"):
        done = sqft(command, "tiny", "--store", tmp_path)
        assert done.exit_code == 2 and "there is no run 'tiny'" in done.stderr and "runs there: none" in done.stderr
    empty = sqft("eval", tmp_path, "--tasks", "x", "--store", tmp_path)
    assert empty.exit_code == 2 and "has no config.json" in empty.stderr
    odd = sqft("eval", model_folder, "--tasks", "arc_easy", "--of", "merge", "--store", tmp_path)
    assert odd.exit_code == 2 and "needs a finetune section" in odd.stderr


def test_anchored(raw: dict[str, Any], tmp_path: Path) -> None:
    """Every path counts from the recipe's folder, and a Hugging Face id is none."""
    raw["model"]["path"] = "someone/model"
    raw["calibration"]["data"] = "c.jsonl"
    raw["evaluate"] |= {"tasks": ["mine"], "include_path": "../tasks"}
    stored = with_absolute_paths(Recipe.parse(raw, tmp_path / "here"))
    assert stored["model"]["path"] == "someone/model"
    assert stored["calibration"]["data"]["path"] == str(tmp_path / "here" / "c.jsonl")
    assert stored["evaluate"]["include_path"] == str(tmp_path / "tasks")
    again = Recipe.parse(stored, tmp_path)
    assert with_absolute_paths(again) == stored and paths(again).keys() == {
        "calibration.data.path", "finetune.data.path", "search.data.path",
        "evaluate.perplexity.text", "evaluate.exact_match.data.path", "evaluate.include_path",
    }  # fmt: skip


def test_only_what_is_measured_is_kept(raw: dict[str, Any]) -> None:
    def kept(*of: str, **measures: Any) -> Recipe:
        return Recipe.changed(json.loads(json.dumps(raw)), evaluation_overrides(raw, of, measures))

    sparse = kept("sparsify", perplexity={"text": "other.txt"})
    assert sparse.sparsify and not (sparse.finetune or sparse.search or sparse.merge)
    assert sparse.evaluate and sparse.evaluate.perplexity and not sparse.evaluate.exact_match
    assert (sparse.evaluate.perplexity.text, sparse.evaluate.perplexity.length) == ("other.txt", 64)
    several = kept("sparsify", perplexity=[{"text": "a.txt"}, {"text": "b.txt"}]).evaluate
    assert several and [(text.text, text.length) for text in several.texts.values()] == [("a.txt", 64), ("b.txt", 64)]
    tuned = kept("search")
    assert tuned.sparsify and tuned.finetune and tuned.search and not tuned.merge
    assert tuned.evaluate and tuned.evaluate.exact_match and tuned.evaluate.of == ("search",)
    merged = kept("merge", tasks=["a", "b"])
    assert merged.merge and merged.evaluate and merged.evaluate.tasks == ("a", "b") and merged.name == "tiny.eval"


def test_a_list_of_data_and_validation_are_found_again(
    raw: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stored recipe, its paths made absolute, is the same run: nothing is made again."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        (here / name).write_bytes((data / name).read_bytes())
    raw["finetune"] |= {"data": ["train.jsonl", {"path": "validation.jsonl", "weight": 2}]}
    raw["finetune"] |= {"validation": "validation.jsonl", "evaluate_every": 3}
    orchestrator = Orchestrator(Registry.discover(), tmp_path / "store")
    recipe = Recipe.parse(raw, here)
    stored = Recipe.parse(json.loads(json.dumps(with_absolute_paths(recipe))), tmp_path)
    assert [step.fingerprint for step in orchestrator.plan(stored).steps] == [
        step.fingerprint for step in orchestrator.plan(recipe).steps
    ]
    assert stored.finetune and stored.finetune.validation
    assert stored.finetune.validation.path == str(here / "validation.jsonl")
