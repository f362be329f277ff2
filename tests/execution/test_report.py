"""The table of a run: a row for each configuration, in text and in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.execution.report import make_report, remarks, report_markdown, table
from sqft.planning.plan import Plan
from sqft.store.artifacts import Artifact


@pytest.fixture
def plan(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> Plan:
    return Orchestrator(registry, tmp_path).plan(Recipe.parse(raw))


def artifact(stage: str, report: dict[str, Any], seconds: float = 2.6, peak: int | None = 3 << 20) -> Artifact:
    files = {"a": {"size": 1500, "sha256": ""}, "b": {"size": 548, "sha256": ""}}
    manifest = {"stage": stage, "seconds": seconds, "peak_memory": peak, "report": report, "files": files}
    return Artifact(Path("store") / "artifacts" / f"{stage}-0123", manifest)


MATCH = {"exact_match": {"accuracy": 0.4804, "stderr": 0.035, "correct": 98, "samples": 204}}
PERPLEXITY = {"perplexity": {"perplexity": 21.306, "nll": 3.06, "tokens": 256}}
FACTS = {"sparsity": 0.5, "zeros": 5, "weights": 10}


def rows(plan: Plan, artifacts: dict[str, Artifact]) -> dict[str, dict[str, str]]:
    """Each configuration's cells that say something, by head."""
    heads, cells = table(make_report(plan, artifacts))
    assert all(len(row) == len(heads) for row in cells)
    return {
        row[0]: {head: cell for head, cell in list(zip(heads, row, strict=True))[1:] if cell != "–"} for row in cells
    }


def test_a_row_for_each_configuration_with_its_makers_cost(plan: Plan) -> None:
    found = rows(
        plan,
        {
            "sparsify": artifact("sparsify", {"layers": {}}, 38.2),
            "finetune": artifact("finetune", {}, 335),
            "search": artifact("search", {"searcher": "hill-climbing"}, 16, None),
            "merge": artifact("merge", {}, 3),
            "evaluate:model": artifact("evaluate", MATCH | PERPLEXITY | FACTS, 32),
            "evaluate:sparsify": artifact("evaluate", PERPLEXITY | FACTS),
            "evaluate:finetune:maximal": artifact("evaluate", MATCH | FACTS | {"trainable": 6_635_520}),
            "evaluate:search": artifact("evaluate", MATCH | FACTS),
            "evaluate:merge": artifact("evaluate", FACTS),
        },
    )
    cost = {"adds on disk": "2 KiB", "peak memory": "3 MiB", "evaluated in": "3 s", "sparsity": "50.00%"}
    match = {"accuracy": "48.0% ± 3.5%"}
    assert found == {
        "model": match | {"perplexity": "21.31", "sparsity": "50.00%", "evaluated in": "32 s"},
        "sparsify": {"perplexity": "21.31", "made in": "38 s", **cost},
        "finetune:maximal": match | {"trained": "6,635,520", "made in": "335 s", **cost},
        "search (hill-climbing)": match | {"made in": "16 s", **{k: v for k, v in cost.items() if k != "peak memory"}},
        "merge": {"made in": "3 s", **cost},
    }


def test_a_column_for_each_text(raw: dict[str, Any], registry: Registry, data: Path, tmp_path: Path) -> None:
    """By the names of the files, with folders where two are alike; the first is the row's `perplexity`."""
    (tmp_path / "other").mkdir()
    texts = [data / "heldout.txt", tmp_path / "other" / "heldout.txt", tmp_path / "b.txt"]
    for text in texts[1:]:
        text.write_text("Words.")
    raw["evaluate"]["perplexity"] = [{"text": str(text)} for text in texts]
    plan = Orchestrator(registry, tmp_path).plan(Recipe.parse(raw))
    measured = {f"perplexity.{n}.text": {"perplexity": 10.0 + n, "windows": [1.0]} for n in range(3)}
    report = make_report(plan, {"evaluate:merge": artifact("evaluate", FACTS | PERPLEXITY | {"texts": measured})})
    (row,) = report["rows"]
    assert row["perplexity"] == 21.306 and "texts" not in report["steps"][0]["report"]
    names = [f"{data.name}/heldout.txt", "other/heldout.txt", f"{tmp_path.name}/b.txt"]
    assert row["texts"] == dict(zip(names, measured.values(), strict=True))
    heads, (cells,) = table(report)
    assert heads[2:5] == [f"perplexity {name}" for name in names] and cells[2:5] == ["10.00", "11.00", "12.00"]


