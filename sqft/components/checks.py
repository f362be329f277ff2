"""The core's checks of what a component returned.

Every breach is a `ContractError` that names the component, the layer and what was expected there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from sqft.errors import ContractError
from sqft.ranks import RankConfig, RankGroup, SearchSpace
from sqft.types import SPARSITY_TOLERANCE, BaseWeight, DeltaModule, Grid, LinearShape, LinearStats, Quantized

if TYPE_CHECKING:
    from torch import Tensor, device


def check_scores(label: str, place: str, weight: Tensor, scores: object) -> Tensor:
    """Check that scores of some or all columns are a finite floating tensor with the weight's rows, on its device."""
    shape = tuple(getattr(scores, "shape", ()))
    if len(shape) != 2 or shape[0] != weight.shape[0] or not 1 <= shape[1] <= weight.shape[1]:
        shape = tuple(weight.shape)
    return _check_tensor(label, place, "scores", scores, shape, weight.device)


def check_pruned(label: str, place: str, weight: Tensor, pruned: object, sparsity: float) -> tuple[Tensor, Tensor]:
    """Check that a new weight and its mask have the weight's shape, that it is finite and 0 where the mask is false,
    and that the mask prunes the fraction that `select` did.

    Args:
        label: the component, as messages name it.
        place: the layer's name.
        weight: the layer's weight [out, in].
        pruned: what the component returned: the new weight and the bool mask, both [out, in].
        sparsity: the fraction that `select` pruned.
    """
    if not isinstance(pruned, tuple) or len(pruned) != 2:
        raise ContractError(f"{label} returned {type(pruned).__name__} for {place}, expected a weight and a mask")
    mask = pruned[1]
    if str(getattr(mask, "dtype", None)) != "torch.bool" or mask.shape != weight.shape or mask.device != weight.device:
        raise ContractError(
            f"{label} returned a mask for {place} that is no bool tensor of the weight's shape and device"
        )
    new = check_updated(label, place, mask, pruned[0])
    spent = 1 - mask.double().mean().item()
    if abs(spent - sparsity) > 1e-6:
        raise ContractError(f"{label} pruned {spent:.3f} of {place}, but `select` pruned {sparsity:.3f}")
    return new, mask


def check_updated(label: str, place: str, mask: Tensor, new: object) -> Tensor:
    """Check that an updated weight [out, in] is finite and 0 where the mask [out, in] is false."""
    tensor = _check_tensor(label, place, "a weight", new, tuple(mask.shape), mask.device)
    if changed := int(((tensor != 0) & ~mask).sum()):
        raise ContractError(f"{label} left {changed} pruned weights of {place} that are not 0")
    return tensor


def check_measured(label: str, names: Sequence[str], measured: object) -> None:
    """Check that every layer of the block, and no other, has a finite number."""
    if not isinstance(measured, Mapping) or set(measured) != set(names):
        raise ContractError(f"{label} did not measure exactly the layers that it was given, such as {names[0]}")
    for name, value in measured.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ContractError(f"{label} measured {name} as {value!r}, expected a finite number")


def check_unchanged(label: str, place: str, before: Tensor, after: Tensor, what: str = "the weight") -> None:
    """Check that the component did not edit its argument.

    Args:
        label: the component, as messages name it.
        place: the layer's name.
        before: a copy of the argument from before the call.
        after: the argument after it.
        what: the argument, as the message names it.
    """
    if before.shape != after.shape or not before.equal(after):
        raise ContractError(f"{label} edited {what} of {place} in place; it must return a new tensor")


@contextmanager
def statistics_unchanged(label: str, stats: Mapping[str, LinearStats]) -> Iterator[None]:
    """Inside, the component does not edit the statistics of these layers.

    No copy is kept of a Hessian, which may be larger than all else: version counters see torch's edits in place, and a
    sum over the bits those that go round them (`.data`, numpy).
    """
    before = _states(stats)
    yield
    for (place, field), state in _states(stats).items():
        if state != before[place, field]:
            raise ContractError(f"{label} edited the statistics ({field}) of {place} in place; it must copy them first")


