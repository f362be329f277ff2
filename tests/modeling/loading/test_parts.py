"""A model read in parts has the tensors of the model read as a whole, and holds one part at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_family

from sqft.checkpoints.model_spec import ModelSpec
from sqft.modeling.architecture.blocks import decoder_blocks
from sqft.modeling.loading.parts import OUTSIDE, PartedModel
from sqft.modeling.loading.transformers_io import load_floats

FAST = ("Llama", "GPT2", "Falcon", "Mixtral", "GptOss", "DeepseekV3", "Mamba", "FalconH1")
"""Families that differ in how their tensors are stored; the others are tested with the real model."""


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name, family in FAMILIES.items()
        if family.walk == "blocks" and name != "Zamba2"
    ],
)
def test_the_tensors_of_a_model_that_is_read_as_a_whole(family: str, tokenizer: Any, tmp_path: Path) -> None:
    for stored, asked in ((torch.float32, None), (torch.bfloat16, "float32"), (torch.float32, "bfloat16")):
        spec = ModelSpec(save_family(family, tokenizer, tmp_path / f"{stored}", stored), asked)
        whole, _ = load_floats(spec)
        parted = PartedModel(spec)
        assert list(parted.model.state_dict()) == list(whole.state_dict())
        expected = whole.state_dict()
        assert parted.blocks == list(decoder_blocks(whole))
        for part in (OUTSIDE, *parted.blocks):
            parted.load(part)
            found = parted.model.state_dict()
            for name, tensor in expected.items():
                if parted.part_of(name) == part:
                    assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
            parted.release(part)
            assert all(parameter.is_meta for parameter in parted.model.parameters())
        for name, buffer in whole.named_buffers():
            assert torch.equal(parted.model.get_buffer(name), buffer), name
