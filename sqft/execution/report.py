"""The report of a run: one table of what each step cost and achieved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqft.planning.plan import Plan
from sqft.store.artifacts import Artifact
from sqft.utils.text import escaped, human_size, markdown_table

OF_LAYERS = ("layers", "output_errors")
"""What a step's report says of each layer, which only its manifest repeats."""


def make_report(plan: Plan, artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return a row for each evaluated configuration and an entry for each step, from manifests alone."""
    rows = []
    for name, artifact in artifacts.items():
        if artifact.manifest["stage"] == "evaluate":
            rows.append(_row(name.partition(":")[2], artifact, artifacts))
    steps = [
        {
            "step": name,
            "artifact": artifact.folder.name,
            "seconds": artifact.manifest["seconds"],
            "peak_memory": artifact.manifest["peak_memory"],
            "storage": artifact.size,
            "report": {key: value for key, value in artifact.report.items() if key not in OF_LAYERS},
        }
        for name, artifact in artifacts.items()
    ]
    return {"recipe": plan.recipe.name, "seed": plan.recipe.seed, "rows": rows, "steps": steps}


def _row(configuration: str, artifact: Artifact, artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return the row of a configuration ("search", "finetune:maximal", …) that `artifact` measured."""
    made = artifacts.get(configuration.partition(":")[0])  # the step whose cost the row shows; none for "model"
    measured = artifact.report
    label = configuration
    if configuration == "search" and made:
        label = f"search ({made.report['searcher']})"
    match = measured.get("exact_match", {})
    return {
        "configuration": label,
        "accuracy": match.get("accuracy"),
        "stderr": match.get("stderr"),
        "perplexity": measured.get("perplexity", {}).get("perplexity"),
        "tasks": measured.get("tasks", {}),
        "lm_eval": measured.get("lm_eval"),
        "answers": [f"{artifact.folder.name}/{name}" for name in artifact.manifest["files"] if name.endswith(".jsonl")],
        "sparsity": measured["sparsity"],
        "trainable": measured.get("trainable"),
        "storage": made.size if made else None,
        "seconds": made.manifest["seconds"] if made else None,
        "peak_memory": made.manifest["peak_memory"] if made else None,
        "evaluation_seconds": artifact.manifest["seconds"],
    }


def table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the report's rows as text: heads and cells."""
    tasks = sorted({task for row in report["rows"] for task in row["tasks"]})
    heads = ["configuration", "accuracy", "perplexity", *tasks, "sparsity", "trained", "adds on disk", "made in"]
    heads += ["peak memory", "evaluated in"]
    cells = []
    for row in report["rows"]:
        accuracy = f"{row['accuracy']:.1%} ± {row['stderr']:.1%}" if row["accuracy"] is not None else "–"
        cells.append(
            [
                row["configuration"],
                accuracy,
                _text(row["perplexity"], "{:.2f}"),
                *(_task(row["tasks"].get(task, {})) for task in tasks),
                f"{row['sparsity']:.2%}",
                _text(row["trainable"], "{:,}"),
                human_size(row["storage"]) if row["storage"] is not None else "–",
                _text(row["seconds"], "{:.0f} s"),
                human_size(row["peak_memory"]) if row["peak_memory"] is not None else "–",
                _text(row["evaluation_seconds"], "{:.0f} s"),
            ]
        )
    return heads, cells


def title(report: Mapping[str, Any]) -> str:
    """Return the title of the table."""
    return f"{report['recipe']} (seed {report['seed']})"


def report_markdown(report: Mapping[str, Any]) -> str:
    """Return the table as Markdown, what its numbers depend on, and where the answers are."""
    lines = settings_of_tasks(report)
    lines += [
        f"answers of {row['configuration']}: ../../artifacts/{file}"
        for row in report["rows"]
        for file in row["answers"]
    ]
    remarks = "".join(f"- {escaped(line)}\n" for line in lines)
    return markdown_table(title(report), *table(report)) + (f"\n{remarks}" if remarks else "")


def settings_of_tasks(report: Mapping[str, Any]) -> list[str]:
    """Return lines that say how lm-eval was asked, the same for every row: its settings, then each task."""
    asked = next((row["lm_eval"] for row in report["rows"] if row["lm_eval"]), None)
    if asked is None:
        return []
    given = [
        f"{name} {json.dumps(value, ensure_ascii=False)}"
        for name, value in asked.items()
        if name not in ("lm_eval", "names", "tasks") and value not in (None, {})
    ]
    return [f"lm-eval {asked['lm_eval']}: {', '.join(given)}"] + [
        f"{task}: {_version(facts['version'])}, {facts['num_fewshot']}-shot, {facts['documents']:,} of {facts['of']:,} "
        "documents"
        for task, facts in asked["tasks"].items()
    ]


def _version(version: object) -> str:
    return "no version" if version is None else f"version {version}"


def _text(value: float | None, form: str) -> str:
    return form.format(value) if value is not None else "–"


def _task(metrics: Mapping[str, float]) -> str:
    """Return a task's metrics by name, each with its standard error if it has one."""
    shown = []
    for name, value in metrics.items():
        if not name.endswith("_stderr"):
            error = metrics.get(f"{name}_stderr")
            shown.append(f"{name} {value:.3f}" + (f" ± {error:.3f}" if error is not None else ""))
    return ", ".join(shown) or "–"
