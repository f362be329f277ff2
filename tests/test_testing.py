"""The suite passes what keeps the contract, and says of each breach which promise is broken."""

from __future__ import annotations

import random
import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import PrivateAttr
from sqft_hf import HuggingFace
from sqft_least_squares import LeastSquares
from sqft_nls.adapter import Nls
from sqft_nls.delta import LowRankDelta
from sqft_nls.searchers import Heuristic, HillClimbing
from sqft_sparsepeft import SparsePEFT
from sqft_uniform import Uniform
from sqft_unmerged import Unmerged
from sqft_wanda import Wanda
from torch import Tensor

from sqft.api import (
    BaseKind,
    ContractError,
    Grid,
    LinearStats,
    Merger,
    Quantized,
    Quantizer,
    RankConfig,
    Scorer,
    SearchSpace,
    Statistic,
)
from sqft.modeling.loading.finished_model import FinishedModel
from sqft.testing import check, check_exporter

HESSIAN = frozenset({Statistic.HESSIAN})


class Diagonal(Scorer):
    """Needs the Hessian, and gets nothing else."""

    name = "diagonal"
    needs = HESSIAN

    def score(self, weight: Tensor, stats: LinearStats) -> Tensor:
        assert stats.hessian is not None and stats.input_sq_sum is None and stats.tokens
        return weight.abs() * stats.hessian.diagonal().sqrt()


class RoundToNearest(Quantizer):
    """Round to nearest on one 4-bit grid a row; what is pruned takes the code of zero."""

    name = "rtn"
    needs = frozenset()

    def quantize(self, weight: Tensor, mask: Tensor | None, stats: LinearStats) -> Quantized:
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 7
        codes = (weight / scale).round().clamp(-8, 7).long() + 8
        return Quantized(codes, Grid(scale, torch.full((len(weight), 1), 8), -1, 4))


def variant(base: type, **members: Any) -> Any:
    """A class that differs from `base` in these members, each method a function of (self, ...)."""
    return type("Variant", (base,), {"__doc__": "A variant.", "__module__": __name__, **members})


@pytest.mark.parametrize(
    "component",
    [
        Diagonal(),
        RoundToNearest(),
        variant(SparsePEFT, derivative=Merger.derivative)(),
        variant(Unmerged, bases=frozenset({BaseKind.QUANTIZED}))(),
    ],
    ids=lambda component: type(component).__mro__[1].__name__,
)
def test_what_keeps_the_contract_passes(component: Any) -> None:
    check(component)


def scorer(score: Any, needs: Any = Wanda.needs) -> Any:
    return variant(Wanda, score=lambda self, weight, stats: score(weight, stats), needs=needs)()


def quantizer(spoil: Any) -> Any:
    """Round to nearest, after which `spoil` gets the weight, the mask (all ones if there is none) and the codes."""

    def quantize(self: Any, weight: Tensor, mask: Tensor | None, stats: LinearStats) -> Quantized:
        result = RoundToNearest().quantize(weight, mask, stats)
        spoil(weight, mask if mask is not None else torch.ones_like(weight).bool(), result.codes)
        return result

    return variant(RoundToNearest, quantize=quantize)()


def adapter(delta: Any) -> Any:
    """Ranks 8 and 4, with `delta` of the layer, the largest rank and the generator."""
    return variant(Nls, delta=lambda self, linear, generator: delta(linear, 8, 1.0, generator))(ranks=(8, 4))


def factors(change: Any) -> Any:
    """Ranks 8 and 4, with `change` of (B, A, rank) for factors."""
    return adapter(variant(LowRankDelta, factors=lambda self, rank: (*change(self.B, self.A, rank), 1.0)))


def started(*arguments: Any) -> LowRankDelta:
    delta = LowRankDelta(*arguments)
    torch.nn.init.ones_(delta.B)
    return delta


class NoModule:
    """Right in every number, but nothing would find its parameters."""

    def __init__(self, *arguments: Any) -> None:
        inner = LowRankDelta(*arguments)
        self.rank, self.factors = inner.rank, inner.factors


def asking(ranks: Any, samples: Any = lambda: None, base: Any = HillClimbing) -> Any:
    """A searcher that first asks about the ranks it is told, on the samples it is told."""

    def search(self: Any, space: SearchSpace, evaluate: Any, rng: random.Random) -> Any:
        evaluate(RankConfig(tuple(ranks(group) for group in space.groups)), samples())
        return base.search(self, space, evaluate, rng)

    return variant(base, search=search)()


def endless(self: Any, space: SearchSpace, evaluate: Any, rng: random.Random) -> Any:
    """A search that only time would end, but what is known takes none."""
    while evaluate.within(2):
        evaluate(space.choice(space.median()), 4)


def updater(update: Any) -> Any:
    return variant(LeastSquares, update=lambda self, weight, mask, stats: update(weight, mask, stats))()


