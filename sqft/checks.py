"""The core's checks of what a component returned; the error names the component and the tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sqft.contracts import BaseWeight, DeltaModule, LinearShape, Quantized, SearchSpace
from sqft.errors import ContractError

if TYPE_CHECKING:
    from torch import Tensor


def check_scores(who: str, place: str, weight: Tensor, scores: object) -> None:
    """Scores are a finite floating tensor of the weight's shape."""
    _check_tensor(who, place, "scores", scores, tuple(weight.shape))


def check_unchanged(who: str, place: str, before: Tensor, after: Tensor) -> None:
    """The component did not edit its argument."""
    if before.shape != after.shape or not before.equal(after):
        raise ContractError(f"{who} edited the weight of {place} in place; it must return a new tensor")


def check_allocation(who: str, linears: Sequence[LinearShape], result: object) -> None:
    """Every layer has a fraction in [0, 1)."""
    if not isinstance(result, Mapping):
        raise ContractError(f"{who} returned {type(result).__name__}, expected a mapping of layer names to fractions")
    for linear in linears:
        value = result.get(linear.name)
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ContractError(f"{who} gave {linear.name} the sparsity {value!r}, expected a number in [0, 1)")


def check_quantized(who: str, place: str, quantized: object, weight: Tensor, mask: Tensor | None) -> None:
    """Codes and grid fit the weight, are in range, and pruned entries are exactly zero."""
    if not isinstance(quantized, Quantized):
        raise ContractError(f"{who} returned {type(quantized).__name__} for {place}, expected Quantized")
    codes, grid = quantized.codes, quantized.grid
    if codes.shape != weight.shape or codes.is_floating_point():
        raise ContractError(
            f"{who} returned codes of shape {list(codes.shape)} for {place}, expected integers {list(weight.shape)}"
        )
    top = 2**grid.bits - 1
    for label, values in (("codes", codes), ("zero points", grid.zero)):
        if values.numel() and (values.min() < 0 or values.max() > top):
            raise ContractError(f"{who} returned {label} outside [0, {top}] for {place}")
    if not grid.scale.isfinite().all():
        raise ContractError(f"{who} returned scales that are not finite for {place}")
    if mask is not None:
        inputs = weight.shape[1]
        size = inputs if grid.group_size == -1 else grid.group_size
        group = grid.group_index
        zero = grid.zero[:, group] if group is not None else grid.zero.repeat_interleave(size, 1)[:, :inputs]
        if changed := int(((codes != zero) & ~mask).sum()):
            raise ContractError(f"{who} changed {changed} pruned weights of {place}")


def check_space(who: str, linears: Sequence[LinearShape], space: object) -> None:
    """Every layer is in exactly one group, and every group has ranks, largest first."""
    if not isinstance(space, SearchSpace):
        raise ContractError(f"{who} returned {type(space).__name__}, expected SearchSpace")
    members = sorted(member for group in space.groups for member in group.members)
    if members != sorted(linear.name for linear in linears):
        raise ContractError(f"{who} returned a search space that does not hold every layer exactly once")
    for group in space.groups:
        if not group.ranks or min(group.ranks) < 1 or list(group.ranks) != sorted(set(group.ranks), reverse=True):
            raise ContractError(
                f"{who} gave group {group.name} the ranks {list(group.ranks)}, expected them descending"
            )


def check_choice(who: str, space: SearchSpace, choice: object) -> None:
    """A configuration lies in its space."""
    if choice not in space:
        raise ContractError(f"{who} returned {choice!r}, which is no configuration of the search space")


def check_delta(who: str, linear: LinearShape, delta: DeltaModule, ranks: Sequence[int] = ()) -> None:
    """Factors fit the layer at every rank, are finite, and the delta is zero at start."""
    for rank in ranks or (delta.rank,):
        B, A, scale = delta.factors(rank)
        _check_tensor(who, linear.name, "B", B, (linear.out_features, rank))
        _check_tensor(who, linear.name, "A", A, (rank, linear.in_features))
        if not math.isfinite(scale):
            raise ContractError(f"{who} returned the scale {scale} for {linear.name}")
        if (B.detach() @ A.detach()).any():
            raise ContractError(f"{who} starts {linear.name} with a delta that is not zero")


def check_effective(who: str, place: str, base: BaseWeight, result: object, keeps_mask: bool) -> None:
    """An effective weight fits its base, is finite and keeps the zeros it promised to keep."""
    tensor = _check_tensor(who, place, "an effective weight", result, tuple(base.weight.shape))
    if keeps_mask and base.mask is not None and (lost := int((tensor[~base.mask] != 0).sum())):
        raise ContractError(f"{who} turned {lost} zeros of the base nonzero in {place}")


def _check_tensor(who: str, place: str, what: str, value: object, shape: tuple[int, ...]) -> Tensor:
    from torch import Tensor

    if not isinstance(value, Tensor):
        raise ContractError(f"{who} returned {type(value).__name__} as {what} for {place}, expected a tensor")
    if tuple(value.shape) != shape:
        raise ContractError(f"{who} returned {what} of shape {list(value.shape)} for {place}, expected {list(shape)}")
    if not value.is_floating_point():
        raise ContractError(f"{who} returned {what} of {value.dtype} for {place}, expected a floating type")
    if not value.detach().isfinite().all():
        raise ContractError(f"{who} returned {what} with values that are not finite for {place}")
    return value
