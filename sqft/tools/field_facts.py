"""What the fields of a section, or the options of a component, take: type, limits and default, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_json

from sqft.recipe.fields import fields_of, short_form_of

TYPES = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "`null`"}
LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
    "multipleOf": "a multiple of",
    "minLength": "of a length of at least",
    "maxLength": "of a length of at most",
    "pattern": "of the form",
}


@dataclass(frozen=True)
class FieldFacts:
    """One field; literal values are in backticks."""

    name: str
    takes: str
    """Type and limits: "whole number, at least 1"."""
    default: str
    """"required", or "default `3`"."""
    description: str

    def __str__(self) -> str:
        facts = f"{self.takes}; {self.default}".replace("`", "")
        return f"{self.name}: {facts}" + (f"; {self.description}" if self.description else "")


def field_facts(model: type[BaseModel]) -> Iterator[FieldFacts]:
    """Yield the facts of each field, from the JSON Schema that pydantic makes of the model."""
    schema = model.model_json_schema(by_alias=True)
    definitions, required = schema.get("$defs", {}), schema.get("required", ())
    for name, field in fields_of(model).items():
        words = schema["properties"][name]
        if name in required:
            default = "required"
        else:
            value = words.get("default", json.loads(to_json(field.get_default(call_default_factory=True))))
            default = f"default {_literal(_shortened(value, field))}"
        yield FieldFacts(name, takes(words, definitions), default, words.get("description", ""))


def _shortened(value: Any, field: FieldInfo) -> Any:
    """Return a value in its short form, if that says it all."""
    short = short_form_of(field)
    if short and isinstance(value, dict) and not any(value[key] for key in value.keys() - {short.field}):
        return value[short.field]
    return value


def takes(words: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return the type and the limits of a value, from its schema."""
    words = _resolved(words, definitions)
    if "enum" in words:
        return "one of " + ", ".join(map(_literal, words["enum"]))
    if "const" in words:
        return _literal(words["const"])
    if choices := words.get("anyOf") or words.get("oneOf"):
        return ", or ".join(_choices(choices, definitions))
    limits = [f"{said} {_limit(words[word])}" for word, said in LIMITS.items() if word in words]
    return ", ".join([_type(words, definitions), *limits])


def _choices(choices: list[dict[str, Any]], definitions: dict[str, Any]) -> Iterator[str]:
    """Yield each of several types; a list of one that precedes is a list of these."""
    for choice in choices:
        if choice.get("items") in choices:
            yield "list of these" + _size(choice)
        else:
            yield takes(choice, definitions)


def _type(words: dict[str, Any], definitions: dict[str, Any]) -> str:
    if words.get("type") == "array" and "prefixItems" in words:
        return f"list ({'; '.join(takes(item, definitions) for item in words['prefixItems'])})"
    if words.get("type") == "array":
        items = f" (each item: {takes(words['items'], definitions)})" if words.get("items") else ""
        return f"list{items}{_size(words)}"
    if words.get("type") == "object":
        values = words.get("additionalProperties")
        return f"object (each value: {takes(values, definitions)})" if isinstance(values, dict) else "object"
    return TYPES.get(words.get("type", ""), "any value")


def _size(words: dict[str, Any]) -> str:
    least, most = words.get("minItems", 0), words.get("maxItems")
    if most is not None:
        return f", of {least} to {most} items"
    return f", of at least {least} items" if least > 1 else ", not empty" if least else ""


def _limit(value: Any) -> str:
    return _literal(value) if isinstance(value, str) else f"{value:.15g}"


def _literal(value: Any) -> str:
    """Return a value as JSON, in backticks."""
    return "`" + (f"{value:.15g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)) + "`"


def _resolved(words: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with its `$ref` replaced by the definition; the schema's own keywords take precedence."""
    target = words.get("$ref", "").rpartition("/")[2]
    return {**definitions.get(target, {}), **words}
