"""The rules that a component class must keep to be registered."""

from __future__ import annotations

import inspect
import re
from typing import Any

from sqft.components.kinds import KINDS
from sqft.types import BaseKind, Statistic

NAME = re.compile(r"[a-z][a-z0-9-]*")


def component_mistake(kind: str, hook: str, component: Any) -> str | None:
    """What keeps this object from being a component of that kind, or None."""
    base = KINDS[kind]
    label = getattr(component, "__name__", repr(component))
    if not inspect.isclass(component) or not issubclass(component, base):
        return f"offers {label!r} through {hook}, which takes classes derived from {base.__name__}"
    name = getattr(component, "name", None)
    if "name" in component.model_fields:
        return f'offers {label}, whose name is a field; write name = "…" without an annotation'
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return f"offers {label}, whose name is {name!r}; a name is lower-case letters, digits and dashes"
    abstract = [verb for verb, method in vars(base).items() if _is_stub(method)]
    spare = _spare(component)
    missing = [verb for verb in abstract if getattr(component, verb) is getattr(base, verb) and verb not in spare]
    if missing:
        return f"offers {kind} '{name}', which does not define {', '.join(f'{verb}()' for verb in missing)}"
    if kind == "merger" and not hasattr(component, "bases"):
        return f"offers merger '{name}', which does not say which `bases` it works on"
    for attribute, member in (("needs", Statistic), ("bases", BaseKind)):
        words: Any = getattr(component, attribute, frozenset())
        if not isinstance(words, frozenset) or not all(isinstance(word, member) for word in words):
            expected = f"a frozenset of {member.__name__}"
            return f"offers {kind} '{name}', whose `{attribute}` is {words!r}, expected {expected}"
    try:
        component.model_json_schema()
    except Exception as error:
        return f"offers {kind} '{name}', with an option that JSON cannot hold: {str(error).splitlines()[0]}"
    return None


def _spare(component: Any) -> set[str]:
    """The verbs that a component may leave undefined, for what it says of itself."""
    if component.kind == "scorer":
        return {"score"} if component.updates else {"prune"}
    return {"measure"} if component.kind == "allocator" and not component.needs else set()


def _is_stub(method: object) -> bool:
    return inspect.isfunction(method) and method.__code__.co_names == ("NotImplementedError",)
