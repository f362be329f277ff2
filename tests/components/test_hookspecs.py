"""The hooks: every kind of component has one, and every example runs as it is written and keeps the contract."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest

from sqft import Registry
from sqft.components import hookspecs
from sqft.components.hookspecs import COMPONENT_HOOKS, hookimpl
from sqft.components.kinds import KINDS
from sqft.testing import check

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


def example(hook: str) -> SimpleNamespace:
    """A plugin with what the example in a hook's docstring implements."""
    code = re.search(r"Example:\n    ```python\n(.*?)    ```", inspect.getdoc(HOOKS[hook]) or "", re.DOTALL)
    assert code, f"{hook} has no example"
    names: dict[str, Any] = {"__name__": "example"}
    exec(inspect.cleandoc(code[1]), names)
    return SimpleNamespace(**{hook: names[hook]})


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_of_a_kind_keeps_the_contract(kind: str) -> None:
    registry = Registry()
    registry.add(example(COMPONENT_HOOKS[kind]), name="example")
    (registration,) = registry.entries()
    assert registration.component.kind == kind
    check(registration.component())


@pytest.mark.parametrize("hook", sorted(HOOKS.keys() - COMPONENT_HOOKS.values()))
def test_the_example_of_a_notification_is_called(hook: str, capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry()
    registry.add(example(hook), name="example")
    arguments = {"step": SimpleNamespace(name="sparsify"), "artifact": SimpleNamespace(report={"sparsity": 0.5})}
    assert list(registry.notify(hook, **arguments)) == []
    assert capsys.readouterr().out.startswith("sparsify ")


@pytest.mark.parametrize("hook", HOOKS)
def test_every_argument_is_documented(hook: str) -> None:
    for argument in inspect.signature(HOOKS[hook]).parameters:
        assert re.search(rf"\n    {argument}: ", inspect.getdoc(HOOKS[hook]) or "")
