"""Elastic adapters: groups, ranks, sampling and the factors."""

from __future__ import annotations

import math
from collections import Counter
from random import Random
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sqft_nls.adapter import Lora, Nls
from sqft_nls.delta import LowRankDelta

from sqft.api import LinearShape, RankConfig
from sqft.testing import check_adapter

NAMES = [
    f"model.layers.{block}.{last}"
    for block in (0, 1)
    for last in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
]
LINEARS = [LinearShape(name, 6, 5) for name in NAMES]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_query_key_and_value_of_one_parent_share_a_rank() -> None:
    groups = Nls(ranks=(8, 4)).space(LINEARS).groups
    assert [group.name for group in groups] == [
        "model.layers.0.self_attn.q_proj+k_proj+v_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj+k_proj+v_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert [len(group.members) for group in groups] == [3, 1, 3, 1]
    assert {group.ranks for group in groups} == {(8, 4)}


def test_groups_are_configurable() -> None:
    alone = Nls(groups=()).space(LINEARS)
    assert [group.members for group in alone.groups] == [(name,) for name in NAMES]
    pair = Nls(groups=(("q_proj", "v_proj"),)).space(LINEARS[:3])
    assert sorted(map(len, (group.members for group in pair.groups))) == [1, 2]


@pytest.mark.parametrize("ranks", [(), (0,), (4, 4), (2, 4), (8, -1)])
def test_ranks_are_positive_and_descending(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="ranks"):
        Nls(ranks=ranks)


@pytest.mark.parametrize("options", [{"alpha": 0}, {"dropout": 1}, {"dropout": -0.1}, {"alpha": math.inf}])
def test_other_options_have_ranges(options: dict[str, float]) -> None:
    for adapter in (Nls, Lora):
        with pytest.raises(ValidationError):
            adapter.model_validate(options)


def test_every_group_draws_uniformly_and_on_its_own() -> None:
    adapter = Nls(ranks=(8, 6, 4))
    space, rng, draws = adapter.space(LINEARS), Random(0), 9000
    seen = Counter(adapter.sample(space, rng).ranks[:2] for _ in range(draws))
    assert len(seen) == 9
    # Each pair has probability 1/9: within five standard deviations of a binomial.
    slack = 5 * math.sqrt(draws * (1 / 9) * (8 / 9))
    assert all(abs(count - draws / 9) < slack for count in seen.values())


@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=4, unique=True))
def test_smaller_ranks_are_slices_at_one_scale(out: int, inputs: int, unsorted: list[int]) -> None:
    """Paper §2.2; the scale is alpha / r_max for every rank, which may exceed the layer's size."""
    ranks = tuple(sorted(unsorted, reverse=True))
    adapter = Nls(ranks=ranks, alpha=10)
    delta = cast(LowRankDelta, adapter.delta(LinearShape("l", out, inputs), seeded()))
    assert delta.B.shape == (out, ranks[0]) and delta.A.shape == (ranks[0], inputs)
    for rank in ranks:
        B, A, scale = delta.factors(rank)
        assert B.equal(delta.B[:, :rank]) and A.equal(delta.A[:rank])
        assert scale == 10 / ranks[0]


def test_alpha_over_the_root_of_the_largest_rank() -> None:
    """rsLoRA's scale, for every sub-adapter."""
    nls = Nls(ranks=(16, 9), alpha=10, scaling="root").delta(LINEARS[0], seeded())
    assert [nls.factors(rank)[2] for rank in (16, 9)] == [10 / 4, 10 / 4]
    assert Lora(rank=9, alpha=6, scaling="root").delta(LINEARS[0], seeded()).factors(9)[2] == 2
    with pytest.raises(ValidationError, match="scaling"):
        Lora.model_validate({"scaling": "square"})


def test_the_start_is_loras() -> None:
    """B zeros, A uniform in ±1/√in: Kaiming's bound √(6 / ((1 + a²) · in)) with a = √5."""
    linear = LinearShape("l", 7, 400)
    delta = cast(LowRankDelta, Nls().delta(linear, seeded()))
    bound = 1 / math.sqrt(400)
    assert not delta.B.any() and delta.A.dtype == delta.B.dtype == torch.float32
    assert delta.A.abs().max() <= bound
    assert delta.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert delta.A.mean().item() == pytest.approx(0, abs=bound / 50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_defaults_do_not_matter(dtype: torch.dtype) -> None:
    usual = cast(LowRankDelta, Nls().delta(LINEARS[0], seeded()))
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            other = cast(LowRankDelta, Nls().delta(LINEARS[0], seeded()))
    finally:
        torch.set_default_dtype(default)
    for one, same in ((usual.A, other.A), (usual.B, other.B)):
        assert same.dtype == torch.float32 and same.device.type == "cpu" and one.equal(same)


def test_only_the_generator_is_drawn_from() -> None:
    state = torch.get_rng_state()
    one, same, other = (cast(LowRankDelta, Nls().delta(LINEARS[0], seeded(seed))) for seed in (1, 1, 2))
    assert torch.get_rng_state().equal(state)
    assert one.A.equal(same.A) and not one.A.equal(other.A)


def test_gradients_reach_the_slice_and_nothing_else() -> None:
    delta = cast(LowRankDelta, Nls(ranks=(8, 4, 2)).delta(LINEARS[0], seeded()))
    torch.nn.init.ones_(delta.B)
    B, A, scale = delta.factors(4)
    (scale * B @ A).square().sum().backward()  # type: ignore[no-untyped-call]
    assert delta.A.grad is not None and delta.B.grad is not None
    assert delta.A.grad[:4].any(dim=1).all() and not delta.A.grad[4:].any()
    assert delta.B.grad[:, :4].any(dim=0).all() and not delta.B.grad[:, 4:].any()


def test_lora_is_one_rank_everywhere() -> None:
    lora = Lora(rank=3, alpha=6)
    space = lora.space(LINEARS)
    assert [group.members for group in space.groups] == [(name,) for name in NAMES]
    assert lora.sample(space, Random(0)) == RankConfig((3,) * len(NAMES))
    one, nls = lora.delta(LINEARS[0], seeded()), Nls(ranks=(3,), alpha=6).delta(LINEARS[0], seeded())
    for ours, theirs in zip(one.factors(3)[:2], nls.factors(3)[:2], strict=True):
        assert ours.equal(theirs)
    assert one.factors(3)[2] == nls.factors(3)[2] == 2


@pytest.mark.parametrize(
    "adapter", [Nls(), Nls(ranks=(8, 6, 4)), Nls(groups=()), Lora(), Lora(rank=1, scaling="root")], ids=repr
)
def test_the_contract(adapter: Nls) -> None:
    check_adapter(adapter)
