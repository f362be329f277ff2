"""What the sections of a recipe are made of, and what a field says about itself.

A field says once, as `Annotated` metadata, what it is: a path that is read (`sqft.types.InputPath`) or written, a
setting without effect on results, a section with a short form. Whatever depends on that asks here: re-running a stored
recipe, the fingerprint, `sqft init`, `--set` and the files of a plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError

from sqft.types import InputPath
from sqft.utils.annotations import parts_of

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What names a folder of the store."""


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class OutputPath:
    """Marks the path of a folder that a step writes to, besides its artifact. No part of a fingerprint."""


@dataclass(frozen=True)
class NoEffect:
    """Marks a setting that changes no step's result, such as how often it is saved. No part of a fingerprint."""


@dataclass(frozen=True)
class ShortForm:
    """Marks a section that may be written as the text of one of its fields: "wanda" for {"name": "wanda"}."""

    field: str

    def expand(self, value: Any) -> Any:
        """Return the section that a text is short for; anything else as it is."""
        return {self.field: value} if isinstance(value, str) else value

    def _validated(self, value: Any) -> Any:
        if not isinstance(value, str | Mapping | BaseModel):
            raise PydanticCustomError("short_form", "Input should be a text or an object")
        return self.expand(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        validator = BeforeValidator(self._validated, json_schema_input_type=str | source)
        return validator.__get_pydantic_core_schema__(source, handler)


def one_or_several(value: Any) -> str:
    """Return the tag of a field's type: "@several" for a list, else "@one".

    Tags are not part of a path in the recipe: `diagnostics` removes them.
    """
    return "@several" if isinstance(value, list | tuple) else "@one"


M = TypeVar("M")


@dataclass(frozen=True)
class Marked(Generic[M]):
    """A marked field in plain data: `holder[key]` is its value, `place` where that is in the recipe."""

    place: tuple[str, ...]
    marker: M
    holder: Any
    key: Any

    @property
    def value(self) -> Any:
        return self.holder[self.key]


def fields_marked(
    model: type[BaseModel], marker: type[M] | tuple[type[M], ...], content: Any, place: Sequence[str] = ()
) -> Iterator[Marked[M]]:
    """Walk plain data and the sections that describe it, and yield each value whose field carries a marker.

    Args:
        model: the recipe, or one of its sections, whose fields are marked.
        marker: the type of marker to look for, or several.
        content: plain data of that model, in short forms or complete; what does not fit the model is skipped.
        place: where `content` is in the recipe.
    """
    for key, field in fields_of(model).items() if isinstance(content, dict) else ():
        if key in content:
            marks = _marks(field, marker, content[key])
            found = [Marked((*place, key), mark, content, key) for mark in marks]
            yield from found or _marked_below(field, marker, content, key, (*place, key))


def _marks(field: FieldInfo, marker: type[M] | tuple[type[M], ...], value: Any) -> list[M]:
    """Return the markers of a field that hold for its value: a word in place of a path is none."""
    found = [mark for mark in field.metadata if isinstance(mark, marker)]
    return [mark for mark in found if not (isinstance(mark, InputPath) and value in mark.words)]


def _marked_below(
    field: FieldInfo, marker: type[M] | tuple[type[M], ...], holder: Any, key: Any, place: tuple[str, ...]
) -> Iterator[Marked[M]]:
    """Yield the marked values inside a field: those of each item of a list, or the text of a short form.

    Args:
        field: describes the value.
        marker: the type of marker to look for, or several.
        holder: the object or list that holds the value.
        key: of the value in `holder`.
        place: where the value is in the recipe.
    """
    section, short, value = section_in(field), short_form_of(field), holder[key]
    if isinstance(value, list | tuple):
        for index in range(len(value)):
            yield from _marked_below(field, marker, value, index, (*place, str(index)))
    elif section and isinstance(value, str) and short:
        marks = _marks(section.model_fields[short.field], marker, value)
        yield from (Marked(place, mark, holder, key) for mark in marks)
    elif section:
        yield from fields_marked(section, marker, value, place)


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return a model's fields by the keys that a recipe uses."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def section_in(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a field holds, alone, in a list or as one of several types."""
    return next(
        (part for part in parts_of(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel)), None
    )


def short_form_of(field: FieldInfo) -> ShortForm | None:
    """Return the short form that a field's section may be written in."""
    parts = (*field.metadata, *parts_of(field.annotation))
    return next((part for part in parts if isinstance(part, ShortForm)), None)
