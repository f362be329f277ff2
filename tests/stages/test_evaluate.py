"""Measuring a model: what counts as a zero, and what is written down."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import StageError
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.evaluation.harness import lm_eval_tasks
from sqft.stages.evaluate import EvaluateStage, count_zeros
from sqft.stages.inputs import StageInputs


def test_zeros_of_the_linear_layers_in_decoder_blocks(model: Any) -> None:
    """Not of embeddings, norms or the head, which are never pruned."""
    layers = linears(model)
    weights = sum(layer.weight.numel() for layer in layers.values())
    assert count_zeros(model) == {"sparsity": 0.0, "zeros": 0, "weights": weights}
    next(iter(layers.values())).weight.data[:3] = 0
    model.get_input_embeddings().weight.data.zero_()
    assert count_zeros(model)["zeros"] == 3 * 32 and count_zeros(model)["sparsity"] == 96 / weights


def stage_of(raw: dict[str, Any], registry: Registry, folder: Path, **evaluate: Any) -> EvaluateStage:
    raw = {key: raw[key] for key in ("schema", "name", "model")} | {"evaluate": {"of": ["model"], **evaluate}}
    plan = Orchestrator(registry, folder / "store").plan(Recipe.parse(raw))
    return EvaluateStage(StageInputs(plan, plan.step("evaluate:model"), {}, folder, "cpu"))


def test_a_model_is_measured_and_every_answer_written_down(
    raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    measures = {name: raw["evaluate"][name] for name in ("perplexity", "exact_match")}
    stage = stage_of(raw, registry, tmp_path, **measures)
    report = stage.run()
    stage.verify()
    written = json.loads((tmp_path / "results.json").read_text())
    assert math.isfinite(report["perplexity"]["perplexity"]) and report["sparsity"] == 0
    assert written == {name: report[name] for name in (*measures, "texts")}
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in Path(raw["evaluate"]["exact_match"]["data"]).read_text().splitlines()]
    assert [one["prompt"] for one in predictions] == [record["prompt"] for record in records]
    assert [one["expected"] for one in predictions] == [record["completion"] for record in records]
    assert sum(one["right"] for one in predictions) == written["exact_match"]["correct"]
    assert [one["record"] for one in predictions] == list(range(1, 11))


@pytest.mark.parametrize(("tolerance", "right"), [(0, [False, False, True]), (0.001, [True, False, True])])
def test_numbers_are_right_to_a_tolerance(
    raw: dict[str, Any],
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tolerance: float,
    right: list[bool],
) -> None:
    said = "7 * 1,000 is 7,000. The answer is 7000.0005."
    monkeypatch.setattr("sqft.modeling.evaluation.measures._texts", lambda *_: (said, said))
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(f'{{"prompt": "7 * 1000?", "completion": "{n}"}}\n' for n in (7000, 7001, "7000.0005")))
    match = {"data": str(file), "answer": "last_number", "tolerance": tolerance}
    report = stage_of(raw, registry, tmp_path, exact_match=match).run()
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [one["right"] for one in predictions] == right and report["exact_match"]["correct"] == sum(right)


def test_several_texts_each_measured_once(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that failed at the second has the first; `perplexity` is that of the first."""
    first = raw["evaluate"]["perplexity"]
    (tmp_path / "other.txt").write_text("Some words of another kind.")
    texts = [first, {"text": str(tmp_path / "other.txt"), "length": 64}]
    (tmp_path / "results.json").write_text(json.dumps({"texts": {"perplexity.0.text": {"nll": 1}}, "perplexity": 7}))
    report = stage_of(raw, registry, tmp_path, perplexity=texts).run()
    assert report["perplexity"] == 7 and report["texts"]["perplexity.0.text"] == {"nll": 1}
    assert report["texts"].keys() == {"perplexity.0.text", "perplexity.1.text"}
    assert report["texts"]["perplexity.1.text"]["window_tokens"] == [26]
    assert report["texts"]["perplexity.1.text"]["stderr"] is None


