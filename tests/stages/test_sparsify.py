"""The stage by itself: what it writes, and that what is on disk is proved and not what it remembers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sqft_least_squares import LeastSquares
from torch import Tensor

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import ArtifactError, ContractError, StageError
from sqft.kernels.masks import unpack_mask
from sqft.stages import sparsify as sparsify_module
from sqft.stages.inputs import StageInputs
from sqft.stages.sparsify import Selection, SparsifyStage
from sqft.types import LinearStats, Pattern

Q, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.embed_tokens.weight"
LABEL = "scorer 'mine' (mine 1.0)"


def sparsify(raw: dict[str, Any], registry: Registry, folder: Path, **section: Any) -> SparsifyStage:
    kept = {key: raw[key] for key in ("schema", "name", "model", "calibration")}
    kept["sparsify"] = {"scorer": "magnitude", **section}
    plan = Orchestrator(registry, folder / "store").plan(Recipe.parse(kept))
    (folder / "scratch").mkdir()
    return SparsifyStage(StageInputs(plan, plan.step("sparsify"), {}, folder / "scratch", "cpu"))


@pytest.mark.parametrize("scorer", ["magnitude", "sparsegpt"])
def test_what_it_writes(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, model_folder: Path, scorer: str
) -> None:
    stage = sparsify(raw, registry, tmp_path, scorer=scorer, exclude=["o_proj"])
    report = stage.run()
    stage.verify()
    dense, sparse = (load_file(f / "model.safetensors") for f in (model_folder, tmp_path / "scratch" / "model"))
    masks = load_file(tmp_path / "scratch" / "masks.safetensors")
    assert sorted(masks) == sorted(report["layers"]) and len(masks) == 2 * 6
    for name, tensor in dense.items():
        layer = name.removesuffix(".weight")
        if layer not in masks:
            assert sparse[name].equal(tensor)
            continue
        mask = unpack_mask(masks[layer], (tensor.shape[0], tensor.shape[1]))
        assert not sparse[name][~mask].any() and report["layers"][layer] == 0.5
        assert sparse[name][mask].equal(tensor[mask]) == (scorer == "magnitude")
    assert report["sparsity"] == report["zeros"] / report["weights"] == 0.5
    assert report["calibration_tokens"] == (0 if scorer == "magnitude" else 4 * 32)


@pytest.mark.parametrize("scorer", ["magnitude", "sparsegpt"])
def test_an_updater_under_the_mask_of_any_scorer(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, model_folder: Path, scorer: str
) -> None:
    """It solves from the dense weight, and lowers each layer's error; the mask is the scorer's."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def update(self: Any, weight: Tensor, mask: Tensor, stats: LinearStats) -> Tensor:
        seen[stats.name] = weight.clone(), mask.clone()
        return LeastSquares.update(self, weight, mask, stats)

    registry.add(type("Seeing", (LeastSquares,), {"name": "seeing", "__module__": __name__, "update": update}))
    stage = sparsify(raw, registry, tmp_path, scorer=scorer, updater="seeing")
    report = stage.run()
    stage.verify()
    dense, sparse = (load_file(f / "model.safetensors") for f in (model_folder, tmp_path / "scratch" / "model"))
    masks = load_file(tmp_path / "scratch" / "masks.safetensors")
    assert list(report["layers"]) == list(report["output_errors"]) and sorted(seen) == sorted(masks)
    for layer, packed in masks.items():
        name = f"{layer}.weight"
        mask = unpack_mask(packed, (dense[name].shape[0], dense[name].shape[1]))
        assert seen[layer][0].equal(dense[name]) and seen[layer][1].equal(mask)
        assert not sparse[name][~mask].any() and not sparse[name].equal(dense[name] * mask)
        errors = report["output_errors"][layer]
        assert 0 < errors["updated"] < errors["masked"] < 1
    assert report["sparsity"] == 0.5 and report["calibration_tokens"] == 4 * 32
    means = {kind: sum(of[kind] for of in report["output_errors"].values()) / 14 for kind in ("masked", "updated")}
    assert report["output_error"] == pytest.approx(means)
    edit(tmp_path / "scratch" / "model" / "model.safetensors", f"{Q}.weight", lambda t: t * 2)
    with pytest.raises(ArtifactError, match=f"{Q}.weight as stored is not what the updater gave"):
        stage.verify()


