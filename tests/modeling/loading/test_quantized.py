"""GPTQ folders: written, read layer by layer, and loaded as floats or with their codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast

from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.source import folder_source
from sqft.errors import ArtifactError
from sqft.kernels.grids import dequantize, fit_grid, quantize_to_codes, same
from sqft.modeling.adapters.frozen_weight import PackedLinear
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.architecture.layout import describe
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.loading import load_model
from sqft.modeling.loading.quantized import (
    GptqFolder,
    load_dequantized,
    load_packed,
    read_grids,
    read_quantized,
    save_quantized,
)
from sqft.types import Grid, Quantized
from sqft.utils.digests import Digests

LAYER, OTHER = "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@pytest.fixture
def copy(quantized_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized_folder, tmp_path / "copy"))


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The folder with its tensors changed in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return folder


def test_a_folder_s_layers_and_its_other_tensors(quantized_folder: Path) -> None:
    stored = GptqFolder(quantized_folder)
    assert LAYER in stored.layers and len(stored.layers) == 12
    assert "model.layers.1.mlp.down_proj.weight" in stored.other_names()
    assert not [name for name in stored.other_names() if name.startswith(f"{LAYER}.")]
    layers, grids = read_quantized(quantized_folder), read_grids(quantized_folder, [LAYER, "lm_head"])
    assert layers.keys() == stored.layers.keys() and grids.keys() == {LAYER}
    assert same(layers[LAYER], stored.layer(LAYER)) and grids[LAYER].scale.equal(layers[LAYER].grid.scale)


def test_a_folder_of_floats_is_not_quantized(model_folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is not quantized: its config\.json has no quantization_config"):
        GptqFolder(model_folder)


def test_codes_and_floats_are_one_model(quantized_folder: Path) -> None:
    floats, packed = load_dequantized(ModelSpec(quantized_folder)), load_packed(ModelSpec(quantized_folder))
    layers, ids = read_quantized(quantized_folder), torch.arange(2, 40)[None]
    for name, layer in layers.items():
        value = dequantize(layer).bfloat16()
        assert isinstance(packed.get_submodule(name), PackedLinear)
        assert floats.get_parameter(f"{name}.weight").equal(value)
        assert packed.get_submodule(name).weight.equal(value)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, floats(ids).logits)
    assert not any(parameter.requires_grad for parameter in packed.parameters()) and not packed.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_precision_asked_for(quantized_folder: Path, dtype: str) -> None:
    model, tokenizer = load_model(ModelSpec(quantized_folder, dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert tokenizer.pad_token_id is not None


def test_what_is_saved_is_read_back(quantized_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(ModelSpec(quantized_folder))
    layers = read_quantized(quantized_folder)
    save_quantized(model, tokenizer, layers, tmp_path)
    again = read_quantized(tmp_path)
    assert again.keys() == layers.keys() and all(same(again[name], layer) for name, layer in layers.items())
    assert "lm_head.weight" in GptqFolder(tmp_path).other_names()  # tied, and stored all the same


def test_a_part_that_does_not_fit(copy: Path) -> None:
    changed(copy, lambda tensors: tensors.update({f"{LAYER}.scales": tensors[f"{LAYER}.scales"][:, :5]}))
    with pytest.raises(ArtifactError, match=f"the parts of {LAYER} do not fit together"):
        read_quantized(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), r"disagree about tensor model\.norm\.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(2)}),
            r"disagree about tensor model\.norm\.weight",
        ),
        (lambda t: t["model.norm.weight"].fill_(torch.nan), r"tensor model\.norm\.weight holds values that are not"),
        (lambda t: t[f"{LAYER}.scales"].fill_(torch.inf), rf"tensor {LAYER}\.scales holds values that are not finite"),
        (
            lambda t: t.update({f"{OTHER}.{part}": t[f"{LAYER}.{part}"] for part in PARTS}),
            rf"{OTHER} holds codes \[64, 32\], and config\.json makes it \[32, 32\]",
        ),
    ],
    ids=["missing", "mis-shaped", "not finite", "scales", "codes of another shape"],
)
@pytest.mark.parametrize("load", [load_dequantized, load_packed])
def test_what_the_model_cannot_be_made_of(
    copy: Path,
    load: Callable[[ModelSpec], nn.Module],
    change: Callable[[dict[str, Tensor]], object],
    words: str,
) -> None:
    with pytest.raises(ArtifactError, match=words):
        load(ModelSpec(changed(copy, change)))


MORE = {
    f"{LAYER}.bias": torch.ones(64),
    f"{OTHER}.bias": torch.zeros(32),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.layers.0.self_attn.masked_bias": torch.ones(1),
    "model.layers.2.input_layernorm.weight": torch.ones(32),
}
"""Tensors that a Llama has no place for."""


@pytest.mark.parametrize("load", [load_dequantized, load_packed])
def test_what_the_model_has_no_place_for_is_left_out(copy: Path, load: Callable[[ModelSpec], nn.Module]) -> None:
    expected = load(ModelSpec(copy)).state_dict()

    def add(tensors: dict[str, Tensor]) -> None:
        tensors |= MORE | {f"mtp.layers.0.up_proj.{part}": tensors[f"{LAYER}.{part}"] for part in PARTS}

    found = load(ModelSpec(changed(copy, add))).state_dict()
    assert found.keys() == expected.keys() and all(found[name].equal(value) for name, value in expected.items())


def test_folders_of_floats_and_of_codes_leave_out_the_same(copy: Path, model_folder: Path, tmp_path: Path) -> None:
    """What the plan says of both is what their runs do."""
    floats = Path(shutil.copytree(model_folder, tmp_path / "floats"))
    changed(floats, lambda tensors: tensors.update(MORE | {"mtp.layers.0.up_proj.weight": torch.ones(64, 32)}))
    parts = {f"mtp.layers.0.up_proj.{part}": load_file(copy / "model.safetensors")[f"{LAYER}.{part}"] for part in PARTS}
    changed(copy, lambda tensors: tensors.update(MORE | parts))
    said = []
    for folder in (floats, copy):
        layout = describe(ModelSpec(folder), folder_source(folder, Digests()))
        assert not layout.problems
        said.append(sorted((part.name, part.weights) for part in layout.dropped))
        load_model(ModelSpec(folder))
    assert said[0] == said[1] == [(f"{LAYER}.bias", 64), ("model.layers.2", 32), ("mtp", 2048)]


def test_a_quantized_head_that_is_tied(copy: Path) -> None:
    changed(copy, lambda t: t.update({f"lm_head.{part}": t[f"{LAYER}.{part}"] for part in PARTS}))
    assert json.loads((copy / "config.json").read_text())["tie_word_embeddings"]
    with pytest.raises(ArtifactError, match=r"lm_head is quantized, and config\.json ties it to the embedding"):
        load_packed(ModelSpec(copy))


@pytest.mark.parametrize("load", [load_dequantized, load_packed])
def test_a_mixture_with_experts_of_codes_and_of_floats(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, load: Callable[[ModelSpec], nn.Module]
) -> None:
    """By the names of the family's own checkpoints, each expert apart."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=300, num_key_value_heads=2, num_local_experts=3, pad_token_id=1, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "floats")
    tokenizer.save_pretrained(tmp_path / "floats")
    model, _ = load_model(ModelSpec(tmp_path / "floats"))
    weights = {name: layer.weight for name, layer in linears(model).items() if ".experts.1." not in name}
    layers = {}
    for name, weight in weights.items():
        scale, zero = fit_grid(weight[:, None], 4, True)
        codes = quantize_to_codes(weight, scale, zero, 15).to(torch.uint8)
        layers[name] = Quantized(codes, Grid(scale.half(), zero, -1, 4))
        weight.data.copy_(dequantize(layers[name]))
    save_quantized(model, tokenizer, layers, tmp_path / "codes")
    names = set(load_file(tmp_path / "codes" / "model.safetensors"))
    assert {f"model.layers.1.block_sparse_moe.experts.{part}" for part in ("0.w1.qweight", "1.w1.weight")} < names
    loaded, ids = load(ModelSpec(tmp_path / "codes")), torch.arange(2, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    again = read_quantized(tmp_path / "codes", CheckpointNames(loaded))
    assert again.keys() == layers.keys() and all(same(again[name], layer) for name, layer in layers.items())
