"""The effects are those of ridge regression as its normal equations give them; nothing is concluded from noise."""

from __future__ import annotations

import logging
from random import Random
from types import SimpleNamespace

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


def trained(configs: list[RankConfig], losses: list[float]) -> list[TrainingStep]:
    return list(map(TrainingStep, configs, losses))


def search(searcher: LossGuided, space: SearchSpace, steps: list[TrainingStep]) -> RankConfig:
    """Search with an `Evaluate` that evaluates nothing."""
    return searcher.search(space, SimpleNamespace(training=lambda: steps), Random(0))  # type: ignore[arg-type]


def effects_of(space: SearchSpace, steps: list[TrainingStep]) -> tuple[list[list[float]], float]:
    found = rank_effects(space, steps, Random(0))
    assert found
    return found


def ridge(space: SearchSpace, trained: list[TrainingStep]) -> np.ndarray:
    """The slow, obvious version: for each penalty the normal equations, in which the course of training is not
    penalized, and the score of generalized cross-validation by the complete hat matrix."""
    steps, groups, losses = len(trained), space.groups, np.array([step.loss for step in trained])
    pairs = [(i, rank) for i, group in enumerate(groups) for rank in group.ranks]
    features = np.array([[float(step.config.ranks[i] == rank) for i, rank in pairs] for step in trained])
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
    known = trained(configs, [rng.gauss() + sum(c.ranks) / 8 + 10 / (1 + i) for i, c in enumerate(configs)])
    if len(set(configs)) == 1:
        assert rank_effects(space, known, rng) is None
        return
    effects, probability = effects_of(space, known)
    assert [len(group) for group in effects] == lengths and 0 < probability <= 1
    np.testing.assert_allclose(np.concatenate(effects), ridge(space, known), rtol=1e-6, atol=1e-8)


def test_it_finds_the_best_ranks_behind_noise_and_the_course_of_training() -> None:
    space, rng = space_of(5, 5, 5, 5), Random(1)
    best = RankConfig((20, 4, 12, 8))
    configs = drawn(space, 2000, rng)
    away = [sum(abs(a - b) for a, b in zip(config.ranks, best.ranks, strict=True)) / 40 for config in configs]
    known = trained(configs, [away[t] * min(1, t / 1000) + rng.gauss(0, 0.3) + 3 * 0.998**t for t in range(2000)])
    assert search(LossGuided(budget=1000), space, known) == best
    # The best has 44 parameters, and each one less adds as much to the loss: no more is given up than has to be.
    found = search(LossGuided(budget=36), space, known)
    assert space.parameters(found) == 36
    assert sum(abs(a - b) for a, b in zip(found.ranks, best.ranks, strict=True)) == 8


@pytest.mark.parametrize(("lengths", "steps"), [([3] * 6, 40), ([5] * 24, 20), ([3] * 3, 8)])
def test_random_losses_are_taken_for_ranks_as_seldom_as_it_says(lengths: list[int], steps: int) -> None:
    """Of 400 trainings whose losses have nothing to do with ranks, p is at most 0.05 in 20, with a deviation of 4.4."""
    space, found = space_of(*lengths), 0
    for seed in range(400):
        rng = Random(seed)
        known = trained(drawn(space, steps, rng), [rng.gauss() + 2 * 0.9**t for t in range(steps)])
        found += effects_of(space, known)[1] <= 0.05
    assert 7 <= found <= 33


def test_where_losses_say_nothing_it_is_the_heuristic(caplog: pytest.LogCaptureFixture) -> None:
    """Or what fits into the budget of the ranks below."""
    space, rng = space_of(3, 3, 2), Random(3)
    known = trained(drawn(space, 60, rng), [rng.gauss() for _ in range(60)])
    with caplog.at_level(logging.WARNING):
        assert search(LossGuided(), space, known) == RankConfig((8, 8, 8))
    assert "the losses of the last 30 training steps do not tell ranks apart (p = " in caplog.text
    assert search(LossGuided(budget=24), space, known) == RankConfig((8, 8, 8))
    assert search(LossGuided(budget=23), space, known) == RankConfig((4, 4, 4))
    assert search(LossGuided(significance=1), space, known) != RankConfig((8, 8, 8))


@pytest.mark.parametrize("losses", [[], [1.0], [1.0, 0.5, 2.0, 3.0], [1.0] * 20, [0.1 * i for i in range(20)]])
def test_nothing_to_explain(losses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """Then `significance` does not matter."""
    space, rng = space_of(3, 2), Random(0)
    known = trained(drawn(space, len(losses), rng), losses)
    with caplog.at_level(logging.WARNING):
        assert search(LossGuided(skip=0, significance=1), space, known) == RankConfig((8, 8))
    assert (
        f"the losses of the last {len(losses)} training steps say nothing of ranks: it is the heuristic" in caplog.text
    )


def test_a_space_without_a_choice(caplog: pytest.LogCaptureFixture) -> None:
    space, rng = space_of(1, 1), Random(0)
    known = trained(drawn(space, 20, rng), [rng.gauss() for _ in range(20)])
    assert search(LossGuided(), space, known) == RankConfig((4, 4)) and not caplog.text
    with pytest.raises(StageError, match="the smallest ranks have 8 parameters, the budget is 7"):
        search(LossGuided(budget=7), space, known)


@pytest.mark.parametrize("significance", [0.05, 1])
def test_a_budget_below_the_smallest_ranks(significance: float) -> None:
    space, rng = space_of(2, 2, cost=10), Random(0)
    known = trained(drawn(space, 20, rng), [rng.gauss() for _ in range(20)])
    with pytest.raises(StageError, match="loss-guided: the smallest ranks have 80 parameters, the budget is 79"):
        search(LossGuided(significance=significance, budget=79), space, known)


def test_it_keeps_the_contract() -> None:
    check(LossGuided())
    check(LossGuided(significance=1))
    assert not LossGuided().needs_records()
