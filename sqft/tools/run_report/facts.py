"""What the store knows of a run that has ended, as plain data."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sqft.errors import StoreError
from sqft.store.artifacts import Artifact, Store
from sqft.utils.files import reason

BLOCK = re.compile(r"(?:^|\.)(\d+)\.(.+)")
"""The number of a layer's block, and its name in there."""
AVERAGED = 10
"""Over how many optimizer steps the loss is averaged."""
Series = dict[str, list[tuple[float, float]]]
"""Points (x, y) of each line of a chart, by its label."""


@dataclass(frozen=True)
class RunFacts:
    """A run's folder, read, and those of its artifacts that are still in the store."""

    folder: Path
    report: Mapping[str, Any]
    recipe: Mapping[str, Any]
    record: Mapping[str, Any]
    """`run.json`: times, versions, links, and how the result is loaded."""
    artifacts: Mapping[str, Artifact]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def loading(self) -> str:
        """How the result is loaded; empty when the run leaves nothing to load."""
        return str(self.record.get("loading", ""))

    @property
    def result(self) -> Path | None:
        """The folder of the result; None when there is none, or it is no longer in the store."""
        folder = (self.folder / str(self.record.get("result", ""))).resolve()
        return folder if "result" in self.record and folder.is_dir() else None

    def ending_in(self, result: Path, loading: str) -> RunFacts:
        """Return the facts with another result, such as that of a run which stopped before the last step."""
        return dataclasses.replace(self, record={**self.record, "result": str(result.resolve()), "loading": loading})

    def losses(self) -> Series:
        """Return the loss of each optimizer step, its mean over steps, and that of validation where there was any."""
        entries = self._lines("finetune", "log.jsonl")
        lines = {"step": "loss", "mean": "loss", "validation": "eval_loss"}
        found = {name: [(e["step"], e[key]) for e in entries if key in e] for name, key in lines.items()}
        values = [loss for _, loss in found["mean"]]
        means = [statistics.fmean(values[max(0, end - AVERAGED) : end]) for end in range(1, len(values) + 1)]
        found["mean"] = [(step, mean) for (step, _), mean in zip(found["mean"], means, strict=True)]
        return {name: points for name, points in found.items() if points}

    def trials(self) -> Series:
        """Return the value of each trial of the search, and the best one so far, among trials on as many samples as
        the last."""
        trials = self._lines("search", "trials.jsonl")
        trials = [trial for trial in trials if trial["samples"] == trials[-1]["samples"]]
        values = [float(trial["value"]) for trial in trials]
        if not values:
            return {}
        best = [max(values[: number + 1]) for number in range(len(values))]
        return {"trial": list(enumerate(values, 1)), "best so far": list(enumerate(best, 1))}

    def ranks(self) -> dict[str, dict[int, int]]:
        """Return the chosen rank of every group of layers: by its name in the block, and by the block's number."""
        space, choice = self._json("finetune", "space.json"), self._json("search", "choice.json")
        found: dict[str, dict[int, int]] = defaultdict(dict)
        for order, (group, rank) in enumerate(zip(space.get("groups", ()), choice.get("ranks", ()), strict=False)):
            block, name = in_block(group["name"], order)
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
    def answers(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return how right each answer is, 1 or 0 for most measures: by configuration, measure and item."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for name, artifact in self.artifacts.items():
            if artifact.manifest["stage"] != "evaluate":
                continue
            measures = found.setdefault(name.partition(":")[2], {})
            answers = self._lines(name, "predictions.jsonl")
            measures["accuracy"] = by_question((f"{a['prompt']}\0{a['expected']}", a["right"]) for a in answers)
            for task, metrics in artifact.report.get("tasks", {}).items():
                samples = self._lines(name, f"samples/{task.replace('/', '_')}.jsonl")
                for metric in (metric for metric in metrics if not metric.endswith("_stderr")):
                    key, _, used = metric.partition(",")
                    scored = [s for s in samples if s.get("filter", "none") == (used or "none") and key in s]
                    measures[f"{task} {metric}"] = by_question((s["doc_hash"], s[key]) for s in scored)
        return found

    def texts(self) -> dict[str, dict[str, Mapping[str, Any]]]:
        """Return what perplexity was measured window by window: by configuration and text."""
        evaluated = [(name, a) for name, a in self.artifacts.items() if a.manifest["stage"] == "evaluate"]
        return {name.partition(":")[2]: artifact.report.get("texts", {}) for name, artifact in evaluated}

    def _report(self, step: str) -> Mapping[str, Any]:
        return self.artifacts[step].report if step in self.artifacts else {}

    def _json(self, step: str, name: str) -> Any:
        return self.artifacts[step].read_json(name) if self._has(step, name) else {}

    def _lines(self, step: str, name: str) -> list[Any]:
        if not self._has(step, name):
            return []
        text = (self.artifacts[step].folder / name).read_text("utf-8", errors="replace")
        return [json.loads(line) for line in text.splitlines()]

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
        made = [(step["name"], step["fingerprint"]) for step in plan if step["name"] in record["artifacts"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StoreError(f"run {folder.name} cannot be read ({reason(error)}); run its recipe again") from None
    store = Store(root)
    found = {name: store.find(name.partition(":")[0], fingerprint) for name, fingerprint in made}
    artifacts = {name: artifact for name, artifact in found.items() if artifact}
    return RunFacts(folder, report, recipe, record, artifacts)


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


def in_block(layer: str, order: int) -> tuple[int, str]:
    """Return the number of a layer's block and the layer's name in it, experts' numbers as "*"; where the name has no
    number, its order among all."""
    match = BLOCK.search(layer)
    return (int(match[1]), re.sub(r"\b\d+\b", "*", match[2])) if match else (order, layer)


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
