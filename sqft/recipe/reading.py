"""A recipe file as plain data, before anything is made of it: strict JSON, and the changes of `--set`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sqft.errors import Problem, RecipeError
from sqft.recipe.fields import fields_of, section_in, short_form_of

DIGITS = 1000
"""Of the longest integer that is read: Python makes none of more than some thousands."""

NOWHERE = "there is no such path in the recipe"


def read_json(path: Path) -> Any:
    """Read a JSON file strictly: no duplicate keys, no NaN.

    Raises:
        RecipeError: naming the file and the place in it.
    """
    try:
        return _strictly(path.read_text("utf-8-sig"))
    except OSError as error:
        raise RecipeError([Problem("", f"cannot be read: {error.strerror}")], str(path)) from None
    except UnicodeDecodeError:
        raise RecipeError([Problem("", "is not UTF-8 text; save it as UTF-8")], str(path)) from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        hint = "; recipes are JSON, and YAML is not read" if path.suffix in (".yaml", ".yml") else ""
        raise RecipeError([Problem(place, f"not valid JSON: {error.msg}{hint}")], str(path)) from None
    except ValueError as error:
        raise RecipeError([Problem("", str(error))], str(path)) from None
    except RecursionError:
        raise RecipeError([Problem("", "nested too deeply to be a recipe")], str(path)) from None


def _strictly(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_int=_of_some_digits)


def _of_some_digits(word: str) -> int:
    if len(word) > DIGITS:
        raise ValueError(f"{word[:10]}… is a number of {len(word)} digits; write one of at most {DIGITS}")
    return int(word)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"the key '{key}' appears twice in one object; keep one")
        seen[key] = value
    return seen


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a valid JSON number; write a finite number")


def checked_object(raw: object, source: str) -> dict[str, Any]:
    """Return plain data that must be an object, as a recipe or a sweep is.

    Raises:
        RecipeError: when it is something else.
    """
    if not isinstance(raw, dict):
        raise RecipeError([Problem("", f"expected a JSON object, found {type(raw).__name__}")], source)
    return raw


def apply(raw: Any, change: str, source: str, model: type[BaseModel]) -> None:
    """Make one change "path=value" of `--set` in plain data; the value is JSON, or else text.

    Sections on the way that are written in their short form are expanded, as `model` describes them.

    Raises:
        RecipeError: when it is not of that form, or leads to no place in the recipe.
    """
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise RecipeError([Problem("", f"--set takes path=value, found {change!r}")], source)
    try:
        value = _strictly(text)
    except (ValueError, RecursionError):
        value = text
    *parents, last = path.split(".")
    here = raw
    section: type[BaseModel] | None = model
    field: FieldInfo | None = None
    for depth, part in enumerate(parents):
        try:
            if isinstance(here, list):
                key: Any = int(part)
            else:
                key, field = part, fields_of(section).get(part) if section else None
                section = section_in(field) if field else None
                here.setdefault(part, {})
            if field and (short := short_form_of(field)):
                here[key] = short.expand(here[key])
            here = here[key]
        except (AttributeError, IndexError, ValueError):
            where = ".".join(parents[: depth + 1])
            raise RecipeError([Problem(where, f"{NOWHERE}, to set {change}")], source) from None
    if isinstance(here, list) and last.isdecimal() and int(last) < len(here):
        here[int(last)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise RecipeError([Problem(path, f"{NOWHERE}, to set {change}")], source)
