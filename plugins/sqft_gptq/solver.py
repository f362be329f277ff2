"""GPTQ's loop (Frantar et al., ICLR 2023, Algorithm 1), with pruned weights kept at zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sqft.api import Grid, Quantized
from sqft.kernels.grids import fit_grid, quantize, quantize_to_codes

BLOCK = 128
"""Columns between lazy updates of the rest. Every group size divides it, except -1 (the row), which is fitted first."""
INNER = 32
"""Columns between updates of the rest of a block. It divides every group size, so that a group is fitted to weights
that make up for all before it."""


@dataclass(frozen=True)
class GroupOrder:
    """The order in which GPTQ takes the inputs, and the group of each."""

    order: Tensor  # [in]: the input that is taken at each turn
    size: int  # inputs in a group
    contiguous: bool  # whether the inputs of a group lie beside one another in the weight
    static_grid: Grid | None  # grids that were fitted before; None: a group's is fitted when its first turn comes

    @classmethod
    def of(
        cls, diagonal: Tensor, size: int, act_order: bool, reorder_groups: bool, static_grid: Grid | None
    ) -> GroupOrder:
        """Order the inputs by the Hessian's diagonal [in].

        Args:
            diagonal: the sum of x² over tokens, for each input [in].
            size: inputs in a group.
            act_order: the largest inputs first, whatever group they are in.
            reorder_groups: without `act_order`, whole groups in the order of `by_groups`; one group stays as it is.
            static_grid: grids of the contiguous groups that were fitted before, if they were.
        """
        order = torch.arange(len(diagonal), device=diagonal.device)
        if act_order:
            order = diagonal.argsort(descending=True, stable=True)
        elif reorder_groups and size < len(diagonal):
            order = by_groups(diagonal, size)
        return cls(order, size, not act_order, static_grid)

    def groups(self) -> Tensor:
        """Return the group of each turn [in]: those of static grids by where they lie, others by their turn."""
        turns = torch.arange(len(self.order), device=self.order.device)
        return (turns if self.static_grid is None else self.order) // self.size

    def start(self, out: int) -> tuple[Tensor, Tensor]:
        """Return scales and zero points [out, groups] to begin with."""
        if self.static_grid is not None:
            return self.static_grid.scale.float(), self.static_grid.zero
        count, device = len(self.order) // self.size, self.order.device
        return torch.zeros(out, count, device=device), torch.zeros(out, count, dtype=torch.int32, device=device)

    def in_input_order(
        self, codes: Tensor, compensated: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int
    ) -> Quantized:
        """Return codes [out, in], scales and zero points [out, groups] of all turns in the order of the inputs.

        Args:
            codes: in the order of the turns, [out, in].
            compensated: the floats that were rounded to them, in the same order, [out, in].
            scale: of each turn's group, [out, groups].
            zero: of each turn's group, [out, groups].
            bits: of a code.
            group_size: inputs that share a scale; -1 for all.
        """
        back, index = self.order.argsort(), None
        if self.static_grid is None and self.contiguous:  # the groups were reordered, but each still has its own inputs
            turn = (self.order[:: self.size] // self.size).argsort()
            scale, zero = scale[:, turn], zero[:, turn]
        elif self.static_grid is None and self.size < len(back):
            index = self.groups()[back].int()
        grid = Grid(scale.half(), zero, group_size, bits, index)
        return Quantized(codes[:, back], grid, compensated[:, back])


def gptq(
    W: Tensor,
    U: Tensor,
    mask: Tensor | None,
    turns: GroupOrder,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip: bool,
) -> Quantized:
    """Return codes and grid that make ‖W X − Ŵ X‖² small.

    Args:
        W: the weight [out, in], float32.
        U: `inverse_factor` [in, in] of the sum of x xᵀ, whose rows and columns are in the order of `turns`.
        mask: bool [out, in], true where a weight is kept.
        turns: the order of the inputs, and their groups.
        bits: number of bits of a code.
        group_size: inputs that share one scale; -1: all inputs of a row.
        symmetric: whether zero points are the middle code.
        clip: whether a group's range is searched for the smallest error.
    """
    (out, n), size, top = W.shape, turns.size, 2**bits - 1
    keep = torch.ones_like(W) if mask is None else mask.to(W.dtype)
    # An input at a time is read and written: each lies in one piece. So all below is [in, out], and [groups, out].
    W, keep = (W * keep)[:, turns.order].T.contiguous(), keep[:, turns.order].T.contiguous()
    groups, (scale, zero) = turns.groups().tolist(), (grid.T.contiguous() for grid in turns.start(out))
    codes = torch.empty(n, out, dtype=torch.uint8, device=W.device)
    for i1 in range(0, n, BLOCK):
        i2 = min(i1 + BLOCK, n)
        E = torch.empty(i2 - i1, out, device=W.device)
        for j1 in range(i1, i2, INNER):
            j2 = min(j1 + INNER, i2)
            for j in range(j1, j2):
                g = groups[j]
                if turns.static_grid is None and j % size == 0:
                    group = W[j : j + size] if size <= BLOCK else W  # a longer one is the whole row, at its start
                    scale[g], zero[g] = fit_grid(group.T, bits, symmetric, clip)
                w, s, z = W[j], scale[g], zero[g]
                q = quantize_to_codes(w, s, z, top)
                codes[j] = q.to(torch.uint8)
                E[j - i1] = (w - s * (q - z)) / U[j, j]
                W[j + 1 : j2] -= E[j - i1] * U[j, j + 1 : j2, None] * keep[j + 1 : j2]  # pruned ones do not compensate
            W[j2:i2] -= (U[j1:j2, j2:i2].T @ E[j1 - i1 : j2 - i1]) * keep[j2:i2]
        W[i2:] -= (U[i1:i2, i2:].T @ E) * keep[i2:]
    scale, zero = scale.T.contiguous(), zero.T.contiguous()
    return turns.in_input_order(codes.T, W.T, scale, zero, bits, group_size)


def by_groups(diagonal: Tensor, size: int) -> Tensor:
    """Return an order of the inputs [in]: groups of the largest inputs first, and in a group the largest inputs first.

    Group-aware reordering (Gafni, Karnieli, Hanani, CVPR Workshops 2025, arXiv 2505.14638).
    """
    groups = diagonal.reshape(-1, size)
    inside = groups.argsort(dim=1, descending=True, stable=True)  # [groups, size]
    first = groups.amax(1).argsort(descending=True, stable=True)
    return (first[:, None] * size + inside[first]).flatten()


def round_to_nearest(
    W: Tensor, mask: Tensor | None, bits: int, group_size: int, symmetric: bool, clip: bool
) -> Quantized:
    """Put each weight [out, in] on the grid of its contiguous group; pruned ones are 0, which every grid holds.

    Args:
        W: the weight [out, in], float32.
        mask: bool [out, in], true where a weight is kept.
        bits: number of bits of a code.
        group_size: inputs that share one scale; -1: all inputs of a row.
        symmetric: whether zero points are the middle code.
        clip: whether a group's range is searched for the smallest error.
    """
    W = W if mask is None else W * mask
    groups = W.reshape(len(W), 1 if group_size == -1 else -1, W.shape[1] if group_size == -1 else group_size)
    scale, zero = fit_grid(groups, bits, symmetric, clip)
    grid = Grid(scale.half(), zero, group_size, bits)
    return Quantized(quantize(W, grid), grid, W)
