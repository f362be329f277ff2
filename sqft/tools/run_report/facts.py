"""What the store knows of a run that has ended, as plain data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sqft.errors import StoreError
from sqft.execution.run import RESULT
from sqft.recipe.measures import ExactMatch
from sqft.recipe.stages import EVALUABLE
from sqft.store.artifacts import Artifact, Store
from sqft.tools.run_report.trials import Trial, read_trials
from sqft.utils.files import reason

BLOCK = re.compile(r"(?:^|\.)(\d+)\.(.+)")
"""The number of a layer's block, and its name in there."""
AVERAGED = 10
"""Over how many optimizer steps the loss is averaged."""
Series = dict[str, list[tuple[float, float]]]
"""Points (x, y) of each line of a chart, by its label."""


@dataclass(frozen=True)
class Measure:
    """One way in which a model was measured, item by item."""

    name: str
    rules: str
    """What the numbers depend on besides the model: only under equal rules are two models compared."""
    answers: Mapping[str, float]
    """How right each answer is, 1 or 0 for most measures, by its question; empty for a text."""
    windows: Mapping[str, Any] = field(default_factory=dict)
    """A text's negative log-likelihood, window by window; empty for questions."""


@dataclass(frozen=True)
class RunFacts:
    """A run's folder, read, and those of its artifacts that are still in the store."""

    folder: Path
    root: Path
    """The store."""
    report: Mapping[str, Any]
    recipe: Mapping[str, Any]
    record: Mapping[str, Any]
    """`run.json`: times, versions, links, and how the result is loaded."""
    digests: Mapping[str, Mapping[str, str]]
    """Content digests of the files that each step reads, by their roles."""
    artifacts: Mapping[str, Artifact]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def result(self) -> Path | None:
        """The folder of the result; None when there is none, or it is no longer in the store."""
        folder = (self.folder / str(self.record.get("result", ""))).resolve()
        return folder if "result" in self.record and folder.is_dir() else None

    def loading(self, name: str | None = None) -> str:
        """Return how the result is loaded, from a folder or an id on the hub; unless given, from where it is."""
        return str(self.record.get("loading", "")).replace(RESULT, name or str(self.result))

    def ending_in(self, result: Path, loading: str) -> RunFacts:
        """Return the facts with another result, such as that of a run which stopped before the last step; `loading` has
        `RESULT` in place of the folder."""
        return dataclasses.replace(self, record={**self.record, "result": str(result.resolve()), "loading": loading})

    def configurations(self) -> dict[str, str]:
        """Return the step that measured each configuration, in the order in which models are made."""
        order = [stage.partition(":")[0] for stage in EVALUABLE]
        steps = [name for name, artifact in self.artifacts.items() if artifact.manifest["stage"] == "evaluate"]
        measured = {name.partition(":")[2]: name for name in steps}
        return dict(sorted(measured.items(), key=lambda one: order.index(one[0].partition(":")[0])))

    def losses(self) -> Series:
        """Return the loss of each optimizer step, its mean over steps, and that of validation where there was any."""
        entries = self._lines("finetune", "log.jsonl")
        lines = {"step": "loss", "mean": "loss", "validation": "eval_loss"}
        found = {name: [(e["step"], e[key]) for e in entries if key in e] for name, key in lines.items()}
        values = [loss for _, loss in found["mean"]]
        means = [statistics.fmean(values[max(0, end - AVERAGED) : end]) for end in range(1, len(values) + 1)]
        found["mean"] = [(step, mean) for (step, _), mean in zip(found["mean"], means, strict=True)]
        return {name: points for name, points in found.items() if points}

    def trials(self) -> list[Trial]:
        """Return the configurations that the search evaluated, in their order."""
        return read_trials(self._lines("search", "trials.jsonl"))

    def chosen(self) -> list[int]:
        """Return the ranks that the search chose; none without one."""
        ranks: list[int] = self._json("search", "choice.json").get("ranks", [])
        return ranks

    def ranks(self) -> dict[str, dict[int, int]]:
        """Return the chosen rank of every group of layers, each expert's too: by its name in the block, and by the
        block's number."""
        space = self._json("finetune", "space.json")
        found: dict[str, dict[int, int]] = defaultdict(dict)
        for order, (group, rank) in enumerate(zip(space.get("groups", ()), self.chosen(), strict=False)):
            block, name = in_block(group["name"], order, experts=True)
            found[name][block] = rank
        return dict(found)

    def sparsity(self) -> Series:
        """Return the sparsity of the layers of each block, by their name in there."""
        return by_block(self._report("sparsify").get("layers", {}))

    def errors(self) -> dict[str, Series]:
        """Return each step's relative errors of layers, by what the error is of; see `by_block`."""
        pruned, coded = self._report("sparsify").get("output_errors", {}), self._report("quantize").get("layers", {})
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for layers, words in ((pruned, "pruning"), (coded, "quantization")):
            for layer, errors in layers.items():
                for kind, value in errors.items():
                    found[f"{words}: {kind}"][layer] = value
        return {label: by_block(layers) for label, layers in found.items()}

    @cached_property
    def measures(self) -> dict[str, list[Measure]]:
        """Every measure of each configuration that was taken item by item."""
        return {
            configuration: [*self._matched(step), *self._tasks(step), *self._texts(step)]
            for configuration, step in self.configurations().items()
        }

    def _matched(self, step: str) -> Iterator[Measure]:
        """Yield the answers to `exact_match`."""
        if answers := self._lines(step, "predictions.jsonl"):
            rules = rules_of(self.recipe["evaluate"]["exact_match"])
            right = ((f"{one['prompt']}\0{one['expected']}", one["right"]) for one in answers)
            yield Measure("accuracy", rules, by_question(right))

    def _tasks(self, step: str) -> Iterator[Measure]:
        """Yield the answers to lm-eval's tasks, where they were kept and a metric is the mean over them."""
        report = self.artifacts[step].report
        asked = report.get("lm_eval", {})
        shared = {name: value for name, value in asked.items() if name not in ("names", "tasks", "batch_size")}
        for task, metrics in report.get("tasks", {}).items():
            samples = self._lines(step, f"samples/{task.replace('/', '_')}.jsonl")
            rules = json.dumps([task, shared, asked.get("tasks", {}).get(task)], sort_keys=True)
            for metric in (metric for metric in metrics if not metric.endswith("_stderr")):
                key, _, used = metric.partition(",")
                scored = [s for s in samples if s.get("filter", "none") == (used or "none") and key in s]
                answers = by_question((s["doc_hash"], s[key]) for s in scored)
                if answers and math.isclose(statistics.fmean(answers.values()), metrics[metric], abs_tol=1e-6):
                    yield Measure(f"{task} {metric}", f"{metric} {rules}", answers)

    def _texts(self, step: str) -> Iterator[Measure]:
        """Yield the windows of each text, under the names that the results have."""
        texts, configuration = self.artifacts[step].report.get("texts", {}), step.partition(":")[2]
        rows = (row for row in self.report["rows"] if row["configuration"].partition(" ")[0] == configuration)
        row: Mapping[str, Any] = next(rows, {})
        names = list(row["texts"]) if len(row.get("texts", ())) == len(texts) else list(texts)
        for (role, measured), name in zip(texts.items(), names, strict=True):
            # Without a digest, as in earlier records, a text is compared within its run alone.
            digest = self.digests.get(step, {}).get(role) or f"{self.folder} {role}"
            rules = json.dumps([digest, self.recipe["model"]["path"], measured["window_tokens"]])
            yield Measure("perplexity" if len(texts) == 1 else f"perplexity {name}", rules, {}, measured)

    def _report(self, step: str) -> Mapping[str, Any]:
        return self.artifacts[step].report if step in self.artifacts else {}

    def _json(self, step: str, name: str) -> Any:
        return self._read(step, name, json.loads) if self._has(step, name) else {}

    def _lines(self, step: str, name: str) -> list[Any]:
        """Return the entries of a JSON Lines file; only a line feed ends a line, and not every line of Unicode's."""

        def parse(text: str) -> list[Any]:
            return [json.loads(line) for line in text.split("\n") if line]

        return self._read(step, name, parse) if self._has(step, name) else []

    def _read(self, step: str, name: str, parse: Callable[[str], Any]) -> Any:
        artifact = self.artifacts[step]
        file, why = artifact.folder / name, "it has changed since it was stored"
        try:
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() == artifact.manifest["files"][name].get("sha256"):
                return parse(content.decode("utf-8", errors="replace"))
        except (OSError, ValueError) as error:
            why = reason(error)
        remedy = f"delete {artifact.folder}, or run with --fresh {step}"
        raise StoreError(f"{file} is damaged ({why}); {remedy}")

    def _has(self, step: str, name: str) -> bool:
        return step in self.artifacts and name in self.artifacts[step].manifest["files"]