def test_with_an_updater_layers_see_what_became_of_those_before(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, model_folder: Path
) -> None:
    """The errors that it reports of o_proj are those on inputs that come through the updated q, k and v."""
    hessians: dict[str, Tensor] = {}

    def update(self: Any, weight: Tensor, mask: Tensor, stats: LinearStats) -> Tensor:
        assert stats.hessian is not None
        hessians[stats.name] = stats.hessian.clone()
        return weight.masked_fill(~mask, 0) * self.damping

    registry.add(type("Seeing", (LeastSquares,), {"name": "seeing", "__module__": __name__, "update": update}))
    found = []
    for factor in (1.0, 0.0):  # zero: what comes after attention and MLP is nothing
        options = {"name": "seeing", "options": {"damping": factor}}
        (folder := tmp_path / str(factor)).mkdir()
        sparsify(raw, registry, folder, updater=options).run()
        found.append(dict(hessians))
    same = {layer.removeprefix("model.layers.0.") for layer in found[0] if found[0][layer].equal(found[1][layer])}
    assert same == {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    assert not found[1]["model.layers.0.self_attn.o_proj"].any()


def test_output_errors_where_the_hessian_is_at_hand(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    report = sparsify(raw, registry, tmp_path).run()
    assert (report["output_error"], report["output_errors"]) == ({}, {})


def edit(file: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, {"format": "pt"})


def filled(tensor: Tensor) -> Tensor:
    """A weight whose first zero is none any more."""
    tensor[tuple((tensor == 0).nonzero()[0])] = 1.0
    return tensor


@pytest.mark.parametrize(
    ("file", "name", "change", "message"),
    [
        (
            "model/model.safetensors",
            f"{Q}.weight",
            lambda t: t * 2,
            f"{Q}.weight as stored is not the original under its mask",
        ),
        ("model/model.safetensors", f"{Q}.weight", filled, f"{Q}.weight as stored is not the original under its mask"),
        ("model/model.safetensors", EMBEDDING, lambda t: t * 2, f"{EMBEDDING} as stored is not the original"),
        ("model/model.safetensors", f"{Q}.weight", lambda t: t.half(), f"{Q}.weight as stored is not the original"),
        ("masks.safetensors", Q, lambda t: ~t, "the masks as stored are not what the scorer gave"),
    ],
)
def test_what_is_on_disk_is_proved(
    raw: dict[str, Any],
    registry: Registry,
    tmp_path: Path,
    file: str,
    name: str,
    change: Callable[[Tensor], Tensor],
    message: str,
) -> None:
    stage = sparsify(raw, registry, tmp_path)
    stage.run()
    stage.verify()
    edit(tmp_path / "scratch" / file, name, change)
    with pytest.raises(ArtifactError, match=re.escape(message)):
        stage.verify()


def test_a_kept_weight_that_changes_on_its_way(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is proved is the original under its mask, not whatever the stage wrote."""
    stage = sparsify(raw, registry, tmp_path)
    original = sparsify_module.assign_weight
    monkeypatch.setattr(sparsify_module, "assign_weight", lambda *args: original(*args[:3], args[3] * 1.01))
    stage.run()
    with pytest.raises(ArtifactError, match="as stored is not the original"):
        stage.verify()


def test_a_layer_that_changed_before_its_turn(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, layers = sparsify(raw, registry, tmp_path), []

    def prune(name: str, linear: Any, *rest: Any) -> Tensor:
        layers.append(linear)
        if len(layers) == 2:  # while the first one's work is done, the second one's weight is edited
            linear.weight.data[0, 0] += 1
        return original(name, linear, *rest)

    original = stage._prune
    monkeypatch.setattr(stage, "_prune", prune)
    with pytest.raises(ContractError, match="k_proj changed before it was pruned"):
        stage.run()


def selection(pattern: str, sparsity: float = 0.5) -> Selection:
    return Selection(LABEL, "layer", torch.rand(4, 12), Pattern.parse(pattern), sparsity)


def test_a_selection_remembers_how_much_went() -> None:
    select = selection("row")
    masks = [select(torch.rand(4, columns)) for columns in (8, 4)]
    assert [mask.sum().item() for mask in masks] == [16, 8] and select.pruned_fraction() == 0.5


def test_the_sparsity_of_few_entries_at_a_time() -> None:
    """Whole entries of a layer are as near as can be; of a few at a time they may be far off."""
    select = selection("row", 0.45)
    select(torch.rand(4, 12))
    assert select.pruned_fraction() == pytest.approx(5 / 12)
    select = selection("row", 0.45)
    for _ in range(6):
        select(torch.rand(4, 2))
    with pytest.raises(StageError, match=r"so few inputs of layer at a time that 0\.500 of them go where 0\.450 was"):
        select.pruned_fraction()


def test_a_selection_is_asked_about_all_columns() -> None:
    select = selection("2:4")
    select(torch.rand(4, 8))
    with pytest.raises(ContractError, match=re.escape("scores of shape [4, 8] for layer, expected [4, 12]")):
        select.pruned_fraction()
    with pytest.raises(StageError, match="chooses among 6 inputs at a time, no multiple of the M of '2:4'"):
        select(torch.rand(4, 6))
