"""The effects are those of ridge regression as its normal equations give them; nothing is concluded from noise."""

from __future__ import annotations

import logging
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqft_search.loss_guided import PENALTIES, LossGuided, rank_effects

from sqft.api import RankConfig, RankGroup, SearchSpace, StageError, TrainingStep
from sqft.testing import check


def space_of(*lengths: int, cost: int = 1) -> SearchSpace:
    ranks = (tuple(range(4 * n, 0, -4)) for n in lengths)
    return SearchSpace(tuple(RankGroup(f"g{i}", r, (f"l{i}",), cost) for i, r in enumerate(ranks)))


def drawn(space: SearchSpace, steps: int, rng: Random) -> list[RankConfig]:
    return [RankConfig(tuple(rng.choice(group.ranks) for group in space.groups)) for _ in range(steps)]


def trained(space: SearchSpace, losses: list[float], configs: list[RankConfig]) -> SearchSpace:
    return replace(space, training=tuple(map(TrainingStep, configs, losses)))


def search(searcher: LossGuided, space: SearchSpace) -> RankConfig:
    def evaluate(*_: object) -> float:
        raise AssertionError("it evaluates nothing")

    return searcher.search(space, evaluate, Random(0))  # type: ignore[arg-type]


def ridge(space: SearchSpace, configs: list[RankConfig], losses: list[float]) -> np.ndarray:
    """The slow, obvious version: for each penalty the normal equations, in which the course of training is not
    penalized, and the score of generalized cross-validation by the complete hat matrix."""
    steps, groups = len(losses), space.groups
    pairs = [(i, rank) for i, group in enumerate(groups) for rank in group.ranks]
    features = np.array([[float(config.ranks[i] == rank) for i, rank in pairs] for config in configs])
    times = np.linspace(-1, 1, steps)
    course = np.stack([np.ones(steps), times, times**2], axis=1)
    project = np.eye(steps) - course @ np.linalg.inv(course.T @ course) @ course.T
    values = np.linalg.eigvalsh(project @ features @ features.T @ project)
    unit = values[values > 1e-12].mean()
    columns = np.hstack([course, features])
    found = []
    for penalty in PENALTIES:
        weights = np.diag([0.0] * 3 + [penalty * unit] * len(pairs))
        solve = np.linalg.solve(columns.T @ columns + weights, columns.T)
        left = losses - columns @ solve @ losses
        free = 1 - np.trace(columns @ solve) / steps
        found.append(((left @ left / free**2) if free > 0 else np.inf, (solve @ losses)[3:]))
    effects: np.ndarray = min(found, key=lambda pair: pair[0])[1]
    return effects


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(8, 60), st.integers(0, 2**32))
def test_the_effects_are_those_of_the_normal_equations(lengths: list[int], steps: int, seed: int) -> None:
    space, rng = space_of(*lengths), Random(seed)
    configs = drawn(space, steps, rng)
    losses = [rng.gauss() + sum(config.ranks) / 8 + 10 / (1 + step) for step, config in enumerate(configs)]
    effects, probability = rank_effects(space, configs, losses, Random(0))
    assert [len(group) for group in effects] == lengths and 0 < probability <= 1
    if len({config.ranks for config in configs}) > 1:
        np.testing.assert_allclose(np.concatenate(effects), ridge(space, configs, losses), rtol=1e-6, atol=1e-8)


def test_it_finds_the_best_ranks_behind_noise_and_the_course_of_training() -> None:
    space, rng = space_of(5, 5, 5, 5), Random(1)
    best = RankConfig((20, 4, 12, 8))
    configs = drawn(space, 2000, rng)
    away = [sum(abs(a - b) for a, b in zip(config.ranks, best.ranks, strict=True)) / 40 for config in configs]
    losses = [away[t] * min(1, t / 1000) + rng.gauss(0, 0.3) + 3 * 0.998**t for t in range(2000)]
    known = trained(space, losses, configs)
    assert search(LossGuided(budget=1000), known) == best
    # No more parameters than the heuristic's 48, so that something is given up.
    found = search(LossGuided(budget=36), known)
    assert space.parameters(found) <= 36 and found.ranks[1] == 4


def test_random_losses_are_taken_for_ranks_as_seldom_as_it_says() -> None:
    """In 400 trainings whose losses have nothing to do with ranks, p is below 0.05 in 20, with a deviation of 4.4."""
    space, found = space_of(3, 3, 3, 3, 3, 3), 0
    for seed in range(400):
        rng = Random(seed)
        losses = [rng.gauss() + 2 * 0.9**t for t in range(40)]
        found += rank_effects(space, drawn(space, 40, rng), losses, rng)[1] <= 0.05
    assert 5 <= found <= 40


def test_where_losses_say_nothing_it_is_the_heuristic(caplog: pytest.LogCaptureFixture) -> None:
    space, rng = space_of(3, 3, 3), Random(3)
    known = trained(space, [rng.gauss() for _ in range(60)], drawn(space, 60, rng))
    with caplog.at_level(logging.WARNING):
        assert search(LossGuided(), known) == RankConfig((8, 8, 8))
    assert "the losses of 30 training steps do not tell the ranks apart" in caplog.text
    assert search(LossGuided(significance=1), known) != RankConfig((8, 8, 8))


@pytest.mark.parametrize("steps", [0, 1, 4, 5])
def test_hardly_any_steps(steps: int) -> None:
    space, rng = space_of(3, 2), Random(0)
    known = trained(space, [1.0] * steps, drawn(space, steps, rng))
    assert search(LossGuided(skip=0), known) == RankConfig((8, 8))


def test_a_space_without_a_choice() -> None:
    space, rng = space_of(1, 1), Random(0)
    known = trained(space, [rng.gauss() for _ in range(20)], drawn(space, 20, rng))
    assert search(LossGuided(significance=1), known) == RankConfig((4, 4))


def test_a_budget_below_the_smallest_ranks() -> None:
    space, rng = space_of(2, 2, cost=10), Random(0)
    known = trained(space, [rng.gauss() for _ in range(20)], drawn(space, 20, rng))
    with pytest.raises(StageError, match="loss-guided: the smallest ranks have 80 parameters, the budget is 79"):
        search(LossGuided(significance=1, budget=79), known)


def test_it_keeps_the_contract() -> None:
    check(LossGuided())
    check(LossGuided(significance=1))
    assert not LossGuided().needs_records()
