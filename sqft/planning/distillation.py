"""What a plan says of a teacher: whether it can teach, and what that costs. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sqft.checkpoints.model_source import ModelSource
from sqft.errors import Problem
from sqft.planning.resolution import Resolver
from sqft.recipe.sections import Finetune
from sqft.types import BaseKind


def check_teacher(section: Finetune, teacher: ModelSource) -> Iterator[Problem]:
    """Check that the teacher can read the longest example."""
    window = teacher.size("max_position_embeddings")
    if window and section.max_length > window:
        yield Problem(
            "finetune.teacher",
            f"its window is {window} tokens, and finetune.max_length is {section.max_length}; lower it",
        )


def notes(section: Finetune, resolver: Resolver, teacher: ModelSource, kind: BaseKind | None) -> Iterator[str]:
    """Yield what a teacher costs, and when it has nothing to teach.

    Args:
        section: with a teacher.
        resolver: knows how many records there are.
        teacher: the model.
        kind: of the base under the adapters.
    """
    assert section.teacher is not None
    known = min(model.size("vocab_size") for model in (resolver.model, teacher))
    kept = None if section.teacher.keeps_all(known) else section.teacher.top_k
    per_label = 4 * (2 * kept + 1 if kept else known)
    examples = forwards(section, resolver)
    # A packed row holds several examples: how many of them the steps reach is known once they are packed.
    about = "at most" if section.steps and section.packing else "about"
    yield (
        f"before training, a model of {teacher.parameters:,} parameters reads {about} {examples:,} examples once "
        f"({examples:,} teacher forwards); {per_label:,} bytes for each label are on disk until the step is done"
    )
    if teacher.digest == resolver.model.digest and (kind is BaseKind.DENSE or resolver.model.quantization is not None):
        yield "the teacher is the model that training starts from: it holds the student back, and has nothing to add"


def forwards(section: Finetune, resolver: Resolver) -> int:
    """Return about how many examples the teacher reads, or how many at most of those that are packed."""
    counts = (resolver.sizes.get(f"finetune.{role}", 0) * min(1, how.weight) for role, how in section.data_sets.items())
    examples = math.ceil(sum(counts) * (1 - section.holdout))
    if section.steps and not section.packing:
        examples = min(examples, (section.steps * section.gradient_accumulation + 1) * section.batch_size)
    return examples
