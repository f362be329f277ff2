"""SparsePEFT keeps every zero, equals the paper's loop, and has the gradient autograd finds."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from sqft_sparsepeft import SparsePEFT
from sqft_unmerged import Unmerged

from sqft.api import BaseWeight

shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))


def drawn(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse(shape: tuple[int, int], seed: int) -> BaseWeight:
    weight, mask = drawn(shape, seed), drawn(shape, seed + 1) > 0
    return BaseWeight(weight * mask, mask)


@given(shapes, st.integers(0, 999))
def test_equations_1_and_2_entry_by_entry(shape: tuple[int, int], seed: int) -> None:
    base, delta = sparse(shape, seed), drawn(shape, seed + 2)
    assert base.mask is not None
    found = SparsePEFT().combine(base, delta)
    for i in range(shape[0]):
        for j in range(shape[1]):
            kept = bool(base.mask[i, j])
            assert found[i, j] == (base.weight[i, j] + delta[i, j] if kept else 0)


@given(shapes, st.integers(0, 999))
def test_the_derivative_is_autograds_to_the_bit(shape: tuple[int, int], seed: int) -> None:
    base, grad = sparse(shape, seed), drawn(shape, seed + 3)
    leaf = drawn(shape, seed + 2).requires_grad_()
    SparsePEFT().combine(base, leaf).backward(grad)  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert SparsePEFT().derivative(base, leaf.detach(), grad).equal(leaf.grad)


def test_gradcheck() -> None:
    base = sparse((3, 4), 0)
    double = BaseWeight(base.weight.double(), base.mask)
    delta = drawn((3, 4), 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda d: SparsePEFT().combine(double, d), delta)


def test_no_mask_keeps_everything() -> None:
    """A dense base is a mask of ones, and then SparsePEFT is plain LoRA."""
    base, delta, grad = BaseWeight(drawn((3, 4), 0)), drawn((3, 4), 1), drawn((3, 4), 2)
    ones = BaseWeight(base.weight, torch.ones(3, 4, dtype=torch.bool))
    merger = SparsePEFT()
    assert merger.combine(base, delta).equal(merger.combine(ones, delta))
    assert merger.combine(base, delta).equal(Unmerged().combine(base, delta))
    assert merger.derivative(base, delta, grad).equal(merger.derivative(ones, delta, grad))


def test_a_kept_weight_may_become_zero_and_a_zero_may_be_kept() -> None:
    """The mask decides and not the value: a kept entry that trains to zero is still kept."""
    base = BaseWeight(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[True, True, False]]))
    assert SparsePEFT().combine(base, torch.tensor([[-1.0, 2.0, 3.0]])).tolist() == [[0, 2, 0]]
