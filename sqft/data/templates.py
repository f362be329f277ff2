"""Prompt templates, built in or the user's own: they make a prompt and a completion of a row's fields."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

from jinja2 import StrictUndefined, TemplateError, UndefinedError
from jinja2 import Template as Compiled
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sqft.errors import DataError


class Template(Protocol):
    """Two Jinja templates over a row's fields. A float that is an integer is written as one: 4.0 as "4"."""

    @property
    def prompt(self) -> str: ...
    @property
    def completion(self) -> str: ...


class BuiltinTemplate(NamedTuple):
    """A template that a recipe can name."""

    prompt: str
    completion: str


TEMPLATES: Mapping[str, BuiltinTemplate] = {
    "gsm8k": BuiltinTemplate("Question: {{question}}\nAnswer:", " {{answer}}"),
    "llm-adapters": BuiltinTemplate(
        "Below is an instruction that describes a task{% if input %}, paired with an input that provides further "
        "context{% endif %}. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{{instruction}}\n\n{% if input %}### Input:\n{{input}}\n\n{% endif %}### Response:\n",
        "{{output}}",
    ),
    "multiple-choice": BuiltinTemplate("Question: {{question}}\nAnswer:", " {{nth(choices, answer)}}"),
    "arc": BuiltinTemplate("Question: {{question}}\nAnswer:", " {{choices.text[choices.label.index(answerKey)]}}"),
    "boolq": BuiltinTemplate("{{passage}}\nQuestion: {{question}}?\nAnswer:", " {{nth(['no', 'yes'], label)}}"),
    "hellaswag": BuiltinTemplate(
        "{{without_marks(activity_label ~ ': ' ~ ctx_a ~ ' ' ~ ctx_b.capitalize())}}",
        " {{without_marks(nth(endings, label))}}",
    ),
    "openbookqa": BuiltinTemplate("{{question_stem}}", " {{choices.text[choices.label.index(answerKey.lstrip())]}}"),
    "piqa": BuiltinTemplate("Question: {{goal}}\nAnswer:", " {{nth([sol1, sol2], label)}}"),
    "winogrande": BuiltinTemplate(
        "{{sentence[:sentence.index('_')]}}{{nth([option1, option2], answer, 1)}}",
        " {{sentence[sentence.index('_') + 1:].strip()}}",
    ),
}
"""`gsm8k`, and all that follow `llm-adapters` but one, ask what lm-eval's task of that name asks. `multiple-choice`
asks what its ARC does, given a list of choices and the index of the right one, from 0."""

INSTRUCTION = TEMPLATES["llm-adapters"]
"""The template for {instruction, input, output} rows when the recipe names none."""

OPTIONAL = {"input": ""}
"""Fields that a row may leave out, and their values then."""


def render(template: Template, row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row as {prompt, completion}.

    Raises:
        DataError: naming the field that the row lacks, or the reason why the template cannot be filled.
    """
    # A field that is null counts as missing.
    fields = OPTIONAL | {name: value for name, value in row.items() if isinstance(name, str) and value is not None}
    try:
        return {
            "prompt": _compiled(template.prompt).render(fields),
            "completion": _compiled(template.completion).render(fields),
        }
    except UndefinedError as error:
        has = ", ".join(f"'{name}'" for name in row) or "no fields"
        raise DataError(
            f"the prompt template uses a field that the record lacks: {error}; the record has {has}"
        ) from None
    except Exception as error:  # an expression over any data can raise anything
        raise DataError(f"the prompt template cannot be filled: {type(error).__name__}: {error}") from None


def mistake_in(source: str) -> str | None:
    """Return why a text is not a valid Jinja template; None when it is."""
    try:
        _compiled(source)
    except TemplateError as error:
        return str(error)
    return None


@cache
def _compiled(source: str) -> Compiled:
    return _environment().from_string(source)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=_without_fraction, keep_trailing_newline=True
    )
    environment.globals |= {"nth": _nth, "without_marks": _without_marks}
    return environment


def _nth(choices: Sequence[str], number: Any, first: int = 0) -> str:
    """Return a choice by its number, counted from `first`; test sets have -1 or "" where the answer is secret."""
    index = int(number) - first
    if not 0 <= index < len(choices):
        raise ValueError(f"there is no choice {number} of {len(choices)}")
    return choices[index]


def _without_marks(text: str) -> str:
    """Remove the marks of WikiHow's pages ("[header]", "[title]") from a text of HellaSwag, as lm-eval does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _without_fraction(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
