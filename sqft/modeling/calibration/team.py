"""Processes that calibrate together: each runs its share of the windows, and the first one has the sums of all.

The first process alone computes what a layer becomes, and the others are given the result. So nothing has to come out
equal in several processes, and no process needs more than the sums of its own windows besides what a walk needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from sqft.errors import StageError
from sqft.modeling.calibration.statistics import InputStatistics
from sqft.types import Statistic

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process among `count`, inside a process group of torch's that passes tensors on the CPU."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share_of(self, windows: Tensor) -> Tensor:
        """Return this process's part of the windows [samples, length], of which there are at least `count`."""
        return windows[self.rank :: self.count]

    def agreed(self, value: T) -> T:
        """Return the first process's value in all of them."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]

    def assert_same(self, value: object, what: str) -> None:
        """Check that all processes have the same value.

        Raises:
            StageError: in a process whose value is not the first one's.
        """
        if self.agreed(value) != value:
            raise StageError(
                f"process {self.rank} sees other {what} than the first process; all need the same store, and if they "
                "have it, run the same command again"
            )

    def give(self, linear: nn.Linear) -> None:
        """Give all processes the weight that the layer has in the first one."""
        if self.count > 1:
            weight = linear.weight.data.cpu().contiguous()
            distributed.broadcast(weight, 0)
            linear.weight.data.copy_(weight)

    def sum(
        self, observed: Mapping[str, InputStatistics], layers: Mapping[str, nn.Linear]
    ) -> dict[str, InputStatistics]:
        """Add up the statistics of all processes.

        Args:
            observed: those of this process by layer; several layers may have one object.
            layers: the layers, the same ones in the same order in all processes.

        Returns:
            Theirs by layer: the number of tokens in every process, and the sums [in] and [in, in] in the first one.
        """
        if self.count == 1:
            return dict(observed)
        first: dict[int, int] = {}
        own = [first.setdefault(id(observed[name]), index) for index, name in enumerate(layers)]
        of_all: list[list[int]] = [[] for _ in range(self.count)]
        distributed.all_gather_object(of_all, own)
        shared = all(other == own for other in of_all)
        names, totals = list(layers), dict[str, InputStatistics]()
        for index, (name, linear) in enumerate(layers.items()):
            before = own[index] if shared else index
            totals[name] = totals[names[before]] if before < index else self._sum(observed[name], linear, shared)
        return totals

    def _sum(self, own: InputStatistics, linear: nn.Linear, in_place: bool) -> InputStatistics:
        """Add up what one layer was given in all processes; in some of them that may be nothing."""
        total, inputs, device = InputStatistics(own.needs), linear.in_features, linear.weight.device
        tokens = torch.tensor(own.tokens)
        distributed.all_reduce(tokens)
        total.tokens = int(tokens)
        if Statistic.INPUT_NORM in own.needs:
            total.input_sq_sum = self._reduced(own.input_sq_sum, (inputs,), device, in_place)
        if Statistic.HESSIAN in own.needs:
            total.hessian = self._reduced(own.hessian, (inputs, inputs), device, in_place)
        return total

    def _reduced(
        self, own: Tensor | None, shape: tuple[int, ...], device: torch.device, in_place: bool
    ) -> Tensor | None:
        """Return the sum over all processes in the first one; None in the others. `own` may be None, which is zero."""
        part = torch.zeros(shape) if own is None else own.cpu() if in_place else own.cpu().clone()
        distributed.reduce(part, 0)
        return part.to(device) if self.is_main else None
