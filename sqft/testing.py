"""The contract suite: what a plugin author runs with one line, and what our own components pass.

>>> from sqft.testing import check
>>> check(MyScorer())            # or check_scorer(MyScorer())

Each raises `ContractError` saying what was promised and not kept. Exporters write files of models
and are checked by running them; see `check_exporter`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from sqft import checks
from sqft.contracts import (
    Adapter,
    Allocator,
    BaseWeight,
    Choice,
    Component,
    Exporter,
    LinearShape,
    LinearStats,
    Merger,
    ModelReader,
    Quantizer,
    RankGroup,
    Scorer,
    Searcher,
    SearchSpace,
)
from sqft.errors import ContractError

SHAPES = ((8, 8), (16, 32), (24, 8))
LINEARS = tuple(
    LinearShape(f"model.layers.{block}.{name}", out, inputs)
    for block in (0, 1)
    for name, out, inputs in (("self_attn.q_proj", 8, 8), ("self_attn.k_proj", 4, 8), ("mlp.up_proj", 16, 8))
)
SPACE = SearchSpace(tuple(RankGroup(f"g{i}", (8, 6, 4, 2)[: 1 + i % 4], (f"l{i}",)) for i in range(6)))


def check(component: Component) -> None:
    """Run the suite of a component's kind.

    Raises:
        ContractError: saying which promise is broken.
    """
    suites: dict[str, Callable[[Any], None]] = {
        "scorer": check_scorer,
        "allocator": check_allocator,
        "quantizer": check_quantizer,
        "adapter": check_adapter,
        "searcher": check_searcher,
        "merger": check_merger,
        "exporter": _check_options,
    }
    suites[component.kind](component)


def check_scorer(scorer: Scorer) -> None:
    """Finite scores of the weight's shape, the same twice, arguments untouched; dead inputs and zero weights too."""
    _check_options(scorer)
    who = _who(scorer)
    for shape in SHAPES:
        weight, stats = _weight(shape), _stats
        for case in (weight, weight.clone().fill_(0)):
            before, first = case.clone(), scorer.score(case, stats(shape[1]))
            checks.check_unchanged(who, "a test layer", before, case)
            checks.check_scores(who, "a test layer", case, first)
            if not scorer.score(case, stats(shape[1])).equal(first):
                raise ContractError(f"{who} gave other scores for the same weight, statistics and generator")


def check_allocator(allocator: Allocator) -> None:
    """A fraction in [0, 1) for every layer, and over all of them about what was asked for."""
    _check_options(allocator)
    for sparsity in (0.0, 0.5, 0.9):
        result = allocator.allocate(LINEARS, sparsity)
        checks.check_allocation(_who(allocator), LINEARS, result)
        sizes = {linear.name: linear.out_features * linear.in_features for linear in LINEARS}
        total = sum(result[name] * size for name, size in sizes.items()) / sum(sizes.values())
        if abs(total - sparsity) > 0.02:
            raise ContractError(f"{_who(allocator)} spent a sparsity of {total:.3f} where {sparsity} was asked for")


def check_quantizer(quantizer: Quantizer) -> None:
    """Codes on a grid, in range, pruned entries exactly zero, arguments untouched."""
    _check_options(quantizer)
    who = _who(quantizer)
    for shape in ((16, 128), (32, 256)):
        weight = _weight(shape)
        mask = weight.abs() > weight.abs().median()
        pruned = weight * mask
        before = pruned.clone()
        for given in (mask, None):
            result = quantizer.quantize(pruned, given, _stats(shape[1], hessian=True))
            checks.check_unchanged(who, "a test layer", before, pruned)
            checks.check_quantized(who, "a test layer", result, pruned, given)


def check_adapter(adapter: Adapter) -> None:
    """A space that holds every layer once, samples inside it, deltas that fit, start at zero and are seeded."""
    import torch

    _check_options(adapter)
    who = _who(adapter)
    space = adapter.space(LINEARS)
    checks.check_space(who, LINEARS, space)
    for seed in range(8):
        choice = adapter.sample(space, Random(seed))
        checks.check_choice(who, space, choice)
        if adapter.sample(space, Random(seed)) != choice:
            raise ContractError(f"{who} sampled other ranks from the same random state")
    ranks = {member: group.ranks for group in space.groups for member in group.members}
    for linear in LINEARS:
        one, other = (adapter.delta(linear, torch.Generator().manual_seed(3)) for _ in range(2))
        checks.check_delta(who, linear, one, ranks[linear.name])
        pairs = zip(one.factors(one.rank)[:2], other.factors(other.rank)[:2], strict=True)
        if not all(a.equal(b) for a, b in pairs):
            raise ContractError(f"{who} drew other factors from the same generator state")


