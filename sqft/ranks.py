"""Ranks of an adapter's layers: the space of their configurations, and what a searcher may ask about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, product
from random import Random
from typing import NamedTuple, Protocol

Indices = tuple[int, ...]
"""A rank configuration, as a position in each group's list of ranks."""


@dataclass(frozen=True, slots=True)
class RankGroup:
    """Linear layers that share one rank, and the ranks that they may take, largest first.

    An adapter gives the first three. The core fills in the others before it hands the space of a trained adapter to a
    searcher.
    """

    name: str
    ranks: tuple[int, ...]
    members: tuple[str, ...]
    cost: int = 0
    """Parameters that one rank costs: the inputs and outputs of all members."""
    losses: tuple[float, ...] = ()
    """For each of `ranks`, what the trained deltas lose at it: ‖Δ_R − Δ_r‖² (Frobenius), R the largest rank, summed
    over the members. The first is 0."""


@dataclass(frozen=True, slots=True)
class RankConfig:
    """One rank for each group of a search space, in its order. Hashable, so that trials can be remembered."""

    ranks: tuple[int, ...]


class TrainingStep(NamedTuple):
    """The ranks that one optimizer step trained, and the loss that it measured with them, before its update."""

    config: RankConfig
    loss: float


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """All rank configurations of an adapted model."""

    groups: tuple[RankGroup, ...]

    def choice(self, indices: Sequence[int]) -> RankConfig:
        """Return the configuration that takes, in each group, the rank at that index of its list."""
        return RankConfig(tuple(g.ranks[i] for g, i in zip(self.groups, indices, strict=True)))

    def median(self) -> Indices:
        """Return the indices of the paper's reference configuration: (n − 1) // 2 of each descending list."""
        return tuple((len(group.ranks) - 1) // 2 for group in self.groups)

    def neighbours(self, anchor: Indices, step: int, count: int, visited: set[Indices], rng: Random) -> list[Indices]:
        """Return up to `count` unvisited neighbours of an anchor, and add them to `visited`.

        As Algorithm 1 of the paper draws them. A neighbour differs in one or more groups, each by at most `step`
        positions in its list. First the number of groups that change is drawn, uniformly from 1 to all that can change;
        then the groups, and then a change for each, uniformly. If drawing finds too few, all are listed in order.
        """
        moves = [
            [i for i in range(max(0, index - step), min(index + step + 1, len(group.ranks))) if i != index]
            for index, group in zip(anchor, self.groups, strict=True)
        ]
        movable = [position for position, moved in enumerate(moves) if moved]

        def at_random() -> Iterator[Indices]:
            for _ in range(64 * count if movable else 0):  # the same one may be drawn again
                moving = set(rng.sample(movable, rng.randint(1, len(movable))))
                yield tuple(rng.choice(moves[i]) if i in moving else index for i, index in enumerate(anchor))

        # The list of all can be very long, but it is left early. Its first is the anchor.
        listed = islice(product(*((index, *moved) for index, moved in zip(anchor, moves, strict=True))), 1, None)
        found: list[Indices] = []
        for candidate in chain(at_random(), listed):
            if candidate not in visited:
                visited.add(candidate)
                found.append(candidate)
                if len(found) == count:
                    break
        return found

    def parameters(self, choice: RankConfig) -> int:
        """Count the parameters of a configuration's factors."""
        return sum(group.cost * rank for group, rank in zip(self.groups, choice.ranks, strict=True))

    def ranks_by_linear(self, choice: RankConfig) -> dict[str, int]:
        """Return the rank of every linear layer under a configuration."""
        pairs = zip(self.groups, choice.ranks, strict=True)
        return {member: rank for group, rank in pairs for member in group.members}

    def __contains__(self, choice: object) -> bool:
        return (
            isinstance(choice, RankConfig)
            and len(choice.ranks) == len(self.groups)
            and all(r in g.ranks for g, r in zip(self.groups, choice.ranks, strict=True))
        )


class RecordValue(NamedTuple):
    """What one record contributes to a metric; larger totals are better.

    The metric of some records is the sum of their totals, divided by the sum of their weights. Of `exact_match` a total
    is 1 or 0, and the weight is 1. Of `loss` a total is minus the sum of the losses of the record's labels, and the
    weight their number. A record has the same weight under every configuration.
    """

    total: float
    weight: int


class Evaluate(Protocol):
    """The function that a searcher calls: it returns the metric of a configuration; larger is better.

    `samples` uses this many records of the validation set, the first in one seeded order that is drawn once
    for the search (Algorithm 1's proxy set D_M); None uses them all. Values are stored on disk, record by record. So a
    deterministic searcher that is killed repeats its calls, no record is evaluated twice with a configuration, and to
    ask for more samples evaluates the new records only. What `first_order` returns is not stored.
    """

    def __call__(self, choice: RankConfig, samples: int | None = None) -> float: ...

    def each(self, choice: RankConfig, samples: int | None = None) -> Sequence[RecordValue]:
        """Return the values of the single records, in their order: fewer than `samples` where there are fewer."""
        ...

    def within(self, seconds: float | None) -> bool:
        """Return whether this search's evaluations took less time than this so far; None is no limit.

        Values that are known, and `first_order`, cost none. The time is stored with the values. So a searcher that is
        killed and repeats its calls gets the same answers.
        """
        ...

    def first_order(self, samples: int | None = None) -> Sequence[Sequence[float]]:
        """Return, for each group and each of its ranks, how much the mean loss of a label changes if that group alone
        takes that rank and all others take their largest, to first order: positive where the loss rises, 0 at the
        largest rank.

        That is −⟨∂loss/∂Δ, Δ_R − Δ_r⟩ at the largest ranks R, Δ being the deltas of the group's members. The loss is
        that of the records' answers, whatever the search's metric. For searchers whose `needs_gradients` is true.
        """
        ...

    def training(self) -> Sequence[TrainingStep]:
        """Return the training's steps, in order; with `finetune.patience` up to the step whose deltas were kept."""
        ...
