"""A model read in parts has the tensors of the model read as a whole, and holds one part at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_family
from safetensors.torch import load_file, save_file

from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import ModelError
from sqft.modeling.architecture.blocks import decoder_blocks
from sqft.modeling.loading.folder_reader import FolderReader
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


def test_a_part_is_read_again_from_another_file(model_folder: Path, tmp_path: Path) -> None:
    """All of it: a head that is tied, and is not in the file, follows what was read."""
    parted = PartedModel(ModelSpec(model_folder))
    changed = {name: torch.full_like(parted.reader.tensor(name), 7) for name in parted.stored[OUTSIDE]}
    save_file(changed, tmp_path / "written.safetensors")
    with parted.held(OUTSIDE):
        parted.load(OUTSIDE, FolderReader(tmp_path, [tmp_path / "written.safetensors"]))
        assert all((tensor == 7).all() for tensor in parted.state(OUTSIDE).values())
        assert parted.model.lm_head.weight is parted.model.model.embed_tokens.weight


def test_what_is_tied_is_compared_in_the_models_precision(model_folder: Path, tmp_path: Path) -> None:
    """A head that differs from the embedding by less than bfloat16 holds is one with it, as in transformers."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].bfloat16().float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for dtype, tied in (("float32", False), ("bfloat16", True)):
        for model in (load_floats(ModelSpec(folder, dtype))[0], PartedModel(ModelSpec(folder, dtype)).model):
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("content", ["{ nope", "[]", '{"max_new_tokens": -3}'])
def test_settings_of_generation_that_are_damaged(model_folder: Path, tmp_path: Path, content: str) -> None:
    """The same becomes of them as where the model is read as a whole."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "generation_config.json").write_text(content)
    found = []
    for opened in (lambda: load_floats(ModelSpec(folder))[0], lambda: PartedModel(ModelSpec(folder)).model):
        try:
            found.append(opened().generation_config.to_dict())
        except ModelError:
            found.append(None)
    assert found[0] == found[1]
