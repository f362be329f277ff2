"""Conjugate gradients under a mask against each row's normal equations, solved in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sqft_least_squares import LeastSquares
from torch import Tensor

from sqft.api import LinearStats
from sqft.errors import StageError
from sqft.kernels.masks import keep_mask


def layer(out: int, n: int, seed: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs of different sizes, one of which is dead."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    x = torch.randn(tokens, n, generator=generator) @ mix * torch.rand(n, generator=generator).add(0.2)
    x[:, n // 3] = 0
    return torch.randn(out, n, generator=generator), x.T @ x


def exact(W: Tensor, mask: Tensor, H: Tensor, penalty: Tensor) -> Tensor:
    """Each row by itself: V_k (H_kk + diag p) = W H_:k + W_k diag p on its kept columns k, of minimal change."""
    W, H, penalty = W.double(), H.double(), penalty.double()
    V = torch.zeros_like(W)
    for row, kept in enumerate(mask):
        A = H[kept][:, kept] + penalty[kept].diag()
        residual = H[kept] @ (W[row] * ~kept)
        V[row, kept] = W[row, kept] + torch.linalg.pinv(A, rtol=1e-12, hermitian=True) @ residual
    return V


def error(W: Tensor, V: Tensor, H: Tensor) -> float:
    D = (V - W).double()
    return float((D @ H.double() * D).sum())


def penalty_of(updater: LeastSquares, H: Tensor) -> Tensor:
    diagonal = H.diagonal()
    return updater.damping * (diagonal if updater.damping_by == "input" else diagonal.mean().expand_as(diagonal))


PATTERNS = st.sampled_from(["row", "layer", "1:2", "2:4", "5:8"])
LAYERS = st.tuples(st.integers(1, 6), st.integers(1, 4).map(lambda n: 8 * n), st.integers(0, 1000))
DAMPING = st.tuples(st.sampled_from([0.0, 1e-3, 0.1, 3.0]), st.sampled_from(["input", "mean"]))


@settings(max_examples=40, deadline=None)
@given(LAYERS, PATTERNS, st.sampled_from([0.1, 0.5, 0.9]), DAMPING)
def test_every_row_is_solved(
    sizes: tuple[int, int, int], pattern: str, sparsity: float, damping: tuple[float, str]
) -> None:
    W, H = layer(*sizes)
    mask = keep_mask(W.abs(), sparsity, pattern)
    updater = LeastSquares(damping=damping[0], damping_by=damping[1], steps=300)
    found = updater.update(W, mask, LinearStats(400, hessian=H))
    wanted = exact(W, mask, H, penalty_of(updater, H))
    torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=2e-3)
    # The objective is flat at its lowest point, so that it says more of the solution than its entries do.
    objective = [
        error(W, V, H) + float((penalty_of(updater, H) * ((V - W) * mask).square()).sum()) for V in (found, wanted)
    ]
    assert objective[0] <= objective[1] * (1 + 1e-5) + 1e-6


@settings(max_examples=30, deadline=None)
@given(LAYERS, PATTERNS, DAMPING)
def test_each_step_lowers_the_error(sizes: tuple[int, int, int], pattern: str, damping: tuple[float, str]) -> None:
    """The penalised error falls with every step, from that of the mask alone; so the plain one never exceeds it."""
    W, H = layer(*sizes)
    mask = keep_mask(W.abs(), 0.5, pattern)
    before = last = error(W, W * mask, H)
    for steps in range(1, 12):
        updater = LeastSquares(damping=damping[0], damping_by=damping[1], steps=steps)
        V = updater.update(W, mask, LinearStats(400, hessian=H))
        assert not V[~mask].any()
        plain = error(W, V, H)
        penalised = plain + float((penalty_of(updater, H) * ((V - W) * mask).square()).sum())
        assert penalised <= last * (1 + 1e-6) and plain <= before * (1 + 1e-6)
        last = penalised


def test_damping_pulls_kept_weights_back() -> None:
    W, H = layer(8, 32, 0)
    mask = keep_mask(W.abs(), 0.5, "row")
    for by in ("input", "mean"):
        moved = [
            (LeastSquares(damping=damping, damping_by=by, steps=200).update(W, mask, LinearStats(9, hessian=H)) - W)
            .masked_select(mask)
            .norm()
            for damping in (0, 0.01, 0.1, 1, 100, 1e6)
        ]
        assert moved == sorted(moved, reverse=True) and moved[-1] < 1e-4 * moved[0]


def test_kept_weights_that_stay_bit_for_bit() -> None:
    """Rows that are kept or pruned as a whole, and inputs that were never anything but zero."""
    W, H = layer(6, 24, 3)
    mask = keep_mask(W.abs(), 0.5, "row")
    mask[0], mask[1] = True, False
    V = LeastSquares(damping=0).update(W, mask, LinearStats(9, hessian=H))
    assert V[0].equal(W[0]) and not V[1].any()
    dead = H.diagonal() == 0
    assert dead.any() and V[:, dead].equal(W[:, dead] * mask[:, dead])
    assert not V[2:][mask[2:] & ~dead].equal(W[2:][mask[2:] & ~dead])
    everything = torch.ones_like(mask)
    assert LeastSquares().update(W, everything, LinearStats(9, hessian=H)).equal(W)


@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_fewer_tokens_than_inputs(tokens: int) -> None:
    """Many weights fit equally well: the error vanishes where it can, and nothing becomes infinite."""
    W, H = layer(5, 32, tokens, tokens)
    mask = keep_mask(W.abs(), 0.5, "row")
    V = LeastSquares(damping=0, steps=500).update(W, mask, LinearStats(tokens, hessian=H))
    assert V.isfinite().all() and error(W, V, H) < 1e-3 * error(W, W * mask, H)
    nothing = LeastSquares().update(W, mask, LinearStats(tokens, hessian=torch.zeros_like(H)))
    assert nothing.equal(W * mask)


def test_a_hessian_that_is_not_finite() -> None:
    W, H = layer(2, 8, 0)
    H[0, 0] = torch.inf
    with pytest.raises(StageError, match="least-squares needs a finite Hessian"):
        LeastSquares().update(W, W > 0, LinearStats(9, hessian=H))
