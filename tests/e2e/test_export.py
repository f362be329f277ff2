"""Export after quantize and after merge, and what the plan refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sqft import Orchestrator, Recipe, Registry, Run
from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import RecipeError
from sqft.kernels.grids import dequantize, same
from sqft.modeling.loading.compressed import read_compressed_layer
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.quantized import load_dequantized, read_quantized

EXPORTS = [{"exporter": name} for name in ("gptq", "compressed-tensors", "hf")]


def run(raw: dict[str, Any], registry: Registry, store: Path) -> Run:
    orchestrator = Orchestrator(registry, store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)))


@pytest.fixture
def exporting(raw: dict[str, Any]) -> dict[str, Any]:
    raw.pop("evaluate")
    raw["quantize"] = {"quantizer": {"name": "gptq", "options": {"group_size": 32, "symmetric": False}}}
    raw["finetune"]["merger"] = "qa-sparsepeft"
    raw["export"] = EXPORTS
    return raw


@pytest.mark.parametrize("tuned", [False, True], ids=["quantize", "merge"])
def test_all_of_them(exporting: dict[str, Any], registry: Registry, tmp_path: Path, tuned: bool) -> None:
    if not tuned:
        for section in ("finetune", "search", "merge"):
            exporting.pop(section)
    finished = run(exporting, registry, tmp_path)
    source = finished["merge" if tuned else "quantize"]
    layers, again = (read_quantized(outcome.folder / "model") for outcome in (source, finished["export:gptq-0"]))
    assert layers.keys() == again.keys() and all(same(layers[name], again[name]) for name in layers)
    model, floats = source.load_model().state_dict(), finished["export:hf-2"].load_model().state_dict()
    assert all(floats[name].equal(value) for name, value in model.items())
    packed = load_file(finished["export:compressed-tensors-1"].folder / "model" / "model.safetensors")
    assert {name.removesuffix(".weight_packed") for name in packed if name.endswith("_packed")} == layers.keys()
    assert finished.result() == finished["export:hf-2"].folder / "model"


def test_a_checkpoint_of_codes_as_it_came(
    exporting: dict[str, Any], registry: Registry, quantized_folder: Path, tmp_path: Path
) -> None:
    for section in ("calibration", "sparsify", "quantize", "finetune", "search", "merge"):
        exporting.pop(section)
    exporting["model"]["path"] = str(quantized_folder)
    before = {file.name: file.read_bytes() for file in quantized_folder.iterdir()}
    finished = run(exporting, registry, tmp_path)
    assert {file.name: file.read_bytes() for file in quantized_folder.iterdir()} == before
    layers, again = read_quantized(quantized_folder), read_quantized(finished["export:gptq-0"].folder / "model")
    assert layers.keys() == again.keys() and all(same(layers[name], again[name]) for name in layers)
    expected = load_dequantized(ModelSpec(quantized_folder))
    stock = AutoModelForCausalLM.from_pretrained(finished["export:hf-2"].folder / "model")
    assert stock.dtype == expected.dtype  # the checkpoint's own
    assert all(stock.state_dict()[name].equal(value) for name, value in expected.state_dict().items())
    packed = FolderReader(finished["export:compressed-tensors-1"].folder / "model")
    assert sum(name.endswith("_packed") for name in packed.names()) == len(layers)
    for name, layer in layers.items():
        assert dequantize(read_compressed_layer(packed, name)).equal(dequantize(layer))


@pytest.mark.parametrize("name", ["model_folder", "nowhere"])
def test_floats_are_not_exported_as_they_came(
    exporting: dict[str, Any], registry: Registry, model_folder: Path, tmp_path: Path, name: str
) -> None:
    path = {"model_folder": model_folder, "nowhere": tmp_path / "nowhere"}[name]
    recipe = {"name": "x", "model": {"path": str(path)}, "export": [{"exporter": "hf"}]}
    with pytest.raises(RecipeError) as caught:
        Orchestrator(registry, tmp_path).plan(Recipe.parse(recipe))
    (problem,) = caught.value.problems
    assert str(problem).startswith("export: has nothing" if name == "model_folder" else "model.path: no file or folder")


def test_codes_are_not_made_by_an_exporter(exporting: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    exporting.pop("quantize")
    exporting["finetune"]["merger"] = "sparsepeft"
    with pytest.raises(RecipeError) as caught:
        Orchestrator(registry, tmp_path).plan(Recipe.parse(exporting))
    assert [str(problem) for problem in caught.value.problems] == [
        f"export.{index}.exporter: '{name}' writes codes, but this recipe's model holds floats; "
        "use gguf or hf or mlx, or add quantize"
        for index, name in enumerate(["gptq", "compressed-tensors"])
    ]
