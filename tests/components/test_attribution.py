"""A component that raises is named with its provider and its line; an error of ours is not laid at its door."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sqft_nls.searchers import Maximal
from sqft_sparsepeft import SparsePEFT

from sqft import Orchestrator, Recipe, Registry
from sqft.api import LinearStats, Merger, Scorer, hookimpl
from sqft.errors import PluginError


class Dividing(Scorer):
    """Raises by itself."""

    name = "dividing"

    def score(self, weight: Any, stats: LinearStats) -> Any:
        return weight / (1 // 0)


class Multiplying(Scorer):
    """Raises inside torch."""

    name = "multiplying"

    def score(self, weight: Any, stats: LinearStats) -> Any:
        return weight @ torch.ones(3)


class Backward(SparsePEFT):
    """Raises in backward only, below Trainer and autograd."""

    name = "backward"

    def derivative(self, base: Any, delta: Any, grad: Any) -> Any:
        raise KeyError("no derivative")


class Asking(Maximal):
    """Innocent: it asks the core, and the core raises."""

    name = "asking"
    evaluates = True

    def search(self, space: Any, evaluate: Any, rng: Any) -> Any:
        evaluate(super().search(space, evaluate, rng))


@pytest.fixture
def registry() -> Registry:
    registry = Registry.discover()
    offers: dict[str, Any] = {
        "sqft_scorers": lambda: [Dividing, Multiplying],
        "sqft_mergers": lambda: [Backward],
        "sqft_searchers": lambda: [Asking],
    }
    registry.add(SimpleNamespace(**{name: hookimpl(offer) for name, offer in offers.items()}), "mine", "mine 1.2")
    return registry


@pytest.mark.parametrize(
    ("section", "kind", "name", "message"),
    [
        ("sparsify", Scorer, "dividing", "ZeroDivisionError: "),
        ("sparsify", Scorer, "multiplying", "RuntimeError: "),
        ("finetune", Merger, "backward", "KeyError: 'no derivative'"),
    ],
)
def test_a_component_that_raises(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, section: str, kind: Any, name: str, message: str
) -> None:
    raw[section][kind.kind] = name
    orchestrator = Orchestrator(registry, tmp_path)
    with pytest.raises(PluginError) as caught:
        orchestrator.run(orchestrator.plan(Recipe.parse(raw)))
    said = str(caught.value)
    assert said.startswith(f"{kind.kind} '{name}' (mine 1.2) raised {message}")
    assert f"{__file__}:" in said
    log = Path(said.rpartition(" ")[2])
    assert "Traceback" in log.read_text() and message in log.read_text()
    assert not list((tmp_path / "artifacts").glob(f"{section}-*"))


def test_an_error_of_ours_keeps_its_traceback(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw["search"]["searcher"] = "asking"
    # A bug of ours, below the searcher's question.
    monkeypatch.setattr("sqft.modeling.evaluation.measures.Collator", None)
    orchestrator = Orchestrator(registry, tmp_path)
    with pytest.raises(TypeError, match="not callable"):
        orchestrator.run(orchestrator.plan(Recipe.parse(raw)))
