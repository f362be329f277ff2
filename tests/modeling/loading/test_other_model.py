"""Layers of another model's folder, held against the modules that stock transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_configs import GPT2, GRANITE_MOE, LLAMA, MIXTRAL
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sqft.checkpoints.safetensors import WEIGHTS
from sqft.errors import ArtifactError, SqftError
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.architecture.linears import as_linears
from sqft.modeling.loading.other_model import OtherModel

FAMILIES = {
    "llama": LLAMA,
    "stored as [in, out]": GPT2,
    "other names": MIXTRAL,
    "joined experts": GRANITE_MOE,
}
Q = "model.layers.0.self_attn.q_proj"


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_as_transformers_loads_it(family: str, tmp_path: Path) -> None:
    """Square layers too, in which a transposed weight would fit."""
    other = OtherModel(saved(FAMILIES[family], tmp_path))
    layers = linears(as_linears(AutoModelForCausalLM.from_pretrained(tmp_path)))
    assert any(linear.in_features == linear.out_features for linear in layers.values())
    for name, linear in layers.items():
        assert other.weight(name).equal(linear.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_stored_without_its_head_leaves_out_a_prefix(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(FAMILIES[family])
    whole.base_model.save_pretrained(tmp_path)
    assert not any(name.startswith(f"{whole.base_model_prefix}.") for name in load_file(tmp_path / WEIGHTS))
    other = OtherModel(tmp_path)
    for name, linear in linears(as_linears(whole)).items():
        assert other.weight(name).equal(linear.weight)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    other = OtherModel(saved(LLAMA, tmp_path))
    with pytest.raises(ArtifactError, match=r"has no layer nothing; name a model of the same architecture"):
        other.weight("nothing")
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[f"{Q}.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"q_proj\.weight holds values that are not finite"):
        OtherModel(tmp_path).weight(Q)


@pytest.mark.parametrize("method", ["gptq", "fp8"])
def test_codes_are_refused(method: str, tmp_path: Path) -> None:
    saved(LLAMA, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(SqftError, match=str(tmp_path)):
        OtherModel(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(SqftError, match=r"has no config\.json"):
        OtherModel(tmp_path)


def test_a_tensor_that_holds_more_than_the_layer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' conversion is trusted only as far as every number comes back once."""
    other = OtherModel(saved(LLAMA, tmp_path))
    monkeypatch.setattr(
        "sqft.modeling.loading.other_model.reverted",
        lambda model, state: {name: tensor.repeat(2, 1) for name, tensor in state.items()},
    )
    with pytest.raises(ArtifactError, match=r"has the shape"):
        other.weight(Q)
    monkeypatch.setattr(
        "sqft.modeling.loading.other_model.reverted",
        lambda model, state: {name: tensor * 0 for name, tensor in state.items()},
    )
    with pytest.raises(ArtifactError, match=r"q_proj\.weight cannot be read by itself .* leave out the layer"):
        other.weight(Q)
