"""The kept weights that best restore a pruned layer's output, by least squares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sqft.api import LinearStats, StageError, Statistic, Updater, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class LeastSquares(Updater):
    """The kept weights for which the layer's output changes least on the calibration text: ‖(W' − W) X‖² is minimal."""

    name = "least-squares"
    needs = frozenset({Statistic.HESSIAN})
    damping: float = Field(
        0.5, ge=0, le=1e6, description="weight of the penalty that pulls kept weights to their old values; 0: none"
    )
    damping_by: Literal["input", "mean"] = Field(
        "input",
        description="what the penalty of an input's weights is a multiple of: its own sum of squares, or the mean of "
        "all inputs'",
    )
    steps: int = Field(12, ge=1, description="steps of conjugate gradients, if they do not converge before")

    def update(self, weight: Tensor, mask: Tensor, stats: LinearStats) -> Tensor:
        from sqft.kernels.finite import all_finite
        from sqft_least_squares.solver import solve

        H = stats.hessian
        if H is None or not all_finite(H):
            raise StageError("least-squares needs a finite Hessian; use float32, or other calibration text")
        diagonal = H.diagonal()
        by = diagonal if self.damping_by == "input" else diagonal.mean().expand_as(diagonal)
        return solve(weight, mask, H, self.damping * by, self.steps)


@hookimpl
def sqft_updaters() -> Iterator[type[Updater]]:
    yield LeastSquares
