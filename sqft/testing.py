"""The contract suite: what a plugin author runs with one line, and what our own components pass.

>>> from sqft.testing import check
>>> check(MyScorer())            # or check_scorer(MyScorer())

Each raises `ContractError` saying what was promised and not kept. A component is given what the core
would give it and no more: the statistics it `needs`, the bases it lists; an exporter, tiny models.
"""

from __future__ import annotations

from functools import singledispatch
from itertools import product
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sqft.components import checks
from sqft.components.kinds import Adapter, Allocator, Component, Exporter, Merger, Quantizer, Scorer, Searcher, Updater
from sqft.components.made_up_values import SPACES, MadeUpValues
from sqft.errors import ContractError
from sqft.types import (
    BaseKind,
    BaseWeight,
    LinearShape,
    LinearStats,
    ModelReader,
    Statistic,
)

if TYPE_CHECKING:
    from torch import Tensor

SHAPES = ((8, 8), (16, 32), (24, 8))
LINEARS = tuple(
    LinearShape(f"model.layers.{block}.{name}", out, inputs)
    for block in (0, 1)
    for name, out, inputs in (("self_attn.q_proj", 8, 8), ("self_attn.k_proj", 4, 8), ("mlp.up_proj", 16, 8))
)
PLACE = "a test layer"


@singledispatch
def check(component: Component) -> None:
    """Run the suite of a component's kind.

    Raises:
        ContractError: saying which promise is broken.
    """
    raise ContractError(f"{component!r} is of no kind that sqft knows")


@check.register
def check_scorer(scorer: Scorer) -> None:
    """Check that it prunes as `select` lets it, half of each row, on finite scores, the same twice, arguments
    untouched; dead inputs and zero weights too.

    Raises:
        ContractError: saying which promise is broken.
    """
    import torch

    _check_options(scorer)
    label = _label(scorer)
    for shape in SHAPES:
        for weight in (_weight(shape), torch.zeros(shape)):
            (first, pruned), (again, pruned_again) = (_prune(label, scorer, weight) for _ in range(2))
            if len(first) != len(again) or not all(map(torch.equal, first, again)):
                raise ContractError(f"{label} gave other scores for the same weight, statistics and generator")
            if not all(map(torch.equal, pruned, pruned_again)):
                raise ContractError(f"{label} pruned the same weight in two ways, of the same statistics and generator")