TASK = """task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
generation_kwargs: {until: ["x"], max_gen_toks: 3}
metadata: {version: 1.5}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_a_task_that_fails_loses_nothing_that_was_measured(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data come later: the next attempt measures only what is missing, and writes down what was asked."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK.replace("DATA", str(tmp_path / "late.jsonl")))
    options = {"tasks": ["sums"], "include_path": str(tmp_path / "tasks"), "num_fewshot": 2, "log_samples": True}
    options |= {"perplexity": raw["evaluate"]["perplexity"], "limit": 5}
    with pytest.raises(StageError, match=r"'sums' \(data set json\) cannot be loaded"):
        stage_of(raw, registry, tmp_path, **options).run()
    assert json.loads((tmp_path / "results.json").read_text()).keys() == {"perplexity", "texts"}
    (tmp_path / "late.jsonl").write_text(Path(raw["evaluate"]["exact_match"]["data"]).read_text())
    monkeypatch.setattr("sqft.stages.evaluate.perplexity", None)
    report = stage_of(raw, registry, tmp_path, **options).run()
    assert report["perplexity"]["tokens"] > 0
    assert report["tasks"]["sums"].keys() == {"exact_match", "exact_match_stderr"}
    assert report["lm_eval"]["tasks"] == {"sums": {"version": 1.5, "num_fewshot": 2, "documents": 5, "of": 10}}
    assert report["lm_eval"]["add_bos_token"] is False and report["lm_eval"]["batch_size"] == 8
    samples = [json.loads(line) for line in (tmp_path / "samples" / "sums.jsonl").read_text().splitlines()]
    assert len(samples) == 5 and samples[0]["arguments"][0][0].count("\n\n") == 2


def test_a_task_that_fails_does_not_lose_those_before_it(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a task say something else for standing beside others."""
    folder, data = tmp_path / "tasks", raw["evaluate"]["exact_match"]["data"]
    folder.mkdir()
    for name in ("sums", "late"):
        text = TASK.replace("task: sums", f"task: {name}").replace(
            "DATA", str(data if name == "sums" else tmp_path / "d")
        )
        (folder / f"{name}.yaml").write_text(text)
    options = {"tasks": ["sums", "late"], "include_path": str(folder), "limit": 3}
    with pytest.raises(StageError, match="'late'"):
        stage_of(raw, registry, tmp_path, **options).run()
    assert json.loads((tmp_path / "results.json").read_text())["tasks"].keys() == {"sums"}
    (tmp_path / "d").write_text(Path(data).read_text())
    asked = []

    def counted(model: Any, tokenizer: Any, names: Any, *rest: Any) -> Any:
        asked.extend(names)
        return lm_eval_tasks(model, tokenizer, names, *rest)

    monkeypatch.setattr("sqft.modeling.evaluation.harness.lm_eval_tasks", counted)
    report = stage_of(raw, registry, tmp_path, **options).run()
    assert asked == ["late"] and report["tasks"]["sums"] == report["tasks"]["late"]
    assert report["lm_eval"]["tasks"].keys() == {"sums", "late"} == set(report["lm_eval"]["names"])


def test_tasks_get_the_models_arguments_and_their_own(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def measured(model: Any, tokenizer: Any, names: Any, folder: Any, settings: Any, track: Any) -> dict[str, Any]:
        found.append(dict(settings.chat_template_kwargs))
        return {"metrics": {}, "settings": {}, "tasks": {}, "samples": {}}

    monkeypatch.setattr("sqft.modeling.evaluation.harness.lm_eval_tasks", measured)
    model = tmp_path / "model"
    shutil.copytree(raw["model"]["path"], model)
    (model / "chat_template.jinja").write_text("{{ enable_thinking }}{{ effort }}{{ messages[0].content }}")
    raw["model"] = {"path": str(model), "chat_template_kwargs": {"enable_thinking": False, "effort": "low"}}
    own = {"apply_chat_template": True, "chat_template_kwargs": {"effort": "high"}}
    stage_of(raw, registry, tmp_path, tasks=["gsm8k"], **own).run()
    assert found == [{"enable_thinking": False, "effort": "high"}]
