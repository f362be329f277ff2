"""The parts of a recipe that name records."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, field_validator

from sqft.data.chat_template import RESERVED
from sqft.data.templates import TEMPLATES, mistake_in
from sqft.recipe.fields import Count, NoEffect, Section, ShortForm, one_or_several
from sqft.types import InputPath


class Prompt(Section):
    """Jinja templates over a record's fields: "Question: {{question}}"."""

    prompt: str = Field(min_length=1, description="template of the prompt")
    completion: str = Field(min_length=1, description="template of the expected answer")

    @field_validator("prompt", "completion")
    @classmethod
    def _is_template(cls, source: str) -> str:
        if mistake := mistake_in(source):
            raise ValueError(f"not a valid Jinja template: {mistake}")
        return source


def _by_name(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in TEMPLATES:
        raise ValueError(
            f"no prompt template is named '{value}'; choose from {', '.join(TEMPLATES)}, or write your own"
        )
    return {"prompt": TEMPLATES[value].prompt, "completion": TEMPLATES[value].completion}


NamedPrompt = Annotated[Prompt, BeforeValidator(_by_name, json_schema_input_type=str | Prompt)]


def _no_argument_of_ours(arguments: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(arguments.keys() & RESERVED):
        raise ValueError(f"'{taken[0]}' is no argument of a chat template; sqft sets it itself, so remove it")
    return arguments


TemplateArguments = Annotated[dict[str, Any], AfterValidator(_no_argument_of_ours)]
"""Arguments for the model's chat template, such as {"enable_thinking": false}."""


class Data(Section):
    """Records of {prompt, completion}, {messages}, {instruction, input, output} or {text}, or of other fields with a
    prompt template."""

    path: Annotated[str, InputPath(hub=True)] = Field(
        description="a .jsonl, .json, .csv, .tsv, .txt (one text in each line), .parquet or .arrow file, or a Hugging "
        "Face data set: a folder or an id"
    )
    prompt: NamedPrompt | None = Field(
        None,
        description=f"how a record's fields become a prompt and a completion: {', '.join(TEMPLATES)}, or "
        "{prompt, completion} templates of your own",
    )
    limit: Count | None = Field(None, description="use only this many records from the start")
    config: str | None = Field(None, description="configuration of the data set, if it has several")
    file: Annotated[str | None, NoEffect()] = Field(  # its content counts, as that of a path
        None,
        description="read only this file of the data set, a path inside it; of a Hugging Face id, nothing else is "
        "downloaded",
    )
    split: str = Field(
        "train",
        description='split of the data set, or a slice in the syntax of datasets: "train[:1000]", '
        '"train[90%:]", "train+test"',
    )
    delimiter: Annotated[str, Field(pattern=r'^[^"\r\n]$')] | None = Field(
        None, description="character between the cells of a .csv or .tsv file; null: a tab in .tsv, else a comma"
    )
    revision: str | None = Field(None, description="branch, tag or commit, if the path is a Hugging Face id")
    chat_template_kwargs: TemplateArguments = Field(
        default_factory=dict,
        description="arguments for the model's chat template, for these conversations; they replace the model's own",
    )


class TrainingData(Data):
    """One of the data sets to train on."""

    weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        1.0, description="how often each record comes in an epoch; with 2.5, a random half comes a third time"
    )


class CalibrationData(Data):
    """Text to calibrate on: records or a data set, as for training, or a plain text file (.txt, or another suffix)."""

    path: Annotated[str, InputPath(hub=True)] = Field(
        description="a file of records (.jsonl, .json, .csv, .tsv, .parquet or .arrow), a text file (any other suffix) "
        "or a Hugging Face data set: a folder or an id"
    )


DataRef = Annotated[Data, ShortForm("path")]
CalibrationRef = Annotated[CalibrationData, ShortForm("path")]
_One = Annotated[TrainingData, ShortForm("path")]
DataRefs = Annotated[
    Annotated[_One, Tag("@one")] | Annotated[tuple[_One, ...], Field(min_length=1), Tag("@several")],
    Discriminator(one_or_several),
]
"""One data set, or several."""
