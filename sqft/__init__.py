"""sqft: one small, fast model out of a large one. Sparse, low-precision, fine-tuned, merged.

>>> from sqft import Orchestrator, Recipe, Registry
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqft.components.registry import Registry
    from sqft.execution.orchestrator import Orchestrator
    from sqft.execution.run import Outcome, Run
    from sqft.planning.plan import Plan, Step
    from sqft.recipe import Recipe
    from sqft.store import Artifact

__version__ = "0.1.0"
__all__ = ["Artifact", "Orchestrator", "Outcome", "Plan", "Recipe", "Registry", "Run", "Step", "__version__"]

_HOMES = {
    "Artifact": "store.artifacts",
    "Orchestrator": "execution.orchestrator",
    "Outcome": "execution.run",
    "Plan": "planning.plan",
    "Recipe": "recipe.recipe",
    "Registry": "components.registry",
    "Run": "execution.run",
    "Step": "planning.plan",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"sqft.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sqft' has no attribute '{name}'")
