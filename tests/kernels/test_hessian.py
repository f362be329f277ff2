"""The inverse factor against float64, and what makes a Hessian hard to invert."""

from __future__ import annotations

import re
from typing import Literal

import pytest
import torch
from torch import Tensor

from sqft.kernels.hessian import SMALL, inverse_factor, invert_lower


def hessian(inputs: int) -> Tensor:
    x = torch.randn(200 + 2 * inputs, inputs, generator=torch.Generator().manual_seed(inputs))
    return x.T @ x


@pytest.mark.parametrize("by", ["mean", "input"])
@pytest.mark.parametrize("inputs", [1, 8, 40, 2 * SMALL + 3])
def test_it_is_the_factor_of_the_damped_inverse(inputs: int, by: Literal["mean", "input"]) -> None:
    H = hessian(inputs)
    before, U = H.clone(), inverse_factor(H, 0.01, by)
    diagonal = H.diagonal().double()
    damped = H.double() + 0.01 * torch.diag(diagonal if by == "input" else diagonal.mean().expand(inputs))
    assert U.equal(U.triu()) and (U.diagonal() > 0).all() and H.equal(before)
    torch.testing.assert_close((U.T @ U).double(), torch.linalg.inv(damped), rtol=1e-4, atol=1e-6)


def test_a_dead_input_is_apart_from_all_others() -> None:
    H = hessian(8)
    H[3] = H[:, 3] = 0
    U = inverse_factor(H, 0.01)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert not U[3, 4:].any() and not U[:3, 3].any()
    torch.testing.assert_close(U[3, 3] ** -2, H.diagonal()[others].mean() + 0.01 * H.diagonal()[others].mean())
    assert inverse_factor(torch.zeros(4, 4), 0.01).equal(torch.eye(4) / torch.tensor(1.01).sqrt())


def test_damping_grows_until_it_helps() -> None:
    """Two inputs that are always the same, in float32."""
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0]
    assert inverse_factor(x.T @ x, 1e-8).isfinite().all()


def test_nothing_helps() -> None:
    message = "not positive definite even when damped by up to 1000 of its diagonal"
    with pytest.raises(ValueError, match=re.escape(message)):
        inverse_factor(-hessian(8), 0.01)


@pytest.mark.parametrize("n", [1, 2, SMALL, SMALL + 1, 3 * SMALL - 1])
def test_the_inverse_of_a_triangular_matrix(n: int) -> None:
    L = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).div(n).tril()
    L.diagonal().abs_().add_(0.5)
    inverse = L.clone()
    invert_lower(inverse)
    assert inverse.equal(inverse.tril())
    torch.testing.assert_close(inverse @ L, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-9)
