"""A sweep: one recipe with every combination of some settings, run through one store."""

from sqft.tools.sweep.definition import Cell, Sweep
from sqft.tools.sweep.results import DIFFERENCE_HEADS, CellDifference, CellResult, SweepResults
from sqft.tools.sweep.running import plan_cells, run_sweep

__all__ = [
    "DIFFERENCE_HEADS",
    "Cell",
    "CellDifference",
    "CellResult",
    "Sweep",
    "SweepResults",
    "plan_cells",
    "run_sweep",
]
