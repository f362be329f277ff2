"""A GPTQ folder whose layers are read as floats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import ArtifactError
from sqft.kernels.grids import dequantize
from sqft.modeling.loading import load_model
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.parts import PartedModel
from sqft.modeling.loading.quantized import read_quantized
from sqft.modeling.loading.values_of_codes import ValuesOfCodes, reader_of_floats


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_codes_are_read_as_their_values(quantized_folder: Path, dtype: torch.dtype | None) -> None:
    reader, layers = ValuesOfCodes(quantized_folder, dtype=dtype), read_quantized(quantized_folder)
    names = reader.names()
    assert layers and not any("qweight" in name or "scales" in name for name in names)
    assert {name.removesuffix(".weight") for name in names} > layers.keys()
    for name, layer in layers.items():
        assert f"{name}.weight" in reader and f"{name}.qweight" not in reader
        value = dequantize(layer)
        assert reader.shape(f"{name}.weight") == value.shape
        found = reader.tensor(f"{name}.weight")
        assert found.equal(value.to(dtype or torch.bfloat16)) and reader.precisions[f"{name}.weight"] == found.dtype
    for name in set(names) - {f"{layer}.weight" for layer in layers}:
        assert reader.tensor(name).equal(FolderReader(quantized_folder).tensor(name))
        assert reader.shape(name) == reader.tensor(name).shape
    with pytest.raises(ArtifactError, match=r"has no tensor model\.nothing"):
        reader.tensor("model.nothing")


def test_what_a_folder_is_read_with(model_folder: Path, quantized_folder: Path) -> None:
    assert type(reader_of_floats(ModelSpec(model_folder))) is FolderReader
    reader = reader_of_floats(ModelSpec(quantized_folder, dtype="float32"))
    assert isinstance(reader, ValuesOfCodes) and torch.float32 in reader.precisions.values()


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_model_in_parts_is_the_whole_model(quantized_folder: Path, dtype: str | None) -> None:
    spec = ModelSpec(quantized_folder, dtype=dtype)
    whole, _ = load_model(spec)
    parts = PartedModel(spec)
    assert not hasattr(parts.model.config, "quantization_config")
    seen = set()
    for part in parts.parts:
        with parts.held(part):
            for name, tensor in parts.parameters(part).items():
                seen.add(name)
                assert tensor.equal(whole.get_parameter(name)) and tensor.dtype == whole.get_parameter(name).dtype, name
    assert seen == {name for name, _ in whole.named_parameters()}
