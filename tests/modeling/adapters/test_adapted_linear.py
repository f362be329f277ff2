"""The adapted layer against a float64 two-path oracle and against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sqft_nls.adapter import Nls
from sqft_sparsepeft import SparsePEFT
from sqft_unmerged import Unmerged
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sqft.api import BaseWeight, LinearShape, Merger
from sqft.modeling.adapters import frozen_weight as module
from sqft.modeling.adapters.adapted_linear import AdaptedLinear, MergedLinear, adapt, attach, cached_effective_weights
from sqft.modeling.adapters.frozen_weight import FloatWeight


def layer(
    merger: Merger, out: int = 6, inputs: int = 5, rank: int = 3, dropout: float = 0.0, bias: bool = True, seed: int = 0
) -> AdaptedLinear:
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, out, bias=bias).requires_grad_(False)
    linear.weight.data[torch.rand(out, inputs) < 0.5] = 0
    generator = torch.Generator().manual_seed(seed)
    delta = Nls(ranks=(rank,), alpha=2.0 * rank).delta(LinearShape("l", out, inputs), generator)
    assert isinstance(delta, nn.Module)
    delta.B.data.normal_()  # type: ignore[union-attr, operator]
    return adapt(FloatWeight(linear.weight, True), linear.bias, delta, merger, dropout)


def oracle(adapted: AdaptedLinear, x: Tensor) -> Tensor:
    """W x + scale · ((BA) ⊙ M) x as two paths in float64."""
    B, A, scale = adapted.delta.factors(adapted.rank)
    weight = adapted.base.weight.double()
    low = torch.einsum("or,ri->oi", B.double(), A.double()) * scale
    low = torch.where(weight != 0, low, torch.zeros_like(low))
    bias = adapted.bias.double() if adapted.bias is not None else 0
    return x.double() @ weight.T + x.double() @ low.T + bias


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(0, 50))
def test_forward_and_gradients_equal_the_oracle(out: int, inputs: int, rank: int, bias: bool, seed: int) -> None:
    adapted = layer(SparsePEFT(), out, inputs, rank, bias=bias, seed=seed)
    x = torch.randn(2, 3, inputs, requires_grad=True)
    trained = [x, *adapted.delta.parameters()]  # type: ignore[attr-defined]
    probe = torch.randn(2, 3, out)
    y = adapted(x)
    torch.testing.assert_close(y.double(), oracle(adapted, x), rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad((y * probe).sum(), trained)
    expected = torch.autograd.grad((oracle(adapted, x) * probe).sum(), trained)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merger", [SparsePEFT(), Unmerged()], ids=lambda m: m.name)
def test_a_model_may_read_the_weight(merger: Merger) -> None:
    """Mamba does: the product is the layer's own, and so are the gradients."""
    adapted, x, probe = layer(merger, 7, 5, bias=False), torch.randn(4, 5), torch.randn(4, 7)
    trained = [*adapted.delta.parameters()]  # type: ignore[attr-defined]
    read, called = x @ adapted.weight.T, adapted(x)
    torch.testing.assert_close(read, called)
    for ours, theirs in zip(
        torch.autograd.grad((read * probe).sum(), trained),
        torch.autograd.grad((called * probe).sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with cached_effective_weights(nn.ModuleList([adapted])):
        torch.testing.assert_close(adapted.weight, read.new_tensor(adapted(torch.eye(5)).T.tolist()))


def test_small_row_blocks_change_nothing(monkeypatch: object) -> None:
    adapted = layer(SparsePEFT(), 7, 5)
    whole = adapted.effective()
    module.BLOCK, saved = 10, module.BLOCK
    try:
        torch.testing.assert_close(adapted.effective(), whole)
        x = torch.randn(4, 5)
        torch.testing.assert_close(adapted(x).double(), oracle(adapted, x), rtol=1e-5, atol=1e-5)
    finally:
        module.BLOCK = saved


def test_a_smaller_rank_trains_only_its_slice() -> None:
    adapted = layer(SparsePEFT(), rank=3)
    adapted.rank = 2
    adapted(torch.randn(4, 5)).square().sum().backward()
    delta = adapted.delta
    assert not delta.A.grad[2:].any() and not delta.B.grad[:, 2:].any()  # type: ignore[attr-defined]
    assert delta.A.grad[:2].any() and delta.B.grad[:, :2].any()  # type: ignore[attr-defined]


def test_nothing_of_the_weights_size_is_kept() -> None:
    adapted = layer(SparsePEFT(), 64, 48, rank=2)
    x = torch.randn(8, 48, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = adapted(x)
    own = {adapted.base.weight.untyped_storage().data_ptr(), x.untyped_storage().data_ptr()}
    kept = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    assert kept and max(t.numel() for t in kept) < 64 * 48 / 4
    assert not [v for v in vars(y.grad_fn).values() if isinstance(v, Tensor)]


def test_checkpointing_recomputes_the_same() -> None:
    adapted = layer(SparsePEFT())
    x = torch.randn(4, 5, requires_grad=True)
    parameters = list(adapted.delta.parameters())  # type: ignore[attr-defined]
    plain = torch.autograd.grad(adapted(x).square().sum(), parameters)
    again = torch.autograd.grad(checkpoint(adapted, x, use_reentrant=False).square().sum(), parameters)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_autocast_uses_exactly_the_effective_weight() -> None:
    adapted = layer(SparsePEFT(), 16, 16)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(x)
    bf16 = torch.bfloat16
    assert torch.equal(y, F.linear(x.to(bf16), adapted.effective().to(bf16), adapted.bias.to(bf16)))


def test_frozen_and_training_forward_are_one() -> None:
    adapted = layer(SparsePEFT(), 33, 17)
    x = torch.randn(4, 17)
    trained = adapted(x)
    with cached_effective_weights(adapted), torch.no_grad():
        assert torch.equal(adapted(x), trained)
    assert adapted.cached is None


class Doubling(Merger):
    """Another law, without a closed-form derivative."""

    name = "doubling"
    bases = frozenset()

    def combine(self, base: BaseWeight, delta: Tensor) -> Tensor:
        return base.weight + 2 * delta


def test_the_derivative_comes_from_autograd_by_default() -> None:
    adapted = layer(Doubling())
    x, probe = torch.randn(4, 5), torch.randn(4, 6)
    (found,) = torch.autograd.grad((adapted(x) * probe).sum(), [adapted.delta.A])  # type: ignore[attr-defined]
    B, A, scale = adapted.delta.factors(adapted.rank)
    direct = (F.linear(x, adapted.base.weight + 2 * scale * (B @ A), adapted.bias) * probe).sum()
    (expected,) = torch.autograd.grad(direct, [adapted.delta.A])  # type: ignore[attr-defined]
    torch.testing.assert_close(found, expected)


def test_unmerged_is_lora() -> None:
    adapted = layer(Unmerged())
    x = torch.randn(4, 5)
    B, A, scale = adapted.delta.factors(2)
    adapted.rank = 2
    torch.testing.assert_close(adapted(x), F.linear(x, adapted.base.weight, adapted.bias) + scale * (x @ A.T @ B.T))


def test_dropout_touches_only_the_adapter() -> None:
    adapted = layer(SparsePEFT(), dropout=0.999999).train()
    x = torch.randn(4, 5)
    torch.testing.assert_close(adapted(x), F.linear(x, adapted.base.weight, adapted.bias))
    adapted.eval()
    torch.testing.assert_close(adapted(x).double(), oracle(adapted, x), rtol=1e-5, atol=1e-5)


def test_dropouts_side_path_keeps_a_small_deltas_digits_in_bfloat16() -> None:
    """x (W_eff − W)ᵀ and its gradients against float64, where W is 10⁵ times the delta."""
    adapted = layer(SparsePEFT(), 32, 48, bias=False)
    adapted.base.weight.data = (adapted.base.weight.data * 1000).to(torch.bfloat16)
    adapted.delta.B.data *= 1e-2  # type: ignore[attr-defined]
    x, probe = torch.randn(8, 48, dtype=torch.bfloat16), torch.randn(8, 32)
    assert isinstance(adapted, MergedLinear)
    B, A, scale = adapted.delta.factors(adapted.rank)
    side = adapted.delta_linear(x)
    low = scale * (B.double() @ A.double()) * (adapted.base.weight != 0)
    expected = x.double() @ low.T
    trained = [adapted.delta.B, adapted.delta.A]  # type: ignore[attr-defined]
    found = [side, *torch.autograd.grad((side.float() * probe).sum(), trained)]
    wanted = [expected, *torch.autograd.grad((expected * probe).sum(), trained)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.double() - theirs).abs().max() <= 0.02 * theirs.abs().max()


class Shared(nn.Module):
    """A third party's delta: B is a product, one parameter is in both factors, and another belongs to A alone."""

    rank = 2

    def __init__(self) -> None:
        super().__init__()
        self.left, self.gate = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.zeros(6, 1))
        self.both, self.right = nn.Parameter(torch.ones(1)), nn.Parameter(torch.randn(2, 5))
        self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)

    def factors(self, rank: int) -> tuple[Tensor, Tensor, float]:
        both = self.both.square()  # one node of the graph of each
        return (self.left * self.gate * both * self.fixed)[:, :rank], (both * self.right)[:rank], 1.0


def test_the_parameters_of_b_are_found_whatever_their_names() -> None:
    linear, shared = FloatWeight(torch.randn(6, 5), False), Shared()
    found = adapt(linear, None, shared, SparsePEFT()).parameters_of_B()
    assert [id(p) for p in found] == [id(shared.left), id(shared.gate)]
    usual = layer(Unmerged())
    assert [id(p) for p in usual.parameters_of_B()] == [id(usual.delta.B)]  # type: ignore[attr-defined]
    shared.left.requires_grad_(False), shared.gate.requires_grad_(False), shared.both.requires_grad_(False)
    assert not adapt(linear, None, shared, SparsePEFT()).parameters_of_B()


def test_attach_freezes_all_but_the_deltas() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Sequential(nn.Linear(3, 2))})
    generator = torch.Generator()
    delta = Nls(ranks=(2,)).delta(LinearShape("b.0", 2, 3), generator)
    weight = FloatWeight(model.get_submodule("b.0").weight, False)  # type: ignore[arg-type]
    adapted = attach(model, {"b.0": delta}, SparsePEFT(), {"b.0": weight})
    assert model.get_submodule("b.0") is adapted["b.0"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"b.0.delta.A", "b.0.delta.B"}
