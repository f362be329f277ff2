"""sqft: one small, fast model out of a large one. Sparse, low-precision, fine-tuned, merged.

>>> from sqft import Orchestrator, Recipe, Registry
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqft.orchestrator import Orchestrator, Run
    from sqft.recipe import Recipe
    from sqft.registry import Registry

__version__ = "0.1.0"
__all__ = ["Orchestrator", "Recipe", "Registry", "Run", "__version__"]

_HOMES = {"Orchestrator": "orchestrator", "Run": "orchestrator", "Recipe": "recipe", "Registry": "registry"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"sqft.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sqft' has no attribute '{name}'")
