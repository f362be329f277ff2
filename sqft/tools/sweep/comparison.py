"""Whether cells differ by more than chance, on the same questions and with the same seeds."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from sqft.errors import SqftError
from sqft.store.artifacts import Artifact
from sqft.tools.run_report.facts import RunFacts, read_facts
from sqft.tools.sweep.definition import SEED, Combination, shown_values
from sqft.tools.sweep.results import CellDifference, SweepResults
from sqft.utils.significance import bootstrap_interval

log = logging.getLogger("sqft")


def differences(results: SweepResults, store: Path) -> list[CellDifference]:
    """Compare combinations of values that differ on one axis alone, besides the seed's: each with the first that has
    the same measure of the same configuration.

    Only questions that both answered under the same rules count, and seeds that both have.
    """
    groups: dict[Combination, dict[str, RunFacts]] = {}
    for one in results.cells:
        if one.rows is not None:
            seed = one.cell.values.get(SEED, "")
            try:
                facts = read_facts(one.folder, store)
                _ = facts.measures  # read now, while a damaged file costs one cell and not the table
                groups.setdefault(one.cell.combination, {})[seed] = facts
            except SqftError as error:
                log.warning("cell (%s) is not compared: %s", one.cell, error)
    found: list[CellDifference] = []
    for number, (values, after) in enumerate(groups.items()):
        compared: dict[str, set[tuple[str, str]]] = defaultdict(set)
        for other, before in islice(groups.items(), number):
            differing = [axis for axis, value in values if (axis, value) not in other]
            if len(differing) == 1:
                found += _differences(shown_values(other), before, shown_values(values), after, compared[differing[0]])
    return found


def _differences(
    first: str,
    before: Mapping[str, RunFacts],
    cell: str,
    after: Mapping[str, RunFacts],
    known: set[tuple[str, str]],
) -> list[CellDifference]:
    """Return how a cell differs from another, for each configuration and measure of questions that both have.

    What is `known` is left out. What was compared, and what is of the same model, is known then.
    """
    found: list[CellDifference] = []
    same: set[tuple[str, str]] = set()
    by_measure: dict[tuple[str, str], dict[str, Mapping[str, float]]] = {}
    for seed in (seed for seed in before if seed in after):
        for configuration, step in after[seed].configurations().items():
            other = before[seed].artifacts.get(step)
            if other is None:
                continue  # not measured there
            if _is_same_model(other, after[seed].artifacts[step]):
                same |= {(configuration, one.name) for one in after[seed].measures[configuration]}
                continue
            answers = {one.rules: one.answers for one in before[seed].measures[configuration] if one.answers}
            for one in after[seed].measures[configuration]:
                if one.rules in answers and (configuration, one.name) not in known:
                    differing = _by_question(answers[one.rules], one.answers)
                    by_measure.setdefault((configuration, one.name), {})[seed] = differing
    for (configuration, measure), of_seeds in by_measure.items():
        shared = set.intersection(*(set(one) for one in of_seeds.values()))
        questions = [question for question in next(iter(of_seeds.values())) if question in shared]
        if questions:
            means = [math.fsum(one[q] for one in of_seeds.values()) / len(of_seeds) for q in questions]
            by_seed = {seed: math.fsum(one[q] for q in questions) / len(questions) for seed, one in of_seeds.items()}
            found.append(CellDifference(cell, first, configuration, measure, by_seed, bootstrap_interval(means)))
    known |= same | {(one.configuration, one.measure) for one in found}
    return found


def _is_same_model(one: Artifact, other: Artifact) -> bool:
    """Return whether two evaluations are of one model: they are one, or what they measured was made of the same."""
    what = [[artifact.manifest.get(name) for name in ("inputs", "components", "made_of")] for artifact in (one, other)]
    return one.folder == other.folder or (bool(what[0][0]) and what[0] == what[1])


def _by_question(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {question: after[question] - right for question, right in before.items() if question in after}
