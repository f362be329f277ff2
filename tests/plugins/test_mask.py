"""The mask of another model, and the option that names its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sqft import Orchestrator, Recipe, Registry
from sqft.checkpoints.safetensors import INDEX, WEIGHTS
from sqft.errors import RecipeError, StageError
from sqft.execution.run_folder import make_run_folder, write_plan
from sqft.kernels.masks import keep_mask

Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


def pruned(source: Path, folder: Path, pattern: str, sparsity: float = 0.5) -> Path:
    """Another model: pruned by magnitude, and its weights are twice as large."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensors[name] = 2 * tensor * keep_mask(tensor.abs(), sparsity, pattern)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def recipe(raw: dict[str, Any], folder: str, **sparsify: Any) -> dict[str, Any]:
    kept = {key: raw[key] for key in ("schema", "name", "model", "calibration")}
    return kept | {"sparsify": {"scorer": {"name": "mask", "options": {"folder": folder}}, **sparsify}}


def run(orchestrator: Orchestrator, raw: dict[str, Any], here: Path) -> Any:
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw, here)))["sparsify"]


@pytest.mark.parametrize("pattern", ["row", "2:4", "layer"])
def test_zeros_of_the_one_and_weights_of_the_other(
    pattern: str, raw: dict[str, Any], registry: Registry, tmp_path: Path, model_folder: Path
) -> None:
    """No text is read. The path is relative to the recipe; a kept weight that is zero in the other model stays."""
    other = pruned(model_folder, tmp_path / "other", pattern)
    tensors = load_file(other / WEIGHTS)
    tensors[Q].view(-1)[tensors[Q].view(-1).nonzero()[0]] = 0
    save_file(tensors, other / WEIGHTS, {"format": "pt"})
    raw = recipe(raw, "other", pattern=pattern) | {"calibration": None}
    made = run(Orchestrator(registry, tmp_path / "store"), raw, tmp_path)
    dense, sparse = load_file(model_folder / WEIGHTS), load_file(made.folder / "model" / WEIGHTS)
    assert made.report["sparsity"] == pytest.approx(0.5) and made.report["calibration_tokens"] == 0
    for name, tensor in dense.items():
        differs = (sparse[name] == 0) != (tensors[name] == 0)
        assert differs.sum() == (name == Q) if "_proj" in name else sparse[name].equal(tensor)
        assert sparse[name].equal(tensor * (sparse[name] != 0))


def test_an_updater_solves_under_it(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, model_folder: Path
) -> None:
    other = pruned(model_folder, tmp_path / "other", "2:4")
    raw = recipe(raw, "other", pattern="2:4", updater="least-squares")
    report = run(Orchestrator(registry, tmp_path / "store"), raw, tmp_path).report
    assert report["output_error"]["updated"] < report["output_error"]["masked"] and other.is_dir()


def cut(tensors: dict[str, Tensor]) -> None:
    tensors[Q] = tensors[Q][:8].clone()


def fill(tensors: dict[str, Tensor]) -> None:
    tensors[Q] = torch.where(tensors[Q] == 0, 1e-6, tensors[Q])


def as_codes(tensors: dict[str, Tensor]) -> None:
    tensors[Q] = tensors[Q].to(torch.int32)


def as_float8(tensors: dict[str, Tensor]) -> None:
    tensors[Q] = tensors[Q].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(DOWN), f"other has no tensor {DOWN}"),
        (cut, f"other: {Q} has the shape [8, 32], expected [32, 32]; copy it again"),
        (fill, "has 0.0000 zeros, which are not those of the recipe's pattern and sparsity (512 weights"),
        (lambda tensors: tensors[Q][0].zero_(), "16 zeros kept); set sparsify.pattern and"),
        (as_codes, f"other: {Q} is int32; name a model of floats"),
        (as_float8, f"other: {Q} is float8_e4m3fn; name a model of floats"),
    ],
)
def test_a_folder_that_does_not_fit(
    change: Callable[[dict[str, Tensor]], Any],
    message: str,
    raw: dict[str, Any],
    registry: Registry,
    tmp_path: Path,
    model_folder: Path,
) -> None:
    other = pruned(model_folder, tmp_path / "other", "row")
    tensors = load_file(other / WEIGHTS)
    change(tensors)
    save_file(tensors, other / WEIGHTS, {"format": "pt"})
    with pytest.raises(StageError, match=r"^sparsify\.scorer\.options\.folder: ") as caught:
        run(Orchestrator(registry, tmp_path / "store"), recipe(raw, "other"), tmp_path)
    assert message in str(caught.value)