def merger(combine: Any, derivative: Any = Merger.derivative) -> Any:
    return variant(SparsePEFT, combine=lambda self, base, delta: combine(base, delta), derivative=derivative)()


def editing_mask(base: Any, delta: Tensor) -> Tensor:
    result = sparse(base, delta)
    if base.mask is not None:
        base.mask.logical_not_()
    return result


class Lossy(Wanda):
    """Loses its option on the way through a recipe."""

    power: float = 1.0

    def model_dump(self, **arguments: Any) -> dict[str, Any]:
        return {"power": 2.0}


sparse = SparsePEFT().combine
turn: Any = count()
unseeded: Any = random
BREACHES = [
    (Lossy(), "after its options went through JSON"),
    (variant(Wanda, _seen=PrivateAttr(0))(), "can hold state"),
    (variant(Wanda, model_config={"frozen": False})(), "can hold state"),
    (variant(Wanda, __doc__="")(), "no docstring"),
    (scorer(lambda weight, stats: weight.abs().T), "scores of shape"),
    (scorer(lambda weight, stats: weight * torch.nan), "not finite"),
    (scorer(lambda weight, stats: weight / weight.abs().sum(1, keepdim=True)), "not finite"),  # weights of zero
    (scorer(lambda weight, stats: weight / stats.input_sq_sum), "not finite"),  # a dead input
    (scorer(lambda weight, stats: torch.rand_like(weight)), "other scores for the same weight"),
    (scorer(lambda weight, stats: weight.long()), "expected a floating type"),
    (scorer(lambda weight, stats: None), "returned NoneType"),
    (scorer(lambda weight, stats: weight.abs_()), "edited the weight"),
    (scorer(lambda weight, stats: weight * stats.input_sq_sum.sqrt_()), "edited the statistics (input_sq_sum)"),
    (scorer(lambda weight, stats: weight + stats.hessian.abs_()[0], HESSIAN), "edited the statistics (hessian)"),
    (scorer(lambda weight, stats: weight * stats.hessian[0]), "of the statistics it was given input-norm, as `needs`"),
    (variant(Wanda, needs=frozenset())(), "of the statistics it was given nothing, as `needs` says"),
    (variant(Wanda, needs=HESSIAN)(), "of the statistics it was given hessian, as `needs` says"),
    (
        variant(Uniform, allocate=lambda self, linears, s, measured: {at.name: s / 2 for at in linears})(),
        "0.0500, where 0.1 was asked",
    ),
    (
        variant(Uniform, allocate=lambda self, linears, s, measured: {at.name: s + 0.01 for at in linears})(),
        "0.1100, where 0.1 was asked for (within 0.005)",
    ),
    (
        variant(Uniform, allocate=lambda self, linears, s, measured: {at.name: s for at in linears[1:]})(),
        "the sparsity None",
    ),
    (updater(lambda weight, mask, stats: weight), "pruned weights of a test layer that are not 0"),
    (updater(lambda weight, mask, stats: weight.mul_(mask)), "edited the weight"),
    (updater(lambda weight, mask, stats: weight * mask.logical_not_()), "edited the mask"),
    (updater(lambda weight, mask, stats: stats.hessian.zero_()[0] + weight * mask), "edited the statistics (hessian)"),
    (updater(lambda weight, mask, stats: weight * mask / stats.hessian.diagonal()), "not finite"),  # a dead input
    (updater(lambda weight, mask, stats: weight * mask / (mask.sum(1, keepdim=True))), "not finite"),  # nothing kept
    (updater(lambda weight, mask, stats: weight * mask * next(turn)), "another weight for the same weight, mask"),
    (quantizer(lambda weight, mask, codes: codes.masked_fill_(~mask, 9)), "pruned weights"),
    (quantizer(lambda weight, mask, codes: codes.add_(8)), "outside [0, 15]"),
    (quantizer(lambda weight, mask, codes: weight.add_(1)), "edited the weight"),
    (quantizer(lambda weight, mask, codes: mask.logical_not_()), "edited the mask"),
    (quantizer(lambda weight, mask, codes: codes.masked_fill_(mask, next(turn) % 16)), "other codes"),
    (variant(Nls, space=lambda self, linears: SearchSpace(Nls.space(self, linears).groups[1:]))(), "in 0 groups"),
    (variant(Nls, sample=lambda self, space, rng: RankConfig((3,) * len(space.groups)))(), "no configuration"),
    (variant(Nls, sample=lambda self, space, rng: Nls.sample(self, space, unseeded))(), "the same random state"),
    (variant(Nls, input_dropout=lambda self: "drop")(), "the input dropout 'drop', expected a number in [0, 1)"),
    (factors(lambda B, A, rank: (B[:, :rank].detach(), A[:rank].detach())), "no gradient"),
    (factors(lambda B, A, rank: (B[:, :rank], A[:rank].detach())), "no gradient"),
    (factors(lambda B, A, rank: (B[:, :rank].double(), A[:rank])), "float64"),
    (factors(lambda B, A, rank: (B[:, -rank:], A[:rank])), "does not slice rank 4"),
    (factors(lambda B, A, rank: (B[:, :rank], A[-rank:])), "does not slice rank 4"),
    (factors(lambda B, A, rank: (B, A)), "B of shape [8, 8] for model.layers.0.self_attn.q_proj, expected [8, 4]"),
    (
        adapter(lambda linear, rank, *_: LowRankDelta(linear, rank, 1.0, torch.default_generator)),
        "the same generator state",
    ),
    (adapter(lambda *arguments: LowRankDelta(*arguments).to(torch.get_default_dtype())), "bfloat16"),
    (adapter(lambda linear, rank, *rest: LowRankDelta(linear, 4, *rest)), "rank 4 for model.layers.0"),
    (adapter(started), "delta that is not zero"),
    (adapter(NoModule), "expected a torch.nn.Module"),
    (variant(Heuristic, search=lambda self, space, *_: RankConfig((1,) * len(space.groups)))(), "no configuration"),
    (
        variant(HillClimbing, search=lambda self, space, ask, _: HillClimbing.search(self, space, ask, unseeded))(),
        "not deterministic",
    ),
    (asking(lambda group: 1), "no configuration"),
    (asking(lambda group: group.ranks[0], lambda: 0), "on 0 samples"),
    (asking(lambda group: group.ranks[0], lambda: next(turn) + 1), "not deterministic"),
    (asking(lambda group: group.ranks[0], base=Heuristic), "evaluates, but says"),
    (variant(Heuristic, search=lambda self, space, evaluate, _: evaluate.first_order())(), "asked for gradients, but"),
    (variant(Heuristic, needs_gradients=lambda self: True)(), "never asked for gradients, but"),
    (variant(HillClimbing, search=endless)(), "asked 100,000 questions, and did not end"),
    (merger(lambda base, delta: base.weight + delta), "zeros of the base nonzero"),
    (merger(lambda base, delta: sparse(base, delta - delta.mean())), "block of rows"),
    (merger(lambda base, delta: sparse(base, delta - delta.mean(1, keepdim=True))), "not elementwise"),
    (merger(lambda base, delta: sparse(base, delta).half()), "float16, expected float32"),
    (merger(lambda base, delta: base.weight.add_(delta)), "edited the weight"),
    (merger(lambda base, delta: sparse(base, delta.mul_(2))), "edited the delta"),
    (merger(editing_mask), "edited the mask"),
    (merger(sparse, lambda self, base, delta, grad: grad), "derivative"),
    (merger(sparse, lambda self, base, delta, grad: SparsePEFT().derivative(base, delta, grad).half()), "derivative"),
    (merger(lambda base, delta: base.weight + 0 * delta, SparsePEFT.derivative), "derivative"),
    (
        merger(sparse, lambda self, base, delta, grad: SparsePEFT().derivative(base, delta, grad.mul_(2))),
        "the gradient",
    ),
]


