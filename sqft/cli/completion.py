"""What shells complete: runs, components, stages, and the settings of a recipe. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class


def complete_run(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a run: the names in the store, or else a path."""
    return _folders(context, incomplete, "runs/*/recipe.json")


def complete_run_or_sweep(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a run or a sweep: the names in the store, or else a path."""
    return _folders(context, incomplete, "runs/*/recipe.json", "sweeps/*/results.json")


def complete_kind(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete a kind of component."""
    from sqft.components.kinds import KINDS

    return _begun(KINDS, incomplete)


def complete_name(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a component of the kind that precedes it."""
    return _begun(_components(context.params.get("kind") or ""), incomplete)


def complete_searcher(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a searcher."""
    return _begun(_components("searcher"), incomplete)


def complete_stage(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete a stage: those of the recipe, if it can be read."""
    from sqft.recipe.stages import STAGES

    asked = _recipe(context)
    return _begun([stage.name for stage in STAGES if not asked or stage.name in asked], incomplete)


def complete_evaluable(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete what can be measured, as `evaluate.of` names it."""
    from sqft.recipe.stages import EVALUABLE

    names = [f"finetune:{name}" for name in _components("searcher", evaluates=False)]
    return _begun([*(name for name in EVALUABLE if "NAME" not in name), *names], incomplete)


def complete_data(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete a section of the recipe, or a place in it, where data are read."""
    from sqft.errors import RecipeError
    from sqft.recipe.recipe import Recipe
    from sqft.recipe.rerun import paths

    try:
        read = paths(Recipe.load(_recipe_file(context)))
    except RecipeError:
        return []
    places = [place.removesuffix(".path").removesuffix(".text") for place in read if place.endswith((".path", ".text"))]
    places = [place.replace("exact_match.data", "exact_match") for place in places]
    return _begun(sorted({*places, *(place.partition(".")[0] for place in places)}), incomplete)


def complete_setting(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete the path of a setting in a recipe; after "=", its values if there are only some."""
    from sqft.components.registry import Registry
    from sqft.tools.json_schema import choices_by_place

    path, equals, value = incomplete.partition("=")
    choices = choices_by_place(Registry.discover())
    if not equals:
        return [f"{place}=" for place in _begun(choices, path)]
    plain = [choice for choice in choices.get(path, ()) if "/" in value or "/" not in choice]
    return [f"{path}={choice}" for choice in _begun(plain, value)]


def _folders(context: click.Context, incomplete: str, *files: str) -> list[CompletionItem]:
    """Return the names of those folders in the store that hold such files; where there are none, paths."""
    store = Path(context.params.get("store") or "store")
    names = _begun(sorted({file.parent.name for pattern in files for file in store.glob(pattern)}), incomplete)
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


def _begun(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _components(kind: str, evaluates: bool | None = None) -> list[str]:
    """Return the names of the components of a kind; of searchers also only those that do, or do not, evaluate."""
    from sqft.components.registry import Registry

    found = [registration.component for registration in Registry.discover().entries()]
    return [
        component.name
        for component in found
        if component.kind == kind and evaluates in (None, getattr(component, "evaluates", None))
    ]


def _recipe(context: click.Context) -> dict[str, object]:
    """Return the recipe that precedes, as plain data; nothing if it cannot be read."""
    from sqft.errors import RecipeError
    from sqft.recipe.reading import read_json

    try:
        raw = read_json(_recipe_file(context))
    except RecipeError:
        return {}
    return raw if isinstance(raw, dict) else {}


def _recipe_file(context: click.Context) -> Path:
    """Return the recipe that precedes; click leaves it among the arguments when the last option has no value yet."""
    return Path(context.params.get("recipe") or next(iter(context.args), ""))


class BashWords(BashComplete):
    """Completion in bash, which takes "=" and ":" for words of their own: "a.b=c" arrives as "a.b = c"."""

    source_template = BashComplete.source_template.replace(
        "COMPREPLY+=($value)", 'COMPREPLY+=("$value"); [[ $value == *= ]] && compopt -o nospace'
    )

    head = ""
    """What bash has taken off the word to complete."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one to complete, and that one, each in one piece."""
        before, begun = super().get_completion_args()
        joined = "\n".join([*before, begun])
        for sign in "=:":
            joined = joined.replace(f"\n{sign}\n", sign).replace(f"\n{sign}", sign)
        *before, begun = joined.split("\n")
        self.head = begun[: max(begun.rfind("="), begun.rfind(":")) + 1]
        return before, begun

    def format_completion(self, item: CompletionItem) -> str:
        """Return only what bash puts in place of its last word."""
        return super().format_completion(CompletionItem(item.value.removeprefix(self.head), item.type))


add_completion_class(BashWords)
