"""The rules for component classes, one by one; how a registry keeps what breaks them is tested there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqft_gptq import Gptq
from sqft_nls.adapter import Nls
from sqft_owl import Owl
from sqft_sparsegpt import SparseGpt
from sqft_sparsepeft import SparsePEFT
from sqft_uniform import Uniform
from sqft_wanda import Wanda

from sqft.components.kinds import Adapter, Allocator, Component, Merger, Quantizer, Scorer, Searcher
from sqft.components.validation import component_mistake
from sqft.types import Statistic


def a(base: type, **members: Any) -> type:
    return type("Mine", (base,), {"name": "mine", "__module__": __name__, "__doc__": "Mine.", **members})


def nothing(*_: Any) -> Any: ...


@pytest.mark.parametrize("component", [Wanda, SparseGpt, Owl, Uniform, Gptq, Nls, SparsePEFT])
def test_ours_keep_the_rules(component: type[Component]) -> None:
    assert component_mistake(component.kind, "hook", component) is None


@pytest.mark.parametrize(
    ("component", "missing"),
    [
        (a(Scorer), "score() or prune()"),
        (a(Scorer, score=nothing), None),
        (a(Scorer, prune=nothing), None),
        (a(Allocator), "allocate()"),
        (a(Allocator, allocate=nothing), None),
        (a(Uniform, needs=frozenset({Statistic.HESSIAN})), "measure(), which its `needs` asks for"),
        (a(Uniform, needs=frozenset({Statistic.HESSIAN}), measure=nothing), None),
        (a(Quantizer), "quantize()"),
        (a(Adapter), "delta(), sample(), space()"),
        (a(Adapter, space=nothing, sample=nothing), "delta()"),
        (a(Searcher), "search()"),
        (a(Merger), "combine()"),
    ],
)
def test_methods_that_a_kind_needs(component: Any, missing: str | None) -> None:
    expected = f"offers {component.kind} 'mine', which does not define {missing}" if missing else None
    assert component_mistake(component.kind, "hook", component) == expected


@pytest.mark.parametrize(
    ("component", "mistake"),
    [
        (lambda: Wanda(), "through hook, which takes classes derived from Scorer"),
        (lambda: Uniform, "offers 'Uniform' through hook, which takes classes derived from Scorer"),
        (lambda: a(Wanda, name="Mine"), "whose name is 'Mine'; a name is lower-case letters, digits and dashes"),
        (lambda: a(Wanda, name=3), "whose name is 3;"),
        (lambda: a(Wanda, needs={"hessian"}), "whose `needs` is {'hessian'}, expected a frozenset of Statistic"),
        (lambda: a(Wanda, needs=frozenset({"hessian"})), "expected a frozenset of Statistic"),
    ],
)
def test_other_rules(component: Callable[[], Any], mistake: str) -> None:
    assert mistake in str(component_mistake("scorer", "hook", component()))
