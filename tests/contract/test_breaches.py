"""A component that breaks its contract inside a run is named, with its provider and the layer or tensor."""

from __future__ import annotations

import re
from itertools import count, cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sqft_baselines import Magnitude
from sqft_gptq import Gptq
from sqft_hf import HuggingFace
from sqft_least_squares import LeastSquares
from sqft_nls.adapter import Lora
from sqft_nls.delta import LowRankDelta
from sqft_nls.searchers import Heuristic, HillClimbing
from sqft_owl import Owl
from sqft_sparsegpt import SparseGpt
from sqft_sparsepeft import SparsePEFT
from sqft_uniform import Uniform
from sqft_wanda import Wanda

from sqft import Orchestrator, Recipe, Registry
from sqft.api import RankConfig, RankGroup, SearchSpace, hookimpl
from sqft.components.hookspecs import COMPONENT_HOOKS
from sqft.errors import ArtifactError, ContractError, RecipeError, SqftError

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def allocator(change: Any) -> Any:
    """`uniform`, with `change` made to its dictionary."""
    return Uniform, {"allocate": lambda self, linears, s, measured: change({linear.name: s for linear in linears})}


def scorer(score: Any) -> Any:
    return Magnitude, {"score": lambda self, weight, stats: score(weight)}


def updater(update: Any) -> Any:
    return LeastSquares, {"update": lambda self, weight, mask, stats: update(weight, mask, stats)}


def adapter(space: Any = lambda space: space, delta: Any = LowRankDelta, sample: Any = Lora.sample) -> Any:
    """`lora` of rank 2, with `space` made of its space, and with another delta or sample."""
    return Lora, {
        "space": lambda self, linears: space(Lora(rank=2).space(linears)),
        "delta": lambda self, linear, generator: delta(linear, 2, 1.0, generator),
        "sample": sample,
    }


def factors(change: Any) -> Any:
    """`lora`, with `change` made to (B, A, scale) of the layer UP."""

    class Changed(LowRankDelta):
        def __init__(self, linear: Any, *rest: Any) -> None:
            super().__init__(linear, *rest)
            self.changed = linear.name == UP

        def factors(self, rank: int) -> Any:
            right = super().factors(rank)
            return change(*right) if self.changed else right

    return adapter(delta=Changed)


def merger(combine: Any) -> Any:
    return SparsePEFT, {"combine": lambda self, base, delta: combine(base, delta)}


def exporter(change: Any) -> Any:
    """`hf`, with `change` made to the tensor of the layer UP."""

    def export(self: Any, model: Any, folder: Path) -> None:
        tensors = {name: model.tensor(name) for name in model.names()}
        tensors[f"{UP}.weight"] = change(tensors[f"{UP}.weight"])
        save_file(tensors, folder / "model.safetensors")

    return HuggingFace, {"export": export}


def ask_outside(self: Any, space: Any, evaluate: Any, rng: Any) -> RankConfig:
    evaluate(RankConfig((1,) * len(space.groups)))
    return space.choice([0] * len(space.groups))  # type: ignore[no-any-return]


def damping(stats: Any) -> None:
    """As no version counter sees it."""
    stats.hessian.numpy()[0, 0] += 1


def sorting(stats: Any) -> None:
    """As no sum over the bits sees it."""
    for one in stats.values():
        one.input_sq_sum.copy_(one.input_sq_sum.sort().values)


calls = count()


def editing_later(base: Any, delta: Any) -> Any:
    """Nothing to see at the first call, which is the core's look at it."""
    if next(calls) == 1:
        base.weight.mul_(2)
    return base.weight + delta * base.mask