def test_another_pattern(raw: dict[str, Any], registry: Registry, tmp_path: Path, model_folder: Path) -> None:
    pruned(model_folder, tmp_path / "other", "row")
    with pytest.raises(StageError, match=r"weights of it would be pruned, [0-9]+ zeros kept\); set sparsify.pattern"):
        run(Orchestrator(registry, tmp_path / "store"), recipe(raw, "other", pattern="2:4"), tmp_path)


def test_the_message_gives_the_sparsity_to_set(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, model_folder: Path
) -> None:
    """A solver that chooses in blocks of inputs rounds in each: 17 of 32 where 18 are asked for."""
    pruned(model_folder, tmp_path / "other", "row", 17 / 32)
    orchestrator = Orchestrator(registry, tmp_path / "store")
    with pytest.raises(StageError, match=r"was pruned with, here 0\.53125 \(the allocator 'explicit'"):
        run(orchestrator, recipe(raw, "other", sparsity=0.55), tmp_path)
    assert run(orchestrator, recipe(raw, "other", sparsity=0.53125), tmp_path).report["sparsity"] == 0.53125


def test_the_folder_is_a_file_of_the_plan(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, model_folder: Path
) -> None:
    """Its content is in the fingerprint and its name is not; the stored recipe names it from anywhere."""
    orchestrator = Orchestrator(registry, tmp_path / "store")
    plans = []
    for name in ("one", "two"):
        pruned(model_folder, tmp_path / name, "row")
        plans.append(orchestrator.plan(Recipe.parse(recipe(raw, name), tmp_path)))
    step, again = (plan.step("sparsify") for plan in plans)
    assert step.files == {"scorer.folder": tmp_path / "one"} and step.fingerprint == again.fingerprint
    assert step.components["scorer"].identity["options"] == {}
    write_plan(orchestrator.store, (folder := make_run_folder(orchestrator.store, plans[0])), plans[0])
    stored = json.loads((folder / "recipe.json").read_text())
    assert stored["sparsify"] == {"scorer": {"name": "mask", "options": {"folder": str(tmp_path / "one")}}}
    assert orchestrator.plan(Recipe.parse(stored, tmp_path / "one")).step("sparsify").fingerprint == step.fingerprint
    (tmp_path / "two" / "more.json").write_text("{}")
    assert orchestrator.plan(plans[1].recipe).step("sparsify").fingerprint != step.fingerprint
    with pytest.raises(StageError, match=r"sparsify\.scorer\.folder: .*two has changed since the plan"):
        orchestrator.run(plans[1], until="sparsify")


def test_mistakes_are_found_by_the_plan(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    for options, message in (
        ({}, "sparsify.scorer.options.folder: is missing"),
        ({"folder": "nowhere"}, f"sparsify.scorer.options.folder: there is no folder {tmp_path / 'nowhere'}"),
    ):
        raw["sparsify"] = {"scorer": {"name": "mask", "options": options}}
        with pytest.raises(RecipeError) as caught:
            Orchestrator(registry, tmp_path).plan(Recipe.parse(raw, tmp_path))
        assert message in str(caught.value)


def test_shards(raw: dict[str, Any], registry: Registry, tmp_path: Path, model_folder: Path) -> None:
    other = pruned(model_folder, tmp_path / "other", "row")
    whole = run(Orchestrator(registry, tmp_path / "whole"), recipe(raw, "other"), tmp_path)
    tensors = load_file(other / WEIGHTS)
    (other / WEIGHTS).unlink()
    files = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in sorted(set(files.values())):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, other / file, {"format": "pt"})
    (other / INDEX).write_text(json.dumps({"weight_map": files}))
    parts = run(Orchestrator(registry, tmp_path / "parts"), recipe(raw, "other"), tmp_path)
    assert parts.report["zeros"] == whole.report["zeros"]
    masks = (load_file(made.folder / "masks.safetensors") for made in (whole, parts))
    assert all(one.equal(other) for one, other in zip(*(mask.values() for mask in masks), strict=True))
