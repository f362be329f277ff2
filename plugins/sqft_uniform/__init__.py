"""The same sparsity for every layer, or the user's values for some layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field

from sqft.api import SPARSITY_TOLERANCE, Allocator, LinearShape, StageError, hookimpl

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Uniform(Allocator):
    """Every layer gets the sparsity of the recipe."""

    name = "uniform"

    def allocate(
        self, linears: Sequence[LinearShape], sparsity: float, measured: Mapping[str, float]
    ) -> Mapping[str, float]:
        return {linear.name: sparsity for linear in linears}


class Explicit(Allocator):
    """Some layers get their own sparsity. The others share the rest: all together have the recipe's sparsity."""

    name = "explicit"
    values: dict[str, Fraction] = Field(
        default_factory=dict,
        description='sparsity by glob pattern of full layer names, the longest match counts: {"*.q_proj": 0.3}',
    )

    def allocate(
        self, linears: Sequence[LinearShape], sparsity: float, measured: Mapping[str, float]
    ) -> Mapping[str, float]:
        sizes = {linear.name: linear.out_features * linear.in_features for linear in linears}
        longest = sorted(self.values, key=lambda pattern: (-len(pattern), pattern))
        fitting = {name: next((p for p in longest if fnmatchcase(name, p)), None) for name in sizes}
        if unused := [pattern for pattern in self.values if pattern not in fitting.values()]:
            raise StageError(
                f"explicit: no pruned layer gets its value from {unused[0]!r}; use full layer names, with *"
            )
        given = {name: self.values[pattern] for name, pattern in fitting.items() if pattern}
        others = sum(size for name, size in sizes.items() if name not in given)
        left = sparsity * sum(sizes.values()) - sum(sizes[name] * value for name, value in given.items())
        rest = left / others if others else 0.0
        if not 0 <= rest < 1 or (not others and abs(left) > SPARSITY_TOLERANCE * sum(sizes.values())):
            total = (sum(sizes.values()) * sparsity - left) / sum(sizes.values())
            raise StageError(
                f"explicit: the given values alone prune {total:.3f} of all weights, "
                f"but sparsify.sparsity is {sparsity:g}; "
                "change one of them"
            )
        return {name: given.get(name, rest) for name in sizes}


@hookimpl
def sqft_allocators() -> Iterator[type[Allocator]]:
    yield Uniform
    yield Explicit
