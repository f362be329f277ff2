"""`loss-guided`: ranks by the losses that training measured with them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from pydantic import Field

from sqft.api import Evaluate, RankConfig, SearchSpace, TrainingStep
from sqft_search.budget import Budgeted

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

    Array = NDArray[float64]

log = logging.getLogger("sqft")
PENALTIES = [10 ** (power / 4) for power in range(-8, 17)]
"""Penalties that are tried, in units of the mean squared singular value of the features."""
PERMUTATIONS = 999
ROUNDING = 1e-9
"""Relative to what they come from, smaller numbers are errors of rounding."""
TREND = 3
"""Numbers that describe the course of the loss: of 1, t and t²."""


class LossGuided(Budgeted):
    """The ranks with the lowest training loss, within a budget of parameters; no configuration is evaluated.

    Elastic training draws other ranks for each step, and measures a loss with them. These losses are explained by the
    course of training and an effect of each rank of each group, which add up: a ridge regression, its penalty by
    generalized cross-validation (Golub, Heath and Wahba, Technometrics, 1979). The first steps are left out, in which
    the deltas are still small. Batches differ much more than ranks do, so it takes many steps to see an effect. Where
    ranks given to the losses at random would explain them as well, this is the heuristic, and a warning says so.
    """

    name = "loss-guided"
    skip: float = Field(0.5, ge=0, lt=1, description="share of the training steps, from the first on, to leave out")
    significance: float = Field(
        0.05,
        gt=0,
        le=1,
        description="the largest p-value at which the effects are used: the probability that ranks drawn at random "
        "explain the losses as well; 1: whenever there are any",
    )

    def search(self, space: SearchSpace, evaluate: Evaluate, rng: Random) -> RankConfig:
        if all(len(group.ranks) == 1 for group in space.groups):
            return self.heuristic(space)
        steps = evaluate.training()
        steps = steps[math.ceil(self.skip * len(steps)) :]
        found = rank_effects(space, steps, rng)
        if found and found[1] <= self.significance:
            return self.within_budget(space, found[0])
        why = f"do not tell ranks apart (p = {found[1]:.2f})" if found else "say nothing of ranks"
        log.warning("loss-guided: the losses of the last %d training steps %s: it is the heuristic", len(steps), why)
        return self.heuristic(space)


def rank_effects(
    space: SearchSpace, steps: Sequence[TrainingStep], rng: Random
) -> tuple[list[list[float]], float] | None:
    """Estimate what each rank of each group adds to the loss.

    Args:
        space: the groups and their ranks.
        steps: of the training.
        rng: draws the permutations.

    Returns:
        The effects, and the probability that permuted losses are explained as well; None where the steps are too few,
        or nothing differs among them.
    """
    import numpy as np

    if len(steps) <= TREND + 1:
        return None
    features = np.array([
        [rank == other for group, rank in zip(space.groups, step.config.ranks, strict=True) for other in group.ranks]
        for step in steps
    ], dtype=float)  # fmt: skip
    losses = np.array([step.loss for step in steps])
    course = np.linalg.qr(np.linspace(-1, 1, len(steps))[:, None] ** np.arange(TREND))[0]

    def without_course(columns: Array) -> Array:
        rest: Array = columns - course @ (course.T @ columns)
        return rest

    seen = without_course(losses)
    U, S, Vt = np.linalg.svd(without_course(features), full_matrices=False)
    real = ROUNDING * len(steps) < S
    U, S, Vt = U[:, real], S[real], Vt[real]
    if not S.size or np.abs(seen).max() <= ROUNDING * np.abs(losses).max():
        return None
    draws = np.random.default_rng(rng.getrandbits(64))
    permuted = np.stack([draws.permutation(seen) for _ in range(PERMUTATIONS)], axis=1)
    scores, kept = _scores(U, S, np.column_stack([seen, without_course(permuted)]))
    best = scores.min(0)
    probability = float((best <= best[0]).mean())
    effects = Vt.T @ (kept[scores[:, 0].argmin()] / S * (U.T @ seen))
    ends = np.cumsum([len(group.ranks) for group in space.groups])[:-1]
    return [group.tolist() for group in np.split(effects, ends)], probability


def _scores(U: Array, S: Array, losses: Array) -> tuple[Array, Array]:
    """Return, for each penalty, the scores of generalized cross-validation [penalties, columns] of some columns of
    losses, and the share of each direction that is kept [penalties, directions].

    A score is relative to the one of no effects, the sum of squares / (1 − parameters / steps)².
    """
    import numpy as np

    steps = len(losses)
    total = np.square(losses).sum(0)
    along = np.square(U.T @ losses)
    penalties = np.array(PENALTIES)[:, None] * np.square(S).mean()
    kept = np.square(S) / (np.square(S) + penalties)
    left = total - along.sum(0) + np.square(1 - kept) @ along
    free = 1 - (TREND + kept.sum(1, keepdims=True)) / steps
    scores = left / np.square(free) / (total / (1 - TREND / steps) ** 2)
    scores[free[:, 0] <= 0] = np.inf
    return scores, kept
