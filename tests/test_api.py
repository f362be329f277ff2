"""The names that plugins may import."""

from __future__ import annotations

import inspect

import pytest

from sqft import api, errors
from sqft.components.kinds import KINDS


def test_every_name_is_there_once_and_no_other() -> None:
    public = {name for name in vars(api) if not name.startswith("_")}
    assert public == set(api.__all__) and len(api.__all__) == len(public)


@pytest.mark.parametrize("name", sorted(api.__all__))
def test_every_class_and_function_is_described(name: str) -> None:
    value = getattr(api, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert (value.__doc__ or "").strip()


def test_a_plugin_can_subclass_every_kind_and_raise_what_it_should() -> None:
    assert all(getattr(api, cls.__name__) is cls for cls in KINDS.values())
    raised = ("ContractError", "PluginError", "SqftError", "StageError")
    assert all(getattr(api, name) is getattr(errors, name) for name in raised)
