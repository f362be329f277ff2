"""Sums over calibration tokens, float32 whatever the model's precision."""

from __future__ import annotations

from torch import Tensor

from sqft.errors import StageError
from sqft.types import LinearStats, Statistic


class InputStatistics:
    """Sums over one layer's input X [tokens, in]: those of the statistics that are needed."""

    def __init__(self, needs: frozenset[Statistic]) -> None:
        self.needs = needs
        self.tokens = 0
        self.input_sq_sum: Tensor | None = None  # [in]
        self.hessian: Tensor | None = None  # [in, in]

    def add(self, inputs: Tensor) -> None:
        """Add a batch of inputs [..., in]."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()  # [tokens, in]
        self.tokens += x.shape[0]
        if Statistic.INPUT_NORM in self.needs:
            norm = x.square().sum(0)
            self.input_sq_sum = norm if self.input_sq_sum is None else self.input_sq_sum.add_(norm)
        if Statistic.HESSIAN in self.needs:
            self.hessian = x.T @ x if self.hessian is None else self.hessian.addmm_(x.T, x)

    def result(self, name: str) -> LinearStats:
        """Return the finished sums.

        Raises:
            StageError: when no token reached the layer called `name`.
        """
        if not self.tokens:
            raise StageError(f"calibration sent no token through {name}; it cannot be scored")
        return LinearStats(self.tokens, self.input_sq_sum, self.hessian)
