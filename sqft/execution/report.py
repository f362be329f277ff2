"""The report of a run: one table of what each step cost and achieved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sqft.planning.plan import Plan, Step
from sqft.recipe.sections import Evaluate
from sqft.store.artifacts import Artifact
from sqft.utils.text import escaped, human_size, markdown_table

LONG = ("layers", "output_errors", "texts")
"""What a step's manifest says of each layer or window, and its report here does not repeat."""


def make_report(plan: Plan, artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return a row for each evaluated configuration and an entry for each step, from manifests alone."""
    rows = []
    texts = {step.name: _names_of_texts(step) for step in plan.steps if isinstance(step.section, Evaluate)}
    for name, artifact in artifacts.items():
        if artifact.manifest["stage"] == "evaluate":
            measured = artifact.report.get("texts", {})
            named = {text: measured[role] for role, text in texts.get(name, {}).items() if role in measured}
            rows.append({**_row(name.partition(":")[2], artifact, artifacts), "texts": named})
    steps = [
        {
            "step": name,
            "artifact": artifact.folder.name,
            "seconds": artifact.manifest["seconds"],
            "peak_memory": artifact.manifest["peak_memory"],
            "storage": artifact.size,
            "report": {key: value for key, value in artifact.report.items() if key not in LONG},
        }
        for name, artifact in artifacts.items()
    ]
    return {"recipe": plan.recipe.name, "seed": plan.recipe.seed, "rows": rows, "steps": steps}


def _names_of_texts(step: Step) -> dict[str, str]:
    """Return the names of the texts whose perplexity a step measures, by their roles: of the files, with as many of
    their folders as tell them apart."""
    files = {role: step.files[role] for role in cast(Evaluate, step.section).texts}
    for parts in range(1, max((len(file.parts) for file in files.values()), default=0) + 1):
        names = {role: Path(*file.parts[-parts:]).as_posix() for role, file in files.items()}
        if len(set(names.values())) == len(names):
            return names
    return {}


def _row(configuration: str, artifact: Artifact, artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return the row of a configuration ("search", "finetune:maximal", …) that `artifact` measured."""
    made = artifacts.get(configuration.partition(":")[0])  # the step whose cost the row shows; none for "model"
    measured = artifact.report
    label = configuration
    if configuration == "search" and made:
        label = f"search ({made.report['searcher']})"
    if configuration == "model" and "trainable" in measured:
        label = "model + adapter"
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
    texts = list(dict.fromkeys(text for row in report["rows"] for text in row.get("texts", ())))
    perplexities = [f"perplexity {text}" for text in texts] if len(texts) > 1 else ["perplexity"]
    heads = ["configuration", "accuracy", *perplexities, *tasks, "sparsity", "trained", "adds on disk", "made in"]
    heads += ["peak memory", "evaluated in"]
    cells = []
    for row in report["rows"]:
        accuracy = f"{row['accuracy']:.1%} ± {row['stderr']:.1%}" if row["accuracy"] is not None else "–"
        cells.append(
            [
                row["configuration"],
                accuracy,
                *(_text(value, "{:.2f}") for value in _perplexities(row, texts)),
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


def flat_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a flat dict for each measured configuration, with equal keys: rows of a table for other programs."""
    rows = []
    for row in report["rows"]:
        flat = {name: value for name, value in row.items() if name not in ("texts", "tasks", "lm_eval", "answers")}
        flat |= {f"perplexity {text}": found["perplexity"] for text, found in row.get("texts", {}).items()}
        flat |= {f"{task} {metric}": value for task, found in row["tasks"].items() for metric, value in found.items()}
        rows.append({"recipe": report["recipe"], "seed": report["seed"], **flat})
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]


def title(report: Mapping[str, Any]) -> str:
    """Return the title of the table."""
    return f"{report['recipe']} (seed {report['seed']})"


def report_markdown(report: Mapping[str, Any]) -> str:
    """Return the table as Markdown, warnings of steps, what its numbers depend on, and where the answers are."""
    lines = remarks(report)
    lines += [
        f"answers of {row['configuration']}: ../../artifacts/{file}"
        for row in report["rows"]
        for file in row["answers"]
    ]
    listed = "".join(f"- {escaped(line)}\n" for line in lines)
    return markdown_table(title(report), *table(report)) + (f"\n{listed}" if listed else "")


def remarks(report: Mapping[str, Any]) -> list[str]:
    """Return what belongs below the table: warnings of steps, and how lm-eval was asked, the same for every row: its
    settings, then each task."""
    warnings = ((step["step"], step["report"].get("warning")) for step in report["steps"])
    lines = [f"warning of {name}: {text}" for name, text in warnings if text]
    for step in report["steps"]:
        taken = step["report"].get("earlier", {}).items()
        lines += [f"{step['step']}: {name} was measured earlier, in {artifact}" for name, artifact in taken]
    asked = next((row["lm_eval"] for row in report["rows"] if row["lm_eval"]), None)
    if asked is None:
        return lines
    given = [
        f"{name} {json.dumps(value, ensure_ascii=False)}"
        for name, value in asked.items()
        if name not in ("lm_eval", "names", "tasks") and value not in (None, {})
    ]
    lines.append(f"lm-eval {asked['lm_eval']}: {', '.join(given)}")
    return lines + [
        f"{task}: {_version(facts['version'])}, {facts['num_fewshot']}-shot, {facts['documents']:,} of {facts['of']:,} "
        "documents"
        for task, facts in asked["tasks"].items()
    ]


def _version(version: object) -> str:
    return "no version" if version is None else f"version {version}"


def _perplexities(row: Mapping[str, Any], texts: Sequence[str]) -> list[float | None]:
    """Return the perplexity of each text; of the only one when there are no several."""
    if len(texts) < 2:
        return [row["perplexity"]]
    return [row["texts"].get(text, {}).get("perplexity") for text in texts]


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
