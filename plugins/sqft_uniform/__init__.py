"""The same sparsity for every layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sqft.api import Allocator, LinearShape, hookimpl


class Uniform(Allocator):
    """Every layer gets the sparsity asked for."""

    name = "uniform"

    def allocate(self, linears: Sequence[LinearShape], sparsity: float) -> Mapping[str, float]:
        return {linear.name: sparsity for linear in linears}


@hookimpl
def sqft_allocators() -> Iterator[type[Allocator]]:
    yield Uniform
