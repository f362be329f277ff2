"""The part of a recipe that names a teacher."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sqft.recipe.fields import Count, Section, ShortForm
from sqft.types import InputPath

DENSE = "dense"
"""The teacher that is the recipe's own model, as it was before any step."""


class Teacher(Section):
    """A model whose predictions are learnt beside the labels (distillation)."""

    model: Annotated[str, InputPath(hub=True, words=(DENSE,))] = Field(
        description='"dense": the recipe\'s own model before it is pruned and quantized; or a folder in Hugging Face '
        "layout, a GGUF file, or a Hugging Face id, with the same vocabulary"
    )
    revision: str | None = Field(None, description="branch, tag or commit, if the model is a Hugging Face id")
    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="share of the teacher in the loss: (1 - weight) · cross-entropy + weight · temperature² · KL"
    )
    temperature: Annotated[float, Field(ge=0.01, le=100)] = Field(
        1.0, description="logits of teacher and student are divided by it before they are compared"
    )
    top_k: Count | None = Field(
        64,
        description="how many tokens of the teacher's prediction are kept for each label, the most probable ones; all "
        "others count as one outcome. null: the complete prediction",
    )

    def keeps_all(self, vocabulary: int) -> bool:
        """Return whether complete predictions are kept, of so many tokens."""
        return self.top_k is None or self.top_k >= vocabulary


TeacherRef = Annotated[Teacher, ShortForm("model")]
