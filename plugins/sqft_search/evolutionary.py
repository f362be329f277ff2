"""`evolutionary`: NSGA-II, the quality against the number of parameters."""

from __future__ import annotations

from importlib.util import find_spec
from random import Random
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from sqft.api import Evaluate, RankConfig, Searcher, SearchSpace, StageError, TimeLimit

if TYPE_CHECKING:
    import optuna

REPEATS = 10
"""Generations without a new configuration, after which a search ends."""


class Evolutionary(Searcher):
    """The best configuration that NSGA-II (Deb et al., 2002, by optuna) finds for quality against parameters.

    The first generation is the heuristic, the smallest ranks and configurations drawn uniformly. Of all that were
    evaluated, the one of the best quality with at most `budget` parameters is chosen, and of equals the smallest. The
    step's report has the Pareto front. The first two are evaluated whatever time that takes.
    """

    name = "evolutionary"
    evaluations: int = Field(4096, ge=1, description="records to evaluate at most, over all configurations")
    samples: int | None = Field(64, ge=1, description="number of validation records; null uses all")
    seconds: TimeLimit = None
    population: int = Field(16, ge=2, description="configurations in a generation")
    budget: int | None = Field(None, ge=1, description="the chosen adapter's parameters at most; null: any number")

    @model_validator(mode="after")
    def _is_installed(self) -> Evolutionary:
        if find_spec("optuna") is None:
            raise ValueError("searcher 'evolutionary' needs the package optuna: pip install 'sqft[search]'")
        return self

    def search(self, space: SearchSpace, evaluate: Evaluate, rng: Random) -> RankConfig:
        import optuna

        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            sampler = optuna.samplers.NSGAIISampler(population_size=self.population, seed=rng.getrandbits(32))
            study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
            for indices in (space.median(), [len(group.ranks) - 1 for group in space.groups]):
                study.enqueue_trial({str(group): index for group, index in enumerate(indices)})
            found = self._evolve(study, space, evaluate)
        finally:
            optuna.logging.set_verbosity(verbosity)
        within = [choice for choice in found if self.budget is None or space.parameters(choice) <= self.budget]
        if not within:
            least = space.parameters(min(found, key=space.parameters))
            raise StageError(
                f"evolutionary: nothing within the budget was evaluated, the smallest has {least} parameters"
            )
        return max(within, key=lambda choice: (found[choice], -space.parameters(choice)))

    def _evolve(self, study: optuna.Study, space: SearchSpace, evaluate: Evaluate) -> dict[RankConfig, float]:
        """Return the quality of everything that was evaluated; one that is met again costs nothing."""
        found: dict[RankConfig, float] = {}
        size = min(self.samples or self.evaluations, self.evaluations)
        left, again = self.evaluations, 0
        while left >= size and again < REPEATS * self.population:
            if len(found) > 1 and not evaluate.within(self.seconds):  # the smallest ranks fit any budget
                break
            trial = study.ask()
            chosen = (trial.suggest_int(str(i), 0, len(group.ranks) - 1) for i, group in enumerate(space.groups))
            choice = space.choice(tuple(chosen))
            again = again + 1 if choice in found else 0
            if choice not in found:
                values = evaluate.each(choice, size)
                size = len(values)  # there may be fewer
                left -= size
                found[choice] = sum(value.total for value in values) / sum(value.weight for value in values)
            study.tell(trial, (found[choice], space.parameters(choice)))
        return found
