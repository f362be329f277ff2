"""SparseGPT against a float64 loop that inverts what is left of the Hessian at every column."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from sqft_sparsegpt import SparseGpt
from torch import Tensor

from sqft import Orchestrator, Recipe, Registry
from sqft.api import LinearStats
from sqft.errors import ArtifactError, ContractError, StageError
from sqft.kernels.masks import keep_mask, unpack_mask


def layer(out: int, n: int, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(out * n)
    mix = torch.randn(n, n, generator=generator) / n**0.5
    x = torch.randn(tokens, n, generator=generator) @ (mix + 0.5 * torch.eye(n))
    return torch.randn(out, n, generator=generator), x.T @ x


def brute(W: Tensor, H: Tensor, select: Any, damp: float, by: str, block: int) -> tuple[Tensor, Tensor]:
    W, H, n = W.double().clone(), H.double(), W.shape[1]
    H = H + damp * (H.diagonal().diag() if by == "input" else torch.eye(n) * H.diagonal().mean())
    mask = torch.ones_like(W, dtype=torch.bool)
    for j in range(n):
        if j % block == 0:
            # [H⁻¹]_kk of the columns from k on: what OBS divides by when its turn comes.
            ends = range(j, min(j + block, n))
            inverse = torch.stack([torch.linalg.inv(H[k:, k:])[0, 0] for k in ends])
            mask[:, j : j + block] = select(W[:, j : j + block].square() / inverse)
        inverse = torch.linalg.inv(H[j:, j:])
        gone = torch.where(mask[:, j], 0.0, W[:, j])
        W[:, j:] -= gone[:, None] / inverse[0, 0] * inverse[0]
    return W * mask, mask


def error(W: Tensor, V: Tensor, H: Tensor) -> float:
    D = (W - V).double()
    return float((D @ H.double() * D).sum())


@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
@pytest.mark.parametrize(("n", "block", "by"), [(24, 24, "mean"), (24, 8, "input"), (40, 16, "mean")])
def test_the_loop(pattern: str, n: int, block: int, by: Literal["mean", "input"]) -> None:
    W, H = layer(6, n)
    select = partial(keep_mask, sparsity=0.5, pattern=pattern)
    found, mask = SparseGpt(block=block, damp_by=by).prune(W, LinearStats(200, hessian=H), select)
    wanted, kept = brute(W, H, select, 0.01, by, block)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)
    assert not found[~mask].any()


def test_the_update_helps() -> None:
    W, _ = layer(16, 96)
    generator = torch.Generator().manual_seed(0)  # inputs of about 12 directions
    x = torch.randn(400, 12, generator=generator) @ torch.randn(12, 96, generator=generator)
    x += 0.3 * torch.randn(400, 96, generator=generator)
    H, select = x.T @ x, partial(keep_mask, sparsity=0.5, pattern="row")
    found, mask = SparseGpt().prune(W, LinearStats(200, hessian=H), select)
    wanda = W * select(W.abs() * H.diagonal().sqrt())
    assert error(W, found, H) < 0.5 * error(W, wanda, H)
    assert error(W, found, H) < error(W, W * mask, H)


def test_nothing_pruned_is_nothing_changed() -> None:
    W, H = layer(4, 32)
    found, mask = SparseGpt().prune(W, LinearStats(9, hessian=H), partial(keep_mask, sparsity=0.0, pattern="row"))
    assert mask.all() and torch.equal(found, W)


def recipe(raw: dict[str, Any], **sparsify: Any) -> dict[str, Any]:
    kept = {key: raw[key] for key in ("schema", "name", "model", "calibration")}
    return {**kept, "sparsify": {"scorer": "sparsegpt", **sparsify}}


def test_on_a_model(raw: dict[str, Any], registry: Registry, tmp_path: Path, model_folder: Path) -> None:
    orchestrator = Orchestrator(registry, tmp_path)
    done = orchestrator.run(orchestrator.plan(Recipe.parse(recipe(raw))))["sparsify"]
    dense, sparse = (load_file(f / "model.safetensors") for f in (model_folder, done.folder / "model"))
    masks, moved = load_file(done.folder / "masks.safetensors"), 0
    for name, packed in masks.items():
        weight = sparse[f"{name}.weight"]
        mask = unpack_mask(packed, (weight.shape[0], weight.shape[1]))
        assert torch.equal(weight != 0, mask) and (mask.sum(1) == weight.shape[1] // 2).all()
        moved += int((weight[mask] != dense[f"{name}.weight"][mask]).sum())
    assert moved > 0 and done.report["sparsity"] == pytest.approx(0.5)
    assert torch.equal(sparse["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])


def test_what_is_stored_is_what_it_gave(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqft.stages import sparsify

    save = sparsify.save_model

    def another(model: Any, *others: Any) -> None:
        weight = model.model.layers[0].self_attn.q_proj.weight.data
        weight[weight != 0] *= 1.5
        save(model, *others)

    monkeypatch.setattr(sparsify, "save_model", another)
    orchestrator = Orchestrator(registry, tmp_path)
    with pytest.raises(ArtifactError, match=r"q_proj\.weight as stored is not what the scorer gave"):
        orchestrator.run(orchestrator.plan(Recipe.parse(recipe(raw))))


def test_a_block_that_the_pattern_does_not_divide(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    scorer = {"name": "sparsegpt", "options": {"block": 6}}
    orchestrator = Orchestrator(registry, tmp_path)
    with pytest.raises(StageError, match="chooses among 6 inputs at a time, no multiple of the M of '2:4'"):
        orchestrator.run(orchestrator.plan(Recipe.parse(recipe(raw, scorer=scorer, pattern="2:4"))))


def test_a_block_too_small_for_the_sparsity(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    scorer = {"name": "sparsegpt", "options": {"block": 1}}
    orchestrator = Orchestrator(registry, tmp_path)
    with pytest.raises(StageError, match=r"0\.000 of them go where 0\.500 was asked for; give it a larger block"):
        orchestrator.run(orchestrator.plan(Recipe.parse(recipe(raw, scorer=scorer))))


@pytest.mark.parametrize("wrong", [[1.0], torch.full((4, 8), torch.nan)])
def test_select_is_asked_about_scores(raw: dict[str, Any], tmp_path: Path, wrong: Any) -> None:
    class Bad(SparseGpt):
        name = "bad"

        def prune(self, weight: Tensor, stats: LinearStats, select: Any) -> tuple[Tensor, Tensor]:
            return weight, select(wrong)

    found = Registry.discover()
    found.add(Bad)
    orchestrator = Orchestrator(found, tmp_path)
    with pytest.raises(ContractError, match=r"scorer 'bad'.*(asked `select` about list|not finite|scores)"):
        orchestrator.run(orchestrator.plan(Recipe.parse(recipe(raw, scorer="bad"))))


def test_an_update_that_the_models_precision_does_not_hold(raw: dict[str, Any], tmp_path: Path) -> None:
    class Far(SparseGpt):
        name = "far"

        def prune(self, weight: Tensor, stats: LinearStats, select: Any) -> tuple[Tensor, Tensor]:
            new, mask = super().prune(weight, stats, select)
            new[tuple(mask.nonzero()[0])] = 1e5
            return new, mask

    found = Registry.discover()
    found.add(Far)
    orchestrator = Orchestrator(found, tmp_path)
    raw["model"]["dtype"] = "float16"
    with pytest.raises(
        StageError, match=r"scorer 'far' .*layers\.0\.self_attn\.q_proj 1 weights that float16"
    ) as caught:
        orchestrator.run(orchestrator.plan(Recipe.parse(recipe(raw, scorer="far"))))
    assert "the largest is 1e+05 and float16 ends at 6.55e+04; set model.dtype to bfloat16" in str(caught.value)
    raw["model"]["dtype"] = "bfloat16"
    run = orchestrator.run(orchestrator.plan(Recipe.parse(recipe(raw, scorer="far"))))
    assert run["sparsify"].report["sparsity"] == pytest.approx(0.5)
