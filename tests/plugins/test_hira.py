"""HiRA keeps every zero by itself, and is what stock PEFT computes for an adapter of that name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sqft_hira import Hira
from sqft_nls.adapter import Lora
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sqft.api import BaseKind, BaseWeight, LinearShape
from sqft.modeling.adapters.adapted_linear import MergedLinear, adapt
from sqft.modeling.adapters.frozen_weight import FloatWeight
from sqft.testing import check_merger

shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))


def drawn(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_zeros(shape: tuple[int, int], seed: int) -> Tensor:
    return drawn(shape, seed) * (drawn(shape, seed + 1) > 0)


@given(shapes, st.integers(0, 999))
def test_each_entry_changes_in_proportion_and_zeros_stay(shape: tuple[int, int], seed: int) -> None:
    weight, delta = with_zeros(shape, seed), drawn(shape, seed + 2)
    found = Hira().combine(BaseWeight(weight), delta)
    torch.testing.assert_close(found.double(), weight.double() * (1 + delta.double()))
    assert not found[weight == 0].any()


@given(shapes, st.integers(0, 999))
def test_the_derivative_is_autograds_to_the_bit(shape: tuple[int, int], seed: int) -> None:
    base, grad = BaseWeight(with_zeros(shape, seed)), drawn(shape, seed + 3)
    leaf = drawn(shape, seed + 2).requires_grad_()
    Hira().combine(base, leaf).backward(grad)  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert Hira().derivative(base, leaf.detach(), grad).equal(leaf.grad)


def test_the_contract_on_every_kind_of_base() -> None:
    assert Hira.bases == set(BaseKind) and Hira.keeps_mask and Hira.merges
    check_merger(Hira())


def layer(dropout: float = 0.0) -> tuple[nn.Linear, MergedLinear]:
    linear = nn.Linear(5, 6)
    linear.weight.data.copy_(with_zeros((6, 5), 0))
    linear.requires_grad_(False)
    delta = Lora(rank=3, alpha=6).delta(LinearShape("l", 6, 5), torch.Generator().manual_seed(0))
    delta.B.data.copy_(drawn((6, 3), 4))  # type: ignore[attr-defined]
    adapted = adapt(FloatWeight(linear.weight, True), linear.bias, delta, Hira(), dropout)
    assert isinstance(adapted, MergedLinear)
    return linear, adapted


def test_stock_peft_computes_the_same_output_and_gradients() -> None:
    """PEFT's has no scale: here it is part of B."""
    hira = pytest.importorskip("peft.tuners.hira.layer")
    from peft import HiraConfig

    linear, adapted = layer()
    B, A, scale = adapted.delta.factors(3)
    theirs = hira.Linear(linear, "default", HiraConfig(r=3), r=3)
    theirs.hira_A["default"].data.copy_(A)
    theirs.hira_B["default"].data.copy_(scale * B)
    x, probe = drawn((4, 5), 5), drawn((4, 6), 6)
    torch.testing.assert_close(adapted(x), theirs(x))
    ours = torch.autograd.grad((adapted(x) * probe).sum(), [adapted.delta.B, adapted.delta.A])  # type: ignore[attr-defined]
    found = torch.autograd.grad((theirs(x) * probe).sum(), [theirs.hira_B["default"], theirs.hira_A["default"]])
    torch.testing.assert_close(ours[0], scale * found[0])
    torch.testing.assert_close(ours[1], found[1])


def test_dropout_leaves_the_bases_path_alone() -> None:
    """What is left of the output is x Wᵀ + b and (W ⊙ Δ) of the inputs that were kept."""
    linear, adapted = layer(0.5)
    x = drawn((4, 5), 5)
    torch.manual_seed(0)
    y = adapted.train()(x)
    torch.manual_seed(0)
    B, A, scale = adapted.delta.factors(3)
    side = adapted.dropout(x).double() @ (linear.weight.double() * (scale * B.double() @ A.double())).T
    torch.testing.assert_close(y.double(), linear(x).double() + side, rtol=1e-5, atol=1e-5)


def test_checkpointing_recomputes_the_same() -> None:
    _, adapted = layer()
    x = drawn((4, 5), 5).requires_grad_()
    trained = [x, *adapted.delta.parameters()]  # type: ignore[attr-defined]
    plain = torch.autograd.grad(adapted(x).square().sum(), trained)
    again = torch.autograd.grad(checkpoint(adapted, x, use_reentrant=False).square().sum(), trained)
    assert all(map(torch.equal, plain, again))
