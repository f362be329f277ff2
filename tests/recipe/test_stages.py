"""The table of stages against what it describes: the recipe's sections, the stages themselves, and `evaluate.of`."""

from __future__ import annotations

from sqft import Recipe
from sqft.recipe.fields import fields_of, section_in
from sqft.recipe.sections import Evaluate
from sqft.recipe.stages import EVALUABLE, STAGES
from sqft.stages.stage import MAKERS


def test_every_stage_has_a_section_of_the_recipe_and_one_that_runs_it() -> None:
    names = [stage.name for stage in STAGES]
    assert names == [name for name in Recipe.model_fields if name in names] == list(MAKERS)
    assert all(section_in(fields_of(Recipe)[stage.name]) is stage.section for stage in STAGES)


def test_what_can_be_evaluated_is_what_the_recipe_says() -> None:
    described = Evaluate.model_fields["of"].description or ""
    assert all(f'"{name}"' in described for name in EVALUABLE)
    assert described.count('"') == 2 * len(EVALUABLE)
    assert EVALUABLE == ("model", "sparsify", "quantize", "finetune:NAME", "search", "merge")
