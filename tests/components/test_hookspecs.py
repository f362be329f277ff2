"""The hooks, and that every kind of component has one."""

from __future__ import annotations

import inspect

import pluggy
import pytest

from sqft.components import hookspecs
from sqft.components.hookspecs import COMPONENT_HOOKS, hookimpl
from sqft.components.kinds import KINDS

HOOKS = {name: value for name, value in vars(hookspecs).items() if name.startswith("sqft_")}


def test_every_kind_has_a_hook_that_offers_it() -> None:
    assert COMPONENT_HOOKS.keys() == KINDS.keys()
    for kind, hook in COMPONENT_HOOKS.items():
        assert HOOKS[hook].__annotations__["return"] == f"Iterable[type[{KINDS[kind].__name__}]]"
    assert HOOKS.keys() - set(COMPONENT_HOOKS.values()) == {"sqft_stage_started", "sqft_stage_finished"}


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_a_specification_with_a_description(name: str) -> None:
    manager = pluggy.PluginManager("sqft")
    manager.add_hookspecs(hookspecs)
    hook = getattr(manager.hook, name)
    assert hook.spec is not None and not hook.spec.opts["firstresult"]
    assert inspect.getdoc(HOOKS[name])


def test_the_marker_marks_an_implementation_and_its_arguments_are_checked() -> None:
    class Tracker:
        @hookimpl
        def sqft_stage_started(self, step: object, nothing: object) -> None: ...

    manager = pluggy.PluginManager("sqft")
    manager.add_hookspecs(hookspecs)
    with pytest.raises(pluggy.PluginValidationError, match="nothing"):
        manager.register(Tracker())
