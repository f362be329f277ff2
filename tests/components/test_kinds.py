"""Kinds of component: frozen options, and what a component gets when it does not define a method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from sqft.components.kinds import KINDS, Allocator, Component, Merger, Quantizer, Scorer
from sqft.types import BaseKind, BaseWeight, LinearShape, LinearStats


class Magnitude(Scorer):
    """Magnitude."""

    name = "magnitude"
    power: float = Field(1.0, gt=0)

    def score(self, weight: Tensor, stats: LinearStats) -> Tensor:
        return weight.abs() ** self.power


class Squared(Merger):
    """W + Δ²."""

    name = "squared"
    bases = frozenset(BaseKind)

    def combine(self, base: BaseWeight, delta: Tensor) -> Tensor:
        return base.weight + delta**2


def test_kinds_by_their_word() -> None:
    assert all(cls.kind == word and issubclass(cls, Component) and cls.__doc__ for word, cls in KINDS.items())


@pytest.mark.parametrize("options", [{"power": 0}, {"power": float("nan")}, {"powers": 2}, {"power": "x"}])
def test_options_are_validated(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Magnitude(**options)


def test_a_component_has_no_state() -> None:
    scorer = Magnitude(power=2)
    with pytest.raises(ValidationError, match="frozen"):
        scorer.power = 3
    with pytest.raises(ValidationError):
        scorer.seen = 1
    assert hash(scorer) == hash(Magnitude(power=2)) and scorer == Magnitude(power=2)


def test_by_default_pruning_keeps_what_is_selected_by_score() -> None:
    weight, asked = torch.tensor([[3.0, -4.0, 0.5]]), list[Tensor]()

    def select(scores: Tensor) -> Tensor:
        asked.append(scores)
        return torch.tensor([[True, False, True]])

    pruned, mask = Magnitude(power=2).prune(weight, LinearStats(0), select)
    assert [scores.tolist() for scores in asked] == [[[9.0, 16.0, 0.25]]]
    assert pruned.tolist() == [[3.0, 0.0, 0.5]] and mask.tolist() == [[True, False, True]]
    assert weight.tolist() == [[3.0, -4.0, 0.5]]


def test_what_is_not_defined_is_named() -> None:
    class Idle(Scorer):
        """Idle."""

        name = "idle"

    class Measureless(Allocator):
        """Measureless."""

        name = "measureless"

        def allocate(self, linears: Any, sparsity: float, measured: Any) -> Any: ...

    with pytest.raises(NotImplementedError, match="scorer 'idle'"):
        Idle().score(torch.zeros(1, 1), LinearStats(0))
    with pytest.raises(NotImplementedError, match="allocator 'measureless'"):
        Measureless().measure({}, {})
    assert Quantizer.incompatibility(None, LinearShape("q", 3, 5)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("grad_mode", [True, False])
def test_by_default_a_derivative_is_that_of_autograd(grad_mode: bool) -> None:
    base, delta = BaseWeight(torch.zeros(2, 2)), torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    grad = torch.tensor([[1.0, 1.0], [5.0, -1.0]])
    with torch.set_grad_enabled(grad_mode):
        result = Squared().derivative(base, delta, grad)
    assert torch.equal(result, 2 * delta * grad) and not result.requires_grad
    assert not Squared().learns_scales()
