"""The forms in which people keep conversations become one: `messages` of roles and contents, and tools beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sqft.errors import DataError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""Who speaks in a ShareGPT turn (`from`), and the role that chat templates know."""

FORM = "a list of {role, content} with at least one assistant turn"
"""What `messages` must be, as errors say it."""

SWITCHES = ("train", "weight")
"""Fields of a message that say whether it is learnt; no template sees them."""


def conversation_in(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a row that holds a conversation with its `messages` in one form; None for any other row.

    Read are `messages` or `conversations`, each with `role` and `content` or ShareGPT's `from` and `value`, and TRL's
    lists of messages in `prompt` and `completion`, of which only the completion is learnt. Beside them may be `system`,
    `tools` (a list, or JSON text of one) and `chat_template_kwargs`. Fields of a message that are null are dropped.
    `not_learnt` lists the assistant's turns whose `train` or `weight` is 0.

    Raises:
        DataError: when it is a conversation that cannot be read, with what is wrong.
    """
    fields = dict(row)
    found, given = _turns(fields)
    if found is None:
        return None
    messages = [_message(turn, number) for number, turn in enumerate(found, 1)]
    system = fields.get("system")
    if isinstance(system, str) and system and not (messages and messages[0]["role"] == "system"):
        fields.pop("system")
        messages, given = [{"role": "system", "content": system}, *messages], given + bool(given)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"'messages' must be {FORM}")
    skipped = [index for index, message in enumerate(messages) if _is_skipped(message, index, given)]
    fields["messages"] = [{k: v for k, v in message.items() if k not in SWITCHES} for message in messages]
    if skipped:
        fields["not_learnt"] = skipped
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        if name in fields and (value := _parsed(fields.pop(name))) is not None:
            if not isinstance(value, kind):
                raise DataError(f"'{name}' must be a JSON {'list' if kind is list else 'object'}")
            if value:
                fields[name] = value
    return fields


def _turns(fields: dict[str, Any]) -> tuple[Any, int]:
    """Take the turns out of a row; return them, None for none, and how many of them are only a prompt."""
    prompt, completion = fields.get("prompt"), fields.get("completion")
    names = ("messages",) if isinstance(prompt, str) and isinstance(completion, str) else ("messages", "conversations")
    for name in names:
        if (turns := _parsed(fields.get(name))) is not None:  # a cell of a CSV file holds JSON text, or nothing
            fields.pop(name)
            if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
                raise DataError(f"'{name}' must be {FORM}")
            return turns, 0
    if "chosen" in fields and "rejected" in fields and completion is None:
        raise DataError(
            "'chosen' and 'rejected' are preferences, which sqft does not train on; keep the chosen answer alone, "
            "as 'messages' or as 'prompt' and 'completion'"
        )
    if not (isinstance(prompt, list) or isinstance(completion, list | dict)):
        return None, 0
    given = 0
    both: list[dict[str, Any]] = []
    for name in ("prompt", "completion"):
        part = fields.pop(name, None)
        part = [part] if isinstance(part, dict) else part
        if not isinstance(part, list) or not all(isinstance(turn, dict) for turn in part):
            raise DataError("'prompt' and 'completion' must both be texts, or both lists of {role, content}")
        given, both = len(both), [*both, *part]
    return both, given


def _message(turn: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a turn as {role, content, …}."""
    message = {key: value for key, value in turn.items() if value is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if speaker not in ROLES:
            known = ", ".join(ROLES)
            raise DataError(f"message {number}: 'from' is {speaker!r}, which is no known role; known are {known}")
        message = {"role": ROLES[speaker], **message}
        if "value" in message:
            message["content"] = message.pop("value")
    if not (isinstance(role := message.get("role"), str) and role):
        raise DataError(f"message {number}: has no 'role'; 'messages' must be {FORM}")
    if isinstance(calls := message.get("tool_calls"), str):
        message["tool_calls"] = _parsed(calls)
    if isinstance(content := message.get("content"), list):
        message["content"] = "".join(_text_of(part, number) for part in content)
    elif content is None and not message.get("tool_calls"):
        raise DataError(f"message {number} of role '{role}' has no 'content'; only a turn with tool_calls needs none")
    elif not isinstance(content, str | None):
        raise DataError(f"message {number}: 'content' is {type(content).__name__}, expected text or a list of parts")
    return message


def _text_of(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else None
    raise DataError(
        f"message {number}: a part of 'content' is {repr(kind) if kind else 'no text'}; sqft trains on text alone, so "
        "leave such records out"
    )


def _is_skipped(message: Mapping[str, Any], index: int, given: int) -> bool:
    """Return whether an assistant's turn is not to be learnt: by its switches, or as part of a prompt."""
    assistant = message["role"] == "assistant"
    for name in SWITCHES:
        value = message.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise DataError(f"message {index + 1}: '{name}' is {value!r}; a turn is learnt or not: write 1 or 0")
        if value and not assistant:
            raise DataError(f"message {index + 1}: '{name}' is {value!r}, but only the assistant's turns can be learnt")
    return assistant and (index < given or any(message.get(name, 1) == 0 for name in SWITCHES))


def _parsed(value: Any) -> Any:
    """Return a value that may be written as JSON text, as columns of tables have it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        return value


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text inside a value of a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)