def test_steps_without_the_detail_of_layers(plan: Plan) -> None:
    report = make_report(plan, {"sparsify": artifact("sparsify", {"layers": {"a": 0.5}, "sparsity": 0.5})})
    assert report["rows"] == [] and table(report)[1] == []
    (step,) = report["steps"]
    assert step["report"] == {"sparsity": 0.5} and step["storage"] == 2048 and step["artifact"] == "sparsify-0123"


def test_tasks_with_differing_metrics(plan: Plan) -> None:
    """As lm-eval gives them: several metrics, filters, a group without any, and a count among the metrics."""
    one = {
        "arc": {"acc": 0.25, "acc_stderr": 0.125, "acc_norm": 0.5, "acc_norm_stderr": 0.25},
        "wikitext": {"word_perplexity": 12.3456},
    }
    other = {
        "gsm8k": {"exact_match,strict-match": 0.5, "exact_match,strict-match_stderr": 0.0625},
        "group": {},
    }
    found = rows(
        plan,
        {
            "evaluate:model": artifact("evaluate", FACTS | {"tasks": one}),
            "evaluate:merge": artifact("evaluate", FACTS | {"tasks": other}),
        },
    )
    told = {"sparsity": "50.00%", "evaluated in": "3 s"}
    assert found == {
        "model": {"arc": "acc 0.250 ± 0.125, acc_norm 0.500 ± 0.250", "wikitext": "word_perplexity 12.346", **told},
        "merge": {"gsm8k": "exact_match,strict-match 0.500 ± 0.062", **told},
    }


def test_markdown(plan: Plan) -> None:
    report = make_report(plan, {"evaluate:model": artifact("evaluate", FACTS | {"tasks": {"arc": {"acc": 0.5}}})})
    assert report_markdown(report) == (
        "# tiny (seed 0)\n\n"
        "| configuration | accuracy | perplexity | arc | sparsity | trained | adds on disk | made in"
        " | peak memory | evaluated in |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
        "| model | – | – | acc 0.500 | 50.00% | – | – | – | – | 3 s |\n"
    )


def test_what_the_numbers_of_tasks_hang_on(plan: Plan) -> None:
    """Settings as they were used, then each task; and the files with the answers, as seen from the run's folder."""
    asked = {"lm_eval": "0.4.13", "apply_chat_template": True, "system_instruction": None, "gen_kwargs": {"top_p": 0.5}}
    tasks = {"arc": {"version": 1.0, "num_fewshot": 25, "documents": 1000, "of": 2376}}
    measured = artifact("evaluate", FACTS | {"tasks": {"arc": {"acc": 0.5}}, "lm_eval": asked | {"tasks": tasks}})
    measured.manifest["files"]["samples/arc.jsonl"] = {"size": 1}
    report = make_report(plan, {"evaluate:model": measured})
    lines = [
        'lm-eval 0.4.13: apply_chat_template true, gen_kwargs {"top_p": 0.5}',
        "arc: version 1.0, 25-shot, 1,000 of 2,376 documents",
    ]
    assert remarks(report) == lines
    answers = "answers of model: ../../artifacts/evaluate-0123/samples/arc.jsonl"
    assert report_markdown(report).endswith("|\n\n" + "".join(f"- {line}\n" for line in [*lines, answers]))
    assert remarks(make_report(plan, {"evaluate:model": artifact("evaluate", FACTS)})) == []


def test_what_a_step_warns_of_is_below_the_table(plan: Plan) -> None:
    report = make_report(plan, {"merge": artifact("merge", {"layers": 4, "warning": "training changed no code"})})
    assert remarks(report) == ["warning of merge: training changed no code"]
    assert report_markdown(report).endswith("\n- warning of merge: training changed no code\n")


def test_markdown_in_names_stands_for_itself(plan: Plan) -> None:
    tasks = {"a|b\nc": {"*acc*": 0.5}, "`x`": {}, "[y](z)": {}, "<b>": {}, "back\\slash": {}, "under_score": {}}
    report = make_report(plan, {"evaluate:model": artifact("evaluate", FACTS | {"tasks": tasks})})
    heads, line, row = report_markdown(report).splitlines()[2:]
    assert [head for head in heads.split(" | ") if "\\" in head] == [
        "\\<b>", "\\[y](z)", "\\`x\\`", "a\\|b c", "back\\\\slash",
    ]  # fmt: skip
    assert "| under_score |" in heads and "\\*acc\\* 0.500" in row
    unescaped = [text.replace("\\|", "").count("|") for text in (heads, line, row)]
    assert len(set(unescaped)) == 1, "every line has as many cells"
