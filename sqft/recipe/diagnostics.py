"""What pydantic found wrong, as people read it; and the recipe without it, so that a plan can find the rest."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sqft.errors import Problem
from sqft.recipe.fields import fields_of, section_in
from sqft.utils.text import brief

M = TypeVar("M", bound=BaseModel)
Place = tuple[str | int, ...]
PLACEHOLDER = "placeholder"
ROUNDS = 8
ELSEWHERE = {
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "lr_scheduler_type": "schedule",
    "optim": "optimizer",
    "target_modules": "targets",
    "lora_target_modules": "targets",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "excess_length_strategy": "truncation",
    "truncation_mode": "truncation",
    "truncation_side": "truncation",
    "model_name_or_path": "path",
}
"""What other programs call some of the keys here."""


def problems_of(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[Problem]:
    """Turn pydantic's errors into problems: a dotted path and a sentence, with a suggestion for an unknown key."""
    problems = []
    for item in error.errors(include_url=False):
        where = _place(item)
        place = ".".join(filter(None, [prefix, *map(str, where)]))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = _unknown_key(str(where[-1]), _keys_at(model, where[:-1]))
        elif item["type"] == "missing":
            message = "is missing"
        elif item["type"] in ("tuple_type", "list_type"):
            message = f"input should be a list, found {brief(item['input'])}"
            message += '; ["*"] is all of them' if item["input"] == "all-linear" else ""
        elif item["type"] not in ("value_error",):
            message = f"{message[0].lower()}{message[1:]}, found {brief(item['input'])}"
        if item["type"] == "literal_error":
            message += _near(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))
        problems.append(Problem(place, message))
    return problems


def _place(item: Any) -> Place:
    """Return the path of a mistake as a user knows it: pydantic's without the tags of a union ("@one")."""
    return tuple(part for part in item["loc"] if not str(part).startswith("@"))


def _unknown_key(key: str, known: list[str]) -> str:
    message = f"unknown key; known here: {', '.join(known) or 'none'}."
    close = [ELSEWHERE[key]] if ELSEWHERE.get(key) in known else difflib.get_close_matches(key, known, n=1)
    return f"{message} Did you mean '{close[0]}'?" if close else message


def _near(value: Any, known: list[str]) -> str:
    """Return a question for the known values that are most like this one; nothing when none is."""
    close = difflib.get_close_matches(value, known, n=2, cutoff=0.5) if isinstance(value, str) else []
    return f". Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _keys_at(model: type[BaseModel], place: Sequence[str | int]) -> list[str]:
    """Return the keys of the model that is nested at a path inside another."""
    for part in place:
        if isinstance(part, int):
            continue
        field = fields_of(model).get(part)
        inner = section_in(field) if field else None
        if inner is None:
            return []
        model = inner
    return list(fields_of(model))


def related(place: str, other: str) -> bool:
    """Return whether two paths of a recipe are the same, or one is inside the other."""
    return f"{place}.".startswith(f"{other}.") or f"{other}.".startswith(f"{place}.")


def without_mistakes(model: type[M], raw: Any) -> M | None:
    """Return the model of `raw` without its invalid values; None when too little is left.

    An invalid value is replaced by its default, a missing one by a placeholder. Ignore what a plan of this model
    reports about those paths (see `related`); what it reports about all others is valid.
    """
    raw = copy.deepcopy(raw)
    for _ in range(ROUNDS):  # a value that was removed may be a required one
        try:
            return model.model_validate(raw)
        except ValidationError as error:
            # The last first: removing an item of a list moves those after it.
            wrong = sorted(error.errors(), key=_position, reverse=True)
            if not all(_take_out(raw, _place(item), item["type"]) for item in wrong):
                return None
    return None


def _position(item: Any) -> list[tuple[bool, str | int]]:
    return [(isinstance(part, int), part) for part in _place(item)]


def _take_out(raw: Any, place: Place, mistake: str) -> bool:
    """Remove one invalid value; return False if that would remove a section, which the other sections depend on."""
    if len(place) == 1 and mistake == "missing":
        raw[place[0]] = {"path": PLACEHOLDER} if place[0] == "model" else PLACEHOLDER
        return True
    if len(place) == 1 and mistake == "model_type":
        return False
    *parents, last = place
    here = raw
    for part in parents:
        inner = here.get(part) if isinstance(here, dict) else here[part] if part in range(len(here)) else None
        if not isinstance(inner, dict | list):  # a short form, as "wanda" for {"name": "wanda"}: the text is invalid
            last = part
            break
        here = inner
    if mistake == "missing" and isinstance(here, dict):
        here[last] = PLACEHOLDER
    elif isinstance(here, dict):
        here.pop(last, None)
    elif isinstance(last, int) and last < len(here):
        del here[last]
    return True
