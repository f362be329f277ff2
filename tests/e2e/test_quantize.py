"""Sparsify, quantize and evaluate on a tiny model; the checkpoint against codes taken by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sqft import Orchestrator, Recipe, Registry, Run
from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import ArtifactError, RecipeError
from sqft.kernels.masks import unpack_mask


@pytest.fixture
def quantizing(raw: dict[str, Any]) -> dict[str, Any]:
    for section in ("finetune", "search", "merge"):
        raw.pop(section)
    raw["quantize"] = {"quantizer": {"name": "gptq", "options": {"group_size": 32}}}
    raw["evaluate"]["of"] = ["model", "sparsify", "quantize"]
    return raw


def run(raw: dict[str, Any], registry: Registry, store: Path) -> Run:
    orchestrator = Orchestrator(registry, store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)))


def words(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes along the first dimension, by Python's integers."""
    columns = []
    for column in packed.T.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(column))
        columns.append([(stream >> (bits * place)) & (2**bits - 1) for place in range(32 * len(column) // bits)])
    return torch.tensor(columns).T


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 32},
        {"group_size": 32, "symmetric": False, "act_order": True},
        {"group_size": -1, "symmetric": False, "bits": 8},
        {"group_size": 32, "bits": 2, "clip": True},
    ],
)
def test_the_checkpoint_is_gptqs_and_keeps_the_zeros(
    quantizing: dict[str, Any], registry: Registry, tmp_path: Path, options: dict[str, Any]
) -> None:
    quantizing["quantize"]["quantizer"]["options"] = options
    finished = run(quantizing, registry, tmp_path)
    stored = load_file(finished["quantize"].folder / "model" / "model.safetensors")
    masks = load_file(finished["sparsify"].folder / "masks.safetensors")
    settings = json.loads((finished["quantize"].folder / "model" / "config.json").read_text())["quantization_config"]
    bits = options.get("bits", 4)
    assert (settings["bits"], settings["group_size"], settings["sym"], settings["desc_act"]) == (
        bits, options["group_size"], options.get("symmetric", True), options.get("act_order", False),
    )  # fmt: skip
    model = finished["quantize"].load_model()
    assert len(masks) == 14 and "lm_head.weight" in stored  # stored although it is tied
    for name, packed in masks.items():
        codes = words(stored[f"{name}.qweight"], bits).T  # [out, in]
        zero = (words(stored[f"{name}.qzeros"].T, bits) + 1) & (2**bits - 1)  # [out, groups]
        index = stored[f"{name}.g_idx"].long()
        value = stored[f"{name}.scales"].T.float()[:, index] * (codes - zero[:, index])
        weight = model.get_parameter(f"{name}.weight")
        assert torch.equal(weight, value)
        mask = unpack_mask(packed, (weight.shape[0], weight.shape[1]))
        assert not weight[~mask].any()
    rows = {row["configuration"]: row for row in finished.report["rows"]}
    assert rows["quantize"]["sparsity"] >= rows["sparsify"]["sparsity"]
    if bits == 8:
        assert rows["quantize"]["perplexity"] == pytest.approx(rows["sparsify"]["perplexity"], rel=0.01)
    report = finished["quantize"].report["layers"]
    assert all(0 < layer["output"] < 1 for layer in report.values())
    assert finished.result() == finished["quantize"].folder / "model"


def test_round_to_nearest_needs_no_calibration(quantizing: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    quantizing.pop("calibration"), quantizing.pop("sparsify")
    quantizing["quantize"] = {
        "quantizer": {"name": "rtn", "options": {"group_size": 32}}, "exclude": ["down_proj"],
    }  # fmt: skip
    quantizing["evaluate"]["of"] = ["quantize"]
    finished = run(quantizing, registry, tmp_path)
    assert not any("down_proj" in name for name in finished["quantize"].report["layers"])
    settings = json.loads((finished["quantize"].folder / "model" / "config.json").read_text())["quantization_config"]
    assert settings["modules_in_block_to_quantize"] == [
        ["mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{x}_proj" for x in "koqv")]
    ]
    assert set(settings["dynamic"]) == {rf"-:^model\.layers\.{n}\.mlp\.down_proj$" for n in (0, 1)}
    stored = load_file(finished["quantize"].folder / "model" / "model.safetensors")
    assert "model.layers.0.mlp.down_proj.weight" in stored and "model.layers.0.mlp.up_proj.qweight" in stored


def test_a_model_that_came_sparse_keeps_its_zeros(
    quantizing: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    """And its ends of sequence; what is quantized cannot be quantized again."""
    quantizing["evaluate"]["of"] = ["sparsify"]
    sparse = run({key: quantizing[key] for key in quantizing if key != "quantize"}, registry, tmp_path / "one")
    folder = sparse["sparsify"].folder / "model"
    quantizing["model"]["path"] = str(folder)
    quantizing.pop("sparsify"), quantizing.pop("evaluate")
    finished = run(quantizing, registry, tmp_path / "two")
    model, base = finished["quantize"].load_model(), sparse["sparsify"].load_model()
    for name, weight in base.named_parameters():
        assert not ((weight == 0) & (model.get_parameter(name) != 0)).any()
    assert model.generation_config.eos_token_id == base.generation_config.eos_token_id
    quantizing["model"]["path"] = str(finished["quantize"].folder / "model")
    with pytest.raises(RecipeError, match=r"quantize: the model is already quantized"):
        run(quantizing, registry, tmp_path / "three")


def test_what_no_checkpoint_can_hold(quantizing: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    def said(**options: Any) -> str:
        quantizing["quantize"]["quantizer"]["options"] = options
        with pytest.raises(RecipeError) as caught:
            Orchestrator(registry, tmp_path).plan(Recipe.parse(quantizing))
        return str(caught.value)

    assert "32 inputs are not a multiple of group_size 64, and no runtime opens such" in said(group_size=64)
    assert "sizes that fit: 32, -1 (12 such layers; or set" in said(group_size=64)
    assert "16 outputs of 3 bits do not fill the 32-bit words" in said(bits=3, group_size=32)
    assert "quantize.quantizer.options.bits: input should be 2, 3, 4 or 8, found 5" in said(bits=5)
    quantizing["quantize"]["exclude"] = ["model.layers.0.*"]
    assert "quantize.include: differs from block to block" in said(group_size=32)
    quantizing.pop("calibration")
    quantizing["sparsify"]["scorer"] = "magnitude"
    assert "calibration: is missing: quantizer 'gptq' needs hessian" in said(group_size=32)


def test_a_checkpoint_with_parts_that_do_not_fit(
    quantizing: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from sqft.modeling.loading.quantized import load_dequantized, read_quantized

    folder = run(quantizing, registry, tmp_path)["quantize"].folder / "model"
    whole = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"

    def with_(changes: dict[str, torch.Tensor | None]) -> None:
        kept = {key: tensor for key, tensor in (whole | changes).items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    with_({f"{name}.scales": None})
    with pytest.raises(ArtifactError, match=rf"has no tensor {name}\.scales"):
        read_quantized(folder)
    with_({f"{name}.scales": whole[f"{name}.scales"][:, :5]})
    with pytest.raises(ArtifactError, match=rf"the parts of {name} do not fit together"):
        load_dequantized(ModelSpec(folder))
    with_({"model.norm.weight": None})
    with pytest.raises(ArtifactError, match=r"disagree about tensor model\.norm\.weight"):
        load_dequantized(ModelSpec(folder))
