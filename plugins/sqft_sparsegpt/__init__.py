"""SparseGPT (Frantar and Alistarh, ICML 2023): a scorer that compensates for the weights it prunes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sqft.api import LinearStats, Scorer, Select, StageError, Statistic, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class SparseGpt(Scorer):
    """SparseGPT (Frantar and Alistarh, ICML 2023): the kept weights compensate for the pruned ones."""

    name = "sparsegpt"
    needs = frozenset({Statistic.HESSIAN})
    damp: float = Field(0.01, gt=0, le=1e6, description="added to the Hessian's diagonal, as a fraction of damp_by")
    damp_by: Literal["mean", "input"] = Field(
        "mean", description="what damp is a fraction of: the mean of the diagonal, or each input's own entry"
    )
    block: int = Field(128, ge=1, description="number of inputs that are pruned together; with N:M, a multiple of M")

    def prune(self, weight: Tensor, stats: LinearStats, select: Select) -> tuple[Tensor, Tensor]:
        from sqft.kernels.finite import all_finite
        from sqft.kernels.hessian import inverse_factor
        from sqft_sparsegpt.pruner import sparsegpt

        if stats.hessian is None or not all_finite(stats.hessian):
            raise StageError("sparsegpt needs a finite Hessian; use float32, or other calibration text")
        try:
            U = inverse_factor(stats.hessian, self.damp, self.damp_by)
        except ValueError as error:
            raise StageError(str(error)) from error
        return sparsegpt(weight, U, select, self.block)


@hookimpl
def sqft_scorers() -> Iterator[type[Scorer]]:
    yield SparseGpt
