"""Options of components that name files."""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from sqft.components.kinds import Component
from sqft.types import InputPath
from sqft.utils.annotations import parts_of


def path_marks(component: type[Component]) -> dict[str, InputPath]:
    """Return the marks of the options that may name files, by option."""
    fields = component.model_fields.items()
    parts = ((name, part) for name, field in fields for part in (*field.metadata, *parts_of(field.annotation)))
    return {name: part for name, part in parts if isinstance(part, InputPath)}


def input_paths(component: Component) -> dict[str, InputPath]:
    """Return the marks of the options that do name files: one that is None, or a word of its mark, does not."""
    marks = path_marks(type(component)).items()
    return {name: mark for name, mark in marks if getattr(component, name) not in (None, *mark.words)}


def path_mistake(component: type[Component]) -> str | None:
    """Return what keeps an option from naming a file as its mark says, or None when nothing does."""
    for name, mark in path_marks(component).items():
        field = component.model_fields[name]
        if not _is_path(field.annotation):
            return f"whose option '{name}' names a file and is not str, Path or None"
        if mark.hub:
            return f"whose option '{name}' may be a Hugging Face id, which no option can be; leave out `hub`"
        if field.alias or field.validation_alias:
            return f"whose option '{name}' names a file and has an alias; name the field itself as recipes write it"
    return None


def _is_path(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return all(map(_is_path, get_args(annotation)))
    return (get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation) in (str, Path, NoneType)
