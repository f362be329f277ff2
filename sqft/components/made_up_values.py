"""Search spaces, and made-up values of their configurations, with which the contract suite tries a searcher."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from sqft.components import checks
from sqft.errors import ContractError
from sqft.ranks import RankConfig, RankGroup, RecordValue, SearchSpace, TrainingStep


def _space(*lengths: int) -> SearchSpace:
    ranks = (tuple(range(2 * n, 0, -2)) for n in lengths)
    return SearchSpace(tuple(RankGroup(f"g{i}", r, (f"l{i}",), 8, tuple(range(len(r)))) for i, r in enumerate(ranks)))


SPACES = (_space(1, 2, 3, 4, 1, 2), _space(1), _space(*[5] * 40))
"""A mixed one, one without a choice to make, and one far too large to list."""
RECORDS = 80
STEPS = 40
"""Of a made-up training, whose losses have nothing to do with its ranks."""
MOST_QUESTIONS = 100_000
"""A searcher that asks more of so few records will not end."""


@dataclass(frozen=True)
class MadeUpValues:
    """A rugged `Evaluate`: a value for each configuration and record; to be asked for records that are new takes a
    second. It keeps the questions, in their order; those for gradients are without a configuration."""

    label: str
    space: SearchSpace
    gradients: bool
    """Whether the searcher says that it needs them."""
    asked: list[tuple[RankConfig | None, int | None]] = field(default_factory=list)
    known: dict[RankConfig, int] = field(default_factory=dict)
    """How many records of a configuration were asked for."""
    trials: list[RankConfig] = field(default_factory=list)
    """The configuration of each question for records that were new."""

    def __call__(self, choice: RankConfig, samples: int | None = None) -> float:
        values = self.each(choice, samples)
        return sum(value.total for value in values) / len(values)

    def each(self, choice: RankConfig, samples: int | None = None) -> list[RecordValue]:
        checks.check_question(self.label, self.space, choice, samples)
        self.asked.append((choice, samples))
        if len(self.asked) > MOST_QUESTIONS:
            raise ContractError(f"{self.label} asked {MOST_QUESTIONS:,} questions, and did not end")
        count = min(samples or RECORDS, RECORDS)
        if count > self.known.get(choice, 0):
            self.known[choice] = count
            self.trials.append(choice)
        return [RecordValue(Random(f"{choice.ranks} {record}").random(), 1) for record in range(count)]

    def within(self, seconds: float | None) -> bool:
        return seconds is None or len(self.trials) < seconds

    def first_order(self, samples: int | None = None) -> list[list[float]]:
        checks.check_question_of_gradients(self.label, self.gradients, samples)
        self.asked.append((None, samples))
        return [[self._change(group, rank, samples) for rank in group.ranks] for group in self.space.groups]

    def training(self) -> list[TrainingStep]:
        rng = Random(0)
        configs = (RankConfig(tuple(rng.choice(group.ranks) for group in self.space.groups)) for _ in range(STEPS))
        return [TrainingStep(config, rng.random()) for config in configs]

    def _change(self, group: RankGroup, rank: int, samples: int | None) -> float:
        return 0.0 if rank == max(group.ranks) else Random(f"{samples} {group.name} {rank}").gauss()