order = cycle((1, -1))  # another one at every call
BREACHES: list[tuple[tuple[Any, dict[str, Any]], type[SqftError], str]] = [
    (allocator(lambda given: list(given)), ContractError, "returned list, expected a mapping"),
    (allocator(lambda given: given | {UP: 1.0}), ContractError, f"gave {UP} the sparsity 1.0"),
    (allocator(lambda given: given | {UP: True}), ContractError, f"gave {UP} the sparsity True"),
    (allocator(lambda given: given | {UP: torch.nan}), ContractError, f"gave {UP} the sparsity nan"),
    (allocator(lambda given: given | {"lm_head": 0.5}), ContractError, "gave 'lm_head' a sparsity"),
    (allocator(lambda given: {Q: given[Q]}), ContractError, "gave model.layers.0.self_attn.k_proj the sparsity None"),
    (allocator(lambda given: dict.fromkeys(given, 0.25)), ContractError, "0.2500, where 0.5 was asked for"),
    (scorer(lambda weight: weight.abs()[:, :1]), ContractError, f"scores of shape [32, 1] for {Q}"),
    (scorer(lambda weight: weight.log()), ContractError, f"not finite for {Q}"),
    (scorer(lambda weight: weight.abs_()), ContractError, f"edited the weight of {Q}"),
    (updater(lambda weight, mask, stats: weight), ContractError, f"left 512 pruned weights of {Q} that are not 0"),
    (updater(lambda weight, mask, stats: mask), ContractError, f"a weight of torch.bool for {Q}"),
    (updater(lambda weight, mask, stats: weight[:1]), ContractError, f"a weight of shape [1, 32] for {Q}"),
    (updater(lambda weight, mask, stats: (weight / 0) * mask), ContractError, f"not finite for {Q}"),
    (updater(lambda weight, mask, stats: weight.mul_(mask)), ContractError, f"edited the weight of {Q}"),
    (updater(lambda weight, mask, stats: weight * mask.logical_not_()), ContractError, f"edited the mask of {Q}"),
    (
        updater(lambda weight, mask, stats: damping(stats) or weight * mask),
        ContractError,
        f"edited the statistics (hessian) of {Q} in place",
    ),
    (
        (Wanda, {"score": lambda self, weight, stats: weight * stats.input_sq_sum.sqrt_()}),
        ContractError,
        f"edited the statistics (input_sq_sum) of {Q} in place",
    ),
    (
        (SparseGpt, {"prune": lambda self, weight, stats, select: damping(stats) or (weight, select(weight))}),
        ContractError,
        f"edited the statistics (hessian) of {Q} in place",
    ),
    (
        (Owl, {"measure": lambda self, weights, stats: sorting(stats) or dict.fromkeys(weights, 0.0)}),
        ContractError,
        f"edited the statistics (input_sq_sum) of {Q} in place",
    ),
    (
        (
            Gptq,
            {"quantize": lambda self, weight, mask, stats: damping(stats) or Gptq.quantize(self, weight, mask, stats)},
        ),
        ContractError,
        f"edited the statistics (hessian) of {Q} in place",
    ),
    (scorer(lambda weight: weight != 0), ContractError, f"scores of torch.bool for {Q}"),
    (
        adapter(lambda space: SearchSpace(space.groups[:-1])),
        RecipeError,
        "has model.layers.1.mlp.up_proj in 0 groups",
    ),
    (
        adapter(lambda space: SearchSpace(space.groups * 2)),
        RecipeError,
        "has model.layers.0.self_attn.q_proj in 2 groups",
    ),
    (
        adapter(lambda space: SearchSpace((*space.groups[:-1], RankGroup("last", (2, 4), space.groups[-1].members)))),
        RecipeError,
        "gave group last the ranks [2, 4]",
    ),
    (adapter(lambda space: SearchSpace(list(space.groups))), RecipeError, "expected tuples"),  # type: ignore[arg-type]
    (adapter(lambda space: SearchSpace(space.groups[:: next(order)])), ContractError, "gave another search space"),
    (adapter(sample=lambda self, space, rng: None), ContractError, "returned None, which is no configuration"),
    (adapter(sample=lambda self, space, rng: RankConfig((1,) * len(space.groups))), ContractError, "no configuration"),
    (
        adapter(delta=lambda linear, rank, *rest: LowRankDelta(linear, rank - 1, *rest)),
        ContractError,
        f"a delta of rank 1 for {Q}, expected 2",
    ),
    (adapter(delta=lambda *_: torch.nn.Linear(1, 1)), ContractError, f"a delta of rank None for {Q}"),
    (adapter(delta=lambda *_: SimpleNamespace(rank=2)), ContractError, f"SimpleNamespace for {Q}"),
    (factors(lambda B, A, scale: (B, A)), ContractError, f"factors for {UP} that are not (B, A, scale)"),
    (factors(lambda B, A, scale: (B.T, A, scale)), ContractError, f"B of shape [2, 64] for {UP}, expected [64, 2]"),
    (factors(lambda B, A, scale: (B, A.T, scale)), ContractError, f"A of shape [32, 2] for {UP}, expected [2, 32]"),
    (factors(lambda B, A, scale: (B.bfloat16(), A, scale)), ContractError, f"B of torch.bfloat16 for {UP}"),
    (factors(lambda B, A, scale: (B, A / 0, scale)), ContractError, f"A with values that are not finite for {UP}"),
    (factors(lambda B, A, scale: (B + 1, A, scale)), ContractError, f"starts {UP} with a delta that is not zero"),
    (factors(lambda B, A, scale: (B, A, torch.inf)), ContractError, f"the scale inf for {UP}"),
    (merger(lambda base, delta: None), ContractError, f"NoneType as an effective weight for {Q}"),
    (merger(lambda base, delta: base.weight[:1]), ContractError, f"an effective weight of shape [1, 32] for {Q}"),
    (merger(lambda base, delta: base.weight / 0), ContractError, f"not finite for {Q}"),
    (merger(lambda base, delta: base.weight + delta), ContractError, f"zeros of the base nonzero in {Q}"),
    (merger(lambda base, delta: base.weight.add_(delta * base.mask)), ContractError, f"edited the weight of {Q}"),
    (merger(lambda base, delta: base.weight + delta.mul_(base.mask)), ContractError, f"edited the delta of {Q}"),
    (
        (SparsePEFT, {"derivative": lambda self, base, delta, grad: grad[:1]}),
        ContractError,
        f"a derivative of shape [1, 32] for {Q}, expected [32, 32]",
    ),
    (merger(editing_later), ContractError, f"edited the frozen weight of {Q} in place while training"),
    ((Heuristic, {"search": lambda self, space, *_: None}), ContractError, "returned None, which is no configuration"),
    (
        (Heuristic, {"search": lambda self, space, *_: RankConfig((1, 1))}),
        ContractError,
        "returned RankConfig(ranks=(1, 1))",
    ),
    ((HillClimbing, {"search": ask_outside}), ContractError, "returned RankConfig(ranks=(1, 1, 1, 1)), which is no"),
    ((HuggingFace, {"export": lambda self, model, folder: None}), ArtifactError, "wrote nothing"),
    (exporter(lambda weight: weight / 0), ArtifactError, f"{UP}.weight holds values that are not finite"),
    (exporter(lambda weight: weight + 1), ArtifactError, f"zeros of {UP}.weight are not zero any more"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all, so that what comes before the broken step is made once."""
    return tmp_path_factory.mktemp("store")


@pytest.mark.parametrize(
    ("bad", "error", "message"), BREACHES, ids=[f"{bad[0].kind}: {message}" for bad, _, message in BREACHES]
)
def test_who_broke_what_is_told(
    bad: tuple[Any, dict[str, Any]],
    error: type[SqftError],
    message: str,
    raw: dict[str, Any],
    registry: Registry,
    store: Path,
) -> None:
    base, members = bad
    component = type("Bad", (base,), {"name": "bad", "__module__": __name__, **members})
    offer = SimpleNamespace(**{COMPONENT_HOOKS[base.kind]: hookimpl(lambda: [component])})
    registry.add(offer, name="stranger", source="sqft-stranger 0.3")
    raw["sparsify"] = {"scorer": "magnitude"}
    raw["finetune"] |= {
        "adapter": {"name": "lora", "options": {"rank": 2}},
        "targets": ["q_proj", "up_proj"],
        "steps": 1,
    }
    if base.kind in ("scorer", "allocator", "updater"):
        raw["sparsify"] |= {base.kind: "bad"}
    elif base.kind == "exporter":
        raw = {key: raw[key] for key in ("schema", "name", "model", "sparsify")} | {"export": [{"exporter": "bad"}]}
    elif base.kind == "quantizer":
        raw = {key: raw[key] for key in ("schema", "name", "model", "calibration")}
        raw["quantize"] = {"quantizer": {"name": "bad", "options": {"group_size": 32}}}
    else:
        raw["search" if base.kind == "searcher" else "finetune"] |= {base.kind: "bad"}
    orchestrator = Orchestrator(registry, store)
    with pytest.raises(error, match=re.escape(message)) as caught:
        orchestrator.run(orchestrator.plan(Recipe.parse(raw)))
    assert f"{base.kind} 'bad' (sqft-stranger 0.3)" in str(caught.value)
