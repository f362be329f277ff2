"""Models that are in memory without their zeros compute what they compute with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_family
from safetensors.torch import load_file, save_file

from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.safetensors import weight_files
from sqft.modeling.adapters.frozen_weight import PackedLinear, SparseWeight
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.loading import load_model
from sqft.modeling.loading.without_zeros import load_without_zeros


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model(family: str, tokenizer: object, tmp_path: Path) -> None:
    """To the bit, on every family, read one block at a time where that can be done, and as a whole."""
    folder = save_family(family, tokenizer, tmp_path / "model")
    for file in weight_files(folder):
        tensors, generator = load_file(file), torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if tensor.dim() > 1 and tensor.is_floating_point() and "embed" not in name:
                tensor[torch.rand(tensor.shape, generator=generator) < 0.5] = 0
        save_file(tensors, file, metadata={"format": "pt"})
    model, _ = load_model(ModelSpec(folder))
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    in_parts = FAMILIES[family].walk == "blocks" and family != "Zamba2"  # its blocks share weights
    for streamed in (False, True) if in_parts else (False,):
        packed, _ = load_without_zeros(ModelSpec(folder), streamed, masked=True)
        layers = {name: module for name, module in packed.named_modules() if isinstance(module, PackedLinear)}
        assert layers and all(isinstance(layer.base, SparseWeight) for layer in layers.values())
        left = {*model.state_dict()} ^ {*packed.state_dict()}
        assert {name.partition(".weight")[0].partition(".base.")[0] for name in left} == layers.keys()
        for name, layer in layers.items():
            assert layer.weight.equal(model.get_submodule(name).weight), name
        for name, tensor in packed.named_parameters():
            assert tensor.equal(model.get_parameter(name)), name
        with torch.no_grad():  # where a weight lies in memory may change the last bit of a product
            logits = packed(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_a_weight_that_blocks_share_is_packed_once(tokenizer: object, tmp_path: Path) -> None:
    folder = save_family("Zamba2", tokenizer, tmp_path / "model")
    for file in weight_files(folder):
        tensors = load_file(file)
        for tensor in tensors.values():
            tensor.view(-1)[::2] = 0
        save_file(tensors, file, metadata={"format": "pt"})
    model, _ = load_model(ModelSpec(folder))
    packed, _ = load_without_zeros(ModelSpec(folder), False, masked=True)
    layers = [module.base for module in packed.modules() if isinstance(module, PackedLinear)]
    assert len(layers) > len({id(base) for base in layers}) == len({id(one.weight) for one in linears(model).values()})
