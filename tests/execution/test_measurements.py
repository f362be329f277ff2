"""What is measured once is not measured again in another recipe, and says the same bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.execution.measurements import made_of
from sqft.execution.report import report_markdown
from sqft.execution.run import Run
from sqft.store.status import prune, scan_store

TASK = """task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
generation_kwargs: {until: ["x"], max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def few(raw: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe that measures a text, answers and a task."""
    (tmp_path / "tasks").mkdir()
    for name in ("one", "two"):
        text = TASK.replace("NAME", name).replace("DATA", raw["evaluate"]["exact_match"]["data"])
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    asked = {"tasks": ["one"], "include_path": str(tmp_path / "tasks"), "num_fewshot": 1, "log_samples": True}
    measures = {name: raw["evaluate"][name] for name in ("perplexity", "exact_match")}
    model = {key: raw[key] for key in ("schema", "name", "model")}
    return model | {"evaluate": {"of": ["model"], **measures, **asked}}


@pytest.fixture
def more(few: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Another recipe, which measures the same, and a text and a task beside them."""
    (tmp_path / "other.txt").write_text("Some words of another kind.")
    texts = [{"text": str(tmp_path / "other.txt"), "length": 64}, few["evaluate"]["perplexity"]]
    return few | {"name": "more", "evaluate": few["evaluate"] | {"perplexity": texts, "tasks": ["two", "one"]}}


def done(raw: dict[str, Any], registry: Registry, store: Path, fresh: str | None = None) -> Run:
    orchestrator = Orchestrator(registry, store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)), fresh=fresh)


def measured(run: Run) -> tuple[dict[str, Any], dict[str, str]]:
    """The report, and the content of each file of answers."""
    artifact = run.outcomes["evaluate:model"].artifact
    files = {name: (artifact.folder / name).read_text() for name in artifact.manifest["files"] if name[-1] == "l"}
    return artifact.report, files


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is measured from now on."""
    from sqft.modeling.evaluation import harness
    from sqft.stages.evaluate import EvaluateStage

    names: list[str] = []
    tasks, text = harness.lm_eval_tasks, EvaluateStage._perplexity
    answers = EvaluateStage._exact_match

    def of_tasks(model: Any, tokenizer: Any, asked: Any, *rest: Any) -> Any:
        names.extend(asked)
        return tasks(model, tokenizer, asked, *rest)

    def of_text(stage: Any, role: str, *rest: Any) -> Any:
        names.append(role)
        return text(stage, role, *rest)

    def of_answers(*given: Any) -> Any:
        names.append("exact_match")
        return answers(*given)

    monkeypatch.setattr(harness, "lm_eval_tasks", of_tasks)
    monkeypatch.setattr(EvaluateStage, "_perplexity", of_text)
    monkeypatch.setattr(EvaluateStage, "_exact_match", of_answers)
    return names


def test_only_what_is_new_is_measured(
    few: dict[str, Any], more: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = done(few, registry, tmp_path / "store").outcomes["evaluate:model"].artifact
    alone = measured(done(more, registry, tmp_path / "alone"))
    names = counted(monkeypatch)
    run = done(more, registry, tmp_path / "store")
    assert names == ["perplexity.0.text", "two"]
    report, files = measured(run)
    assert report.pop("earlier") == dict.fromkeys(["perplexity.1.text", "exact_match", "tasks.one"], first.folder.name)
    assert list(report["texts"]) == list(alone[0]["texts"])
    assert (report, files) == alone and files.keys() == {
        "predictions.jsonl", "samples/one.jsonl", "samples/two.jsonl",
    }  # fmt: skip
    assert f"evaluate:model: tasks.one was measured earlier, in {first.folder.name}" in report_markdown(run.report)

    back = measured(
        done(few | {"evaluate": more["evaluate"] | {"tasks": ["one", "two"]}}, registry, tmp_path / "store")
    )
    assert names == ["perplexity.0.text", "two"] and back[1] == files and back[0]["texts"] == report["texts"]
    assert back[0]["perplexity"] == report["perplexity"]


def test_what_was_asked_otherwise_is_measured(
    few: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings of lm-eval are the tasks' alone, and the model is everything's; the seed is nobody's."""
    done(few, registry, tmp_path / "store")
    names = counted(monkeypatch)
    evaluate = few["evaluate"]
    done(few | {"evaluate": evaluate | {"num_fewshot": 2}}, registry, tmp_path / "store")
    assert names == ["one"]
    match = {"data": evaluate["exact_match"]["data"], "max_new_tokens": 2}
    done(few | {"evaluate": evaluate | {"exact_match": match}}, registry, tmp_path / "store")
    assert names == ["one", "exact_match"]
    done(few | {"seed": 5}, registry, tmp_path / "store")
    assert names == ["one", "exact_match"]
    done(few | {"model": few["model"] | {"dtype": "bfloat16"}}, registry, tmp_path / "store")
    assert names == ["one", "exact_match", "perplexity.text", "exact_match", "one"]


