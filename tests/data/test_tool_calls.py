"""The form of tool calls is found by what a template makes of a probe."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from sqft.data.tool_calls import CallForm, Messages, form_taken
from sqft.errors import DataError

CALL: dict[str, Any] = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}


def arguments(messages: Messages) -> Any:
    return messages[-1]["tool_calls"][0]["arguments"]


def needs_content(messages: Messages) -> str:
    if "content" not in messages[-1]:
        raise DataError("no content")
    return json.dumps(arguments(messages))


@pytest.mark.parametrize(
    ("render", "form"),
    [
        (lambda messages: json.dumps(arguments(messages)), CallForm()),
        (lambda messages: f"{arguments(messages)}", CallForm(text=True)),  # an object as Python writes it
        (needs_content, CallForm(content=True)),
        (lambda messages: "nothing of it", CallForm()),
    ],
)
def test_the_form_in_which_arguments_are_shown(render: Callable[[Messages], str], form: CallForm) -> None:
    assert form_taken([CALL], render) == form


def test_no_form_is_taken() -> None:
    def refuse(_: Messages) -> str:
        raise DataError("roles must alternate")

    assert form_taken([CALL], refuse) is None


def test_text_and_objects() -> None:
    text = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a":1}'}}]}
    assert CallForm().of([text])[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert CallForm(text=True).of([text]) == [text]
    assert arguments(CallForm(text=True).of([CALL])) == '{"a": 1}'
    assert CallForm(content=True).of([CALL])[0]["content"] == ""
    assert arguments(CallForm().of([{**CALL, "tool_calls": [{"name": "now", "arguments": ""}]}])) == {}
