"""Packed weights and weights rounded on a grid, against float64 written out and autograd's own straight-through."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sqft_gptq.solver import round_to_nearest
from sqft_nls.adapter import Nls
from sqft_sparsepeft import QASparsePEFT, SparsePEFT
from sqft_unmerged import Unmerged
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sqft.api import Grid, LinearShape, Merger, Quantized
from sqft.kernels.grids import dequantize, residual, same
from sqft.modeling.adapters.adapted_linear import AdaptedLinear, adapt, cached_effective_weights
from sqft.modeling.adapters.frozen_weight import FloatWeight, FrozenWeight, PackedLinear, PackedWeight, SparseWeight


def sparse(out: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with zeros, and what is kept."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(out, inputs, generator=g) < 0.5
    return torch.randn(out, inputs, generator=g) * kept, kept


def adapted(
    base: FrozenWeight, merger: Merger, rank: int = 3, size: float = 0.3, learn_scales: bool = False
) -> AdaptedLinear:
    delta = Nls(ranks=(rank,), alpha=2.0 * rank).delta(
        LinearShape("l", base.out_features, base.in_features), torch.Generator().manual_seed(1)
    )
    assert isinstance(delta, nn.Module)
    delta.B.data.normal_(generator=torch.Generator().manual_seed(2)).mul_(size)  # type: ignore[union-attr, operator]
    return adapt(base, None, delta, merger, learn_scales=learn_scales)


def spread(grid: Grid, inputs: int) -> tuple[Tensor, Tensor]:
    """The oracle's own: scale and zero point of each input, one at a time."""
    size = inputs if grid.group_size == -1 else grid.group_size
    groups = [j // size if grid.group_index is None else int(grid.group_index[j]) for j in range(inputs)]
    return (
        torch.stack([grid.scale[:, g].double() for g in groups], 1),
        torch.stack([grid.zero[:, g].double() for g in groups], 1),
    )


def oracle(layer: AdaptedLinear, x: Tensor, start: Tensor, kept: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Paper eq. 3–4 in float64 with torch's own straight-through: rounded + (W − detached W), clamped by autograd."""
    if layer.scale_multiplier is not None:
        scale_grid = grid.scale.double() * layer.scale_multiplier.double()
        stored = scale_grid + (scale_grid.half().double() - scale_grid).detach()  # float16, straight through
        grid = Grid(stored, grid.zero, grid.group_size, grid.bits, grid.group_index)
    scale, zero = spread(grid, start.shape[1])
    B, A, s = layer.delta.factors(layer.rank)
    merged = start.double() + torch.where(kept, s * B.double() @ A.double(), 0.0)
    ratio = merged / scale
    code = (ratio.detach().round() + (ratio - ratio.detach()) + zero).clamp(0, 2**grid.bits - 1)
    sure = ((ratio - ratio.floor() - 0.5).abs() > 1e-4).all()
    return x.double() @ (scale * (code - zero)).T, code, sure


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([2, 3, 4, 8]), st.sampled_from([-1, 32]), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(["floats", "codes", "compensated"]), st.integers(0, 30),
)  # fmt: skip
def test_forward_codes_and_gradients_of_a_rounded_weight(
    bits: int, size: int, symmetric: bool, act_order: bool, learn: bool, start_from: str, seed: int
) -> None:
    weight, kept = sparse(5, 64, seed)
    result = round_to_nearest(weight, kept, bits, size, symmetric, False)
    if act_order and size == 32:  # groups that are not contiguous
        index = torch.randperm(64, generator=torch.Generator().manual_seed(seed)).int() // 32
        result = Quantized(result.codes, Grid(result.grid.scale, result.grid.zero, 32, bits, index))
        _, zero = spread(result.grid, 64)
        result = Quantized(torch.where(kept, result.codes, zero).to(torch.uint8), result.grid)
    base: FrozenWeight = FloatWeight(weight, True, result.grid)
    start, known = weight, weight != 0
    if start_from != "floats":
        base, start, known = PackedWeight(result, kept, torch.float32), dequantize(result), kept
    if start_from == "compensated":
        scale, zero = spread(result.grid, 64)
        rest = ((weight / scale - (result.codes - zero)) * 256).round().clamp(-127, 127)
        assert isinstance(base, PackedWeight)
        base.set_residual(rest.to(torch.int8))
        start = (scale * (result.codes - zero + rest / 256)).float()
        assert base.block().weight.equal(start) and base.dense().equal(start) and not start[~kept].any()
    layer = adapted(base, QASparsePEFT(), learn_scales=learn)
    if layer.scale_multiplier is not None:
        layer.scale_multiplier.data.uniform_(0.8, 1.2, generator=torch.Generator().manual_seed(seed))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    probe = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed + 1))
    y, code, sure = oracle(layer, x, start, known, result.grid)
    if not sure:
        return  # float32 may round a half the other way
    assert layer.codes().codes.double().equal(code.detach())
    assert layer.effective().equal(dequantize(layer.codes()))
    torch.testing.assert_close(layer(x).double(), y, rtol=1e-5, atol=1e-4)
    trained = [x, *layer.delta.parameters(), *([layer.scale_multiplier] if learn else [])]  # type: ignore[attr-defined, list-item]
    found = torch.autograd.grad((layer(x) * probe).sum(), trained)
    wanted = torch.autograd.grad((y * probe).sum(), trained)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_no_gradient_passes_where_the_clamp_holds() -> None:
    """One weight far above its grid, one below, one between: by hand."""
    grid = Grid(torch.tensor([[0.5]]).half(), torch.tensor([[8]]), -1, 4)
    base = FloatWeight(torch.tensor([[100.0, -100.0, 1.1, 3.5]]), True, grid)  # 3.5 is the top code, 15, itself
    layer = adapted(base, QASparsePEFT(), rank=1, size=0.0)
    layer.delta.B.data.fill_(0.01)  # type: ignore[attr-defined]
    layer.delta.A.data.zero_()  # type: ignore[attr-defined]
    layer(torch.ones(1, 4)).sum().backward()
    assert layer.effective().tolist() == [[3.5, -4.0, 1.0, 3.5]]
    grad = layer.delta.A.grad[0]  # type: ignore[attr-defined]
    torch.testing.assert_close(grad, torch.tensor([0.0, 0.0, 0.02, 0.02]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("compensated", [True, False])
def test_codes_start_as_the_base_has_them(compensated: bool, learn: bool, dtype: torch.dtype) -> None:
    """Bit for bit, their values too; and with what was rounded to them, small deltas move some."""
    weight, kept = sparse(16, 64)
    quantized = round_to_nearest(weight, kept, 4, 32, False, False)
    base = PackedWeight(quantized, kept, dtype)
    if compensated:
        base.set_residual(residual(quantized))
    layer = adapted(base, QASparsePEFT(), size=0.0, learn_scales=learn)
    assert same(layer.codes(), quantized) and layer.effective().equal(dequantize(quantized).to(dtype))  # type: ignore[union-attr]
    moved = (adapted(base, QASparsePEFT(), size=0.05).codes().codes != quantized.codes).float().mean()  # type: ignore[attr-defined]
    assert 0 < moved < 0.1 if compensated else moved == 0


def test_what_is_trained_through_is_what_is_merged_under_autocast_and_checkpointing() -> None:
    weight, kept = sparse(16, 64)
    layer = adapted(FloatWeight(weight, True, round_to_nearest(weight, kept, 4, 32, True, False).grid), QASparsePEFT())
    x = torch.randn(4, 64, requires_grad=True)
    merged = dequantize(layer.codes())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        again = checkpoint(layer, x, use_reentrant=False)
    assert y.equal(F.linear(x.bfloat16(), merged.bfloat16())) and again.equal(y)
    parameters = list(layer.delta.parameters())  # type: ignore[attr-defined]
    one, other = torch.autograd.grad(y.sum(), parameters), torch.autograd.grad(again.sum(), parameters)
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    with cached_effective_weights(layer), torch.no_grad():
        assert layer(x).equal(F.linear(x, merged))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_packed_layer_is_its_dequantized_one(bits: int) -> None:
    weight, kept = sparse(16, 96)
    quantized = round_to_nearest(weight, kept, bits, 32, False, False)
    layer = PackedLinear(PackedWeight(quantized, None, torch.float32), nn.Parameter(torch.randn(16), False))
    x = torch.randn(3, 96, requires_grad=True)
    y = layer(x)
    assert y.equal(F.linear(x, dequantize(quantized), layer.bias))
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(F.linear(x, dequantize(quantized), layer.bias).square().sum(), x)
    assert found.equal(wanted)
    lora = adapted(layer.base, Unmerged())
    B, A, scale = lora.delta.factors(3)
    torch.testing.assert_close(lora(x), F.linear(x, dequantize(quantized)) + scale * (x @ A.T @ B.T))


@pytest.mark.parametrize("merger", [Unmerged(), QASparsePEFT()], ids=lambda m: str(m.name))
def test_nothing_of_the_weights_size_is_kept_over_codes(merger: Merger) -> None:
    weight, kept = sparse(64, 96)
    base = PackedWeight(round_to_nearest(weight, kept, 4, 32, True, False), kept, torch.float32)
    layer = adapted(base, merger, rank=2)
    x = torch.randn(8, 96, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(x).sum().backward()
    assert saved and max(t.numel() for t in saved) < 64 * 96 / 4
    assert all(p.numel() < 64 * 96 / 4 or not p.is_floating_point() for p in [*base.parameters(), *base.buffers()])


def test_bytes_a_weight() -> None:
    """0.6 at 4 bits and groups of 128, 0.7 with the mask, one more with residuals: what the documentation promises."""
    weight, kept = sparse(128, 1024)
    quantized = round_to_nearest(weight, kept, 4, 128, False, False)
    for mask, rest, most in ((None, None, 0.6), (kept, None, 0.7), (kept, residual(quantized), 1.7)):
        base = PackedWeight(quantized, mask, torch.float32)
        if rest is not None:
            base.set_residual(rest)
        assert sum(t.nbytes for t in base.state_dict().values()) / weight.numel() <= most


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans(),
    st.integers(1, 20), st.integers(1, 70), st.integers(0, 20), st.integers(0, 20), st.integers(0, 1000),
)  # fmt: skip
def test_floats_without_their_zeros_are_the_same_floats(
    dtype: torch.dtype, masked: bool, out: int, inputs: int, first: int, last: int, seed: int
) -> None:
    """−0 is 0; rows of nothing but zeros, and any block of rows."""
    weight = sparse(out, inputs, seed)[0].to(dtype)
    weight[seed % out] = 0
    weight.view(-1)[:: 3 + seed % 5] *= -1  # −0 where there was 0
    packed, floats = SparseWeight(weight.clone(), masked), FloatWeight(weight, masked)
    assert packed.dense().equal(weight) and packed.dense().dtype == dtype
    rows = slice(*sorted((min(first, out), min(last, out))))
    ours, theirs = packed.block(rows), floats.block(rows)
    assert ours.weight.equal(theirs.weight)
    assert ours.mask is theirs.mask is None if not masked else ours.mask.equal(theirs.mask)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merger", [Unmerged(), SparsePEFT(), None], ids=lambda m: m.name if m else "no adapter")
@pytest.mark.parametrize("autocast", [True, False])
def test_training_over_floats_without_their_zeros_is_the_same(
    merger: Merger | None, dtype: torch.dtype, autocast: bool
) -> None:
    """Outputs and gradients, to the bit; and nothing of the weight's size is kept for the backward pass."""
    weight = sparse(48, 96)[0].to(dtype)
    bias = nn.Parameter(torch.randn(48, generator=torch.Generator().manual_seed(3)).to(dtype), False)
    found = []
    for base in (FloatWeight(weight, True), SparseWeight(weight, True)):
        layer: nn.Module = adapted(base, merger) if merger else PackedLinear(base, bias)  # type: ignore[arg-type]
        x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
        saved: list[Tensor] = []
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)  # type: ignore[func-returns-value]  # noqa: B023
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), keep:
            y = layer(x * 1)  # autocast would cast a leaf once for both paths
        trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
        found.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), trained)])
        assert isinstance(base, FloatWeight) or all(t.numel() < weight.numel() / 2 for t in saved)
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and ours.equal(theirs)


def test_floats_are_packed_where_that_saves_memory() -> None:
    weight = torch.ones(4, 64)
    assert not SparseWeight.saves_memory(weight)
    weight[:, :8] = 0  # 32 zeros of 4 bytes against 32 bytes of bits
    assert SparseWeight.saves_memory(weight) and not SparseWeight.saves_memory(weight[:, 6:].clone())
    half = sparse(64, 128)[0].bfloat16()
    held = sum(buffer.numel() * buffer.element_size() for buffer in SparseWeight(half, True).buffers())
    assert held == 64 * 128 // 8 + 2 * int((half != 0).sum())  # 9 bits a weight
