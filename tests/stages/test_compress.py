"""What a component is given of a layer, and what it must leave as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sqft_gptq import Gptq
from sqft_owl import Owl
from sqft_wanda import Wanda
from torch import nn

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import ContractError, StageError
from sqft.stages import compress
from sqft.types import LinearStats

LABEL = "scorer 'mine' (mine 1.0)"


def layer(dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    linear = nn.Linear(8, 4, bias=False, dtype=dtype)
    linear.requires_grad_(False)
    return linear


def test_a_component_is_given_a_float32_copy_and_seeded_statistics() -> None:
    linears = {"a": layer(), "b": layer(torch.float32)}
    stats = {"a": LinearStats(3, torch.ones(8)), "b": LinearStats(5, hessian=torch.eye(8), unreached=True)}
    given = {name: (linears[name], stats[name]) for name in linears}
    with compress.guarded(LABEL, given, {"a": 1, "b": 2}.__getitem__) as (weights, seeded):
        for name, linear in linears.items():
            assert weights[name].dtype == torch.float32 and weights[name].equal(linear.weight.float())
            assert weights[name].data_ptr() != linear.weight.data_ptr()
            assert seeded[name].generator is not None
            assert replace(seeded[name], generator=None) == replace(stats[name], name=name)
        assert [seeded[name].generator.initial_seed() for name in "ab"] == [1, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights, stats: weights["b"].add_(1), "edited the weight of b"),
        (lambda weights, stats: stats["a"].input_sq_sum.mul_(2), "edited the statistics (input_sq_sum) of a"),
    ],
)
def test_an_edit_is_noticed(edit: Callable[..., Any], message: str) -> None:
    given = {name: (layer(), LinearStats(1, torch.ones(8))) for name in "ab"}
    with pytest.raises(ContractError) as caught, compress.guarded(LABEL, given, hash) as (weights, stats):
        edit(weights, stats)
    assert str(caught.value).startswith(f"{LABEL} {message}")


def test_a_weight_that_the_precision_does_not_hold() -> None:
    linear = layer(torch.float16)
    compress.assign_weight(LABEL, "a", linear, torch.full((4, 8), 2.0))
    assert linear.weight.eq(2).all()
    with pytest.raises(StageError, match=r"gave a 32 weights that float16, .* does not hold: the largest is 1e"):
        compress.assign_weight(LABEL, "a", linear, torch.full((4, 8), 1e5))


@pytest.mark.parametrize(
    ("base", "method", "section"),
    [
        (Wanda, "score", {"sparsify": {"scorer": "seeing"}}),
        (Owl, "measure", {"sparsify": {"scorer": "magnitude", "allocator": "seeing"}}),
        (Gptq, "quantize", {"quantize": {"quantizer": {"name": "seeing", "options": {"group_size": 32}}}}),
    ],
    ids=["scorer", "allocator", "quantizer"],
)
def test_a_component_is_told_which_layers_no_token_reached(
    raw: dict[str, Any],
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: Any,
    method: str,
    section: dict[str, Any],
) -> None:
    """The walk marks their statistics; what a component is given carries the mark."""
    seen: list[LinearStats] = []

    def seeing(self: Any, *arguments: Any) -> Any:
        for one in arguments[-1].values() if method == "measure" else [arguments[-1]]:
            seen.append(one)
        return getattr(base, method)(self, *arguments)

    walk = compress.walk

    def marking(model: Any, windows: Any, chosen: Any, needs: Any, work: Any, *rest: Any) -> None:
        def mark(name: str, linear: nn.Linear, stats: LinearStats) -> None:
            work(name, linear, replace(stats, unreached="q_proj" in name))

        walk(model, windows, chosen, needs, mark, *rest)

    monkeypatch.setattr(compress, "walk", marking)
    registry.add(type("Seeing", (base,), {"name": "seeing", "__module__": __name__, method: seeing}))
    kept = {key: raw[key] for key in ("schema", "name", "model", "calibration")}
    orchestrator = Orchestrator(registry, tmp_path)
    orchestrator.run(orchestrator.plan(Recipe.parse(kept | section)))
    assert [stats.unreached for stats in seen] == 2 * [True, *6 * [False]]
    assert all(stats.generator is not None for stats in seen)


@pytest.mark.parametrize("every", [1, 3])
def test_the_output_error_of_rows_at_equal_distances(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "MEASURED_ROWS", -(-20 // every))
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(20, 6, generator=generator), torch.randn(6, 50, generator=generator)
    V = W + 0.1 * torch.randn(20, 6, generator=generator)
    D, exact = (V - W)[::every].double(), W[::every].double()
    expected = float(((D @ X.double()) ** 2).sum() / ((exact @ X.double()) ** 2).sum())
    assert compress.output_error(W, V, X @ X.T) == pytest.approx(expected, rel=1e-4)