@pytest.mark.parametrize(("component", "message"), BREACHES, ids=lambda value: value if isinstance(value, str) else "")
def test_what_breaks_it_is_told(component: Any, message: str) -> None:
    with pytest.raises(ContractError, match=re.escape(message)) as caught:
        check(component)
    assert str(caught.value).startswith(f"{component.kind} '{component.name}' ")


@pytest.mark.parametrize(
    ("bases", "masked"), [({"dense"}, {False}), ({"sparse"}, {True}), ({"quantized"}, {False, True})], ids=str
)
def test_a_merger_is_asked_about_the_bases_it_lists(bases: set[str], masked: set[bool]) -> None:
    seen = set()

    def combine(self: Any, base: Any, delta: Tensor) -> Tensor:
        seen.add(base.mask is not None)
        return sparse(base, delta)

    check(variant(SparsePEFT, combine=combine, bases=frozenset(map(BaseKind, bases)))())
    assert seen == masked


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (lambda self, model, folder: None, "wrote nothing"),
        (
            lambda self, model, folder: (model.folder / "config.json").rename(folder / "config.json"),
            "changed the model",
        ),
    ],
)
def test_bad_exporters_are_caught(export: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=message):
        check(variant(HuggingFace, export=export)())
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text("{}")
    with pytest.raises(ContractError, match=message):
        check_exporter(variant(HuggingFace, export=export)(), FinishedModel(source), target)


@pytest.mark.parametrize(("needs_codes", "expected"), [(False, [0, 14]), (True, [14])])
def test_an_exporter_is_given_the_models_it_can_write(needs_codes: bool, expected: list[int]) -> None:
    given = []

    def export(self: Any, model: Any, folder: Path) -> None:
        given.append(len(model.quantized()))
        (folder / "a").touch()

    check(variant(HuggingFace, export=export, needs_codes=needs_codes)())
    assert given == expected
