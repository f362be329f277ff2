"""The JSON Schema of a recipe, composed from what is installed, and one component's options as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sqft.contracts import Component
from sqft.recipe import Recipe
from sqft.registry import Registry

PLACES = {
    "scorer": ("Sparsify", "scorer"),
    "allocator": ("Sparsify", "allocator"),
    "quantizer": ("Quantize", "quantizer"),
    "adapter": ("Finetune", "adapter"),
    "merger": ("Finetune", "merger"),
    "searcher": ("Search", "searcher"),
    "exporter": ("Export", "exporter"),
}
"""Where in the recipe a component of each kind is named: a section's definition and its key."""


def recipe_schema(registry: Registry) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe with the installed components' options."""
    schema = Recipe.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for kind, (section, key) in PLACES.items():
        components = [entry.component for entry in registry.entries() if entry.component.kind == kind]
        choices: list[dict[str, Any]] = [{"enum": sorted(c.name for c in components)}]
        for component in components:
            choices.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": component.name}, "options": _options(component)},
                    "required": ["name"],
                    "additionalProperties": False,
                    "description": (component.__doc__ or "").strip(),
                }
            )
        place = schema["$defs"][section]["properties"][key]
        kept = {word: place[word] for word in ("default", "description") if word in place}
        schema["$defs"][section]["properties"][key] = {"anyOf": choices, **kept}
    return schema


def _options(component: type[Component]) -> dict[str, Any]:
    schema = component.model_json_schema()
    schema.pop("description", None)
    return schema


def option_lines(component: type[Component]) -> Iterator[str]:
    """Each option with its type, range, default and description."""
    for name, words in component.model_json_schema().get("properties", {}).items():
        limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
        ranges = [f"{sign} {words[word]}" for word, sign in limits.items() if word in words]
        kind = words.get("type") or " or ".join(str(w.get("type", w.get("const"))) for w in words.get("anyOf", ()))
        if "enum" in words:
            kind = "one of " + ", ".join(map(json.dumps, words["enum"]))
        default = f"default {json.dumps(words['default'])}" if "default" in words else "required"
        yield ", ".join(filter(None, [f"{name}: {kind}", *ranges, default, words.get("description", "")]))
