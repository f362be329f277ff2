"""Run the quickstart from Python, with a scorer of your own that is not installed as a package.

python examples/orchestrate.py        (after `make quickstart`, which downloads the model and writes the data)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sqft import Orchestrator, Registry
from sqft.api import LinearStats, Scorer, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class Squared(Scorer):
    """Squared weight times squared input norm: other scores than wanda's, but the same masks."""

    name = "squared"

    def score(self, weight: Tensor, stats: LinearStats) -> Tensor:
        return weight.square() * stats.input_sq_sum


@hookimpl
def sqft_scorers() -> Iterator[type[Scorer]]:
    yield Squared


if __name__ == "__main__":
    recipe = Path(__file__).parent / "recipes" / "quickstart.json"
    registry = Registry.discover()
    registry.add(sys.modules[__name__], name="orchestrate")
    orchestrator = Orchestrator(registry, store="store", device="cpu")
    plan = orchestrator.load(recipe, ["sparsify.scorer=squared", "name=from-python"])
    print(plan)
    run = orchestrator.run(plan, until="sparsify")
    print(run["sparsify"].report["sparsity"], run["sparsify"].load_model().num_parameters())