def read_facts(folder: Path, root: Path) -> RunFacts:
    """Read a run's folder and its artifacts in the store at `root`.

    Raises:
        StoreError: when the run has not come to an end yet, or its files cannot be read.
        ArtifactError: when an artifact is damaged.
    """
    if not (folder / "run.json").is_file():
        raise StoreError(f"run {folder.name} has not finished any `sqft run` yet, so there is nothing to report")
    try:
        report, recipe, record, plan = (
            json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("report", "recipe", "run", "plan")
        )
        _ = report["rows"], report["steps"], report["seed"], recipe["model"]["path"], record["versions"]["sqft"]
        made = [(step["name"], step["fingerprint"]) for step in plan if step["name"] in record["artifacts"]]
        digests = {step["name"]: step.get("digests", {}) for step in plan}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreError(f"run {folder.name} cannot be read ({reason(error)}); run its recipe again") from None
    store = Store(root)
    found = {name: store.find(name.partition(":")[0], fingerprint) for name, fingerprint in made}
    artifacts = {name: artifact for name, artifact in found.items() if artifact}
    return RunFacts(folder, root, report, recipe, record, digests, artifacts)


def rules_of(exact_match: Mapping[str, Any]) -> str:
    """Return the settings of `exact_match` in a recipe that decide what is right, also those that it leaves out."""
    given = {key: value for key, value in exact_match.items() if key not in ("data", "batch_size")}
    with suppress(ValidationError):  # one of another version of sqft is compared as it is
        given = ExactMatch.model_validate({**given, "data": "any"}).model_dump(exclude={"data", "batch_size"})
    return json.dumps(given, sort_keys=True)


def by_question(values: Iterable[tuple[str, Any]]) -> dict[str, float]:
    """Return how right each answer is by its question; a question that comes again has its number beside it.

    Empty when not every value is a number.
    """
    found: dict[str, float] = {}
    times: Counter[str] = Counter()
    for question, value in values:
        if not isinstance(value, int | float):
            return {}
        found[f"{question}\0{times[question]}"] = float(value)
        times[question] += 1
    return found


def in_block(layer: str, order: int, experts: bool = False) -> tuple[int, str]:
    """Return the number of a layer's block and the layer's name in it; where it has no number, its order among all.

    An expert's number is "*", unless `experts`.
    """
    match = BLOCK.search(layer)
    if match is None:
        return order, layer
    return int(match[1]), match[2] if experts else re.sub(r"\b\d+\b", "*", match[2])


def by_block(layers: Mapping[str, float]) -> Series:
    """Return a value of each layer as points (block, value), by the layer's name in there; of experts, the mean."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for order, (layer, value) in enumerate(layers.items()):
        block, name = in_block(layer, order)
        found[name][block].append(value)
    return {
        name: [(block, statistics.fmean(values)) for block, values in sorted(blocks.items())]
        for name, blocks in found.items()
    }
