"""One HTML file of one run or several: tables, charts, recipes. It needs no other file and no network."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqft.execution.report import remarks, table
from sqft.tools.run_report import charts
from sqft.tools.run_report.comparison import HEADS, comparisons
from sqft.tools.run_report.facts import RunFacts
from sqft.tools.run_report.trials import CHOSEN, Trial, by_records, in_order, number_of_records
from sqft.utils.text import human_size

NOTE = (
    "What each model gives, less what another gives on the same questions or windows of text, asked in the same way. "
    "Bold: the 95 % interval leaves out 0, and p is below 0.05. Then drawing other questions would hardly turn the "
    "difference round; another seed still may. Of an accuracy, the interval is a paired bootstrap and p is McNemar's "
    "exact test. Of a perplexity, it is Student's t over windows."
)

NOT_MEASURED = "Nothing was measured: the recipe has no section evaluate."


@dataclass(frozen=True)
class Chart:
    """A drawing with what it shows in words."""

    title: str
    svg: str
    caption: str


def render(runs: Sequence[RunFacts]) -> str:
    """Return the page.

    Raises:
        SqftError: when matplotlib, which draws the charts, is not installed.
    """
    compared = list(comparisons(runs))
    differing = [index for index, comparison in enumerate(compared) if comparison.differs]
    lines = [(run.name, line) for run in runs for line in remarks(run.report)]
    return fill(
        title=" and ".join(run.name for run in runs),
        subtitle=f"sqft {runs[0].record['versions']['sqft']}, seed {', '.join(str(r.report['seed']) for r in runs)}",
        results=_results(runs),
        nothing=NOT_MEASURED,
        settings=[line if len(runs) == 1 else f"{name}: {line}" for name, line in lines],
        compared={"heads": HEADS, "rows": [one.cells() for one in compared], "marked": differing, "note": NOTE},
        overall=with_own_ids(_overall(runs), "all-"),
        runs=[_run(run, f"run{number}-") for number, run in enumerate(runs)],
    )


def fill(**values: Any) -> str:
    """Return the page with these values of the template's variables."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader(__name__, "."), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html").render(**values)


def with_own_ids(drawn: Iterable[Chart], place: str) -> list[Chart]:
    """Give each chart ids of its own on the page; `place` tells the lists of charts there apart."""
    return [replace(chart, svg=charts.with_own_ids(chart.svg, f"{place}{n}")) for n, chart in enumerate(drawn)]


def _results(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """Return the table of all measured configurations, of several runs one below the other."""
    rows = [
        {**row, "configuration": f"{run.name}: {row['configuration']}"} for run in runs for row in run.report["rows"]
    ]
    if len(runs) == 1:
        rows = runs[0].report["rows"]
    heads, cells = table({"rows": rows})
    return {"heads": heads, "rows": cells}


def _run(run: RunFacts, place: str) -> dict[str, Any]:
    """Return what the page shows of one run; `place` is for `with_own_ids`."""
    steps, record = run.report["steps"], run.record
    cost = [[s["step"], f"{s['seconds']:.0f} s", human_size(s["peak_memory"]), human_size(s["storage"])] for s in steps]
    return {
        "name": run.name,
        "times": f"started {record['started']}, finished {record['finished']}",
        "charts": with_own_ids(_charts(run), place),
        "missing": ", ".join(name for name in record["artifacts"] if name not in run.artifacts),
        "cost": {"heads": ["step", "time", "peak memory", "on disk"], "rows": cost},
        "loading": run.loading() if run.result else "",
        "recipe": json.dumps(run.recipe, indent=2, ensure_ascii=False),
        "versions": "\n".join(f"{name} {version}" for name, version in record["versions"].items()),
    }


def _charts(run: RunFacts) -> Iterator[Chart]:
    """Draw what one run did, step by step."""
    if sparsity := run.sparsity():
        caption = "Share of weights that are zero, by block; a line for each layer of a block (of experts, the mean)."
        yield Chart("Sparsity by layer", charts.line_chart(sparsity, "block", "sparsity", limits=(0, 1)), caption)
    for label, errors in run.errors().items():
        caption = "Squared error relative to the layer before the step, by block."
        yield Chart(f"Error of {label}", charts.line_chart(errors, "block", "relative error", log=True), caption)
    if losses := run.losses():
        caption = "Mean loss of a label in each optimizer step, and the mean over the last ten steps."
        yield Chart("Loss of fine-tuning", charts.line_chart(losses, "step", "loss"), caption)
    if trials := run.trials():
        yield _search(trials, run.chosen())
    if ranks := run.ranks():
        caption = "The rank of every group of layers in the configuration that the search chose."
        yield Chart("Chosen ranks", charts.rank_chart(ranks), caption)


def _search(trials: Sequence[Trial], chosen: Sequence[int]) -> Chart:
    """Draw the trials of a search; values are compared with the best so far only where all are of the same records."""
    if len({trial.records for trial in trials}) == 1:
        same = number_of_records(trials[0].records)
        caption = f"Each configuration's value on the same {same}, in order; higher is better."
        return Chart("Search", charts.line_chart(in_order(trials), "trial", "value"), caption)
    caption = (
        "Each configuration's value on all records that it met, in the order in which they were first tried, with its "
        "standard error; higher is better. There is no error where the values of all records are equal, where there is "
        "only one record, and where an earlier version searched. Values on few records are less certain, and "
        "records differ: compare only configurations with equally many records."
    )
    points = by_records(trials, chosen)
    starred = [label for label in points if label.startswith(CHOSEN)]
    drawn = charts.error_chart(points, "configuration", "value", joined=False, starred=starred)
    return Chart("Search", drawn, caption)


def _overall(runs: Sequence[RunFacts]) -> Iterator[Chart]:
    """Draw accuracy, each task, and perplexity against sparsity, where runs differ in sparsity."""
    measured: dict[str, dict[str, list[tuple[float, float, float]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for row in run.report["rows"]:
            for measure, (value, error) in _measures(row).items():
                kind = row["configuration"].partition(" ")[0]
                measured[measure][kind].append((row["sparsity"], value, error))
    for measure, lines in measured.items():
        several = {kind: points for kind, points in lines.items() if len({round(x, 3) for x, *_ in points}) > 1}
        if several:
            caption = "A point for each run, with its standard error; a line for each configuration."
            yield Chart(f"{measure} by sparsity", charts.error_chart(several, "sparsity", measure), caption)


def _measures(row: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return a row's measures with their standard errors."""
    found = {}
    if row["accuracy"] is not None:
        found["accuracy"] = (row["accuracy"], row["stderr"] or 0.0)
    for task, metrics in row["tasks"].items():
        found |= {f"{task} {m}": (v, metrics.get(f"{m}_stderr", 0.0)) for m, v in metrics.items() if "_stderr" not in m}
    for text, one in row.get("texts", {}).items():
        found[f"perplexity {text}"] = (one["perplexity"], one["perplexity"] * (one.get("stderr") or 0.0))
    return found
