"""How a record's fields become a prompt and a completion: templates by name, or the user's own."""

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
    """Two Jinja templates over a record's fields. A number that is whole is written without a fraction."""

    @property
    def prompt(self) -> str: ...
    @property
    def completion(self) -> str: ...


class Named(NamedTuple):
    """A template that has a name."""

    prompt: str
    completion: str


TEMPLATES: Mapping[str, Named] = {
    "gsm8k": Named("Question: {{question}}\nAnswer:", " {{answer}}"),
    "llm-adapters": Named(
        "Below is an instruction that describes a task{% if input %}, paired with an input that provides further "
        "context{% endif %}. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{{instruction}}\n\n{% if input %}### Input:\n{{input}}\n\n{% endif %}### Response:\n",
        "{{output}}",
    ),
    "multiple-choice": Named("Question: {{question}}\nAnswer:", " {{nth(choices, answer)}}"),
    "arc": Named("Question: {{question}}\nAnswer:", " {{choices.text[choices.label.index(answerKey)]}}"),
    "boolq": Named("{{passage}}\nQuestion: {{question}}?\nAnswer:", " {{nth(['no', 'yes'], label)}}"),
    "hellaswag": Named(
        "{{without_marks(activity_label ~ ': ' ~ ctx_a ~ ' ' ~ ctx_b.capitalize())}}",
        " {{without_marks(nth(endings, label))}}",
    ),
    "openbookqa": Named("{{question_stem}}", " {{choices.text[choices.label.index(answerKey.lstrip())]}}"),
    "piqa": Named("Question: {{goal}}\nAnswer:", " {{nth([sol1, sol2], label)}}"),
    "winogrande": Named(
        "{{sentence[:sentence.index('_')]}}{{nth([option1, option2], answer, 1)}}",
        " {{sentence[sentence.index('_') + 1:].strip()}}",
    ),
}
"""`gsm8k` and those after `llm-adapters` ask as lm-eval's tasks of these names do; `multiple-choice` as its ARC, of a
list of choices and the number of the right one from 0."""
INSTRUCTION = TEMPLATES["llm-adapters"]
"""What becomes of {instruction, input, output} when no template is named."""
OPTIONAL = {"input": ""}
"""Fields that a record may leave out."""


def render(template: Template, row: Mapping[str, Any]) -> dict[str, str]:
    """A row as {prompt, completion}.

    Raises:
        DataError: naming the field that the row lacks, or what else the template could not do with it.
    """
    # A field that is null is one that is not there.
    fields = OPTIONAL | {name: value for name, value in row.items() if isinstance(name, str) and value is not None}
    try:
        return {
            "prompt": _compiled(template.prompt).render(fields),
            "completion": _compiled(template.completion).render(fields),
        }
    except UndefinedError as error:
        has = ", ".join(f"'{name}'" for name in row) or "nothing"
        raise DataError(f"the prompt template wants more than the record has: {error}; it has {has}") from None
    except Exception as error:  # an expression over somebody's data raises anything
        raise DataError(f"the prompt template cannot be filled: {type(error).__name__}: {error}") from None


def mistake_in(source: str) -> str | None:
    """Why a text is no Jinja template; None when it is one."""
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
    made = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_whole, keep_trailing_newline=True)
    made.globals |= {"nth": _nth, "without_marks": _without_marks}
    return made


def _nth(choices: Sequence[str], number: Any, first: int = 0) -> str:
    """The choice of that number, counted from `first`; test sets say -1 or nothing where the answer is secret."""
    index = int(number) - first
    if not 0 <= index < len(choices):
        raise ValueError(f"there is no choice {number} of {len(choices)}")
    return choices[index]


def _without_marks(text: str) -> str:
    """A text of HellaSwag without what WikiHow's pages left in it ("[header]", "[title]"), as lm-eval cleans it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
