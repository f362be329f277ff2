"""The stages that a recipe can ask for, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass

from sqft.recipe.fields import Section
from sqft.recipe.sections import Evaluate, Export, Finetune, Merge, Quantize, Search, Sparsify


@dataclass(frozen=True)
class StageInfo:
    """A stage.

    Args:
        name: its key in a recipe.
        section: what a recipe says about it.
        makes_model: whether its artifact holds a model.
        evaluable: how `evaluate.of` names its result; None when that cannot be evaluated.
    """

    name: str
    section: type[Section]
    makes_model: bool
    evaluable: str | None


STAGES = (
    StageInfo("sparsify", Sparsify, makes_model=True, evaluable="sparsify"),
    StageInfo("quantize", Quantize, makes_model=True, evaluable="quantize"),
    StageInfo("finetune", Finetune, makes_model=False, evaluable="finetune:NAME"),
    StageInfo("search", Search, makes_model=False, evaluable="search"),
    StageInfo("merge", Merge, makes_model=True, evaluable="merge"),
    StageInfo("export", Export, makes_model=True, evaluable=None),
    StageInfo("evaluate", Evaluate, makes_model=False, evaluable=None),
)
"""Every stage, in order."""
EVALUABLE = ("model", *(stage.evaluable for stage in STAGES if stage.evaluable))
"""What `evaluate.of` may name: "model" is the recipe's own, NAME a searcher that needs no evaluation."""
