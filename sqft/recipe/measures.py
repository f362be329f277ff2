"""The parts of a recipe that say what is measured, besides lm-eval's tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo

from sqft.recipe.data import DataRef
from sqft.recipe.fields import Count, Section, one_or_several
from sqft.types import InputPath


def _of_numbers(tolerance: float, info: ValidationInfo) -> float:
    if tolerance and info.data.get("answer") == "text":
        raise ValueError('is for numbers; set answer to "last_number" or "first_number", or leave this out')
    return tolerance


Answer = Annotated[
    Literal["text", "first_number", "last_number"],
    Field(description="which part of the generated text is compared: all of it, or its first or last number"),
]
Tolerance = Annotated[
    float,
    Field(
        ge=0,
        allow_inf_nan=False,
        description="largest difference between a number and the expected one that counts as right",
    ),
    AfterValidator(_of_numbers),
]
"""Comes after a section's `answer`, which it is checked against."""


class Perplexity(Section):
    """Perplexity of a text, in windows that do not overlap."""

    text: Annotated[str, InputPath()] = Field(description="a text file that nothing was trained or calibrated on")
    tokens: Annotated[int, Field(ge=2)] | None = Field(
        None, description="use only this many tokens from the start; null: all"
    )
    length: Annotated[int, Field(ge=2)] = Field(1024, description="tokens in each window")


Perplexities = Annotated[
    Annotated[Perplexity, Tag("@one")] | Annotated[tuple[Perplexity, ...], Field(min_length=1), Tag("@several")],
    Discriminator(one_or_several),
]


class ExactMatch(Section):
    """Greedy generation from each prompt, compared with its completion."""

    data: DataRef = Field(description="test records with a prompt and a completion, not used in training")
    max_new_tokens: Count = Field(8, description="tokens generated for an answer")
    answer: Answer = "text"
    tolerance: Tolerance = 0.0
    batch_size: Count = Field(64, description="prompts that are processed at once")
