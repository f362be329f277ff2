"""A folder that is written in parts holds what transformers would write of the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_family
from transformers import AutoModelForCausalLM

from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.safetensors import weight_files
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.part_writer import PartWriter, float_tensors
from sqft.modeling.loading.parts import WholeModel, open_in_parts
from sqft.modeling.loading.transformers_io import save_model, save_settings


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen3Moe", "Gemma2"])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_parts_are_the_model(family: str, streamed: bool, tokenizer: Any, tmp_path: Path) -> None:
    spec = ModelSpec(save_family(family, tokenizer, tmp_path / "source"))
    opened, _ = open_in_parts(spec, streamed)
    assert (type(opened) is WholeModel) == (not streamed)
    writer = PartWriter(tmp_path / "parts", opened.parts)
    for part in opened.parts:
        with opened.held(part):
            writer.write(part, float_tensors(opened, part, spec))
    writer.write_index()
    save_settings(opened.model, tokenizer, tmp_path / "parts", spec)
    whole, _ = open_in_parts(spec, False)
    save_model(whole.model, tokenizer, tmp_path / "whole", spec)
    one, other = (dict(FolderReader(f, weight_files(f)).tensors()) for f in (tmp_path / "parts", tmp_path / "whole"))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == len(opened.parts)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    ids = torch.arange(2, 20)[None]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("parts", "source")]
    assert models[0](ids).logits.equal(models[1](ids).logits)


def test_a_part_is_there_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqft.modeling.loading import part_writer

    def cut_off(tensors: Any, file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("no space")

    writer = PartWriter(tmp_path / "parts", ["", "layers.0"])
    monkeypatch.setattr(part_writer, "save_file", cut_off)
    with pytest.raises(OSError, match="no space"):
        writer.write("layers.0", {"a": torch.ones(2)})
    assert not list((tmp_path / "parts").glob("*.safetensors"))