FIELDS = ("input_sq_sum", "hessian", "dense")
"""The tensors of `LinearStats`."""


def _states(stats: Mapping[str, LinearStats]) -> dict[tuple[str, str], tuple[int, int]]:
    from sqft.kernels.checksums import bit_sum

    sums = {(name, field): getattr(one, field) for name, one in stats.items() for field in FIELDS}
    return {place: (tensor._version, bit_sum(tensor)) for place, tensor in sums.items() if tensor is not None}


def check_allocation(label: str, linears: Sequence[LinearShape], sparsity: float, result: object) -> None:
    """Check that every layer, and no other, has a fraction in [0, 1), and that they average to `sparsity` by size."""
    if not isinstance(result, Mapping):
        raise ContractError(f"{label} returned {type(result).__name__}, expected a mapping of layer names to fractions")
    for linear in linears:
        value = result.get(linear.name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
            raise ContractError(f"{label} gave {linear.name} the sparsity {value!r}, expected a number in [0, 1)")
    sizes = {linear.name: linear.out_features * linear.in_features for linear in linears}
    if unknown := [name for name in result if name not in sizes]:
        raise ContractError(f"{label} gave {unknown[0]!r} a sparsity, which is not one of the given layers")
    spent = sum(result[name] * size for name, size in sizes.items()) / sum(sizes.values())
    if abs(spent - sparsity) > SPARSITY_TOLERANCE:
        raise ContractError(
            f"{label} gave all layers together a sparsity of {spent:.4f}, where {sparsity:g} was asked for "
            f"(within {SPARSITY_TOLERANCE})"
        )


def check_quantized(
    label: str, place: str, quantized: object, weight: Tensor, mask: Tensor | None, gives_compensated: bool = False
) -> None:
    """Check that codes [out, in] lie on a grid as `sqft.types.Grid` describes it, and pruned entries are exactly 0; and
    that compensated floats, if any, round to the codes.

    Args:
        label: the component, as messages name it.
        place: the layer's name.
        quantized: what the component returned.
        weight: the layer's weight [out, in].
        mask: bool [out, in], false where the weight is pruned; None when nothing is.
        gives_compensated: whether the component promises compensated floats.
    """
    if not isinstance(quantized, Quantized) or not isinstance(quantized.grid, Grid):
        raise ContractError(f"{label} returned {type(quantized).__name__} for {place}, expected Quantized with a Grid")
    grid, index = quantized.grid, quantized.grid.group_index
    if type(grid.bits) is not int or not 1 <= grid.bits <= 16:
        raise ContractError(
            f"{label} returned a grid of {grid.bits!r} bits for {place}, expected an integer in [1, 16]"
        )
    if type(grid.group_size) is not int or (grid.group_size < 1 and grid.group_size != -1):
        raise ContractError(
            f"{label} returned a grid of group size {grid.group_size!r} for {place}, expected a positive integer or -1"
        )
    out, inputs = weight.shape
    size = inputs if grid.group_size == -1 else grid.group_size
    groups, top = -(-inputs // size), 2**grid.bits - 1
    integers: list[tuple[str, object, tuple[int, ...], int]] = [
        ("codes", quantized.codes, (out, inputs), top),
        ("zero points", grid.zero, (out, groups), top),
    ]
    if index is not None:
        integers.append(("group indices", index, (inputs,), groups - 1))
    for what, values, shape, highest in integers:
        tensor = _check_tensor(label, place, what, values, shape, weight.device, "an integer type")
        if tensor.min().item() < 0 or tensor.max().item() > highest:
            raise ContractError(f"{label} returned {what} outside [0, {highest}] for {place}")
    if not (_check_tensor(label, place, "scales", grid.scale, (out, groups), weight.device) > 0).all():
        raise ContractError(f"{label} returned scales for {place} that are not above 0")
    if mask is not None:
        zero = grid.zero[:, index.long()] if index is not None else grid.zero.repeat_interleave(size, 1)[:, :inputs]
        if changed := int(((quantized.codes != zero) & ~mask).sum()):
            raise ContractError(
                f"{label} changed {changed} pruned weights of {place}, expected their group's zero point"
            )
    if quantized.compensated is not None or gives_compensated:
        _check_compensated(label, place, quantized, mask)


def _check_compensated(label: str, place: str, quantized: Quantized, mask: Tensor | None) -> None:
    from sqft.kernels.grids import expand_per_input, quantize_to_codes

    codes, grid, what = quantized.codes, quantized.grid, "compensated weights"
    floats = _check_tensor(label, place, what, quantized.compensated, tuple(codes.shape), codes.device)
    rounded = quantize_to_codes(floats.float(), *expand_per_input(grid, codes.shape[1]), 2**grid.bits - 1)
    if unlike := int((rounded != codes).sum()):
        raise ContractError(f"{label} returned {what} of {place} of which {unlike} do not round to their codes")
    if mask is not None and (lost := int(((floats != 0) & ~mask).sum())):
        raise ContractError(f"{label} returned {what} of {place} that are not 0 where {lost} weights are pruned")


def check_space(label: str, linears: Sequence[LinearShape], space: object) -> None:
    """Check that every layer is in exactly one group, and that every group has ranks, largest first, all in tuples."""
    if not isinstance(space, SearchSpace):
        raise ContractError(f"{label} returned {type(space).__name__}, expected SearchSpace")
    if space != SearchSpace(tuple(RankGroup(g.name, tuple(g.ranks), tuple(g.members)) for g in space.groups)):
        raise ContractError(f"{label} returned a search space with lists in it, expected tuples")
    counts = Counter(member for group in space.groups for member in group.members)
    expected = Counter(linear.name for linear in linears)
    for name in counts | expected:
        if counts[name] != expected[name]:
            raise ContractError(
                f"{label} returned a search space that has {name} in {counts[name]} groups, expected {expected[name]}"
            )
    for group in space.groups:
        ranks = group.ranks
        integers = all(type(rank) is int and rank >= 1 for rank in ranks)
        if not ranks or not integers or list(ranks) != sorted(set(ranks), reverse=True):
            raise ContractError(
                f"{label} gave group {group.name} the ranks {list(ranks)}, expected integers descending"
            )


def check_choice(label: str, space: SearchSpace, choice: object) -> None:
    """Check that a configuration lies in its space."""
    integers = (
        isinstance(choice, RankConfig) and type(choice.ranks) is tuple and all(type(r) is int for r in choice.ranks)
    )
    if not integers or choice not in space:
        raise ContractError(f"{label} returned {choice!r}, which is no configuration of the search space")


def check_question(label: str, space: SearchSpace, choice: object, samples: object) -> None:
    """Check that a searcher asks for a configuration of its space, on one record or more, or on all (None)."""
    check_choice(label, space, choice)
    _check_samples(label, "an evaluation", samples)


def check_question_of_gradients(label: str, needs_gradients: bool, samples: object) -> None:
    """Check that a searcher said that it needs gradients, as the plan counts their memory, and of how many records."""
    if not needs_gradients:
        raise ContractError(f"{label} asked for gradients, but its needs_gradients() is false")
    _check_samples(label, "gradients", samples)


def _check_samples(label: str, what: str, samples: object) -> None:
    if samples is not None and (type(samples) is not int or samples < 1):
        raise ContractError(f"{label} asked for {what} on {samples!r} samples, expected 1 or more, or None")


def check_delta(label: str, linear: LinearShape, delta: DeltaModule, ranks: Sequence[int] = ()) -> None:
    """Check that a delta is a module with finite float32 factors on the CPU that fit the layer, and is zero at start.

    At each of `ranks`, the first of which is the delta's own; without them at the delta's own rank.
    """
    import torch

    name = linear.name
    if not isinstance(delta, torch.nn.Module):
        raise ContractError(f"{label} returned {type(delta).__name__} for {name}, expected a torch.nn.Module")
    own = getattr(delta, "rank", None)
    if type(own) is not int or (ranks and own != ranks[0]):
        raise ContractError(
            f"{label} returned a delta of rank {own} for {name}, expected {ranks[0] if ranks else 'one'}"
        )
    for rank in ranks or (own,):
        factors = delta.factors(rank)
        if not isinstance(factors, tuple) or len(factors) != 3:
            raise ContractError(f"{label} returned factors for {name} that are not (B, A, scale)")
        cpu = torch.device("cpu")
        B = _check_tensor(label, name, "B", factors[0], (linear.out_features, rank), cpu, "float32")
        A = _check_tensor(label, name, "A", factors[1], (rank, linear.in_features), cpu, "float32")
        if not isinstance(factors[2], int | float) or not math.isfinite(factors[2]):
            raise ContractError(f"{label} returned the scale {factors[2]!r} for {name}, expected a finite number")
        if B.any() and A.any() and (B.detach() @ A.detach()).any():  # most often B is zero, and no product is made
            raise ContractError(f"{label} starts {name} with a delta that is not zero")


def check_dropout(label: str, dropout: object) -> float:
    """Check that the dropout on an adapter's input is a number in [0, 1)."""
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise ContractError(f"{label} returned the input dropout {dropout!r}, expected a number in [0, 1)")
    return dropout


def check_effective(label: str, place: str, base: BaseWeight, result: object, keeps_mask: bool) -> None:
    """Check that an effective weight fits its base, is finite and keeps the zeros that it promised to keep.

    Args:
        label: the merger, as messages name it.
        place: the layer's name.
        base: the base's weight and mask [out, in].
        result: what `combine` returned.
        keeps_mask: whether the merger promises to keep the base's zeros.
    """
    weight = base.weight
    tensor = _check_tensor(label, place, "an effective weight", result, tuple(weight.shape), weight.device)
    if keeps_mask and base.mask is not None and (lost := int((tensor[~base.mask] != 0).sum())):
        raise ContractError(f"{label} turned {lost} zeros of the base nonzero in {place}")


def check_derivative(label: str, place: str, base: BaseWeight, result: object) -> None:
    """Check that a derivative has the weight's shape and is finite."""
    _check_tensor(label, place, "a derivative", result, tuple(base.weight.shape), base.weight.device)


def _check_tensor(
    label: str,
    place: str,
    what: str,
    value: object,
    shape: tuple[int, ...],
    where: device,
    kind: Literal["a floating type", "float32", "an integer type"] = "a floating type",
) -> Tensor:
    """Check that a component returned a finite tensor, and return it.

    Args:
        label: the component, as messages name it.
        place: the layer, as messages name it.
        what: the name of the value in messages, such as "scores".
        value: what the component returned.
        shape: expected shape.
        where: expected device.
        kind: expected kind of data type.
    """
    import torch

    from sqft.kernels.finite import all_finite

    kinds = {
        "a floating type": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        "float32": (torch.float32,),
        "an integer type": (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    }
    if not isinstance(value, torch.Tensor):
        raise ContractError(f"{label} returned {type(value).__name__} as {what} for {place}, expected a tensor")
    if tuple(value.shape) != shape:
        raise ContractError(f"{label} returned {what} of shape {list(value.shape)} for {place}, expected {list(shape)}")
    if value.dtype not in kinds[kind]:
        raise ContractError(f"{label} returned {what} of {value.dtype} for {place}, expected {kind}")
    if value.device != where:
        raise ContractError(f"{label} returned {what} on {value.device} for {place}, expected {where}")
    if not all_finite(value):
        raise ContractError(f"{label} returned {what} with values that are not finite for {place}")
    return value