def check_searcher(searcher: Searcher) -> None:
    """A configuration of the space, asked only about the space, deterministic, and silent if it says so."""
    _check_options(searcher)
    who = _who(searcher)
    for seed in range(4):
        asked: list[list[Choice]] = []
        found = []
        for _ in range(2):
            questions: list[Choice] = []
            asked.append(questions)

            def evaluate(choice: Choice, samples: int | None = None, questions: list[Choice] = questions) -> float:
                checks.check_choice(who, SPACE, choice)
                questions.append(choice)
                return Random(str(choice.ranks)).random()

            found.append(searcher.search(SPACE, evaluate, Random(seed)))
            checks.check_choice(who, SPACE, found[-1])
        if found[0] != found[1] or asked[0] != asked[1]:
            raise ContractError(f"{who} is not deterministic in its random state and answers, so it cannot resume")
        if not searcher.evaluates and asked[0]:
            raise ContractError(f"{who} evaluates, but says `evaluates = False`")


def check_merger(merger: Merger) -> None:
    """An elementwise law: shape, finite, mask kept, blocks of rows alike, derivative as autograd has it."""
    import torch

    _check_options(merger)
    who = _who(merger)
    for shape in SHAPES:
        weight, delta, grad = (_weight(shape, seed) for seed in range(3))
        mask = weight > 0
        for base in (BaseWeight(weight * mask, mask), BaseWeight(weight)):
            kept = base.weight.clone(), delta.clone()
            result = merger.combine(base, delta)
            checks.check_unchanged(who, "a test layer", kept[0], base.weight)
            checks.check_unchanged(who, "a test layer", kept[1], delta)
            checks.check_effective(who, "a test layer", base, result, merger.keeps_mask)
            rows = BaseWeight(base.weight[2:5], base.mask[2:5] if base.mask is not None else None)
            if not merger.combine(rows, delta[2:5]).equal(result[2:5]):
                raise ContractError(f"{who} gives a block of rows another weight than the whole matrix")
            own, default = merger.derivative(base, delta, grad), Merger.derivative(merger, base, delta, grad)
            if not torch.allclose(own, default, rtol=1e-5, atol=1e-6):
                raise ContractError(f"{who} has a derivative that is not the one of its combine")


def check_exporter(exporter: Exporter, model: ModelReader, folder: Path) -> None:
    """It writes something into an empty folder and leaves the source as it was."""
    _check_options(exporter)
    before = {file.name: file.read_bytes() for file in model.folder.iterdir() if file.is_file()}
    exporter.export(model, folder)
    if not any(folder.iterdir()):
        raise ContractError(f"{_who(exporter)} wrote nothing")
    if before != {file.name: file.read_bytes() for file in model.folder.iterdir() if file.is_file()}:
        raise ContractError(f"{_who(exporter)} changed the model it was to export")


def _check_options(component: Component) -> None:
    """Options survive the trip through a recipe, and the component explains itself."""
    cls = type(component)
    if cls.model_validate(component.model_dump(mode="json")) != component:
        raise ContractError(f"{_who(component)} is not the same after its options went through JSON")
    if not (cls.__doc__ or "").strip():
        raise ContractError(f"{_who(component)} has no docstring, which is its help")


def _who(component: Component) -> str:
    return f"{component.kind} '{component.name}'"


def _weight(shape: tuple[int, int], seed: int = 0) -> Any:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _stats(inputs: int, hessian: bool = False) -> LinearStats:
    import torch

    x = _weight((64, inputs), 9)
    x[:, 0] = 0  # a dead input
    squares = x.square().sum(0)
    return LinearStats(64, squares, x.T @ x if hessian else None, torch.Generator().manual_seed(5))
