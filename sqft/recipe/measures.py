"""The parts of a recipe that say what is measured, besides lm-eval's tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from sqft.recipe.data import DataRef
from sqft.recipe.fields import Count, Section, one_or_several
from sqft.types import InputPath

Answer = Literal["text", "first_number", "last_number"]
ANSWER = "which part of the generated text is compared: all of it, or its first or last number"


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
    answer: Answer = Field("text", description=ANSWER)
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="largest difference between a number and the expected one that counts as right"
    )
    batch_size: Count = Field(64, description="prompts that are processed at once")

    @field_validator("tolerance")
    @classmethod
    def _of_numbers(cls, tolerance: float, info: ValidationInfo) -> float:
        if tolerance and info.data.get("answer") == "text":
            raise ValueError('is for numbers; set answer to "last_number" or "first_number", or leave this out')
        return tolerance
