"""What a type annotation is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def parts_of(annotation: Any) -> Iterator[Any]:
    """Yield the types and the metadata that an annotation is made of, itself first."""
    yield annotation
    for inner in (*getattr(annotation, "__args__", ()), *getattr(annotation, "__metadata__", ())):
        yield from parts_of(inner)
