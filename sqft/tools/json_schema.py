"""The JSON Schemas of recipes and sweeps, composed from what is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sqft.components.registration import Registration
from sqft.components.registry import Registry
from sqft.recipe.fields import fields_of, section_in
from sqft.recipe.recipe import Recipe
from sqft.recipe.sections import ComponentRef
from sqft.recipe.stages import STAGES
from sqft.tools.sweep.definition import NOT_SET, RECIPE, Sweep

PLACES = {
    name: (stage.section.__name__, name)
    for stage in STAGES
    for name, field in fields_of(stage.section).items()
    if section_in(field) is ComponentRef
}
"""Where in the recipe a component of each kind is named: a section's definition and its key, which is the kind."""


def recipe_schema(registry: Registry) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe with the installed components' options."""
    schema = Recipe.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["$schema"] = {"type": "string", "description": "path of this schema, for editors"}
    for kind, (section, key) in PLACES.items():
        entries = [registration for registration in registry.entries() if registration.component.kind == kind]
        names = {name for registration in entries for name in _names(registration)}
        choices: list[dict[str, Any]] = [{"enum": sorted(names)}]
        for registration in entries:
            options, definitions = _options(registration)
            schema["$defs"] |= definitions
            choices.append(
                {
                    "type": "object",
                    "properties": {"name": {"enum": _names(registration)}, "options": options},
                    "required": ["name"],
                    "additionalProperties": False,
                    "description": (registration.component.__doc__ or "").strip(),
                }
            )
        place = schema["$defs"][section]["properties"][key]
        if "default" in place and place["default"] is None:
            choices.append({"type": "null"})
        kept = {word: place[word] for word in ("default", "description") if word in place}
        schema["$defs"][section]["properties"][key] = {"anyOf": choices, **kept}
    return schema


def sweep_schema(registry: Registry) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a sweep's file: settings and axes with the recipe's values at each place.

    Places inside a component's options, or in a list, are allowed, with any value.
    """
    recipe, schema = recipe_schema(registry), Sweep.model_json_schema(by_alias=True)
    schema["$schema"] = recipe.pop("$schema")
    known = schema["$defs"] = recipe.pop("$defs") | {"Recipe": recipe}
    values = {place: {"$ref": f"#/$defs/{target}"} for place, target in _places(recipe, known)}
    start = {"type": "string", "description": "recipe file to begin from"}
    known["Settings"] = {"type": "object", "properties": {**values, RECIPE: start}}
    known["Labels"] = {"type": "object", "minProperties": 1, "additionalProperties": {"$ref": "#/$defs/Settings"}}

    def axis(value: dict[str, Any]) -> dict[str, Any]:
        listed = {"type": "array", "minItems": 1, "uniqueItems": True, "items": value}
        return {"anyOf": [listed, {"$ref": "#/$defs/Labels"}]}

    schema["properties"]["set"] |= {"properties": values}
    axes = {place: axis(value) for place, value in values.items()}
    schema["properties"]["axes"] |= {"properties": axes, "additionalProperties": axis({})}
    return schema


def _places(recipe: dict[str, Any], definitions: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each place in a recipe that a sweep may set, of sections and their keys, and where its schema is."""
    for name, words in recipe["properties"].items():
        if name not in (*NOT_SET, "schema", "$schema"):
            yield name, f"Recipe/properties/{name}"
            for word in (words, *words.get("anyOf", ())):
                section = word.get("$ref", "").rpartition("/")[2]
                for key in definitions.get(section, {}).get("properties", ()):
                    yield f"{name}.{key}", f"{section}/properties/{key}"


def _names(registration: Registration) -> list[str]:
    """Return the names of a component: alone, and with its plugin's name."""
    return [registration.component.name, f"{registration.provider.plugin}/{registration.component.name}"]


def _options(registration: Registration) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the schema of a component's options and the definitions it refers to, under names that are unique."""
    prefix = f"{registration.provider.plugin}.{registration.component.kind}.{registration.component.name}"
    schema = registration.component.model_json_schema(ref_template=f"#/$defs/{prefix}.{{model}}")
    schema.pop("description", None)
    definitions = schema.pop("$defs", {})
    return schema, {f"{prefix}.{name}": definition for name, definition in definitions.items()}


def choices_by_place(registry: Registry) -> dict[str, list[str]]:
    """Return every place in a recipe that `--set` can name, each with its values as JSON or text if they are few."""
    schema = recipe_schema(registry)
    found: dict[str, list[str]] = {}
    for name, words in schema["properties"].items():
        if name not in ("schema", "$schema"):
            _collect_choices(name, words, schema["$defs"], found)
    return found


def _collect_choices(place: str, words: dict[str, Any], known: dict[str, Any], found: dict[str, list[str]]) -> None:
    """Collect the values of a place, and all places below it that have a name."""
    words = known.get(words.get("$ref", "").rpartition("/")[2], words)
    of_type: dict[str, list[Any]] = {"boolean": [True, False], "null": [None]}
    few = [words["const"]] if "const" in words else words.get("enum") or of_type.get(words.get("type", ""), [])
    values = [value if isinstance(value, str) else json.dumps(value) for value in few]
    found[place] = list(dict.fromkeys([*found.get(place, ()), *values]))
    for choice in (*words.get("anyOf", ()), *words.get("oneOf", ())):
        _collect_choices(place, choice, known, found)
    for name, inner in words.get("properties", {}).items():
        _collect_choices(f"{place}.{name}", inner, known, found)
