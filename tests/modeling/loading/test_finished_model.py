"""A finished model as exporters see it, against the model that transformers makes of the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import ArtifactError, ModelError
from sqft.kernels.grids import same
from sqft.modeling.loading.finished_model import FinishedModel
from sqft.modeling.loading.quantized import load_dequantized, read_quantized


def test_floats(model_folder: Path, tmp_path: Path) -> None:
    reader = FinishedModel(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert set(reader.names()) == {name for name, _ in model.named_parameters()}
    assert all(reader.tensor(name).equal(value) for name, value in model.named_parameters())
    assert reader.quantized() == []
    with pytest.raises(ArtifactError, match=r"model\.layers\.0\.mlp\.up_proj is not quantized"):
        reader.codes("model.layers.0.mlp.up_proj")
    reader.copy_settings(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (model_folder / "config.json").read_bytes()


def test_codes(quantized_folder: Path, tmp_path: Path) -> None:
    """Named and valued as the float model has them, in the precision of what stayed floats."""
    reader, state = FinishedModel(quantized_folder), load_dequantized(ModelSpec(quantized_folder)).state_dict()
    assert list(reader.names()) == sorted(state)
    for name, value in state.items():
        found = reader.tensor(name)
        assert found.dtype == torch.bfloat16 and found.equal(value)
    layers = read_quantized(quantized_folder)
    assert sorted(reader.quantized()) == sorted(layers) and len(layers) == 12
    assert all(same(reader.codes(name), layer) for name, layer in layers.items())
    reader.copy_settings(tmp_path)
    before = json.loads((quantized_folder / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == {
        key: before[key] for key in before if key != "quantization_config"
    }
    assert {"tokenizer.json", "chat_template.jinja"} < {file.name for file in tmp_path.iterdir()}
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / "quantize_config.json").exists()


def test_another_format_is_refused(model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="sqft reads only GPTQ checkpoints, version 1"):
        FinishedModel(tmp_path)
