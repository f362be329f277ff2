"""The schema a plugin's options make: what they refer to is there, under names of their own."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel
from sqft_wanda import Wanda

from sqft import Registry
from sqft.tools.json_schema import recipe_schema, sweep_schema


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Inner(BaseModel):
    depth: int = 3


class Nested(Wanda):
    """Options of every sort."""

    name = "nested"
    color: Color = Color.RED
    inner: Inner = Inner()
    way: Literal["up"] = "up"
    maybe: int | None = None


class Other(Wanda):
    """Another class called Color, with other values."""

    name = "other"

    class Color(Enum):
        GREEN = "green"

    color: Color = Color.GREEN


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if "$ref" in value else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_everything_referred_to_is_there() -> None:
    registry = Registry.discover()
    registry.add(Nested)
    registry.add(Other)
    schema = recipe_schema(registry)
    known = {f"#/$defs/{name}" for name in schema["$defs"]}
    assert references(schema) <= known and any("nested.Color" in name for name in known)
    text = json.dumps(schema)
    assert '"blue"' in text and '"green"' in text and '"Nested/nested"' in text
    assert "$schema" in schema["properties"]
    places = schema["$defs"]["Sparsify"]["properties"]
    assert {"type": "null"} in places["updater"]["anyOf"] and {"type": "null"} not in places["scorer"]["anyOf"]


def test_a_sweeps_values_are_those_of_the_recipe() -> None:
    """At each place that it sets, alone, as an axis, and under a label."""
    schema = sweep_schema(Registry.discover())
    known = schema["$defs"]

    def found(pointer: str) -> Any:
        value: Any = schema
        for word in pointer.removeprefix("#/").split("/"):
            value = value[word]
        return value

    assert all(found(pointer) is not None for pointer in references(schema))
    places = schema["properties"]["set"]["properties"]
    assert {"seed", "merge", "evaluate", "finetune.adapter", "model.path"} <= places.keys()
    assert not {"name", "recipe", "schema", "$schema"} & places.keys()
    assert found(places["finetune.adapter"]["$ref"]) == known["Finetune"]["properties"]["adapter"]
    assert found(places["seed"]["$ref"])["minimum"] == 0
    assert known["Settings"]["properties"] == {**places, "recipe": known["Settings"]["properties"]["recipe"]}
    axes = schema["properties"]["axes"]
    for place, value in places.items():
        assert axes["properties"][place]["anyOf"][0]["items"] == value
    assert axes["additionalProperties"]["anyOf"][0]["items"] == {}
