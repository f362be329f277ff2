"""Make a plan: resolve a recipe against what is installed into steps, or report every mistake at once.

No torch: everything that can be checked without loading a model is checked here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

from sqft.components.registry import Registry
from sqft.errors import Problem, RecipeError
from sqft.planning import layout_checks
from sqft.planning.adapter_base import AdapterBase
from sqft.planning.fingerprint import fingerprint_of, measurement_fingerprints
from sqft.planning.plan import Plan, Step
from sqft.planning.resolution import Describe, Resolver
from sqft.planning.steps import (
    plan_evaluate,
    plan_export,
    plan_finetune,
    plan_merge,
    plan_quantize,
    plan_search,
    plan_sparsify,
)
from sqft.recipe.recipe import Recipe
from sqft.recipe.sections import Search
from sqft.types import BaseKind
from sqft.utils.digests import Digests


def make_plan(recipe: Recipe, registry: Registry, digests: Digests, describe: Describe) -> Plan:
    """Resolve a recipe against what is installed.

    Args:
        recipe: what the user wants.
        registry: what is installed.
        digests: computes, and remembers, digests of files.
        describe: tells what the modules of a model are; planning loads none.

    Raises:
        RecipeError: with every mistake at once, each with its path in the file.
    """
    resolver = Resolver(recipe, registry, digests, describe)
    recipe = resolver.recipe
    base = adapter_base(resolver)
    steps = plan_steps(resolver, base)
    if resolver.problems:
        broken = [Problem("", line.strip()) for line in resolver.broken]
        raise RecipeError([*resolver.problems, *broken], recipe.source)
    for note in layout_checks.notes(resolver.model.layout) if any(step.layers for step in steps) else ():
        resolver.note("model", note)
    steps_done = with_fingerprints(steps, recipe, resolver.model.digest, digests)
    recipe = with_option_paths(recipe, resolver.option_paths)
    taught = recipe.finetune and recipe.finetune.teacher
    teacher = resolver.teacher(taught, "finetune.teacher") if taught else None
    return Plan(recipe, resolver.model, base, steps_done, taught_by=teacher, notes=tuple(resolver.notes))


def with_option_paths(recipe: Recipe, paths: Mapping[str, str]) -> Recipe:
    """Return a recipe with these values of components' options, by place, so that it can be stored anywhere: which
    options name files, only the components know."""
    changes = [f"{place}={json.dumps(path)}" for place, path in paths.items()]
    return with_changes(recipe, changes) if changes else recipe


def with_changes(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """Return a recipe after changes "path=value". Raises `RecipeError`, as `Recipe.changed` does."""
    raw = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return Recipe.changed(raw, changes, recipe.folder, recipe.source)


def adapter_base(resolver: Resolver) -> AdapterBase:
    """Decide what lies under the adapters of a recipe, or would if it trained any."""
    recipe, model = resolver.recipe, resolver.model
    kind: BaseKind | None = BaseKind.SPARSE if recipe.sparsify else BaseKind.DENSE
    if recipe.quantize or model.quantization is not None:
        kind = BaseKind.QUANTIZED
    elif not resolver.has_model:
        kind = None
    sparse = "sparsify" if recipe.sparsify else None
    if recipe.quantize:
        return AdapterBase(kind, model.path, "quantize", floats_step=sparse)
    return AdapterBase(kind, model.path, sparse)


def plan_steps(resolver: Resolver, base: AdapterBase) -> list[Step]:
    """Plan every section of a recipe, in the order of the stages, and collect what is wrong with it."""
    recipe = resolver.recipe
    steps: dict[str, Step] = {}

    def add(new: Iterable[Step | None]) -> None:
        steps.update({step.name: step for step in new if step is not None})

    if resolver.model.quantization is not None:
        for name in _present(recipe, "sparsify", "quantize"):
            resolver.report(
                name, "the model is already quantized; remove this section, or name the float model it was made of"
            )
    if recipe.sparsify:
        add([plan_sparsify(recipe.sparsify, resolver)])
    if recipe.quantize:
        add([plan_quantize(recipe.quantize, resolver)])
    if recipe.finetune:
        add([plan_finetune(recipe.finetune, resolver, base, steps)])
        add([plan_search(recipe.search or Search.model_validate({}), resolver, base, steps)])
        add([plan_merge(recipe.merge, resolver, base, steps)] if recipe.merge else [])
    else:
        for name in _present(recipe, "search", "merge"):
            resolver.report(name, "needs a finetune section; add one or remove this")
    add(plan_export(recipe.export, resolver, base, steps))
    if recipe.evaluate:
        add(plan_evaluate(recipe.evaluate, resolver, base, steps))
    if not (steps or resolver.problems):
        resolver.report("", "asks for nothing; add a section such as sparsify, finetune or evaluate")
    return list(steps.values())


def _present(recipe: Recipe, *names: str) -> list[str]:
    return [name for name in names if getattr(recipe, name) is not None]


def with_fingerprints(steps: Iterable[Step], recipe: Recipe, model: str, digests: Digests) -> tuple[Step, ...]:
    """Return the steps of a recipe without mistakes, in order, with their files' digests and their fingerprints.

    Args:
        steps: each after those that it reads.
        recipe: the recipe.
        model: digest of the recipe's own model.
        digests: takes those of files and folders.
    """
    done: dict[str, Step] = {}
    for step in steps:
        files = {**step.files, **step.files_of_options()}
        taken = {role: digests.path(path) for role, path in files.items()}
        step = dataclasses.replace(step, files=files, digests=taken)
        measured = measurement_fingerprints(step, recipe, model, done)
        fingerprint = fingerprint_of(step, recipe, model, done)
        done[step.name] = dataclasses.replace(step, fingerprint=fingerprint, measurements=measured)
    return tuple(done.values())