def _prune(label: str, scorer: Scorer, weight: Tensor) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Prune half of each row; return the scores that `select` was asked about, and the new weight and its mask."""
    from sqft.kernels.masks import keep_mask

    before, stats = weight.clone(), _stats(weight.shape[1], scorer.needs)
    asked: list[Tensor] = []

    def select(scores: Tensor) -> Tensor:
        asked.append(checks.check_scores(label, PLACE, weight, scores).clone())
        return keep_mask(scores, 0.5, "row")

    with checks.statistics_unchanged(label, {PLACE: stats}):
        try:
            pruned = scorer.prune(weight, stats, select)
        except ContractError:
            raise
        except Exception as error:
            given = ", ".join(sorted(scorer.needs)) or "nothing"
            raise ContractError(
                f"{label} raised {error!r}; of the statistics it was given {given}, as `needs` says"
            ) from error
    checks.check_unchanged(label, PLACE, before, weight)
    return asked, checks.check_pruned(label, PLACE, before, pruned, 0.5)


@check.register
def check_allocator(allocator: Allocator) -> None:
    """Check that every layer has a fraction in [0, 1), and that by size they average to what was asked for,
    within `SPARSITY_TOLERANCE`.

    Raises:
        ContractError: saying which promise is broken.
    """
    _check_options(allocator)
    measured: dict[str, float] = {}
    if allocator.needs:
        for linear in LINEARS:  # each a block of its own
            weights = {linear.name: _weight((linear.out_features, linear.in_features))}
            before, stats = weights[linear.name].clone(), {linear.name: _stats(linear.in_features, allocator.needs)}
            with checks.statistics_unchanged(_label(allocator), stats):
                numbers = allocator.measure(weights, stats)
            checks.check_unchanged(_label(allocator), linear.name, before, weights[linear.name])
            checks.check_measured(_label(allocator), [linear.name], numbers)
            measured |= numbers
    for sparsity in (0.1, 0.5, 0.9):
        result = allocator.allocate(LINEARS, sparsity, measured)
        checks.check_allocation(_label(allocator), LINEARS, sparsity, result)


@check.register
def check_updater(updater: Updater) -> None:
    """Check for a finite weight that is 0 under the mask, the same twice, arguments untouched; dead inputs, zero
    weights, rows that are pruned or kept as a whole too.

    Raises:
        ContractError: saying which promise is broken.
    """
    import torch

    _check_options(updater)
    label = _label(updater)
    for shape in SHAPES:
        mask = _weight(shape, 1) > 0
        mask[0], mask[1] = False, True
        for weight, given in product((_weight(shape), torch.zeros(shape)), (mask, torch.ones_like(mask))):
            before, stats = (weight.clone(), given.clone()), _stats(shape[1], updater.needs)
            with checks.statistics_unchanged(label, {PLACE: stats}):
                result = updater.update(weight, given, stats)
            checks.check_unchanged(label, PLACE, before[0], weight)
            checks.check_unchanged(label, PLACE, before[1], given, "the mask")
            checks.check_updated(label, PLACE, given, result)
            if not updater.update(weight, given, _stats(shape[1], updater.needs)).equal(result):
                raise ContractError(f"{label} gave another weight for the same weight, mask and statistics")


@check.register
def check_quantizer(quantizer: Quantizer) -> None:
    """Check for codes on a grid, in range, the same twice, pruned entries exactly zero, arguments untouched.

    Raises:
        ContractError: saying which promise is broken.
    """
    _check_options(quantizer)
    label = _label(quantizer)
    for shape in ((16, 128), (32, 256)):
        weight = _weight(shape)
        dense = weight if quantizer.needs_dense() else None
        mask = weight.abs() > weight.abs().median()
        mask[0] = False  # a row with nothing left
        for pruned, given in ((weight * mask, mask), (weight, None)):
            before, stats = (
                (pruned.clone(), mask.clone()),
                _stats(shape[1], quantizer.needs, dense),
            )
            with checks.statistics_unchanged(label, {PLACE: stats}):
                result = quantizer.quantize(pruned, given, stats)
            checks.check_unchanged(label, PLACE, before[0], pruned)
            checks.check_unchanged(label, PLACE, before[1], mask, "the mask")
            checks.check_quantized(label, PLACE, result, pruned, given, quantizer.gives_compensated)
            again = quantizer.quantize(pruned, given, _stats(shape[1], quantizer.needs, dense))
            if not again.codes.equal(result.codes):
                raise ContractError(f"{label} gave other codes for the same weight and statistics")


@check.register
def check_adapter(adapter: Adapter) -> None:
    """Check for a space that holds every layer once, samples inside it, and deltas that keep their contract.

    Raises:
        ContractError: saying which promise is broken.
    """
    _check_options(adapter)
    label = _label(adapter)
    checks.check_dropout(label, adapter.input_dropout())
    space = adapter.space(LINEARS)
    checks.check_space(label, LINEARS, space)
    for seed in range(8):
        choice = adapter.sample(space, Random(seed))
        checks.check_choice(label, space, choice)
        if adapter.sample(space, Random(seed)) != choice:
            raise ContractError(f"{label} sampled other ranks from the same random state")
    ranks = {member: group.ranks for group in space.groups for member in group.members}
    for linear in LINEARS:
        _check_delta(label, adapter, linear, ranks[linear.name])


def _check_delta(label: str, adapter: Adapter, linear: LinearShape, ranks: tuple[int, ...]) -> None:
    """Check that a layer's factors are seeded, float32 whatever torch's default, trainable, smaller ranks slices of the
    largest."""
    import torch

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        delta: Any = adapter.delta(linear, torch.Generator().manual_seed(3))
    finally:
        torch.set_default_dtype(default)
    checks.check_delta(label, linear, delta, ranks)
    again = adapter.delta(linear, torch.Generator().manual_seed(3))
    for one, other in zip(delta.factors(ranks[0])[:2], again.factors(ranks[0])[:2], strict=True):
        if not one.equal(other):
            raise ContractError(f"{label} drew other factors from the same generator state")
    # At the start B is zero, so that slices of it are alike and A has no gradient: go on from elsewhere.
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(_weight(tuple(parameter.shape)))
    B, A, _ = delta.factors(ranks[0])
    for rank in ranks:
        left, right, _ = delta.factors(rank)
        if not (left.equal(B[:, :rank]) and right.equal(A[:rank])):
            raise ContractError(f"{label} does not slice rank {rank} of {linear.name} out of its largest rank")
    parameters = [parameter for parameter in delta.parameters() if parameter.requires_grad]
    loss = (B @ A).square().sum()
    grads = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else ()
    if not grads or any(grad is None or not grad.any() for grad in grads):
        raise ContractError(f"{label} returned factors for {linear.name} through which no gradient reaches a parameter")


@check.register
def check_searcher(searcher: Searcher) -> None:
    """Check for a configuration of the space, determinism, and no other questions than it says that it asks.

    Raises:
        ContractError: saying which promise is broken.
    """
    _check_options(searcher)
    label, asked_for_gradients = _label(searcher), False
    for space, seed in product(SPACES, range(3)):
        first, again = (MadeUpValues(label, space, searcher.needs_gradients()) for _ in range(2))
        found = [searcher.search(space, landscape, Random(seed)) for landscape in (first, again)]
        checks.check_choice(label, space, found[0])
        if found[0] != found[1] or first.asked != again.asked:
            raise ContractError(f"{label} is not deterministic in its random state and answers, so it cannot resume")
        if not searcher.evaluates and any(choice for choice, _ in first.asked):
            raise ContractError(f"{label} evaluates, but says `evaluates = False`")
        asked_for_gradients |= any(choice is None for choice, _ in first.asked)
    if searcher.needs_gradients() and not asked_for_gradients:
        raise ContractError(f"{label} never asked for gradients, but its needs_gradients() is true")


@check.register
def check_merger(merger: Merger) -> None:
    """Check for an elementwise law on every kind of base it lists, with the derivative that autograd finds.

    Float32 [rows, in], finite, mask kept, a block of rows as in the complete weight, arguments unchanged.

    Raises:
        ContractError: saying which promise is broken.
    """
    _check_options(merger)
    for shape in SHAPES:
        weight = _weight(shape)
        mask = weight > 0
        if merger.bases & {BaseKind.SPARSE, BaseKind.QUANTIZED}:
            _check_merger_on(merger, BaseWeight(weight * mask, mask))
        if merger.bases & {BaseKind.DENSE, BaseKind.QUANTIZED}:
            _check_merger_on(merger, BaseWeight(weight))


def _check_merger_on(merger: Merger, base: BaseWeight) -> None:
    import torch

    label, shape = _label(merger), tuple(base.weight.shape)
    delta, grad = _weight(shape, 1), _weight(shape, 2)
    arguments = {"the weight": base.weight, "the delta": delta, "the gradient": grad}
    if base.mask is not None:
        arguments["the mask"] = base.mask
    before = {what: tensor.clone() for what, tensor in arguments.items()}

    def check_arguments() -> None:
        for what, tensor in arguments.items():
            checks.check_unchanged(label, PLACE, before[what], tensor, what)

    result = merger.combine(base, delta)
    check_arguments()
    checks.check_effective(label, PLACE, base, result, merger.keeps_mask)
    if result.dtype != torch.float32:
        raise ContractError(f"{label} returned an effective weight of {result.dtype}, expected float32")
    rows = BaseWeight(base.weight[2:5], base.mask[2:5] if base.mask is not None else None)
    if not merger.combine(rows, delta[2:5]).equal(result[2:5]):
        raise ContractError(f"{label} gives a block of rows another weight than the complete matrix")
    moved = _weight(shape, 3) > 0
    if not merger.combine(base, delta + moved)[~moved].equal(result[~moved]):
        raise ContractError(f"{label} is not elementwise: one entry's delta changes another entry's weight")
    for at in (delta, torch.zeros(shape)):  # training starts from zero
        own, default = merger.derivative(base, at, grad), Merger.derivative(merger, base, at, grad)
        check_arguments()
        if own.dtype != torch.float32 or own.shape != shape or not torch.allclose(own, default, rtol=1e-5, atol=1e-6):
            raise ContractError(f"{label} has a derivative that is not the one of its combine")


@check.register
def check_exporter(exporter: Exporter, model: ModelReader | None = None, folder: Path | None = None) -> None:
    """Check that it writes something into an empty folder and leaves the source as it was.

    Args:
        exporter: the component.
        model: what it writes; unless given, tiny Llamas: of floats, unless it needs codes, and of codes.
        folder: is empty, and written to; given with `model`.

    Raises:
        ContractError: saying which promise is broken.
    """
    _check_options(exporter)
    if model and folder:
        _check_export(exporter, model, folder)
        return
    from sqft.modeling.tiny_model import tiny_model

    for codes in [True] if exporter.needs_codes else [False, True]:
        with TemporaryDirectory() as scratch:
            (target := Path(scratch) / "exported").mkdir()
            _check_export(exporter, tiny_model(Path(scratch) / "model", codes), target)


def _check_export(exporter: Exporter, model: ModelReader, folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in model.folder.iterdir() if file.is_file()}
    exporter.export(model, folder)
    if not any(folder.iterdir()):
        raise ContractError(f"{_label(exporter)} wrote nothing")
    if before != {file.name: file.read_bytes() for file in model.folder.iterdir() if file.is_file()}:
        raise ContractError(f"{_label(exporter)} changed the model it was to export")


def _check_options(component: Component) -> None:
    """Options survive the trip through a recipe, nothing else is kept, and the component explains itself."""
    cls = type(component)
    if cls.model_validate(component.model_dump(mode="json")) != component:
        raise ContractError(f"{_label(component)} is not the same after its options went through JSON")
    if not cls.model_config.get("frozen") or cls.__private_attributes__:
        raise ContractError(f"{_label(component)} can hold state; a component is frozen and has options only")
    if not (cls.__doc__ or "").strip():
        raise ContractError(f"{_label(component)} has no docstring, which is its help")


def _label(component: Component) -> str:
    return f"{component.kind} '{component.name}'"


def _weight(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _stats(inputs: int, needs: frozenset[Statistic], dense: Tensor | None = None) -> LinearStats:
    """Return what the core collects for these needs; without any it does not calibrate and saw no token."""
    import torch

    x = _weight((64, inputs), 9)
    x[:, 0] = 0  # a dead input
    return LinearStats(
        tokens=64 if needs else 0,
        input_sq_sum=x.square().sum(0) if Statistic.INPUT_NORM in needs else None,
        hessian=x.T @ x if Statistic.HESSIAN in needs else None,
        generator=torch.Generator().manual_seed(5),
        dense=dense,
    )
