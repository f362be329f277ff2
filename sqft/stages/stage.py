"""The interface of a stage, and how each is made. Imports no torch: a stage is imported when it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sqft.stages.inputs import Report, StageInputs


class Stage(Protocol):
    """The work of one step.

    One object serves both calls, so that `verify` may use what `run` loaded and did not change. What `verify` proves,
    it reads back from disk.
    """

    def run(self) -> Report:
        """Write the step's result into the scratch folder, and return the numbers to report."""

    def verify(self) -> None:
        """Read back what `run` wrote.

        Raises:
            ArtifactError: when what is on disk breaks a promise of the stage.
        """


def _sparsify(inputs: StageInputs) -> Stage:
    from sqft.stages.sparsify import SparsifyStage

    return SparsifyStage(inputs)


def _quantize(inputs: StageInputs) -> Stage:
    from sqft.stages.quantize import QuantizeStage

    return QuantizeStage(inputs)


def _finetune(inputs: StageInputs) -> Stage:
    from sqft.stages.finetune import FinetuneStage

    return FinetuneStage(inputs)


def _search(inputs: StageInputs) -> Stage:
    from sqft.stages.search import SearchStage

    return SearchStage(inputs)


def _merge(inputs: StageInputs) -> Stage:
    from sqft.stages.merge import MergeStage

    return MergeStage(inputs)


def _export(inputs: StageInputs) -> Stage:
    from sqft.stages.export import ExportStage

    return ExportStage(inputs)


def _evaluate(inputs: StageInputs) -> Stage:
    from sqft.stages.evaluate import EvaluateStage

    return EvaluateStage(inputs)


MAKERS: dict[str, Callable[[StageInputs], Stage]] = {
    "sparsify": _sparsify,
    "quantize": _quantize,
    "finetune": _finetune,
    "search": _search,
    "merge": _merge,
    "export": _export,
    "evaluate": _evaluate,
}
"""How to make a stage, by the name that `sqft.recipe.stages` and `Step.stage` have for it."""


def make_stage(inputs: StageInputs) -> Stage:
    """Make the stage of a step."""
    return MAKERS[inputs.step.stage](inputs)
