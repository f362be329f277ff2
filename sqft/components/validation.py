"""The rules that a component class must keep to be registered."""

from __future__ import annotations

import inspect
import re
from typing import Any

from sqft.components.kinds import KINDS, Allocator, Component, Scorer
from sqft.components.options import path_mistake
from sqft.types import BaseKind, Statistic

NAME = re.compile(r"[a-z][a-z0-9-]*")


def component_mistake(kind: str, hook: str, component: Any) -> str | None:
    """Return the rule that keeps this object from being a component of that kind, or None when it keeps them all."""
    base = KINDS[kind]
    label = getattr(component, "__name__", repr(component))
    if not inspect.isclass(component) or not issubclass(component, base):
        return f"offers {label!r} through {hook}, which takes classes derived from {base.__name__}"
    name = getattr(component, "name", None)
    if "name" in component.model_fields:
        return f'offers {label}, whose name is a field; write name = "…" without an annotation'
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return f"offers {label}, whose name is {name!r}; a name is lower-case letters, digits and dashes"
    if missing := _missing_methods(component):
        return f"offers {kind} '{name}', which does not define {', '.join(missing)}"
    if kind == "merger" and not hasattr(component, "bases"):
        return f"offers merger '{name}', which does not say which `bases` it works on"
    for attribute, member in (("needs", Statistic), ("bases", BaseKind)):
        words: Any = getattr(component, attribute, frozenset())
        if not isinstance(words, frozenset) or not all(isinstance(word, member) for word in words):
            expected = f"a frozenset of {member.__name__}"
            return f"offers {kind} '{name}', whose `{attribute}` is {words!r}, expected {expected}"
    if wrong := path_mistake(component):
        return f"offers {kind} '{name}', {wrong}"
    try:
        component.model_json_schema()
    except Exception as error:
        return f"offers {kind} '{name}', with an option that JSON cannot hold: {str(error).splitlines()[0]}"
    return None


def _missing_methods(component: type[Component]) -> list[str]:
    """Return the methods that a component lacks: the abstract ones, and those whose need depends on others."""
    missing = [f"{method}()" for method in sorted(component.__abstractmethods__)]
    if issubclass(component, Scorer) and component.score is Scorer.score and component.prune is Scorer.prune:
        missing.append("score() or prune()")
    if issubclass(component, Allocator) and component.needs and component.measure is Allocator.measure:
        missing.append("measure(), which its `needs` asks for")
    return missing
