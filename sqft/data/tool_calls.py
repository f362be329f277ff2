"""Tool calls in the form that a chat template takes: templates differ in it, and so do the data that people keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqft.errors import DataError

Messages = Sequence[Mapping[str, Any]]

NAME = "sqft-argument"
"""An argument that is looked for again in a rendered probe."""


@dataclass(frozen=True)
class CallForm:
    """How a template takes a turn that calls tools.

    Args:
        text: the arguments as JSON text, as DeepSeek's concatenate it; else as an object.
        content: a turn without content has an empty one.
    """

    text: bool = False
    content: bool = False

    def of(self, messages: Messages) -> list[dict[str, Any]]:
        """Return messages in this form.

        Raises:
            DataError: when arguments are to be an object, and are text of something else.
        """
        return [self._message(message, number) for number, message in enumerate(messages, 1)]

    def _message(self, message: Mapping[str, Any], number: int) -> dict[str, Any]:
        if not (calls := message.get("tool_calls")) or not isinstance(calls, list):
            return {**message}
        filled = {"content": ""} if self.content and message.get("content") is None else {}
        return {**message, **filled, "tool_calls": [self._call(call, number) for call in calls]}

    def _call(self, call: Any, number: int) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(function := call.get("function"), Mapping):
            return {**call, "function": self._call(function, number)}
        return {**call, "arguments": self._arguments(call["arguments"], number)} if "arguments" in call else {**call}

    def _arguments(self, given: Any, number: int) -> Any:
        if self.text:
            return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        if not isinstance(given, str):
            return given
        try:
            parsed = json.loads(given or "{}")
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise DataError(
                f"message {number}: the chat template takes the arguments of a tool call as an object, and they are "
                f"text that is no JSON object: {given[:40]!r}"
            )
        return parsed


FORMS = [CallForm(text, content) for text in (False, True) for content in (False, True)]
"""The forms that are tried, in this order."""


def form_taken(messages: Messages, render: Callable[[Messages], str]) -> CallForm | None:
    """Return the form in which a template shows a call's arguments as they are; None when it rejects every form.

    A template may write an object as Python does, or encode JSON text once more; neither is what a model was trained
    on. Where no form is shown, the first that is not rejected.

    Args:
        messages: some that end with a turn that calls tools.
        render: makes text of messages.
    """
    taken = None
    probe = [_with_probe(message) for message in messages]
    for form in FORMS:
        try:
            text = render(form.of(probe))
        except DataError:
            continue
        distorted = f"'{NAME}'" in text or f'\\"{NAME}' in text
        if NAME in text and not distorted:
            return form
        if taken is None and not distorted:
            taken = form
    return taken


def _with_probe(value: Any) -> Any:
    """Return a message whose calls have the probe's arguments."""
    if isinstance(value, list):
        return [_with_probe(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: {NAME: "x"} if key == "arguments" else _with_probe(item) if key in ("tool_calls", "function") else item
        for key, item in value.items()
    }
