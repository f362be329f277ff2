"""The same sparsity for every layer, or the user's own for some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field

from sqft.api import SPARSITY_TOLERANCE, Allocator, LinearShape, StageError, hookimpl

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Uniform(Allocator):
    """Every layer gets the sparsity asked for."""

    name = "uniform"

    def allocate(
        self, linears: Sequence[LinearShape], sparsity: float, measured: Mapping[str, float]
    ) -> Mapping[str, float]:
        return {linear.name: sparsity for linear in linears}


class Explicit(Allocator):
    """Some layers get a sparsity of their own; the others share what is left, so that the whole is as asked for."""

    name = "explicit"
    values: dict[str, Fraction] = Field(
        default_factory=dict,
        description='sparsity by glob pattern of full layer names, the longest that fits: {"*.q_proj": 0.3}',
    )

    def allocate(
        self, linears: Sequence[LinearShape], sparsity: float, measured: Mapping[str, float]
    ) -> Mapping[str, float]:
        sizes = {linear.name: linear.out_features * linear.in_features for linear in linears}
        longest = sorted(self.values, key=lambda pattern: (-len(pattern), pattern))
        fitting = {name: next((p for p in longest if fnmatchcase(name, p)), None) for name in sizes}
        if unused := [pattern for pattern in self.values if pattern not in fitting.values()]:
            raise StageError(
                f"explicit: no layer that is pruned gets its value from {unused[0]!r}; use full names, with *"
            )
        given = {name: self.values[pattern] for name, pattern in fitting.items() if pattern}
        others = sum(size for name, size in sizes.items() if name not in given)
        left = sparsity * sum(sizes.values()) - sum(sizes[name] * value for name, value in given.items())
        rest = left / others if others else 0.0
        if not 0 <= rest < 1 or (not others and abs(left) > SPARSITY_TOLERANCE * sum(sizes.values())):
            whole = (sum(sizes.values()) * sparsity - left) / sum(sizes.values())
            raise StageError(
                f"explicit: the values alone prune {whole:.3f} of all weights, and sparsify.sparsity is {sparsity:g}"
            )
        return {name: given.get(name, rest) for name in sizes}


@hookimpl
def sqft_allocators() -> Iterator[type[Allocator]]:
    yield Uniform
    yield Explicit
