"""`nls` and `lora`: an adapter with a list of ranks, and one with a single rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from sqft.api import Adapter, DeltaModule, LinearShape, RankConfig, RankGroup, SearchSpace

if TYPE_CHECKING:
    from torch import Generator

Rank = Annotated[int, Field(ge=1)]


class _LowRank(Adapter):
    """The options and methods that `nls` and `lora` share."""

    alpha: float = Field(64.0, gt=0, description="the delta is (alpha / largest rank) · B A; see scaling")
    scaling: Literal["rank", "root"] = Field(
        "rank",
        description="divide alpha by the largest rank, or by its square root (rsLoRA)",
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="dropout on the adapter's input; above 0, training computes two paths and is slower",
    )

    def sample(self, space: SearchSpace, rng: Random) -> RankConfig:
        return RankConfig(tuple(rng.choice(group.ranks) for group in space.groups))

    def input_dropout(self) -> float:
        return self.dropout

    def _delta(self, linear: LinearShape, rank: int, generator: Generator) -> DeltaModule:
        """Make the delta of a layer, of this largest rank.

        Under "root" (Kalajdzievski 2023) the sizes of output and gradients do not depend on the rank.
        """
        from sqft_nls.delta import LowRankDelta

        divisor = rank if self.scaling == "rank" else math.sqrt(rank)
        return LowRankDelta(linear, rank, self.alpha / divisor, generator)


class Nls(_LowRank):
    """Elastic ranks: each step trains a random rank configuration, and smaller ranks are slices of the largest.

    The scale of every sub-adapter is that of the largest rank, so a sub-adapter is a part of what was trained.
    """

    name = "nls"
    ranks: tuple[Rank, ...] = Field(
        (32, 28, 24, 20, 16), min_length=1, description="ranks that are trained, largest first"
    )
    groups: tuple[tuple[str, ...], ...] = Field(
        (("q_proj", "k_proj", "v_proj"),),
        description="last names of layers that share one rank, within the same parent module",
    )

    @field_validator("ranks")
    @classmethod
    def _descending(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if any(high <= low for high, low in pairwise(ranks)):
            raise ValueError(f"ranks must go from large to small without repeats, found {list(ranks)}")
        return ranks

    def space(self, linears: Sequence[LinearShape]) -> SearchSpace:
        members: dict[str, list[str]] = {}
        for linear in linears:
            parent, _, last = linear.name.rpartition(".")
            shared = next((group for group in self.groups if last in group), None)
            label = f"{parent}.{'+'.join(shared)}" if shared else linear.name
            members.setdefault(label, []).append(linear.name)
        return SearchSpace(tuple(RankGroup(name, self.ranks, tuple(names)) for name, names in members.items()))

    def delta(self, linear: LinearShape, generator: Generator) -> DeltaModule:
        return self._delta(linear, self.ranks[0], generator)


class Lora(_LowRank):
    """The same rank for every layer."""

    name = "lora"
    rank: Rank = 32

    def space(self, linears: Sequence[LinearShape]) -> SearchSpace:
        return SearchSpace(tuple(RankGroup(linear.name, (self.rank,), (linear.name,)) for linear in linears))

    def delta(self, linear: LinearShape, generator: Generator) -> DeltaModule:
        return self._delta(linear, self.rank, generator)
