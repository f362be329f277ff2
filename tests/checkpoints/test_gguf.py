"""GGUF files, by their headers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants

from sqft.checkpoints.gguf import module_shapes, open_gguf
from sqft.checkpoints.model_source import ModelSource
from sqft.utils.digests import Digests

BLOCK = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}


def write_gguf(path: Path, tensors: bool = True) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_context_length(128)
    if tensors:
        names = {"attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
        names |= {"attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
        for name, shape in {"token_embd": (10, 32), **{f"blk.0.{n}": s for n, s in names.items()}}.items():
            values = np.ones(shape, np.float32)
            if len(shape) == 2 and name.startswith("blk"):
                kind = GGMLQuantizationType.Q8_0
                writer.add_tensor(f"{name}.weight", quants.quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file(tmp_path: Path, find: Callable[..., ModelSource]) -> None:
    found = find(write_gguf(tmp_path / "tiny.gguf"))
    assert found.kind == "gguf" and found.digest == Digests().file(tmp_path / "tiny.gguf")
    assert module_shapes(found.shapes) == {f"model.layers.0.{name}": shape for name, shape in BLOCK.items()}
    assert found.dtype == "float32"  # of what is no codes
    assert found.parameters == 10 * 32 + 32 + sum(out * into for out, into in BLOCK.values())


def test_the_reader_finds_what_the_packages_own_finds(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    ours, stock = open_gguf(path), GGUFReader(path)
    assert open_gguf(path) is ours and type(ours) is not GGUFReader
    assert {name: field.contents() for name, field in ours.fields.items()} == {
        name: field.contents() for name, field in stock.fields.items()
    }
    for one, other in zip(ours.tensors, stock.tensors, strict=True):
        assert (one.name, one.tensor_type) == (other.name, other.tensor_type) and (one.data == other.data).all()
    write_gguf(path, tensors=False)
    assert not open_gguf(path).tensors


@pytest.mark.parametrize("cut", [0, 3, 20, 200, 500, -100])
def test_a_gguf_file_that_is_cut_off(tmp_path: Path, cut: int, assert_rejected: Callable[..., None]) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[:cut])
    assert_rejected(tmp_path / "tiny.gguf", "tiny.gguf is not a complete GGUF file", "copy it again")


def test_a_gguf_file_of_something_else(tmp_path: Path, assert_rejected: Callable[..., None]) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not at all a model" * 100)
    assert_rejected(tmp_path / "x.gguf", "x.gguf is not a complete GGUF file")
    assert_rejected(write_gguf(tmp_path / "vocabulary.gguf", tensors=False), "has no tensors")


def test_gguf_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_rejected: Callable[..., None]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_rejected(write_gguf(tmp_path / "tiny.gguf"), "pip install 'sqft[gguf]'")