def test_fresh_measures_everything_and_others_get_that(
    few: dict[str, Any], more: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(few, registry, tmp_path / "store")
    names = counted(monkeypatch)
    run = done(more, registry, tmp_path / "store", fresh="evaluate")
    assert len(names) == 5 and "earlier" not in measured(run)[0]


def test_what_is_damaged_or_deleted_gives_nothing(
    few: dict[str, Any], more: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's own cleaning removes measurements with the artifact that has them."""
    run = done(few, registry, tmp_path / "store")
    names = counted(monkeypatch)
    answers = run.outcomes["evaluate:model"].folder / "predictions.jsonl"
    answers.write_text(answers.read_text().replace("record", "recorb"))
    assert "earlier" not in measured(done(more, registry, tmp_path / "store"))[0] and len(names) == 5
    for folder in (tmp_path / "store" / "runs").iterdir():
        shutil.rmtree(folder)
    store = Orchestrator(registry, tmp_path / "store").store
    assert len(prune(store, scan_store(store).prunable)) == 2
    assert "earlier" not in measured(done(few, registry, tmp_path / "store"))[0]


def test_a_task_that_two_groups_share_is_not_taken(few: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    """Its number is one group's, and the artifact does not say whose."""
    from sqft.execution.measurements import _take

    artifact = done(few, registry, tmp_path / "store").outcomes["evaluate:model"].artifact
    results: dict[str, Any] = {}
    report = json.loads(json.dumps(artifact.report))
    artifact.manifest["report"] = report
    report["lm_eval"]["names"] = {"one": ["one"], "group": ["one", "three"]}
    assert not _take(artifact, "tasks.one", "tasks.one", results, tmp_path) and not results
    report["lm_eval"]["names"] = {"one": ["one"]}
    report["lm_eval"]["lm_eval"] = "0.0.1"
    assert not _take(artifact, "tasks.one", "tasks.one", results, tmp_path) and not results


@pytest.mark.parametrize("what", ["made_of", "versions"])
def test_of_another_model_or_by_other_packages_nothing_is_taken(
    what: str,
    few: dict[str, Any],
    more: dict[str, Any],
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step that was made again has the same fingerprint, and may have come out otherwise."""
    done(few, registry, tmp_path / "store")
    monkeypatch.setattr(f"sqft.execution.measurements.{what}", lambda *_: {"other": "one"})
    assert "earlier" not in measured(done(more, registry, tmp_path / "store"))[0]


@pytest.mark.parametrize("other", ["", "made_of", "versions", "device", "lm_eval"])
def test_what_a_killed_evaluation_left_stays_only_if_it_was_measured_so(
    other: str, few: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr("sqft.stages.evaluate.EvaluateStage._task", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            done(few, registry, tmp_path / "store")
    (begun,) = (tmp_path / "store" / "artifacts").glob(".partial-evaluate-*/*/measured-so.json")
    assert json.loads(begun.read_text())["device"] == "cpu"
    if other:
        begun.write_text(json.dumps(json.loads(begun.read_text()) | {other: "other"}))
    names = counted(monkeypatch)
    run = done(few, registry, tmp_path / "store")
    assert names == (["perplexity.text", "exact_match", "one"] if other else ["one"])
    assert not any("measured-so" in name for name in run.outcomes["evaluate:model"].artifact.manifest["files"])


def test_what_a_model_is_made_of(tmp_path: Path) -> None:
    digests = []
    for content in ("a", "b", "a"):
        (tmp_path / "manifest.json").write_text(json.dumps({"files": {"w": content}, "seconds": len(digests)}))
        digests.append(made_of({"merge": tmp_path}))
    assert digests[0] == digests[2] != digests[1]
