"""Two finished runs of a tiny recipe, which differ in sparsity."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.execution.run import Run

Made = tuple[Run, Run]


@pytest.fixture(scope="session")
def made(tiny_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The runs `tiny` (50 % zeros) and `sparser` (75 %), in one store."""
    orchestrator = Orchestrator(Registry.discover(), tmp_path_factory.mktemp("runs") / "store")
    runs = []
    for name, sparsity in (("tiny", 0.5), ("sparser", 0.75)):
        sparsify = {"scorer": "wanda", "sparsity": sparsity, "updater": "least-squares"}
        raw = copy.deepcopy(tiny_recipe) | {"name": name, "sparsify": sparsify}
        runs.append(orchestrator.run(orchestrator.plan(Recipe.parse(raw))))
    return runs[0], runs[1]


@pytest.fixture(scope="session")
def made_store(made: Made) -> Path:
    return made[0].folder.parents[1]
