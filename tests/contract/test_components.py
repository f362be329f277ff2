"""Every registered component passes the suite that plugin authors run; and the suite catches breaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sqft_hf import HuggingFace
from sqft_nls.searchers import Heuristic
from sqft_sparsepeft import SparsePEFT
from sqft_uniform import Uniform
from sqft_wanda import Wanda

from sqft import Registry
from sqft.errors import ContractError
from sqft.modeling.load import FolderReader
from sqft.testing import check, check_exporter

ENTRIES = [entry for entry in Registry.discover().entries() if entry.provider.source.startswith("sqft ")]


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_ours_keep_the_contract(entry: Any) -> None:
    check(entry.component())


def test_nothing_is_missing() -> None:
    assert {entry.component.kind for entry in ENTRIES} == {
        "scorer", "allocator", "adapter", "searcher", "merger", "exporter",
    }  # fmt: skip
    assert len(ENTRIES) == 14


def test_the_exporter(model_folder: Path, tmp_path: Path) -> None:
    check_exporter(HuggingFace(dtype="bfloat16"), FolderReader(model_folder), tmp_path)
    reader, source = FolderReader(tmp_path), FolderReader(model_folder)
    for name in source.names():
        assert torch.equal(reader.tensor(name), source.tensor(name).bfloat16())


def changing(weight: Any) -> Any:
    return weight.abs_()


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda weight: weight.abs().T, "scores of shape"),
        (lambda weight: weight.abs() * float("nan"), "not finite"),
        (lambda weight: torch.rand_like(weight), "other scores for the same weight"),
        (lambda weight: weight.long(), "floating"),
        (lambda weight: None, "returned NoneType"),
        (changing, "in place"),
    ],
)
def test_a_bad_scorer_is_caught(score: Any, message: str) -> None:
    class Bad(Wanda):
        """Bad."""

        def score(self, weight: Any, stats: Any) -> Any:
            return score(weight)

    with pytest.raises(ContractError, match=message):
        check(Bad())


@pytest.mark.parametrize(
    ("combine", "message"),
    [
        (lambda base, delta: base.weight + delta, "zeros of the base nonzero"),
        (lambda base, delta: base.weight + delta.mean() * (base.weight != 0), "block of rows"),
        (lambda base, delta: base.weight.add_(delta), "in place"),
        (lambda base, delta: base.weight * (1 + 0 * delta), "derivative"),
    ],
)
def test_a_bad_merger_is_caught(combine: Any, message: str) -> None:
    class Bad(SparsePEFT):
        """Bad."""

        def combine(self, base: Any, delta: Any) -> Any:
            return combine(base, delta)

    with pytest.raises(ContractError, match=message):
        check(Bad())


def test_other_breaches_are_caught() -> None:
    class Greedy(Uniform):
        """Greedy."""

        def allocate(self, linears: Any, sparsity: Any) -> Any:
            return {linear.name: sparsity / 2 for linear in linears}

    class Silent(Heuristic):
        def search(self, space: Any, evaluate: Any, rng: Any) -> Any:
            return space.choice([0] * len(space.groups))

    class Chatty(Heuristic):
        """Chatty."""

        def search(self, space: Any, evaluate: Any, rng: Any) -> Any:
            choice = super().search(space, evaluate, rng)
            evaluate(choice)
            return choice

    with pytest.raises(ContractError, match=r"where 0\.5 was asked for"):
        check(Greedy())
    with pytest.raises(ContractError, match="no docstring"):
        check(Silent())
    with pytest.raises(ContractError, match="evaluates, but says"):
        check(Chatty())
