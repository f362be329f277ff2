"""Headers and indexes of safetensors: what is read, and how what is damaged is rejected."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.safetensors import data_bytes, join, safetensors_header
from sqft.errors import ArtifactError


def test_a_header(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert safetensors_header(tmp_path / "x.safetensors") == {"a": (2, 3), "b": (), "c": (0, 4)}


def header(text: str, size: int = 0) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + bytes(size)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ""),
        (b"\x08\0\0", ""),
        (struct.pack("<Q", 1 << 60) + b"{}", "the header is longer than the file"),
        (struct.pack("<Q", 3) + b"{}", "the header is longer than the file"),
        (header("{"), ""),
        (header("[]"), ""),
        (header("[" * 100_000), ""),
        (header('{"a": 1}'), ""),
        (header('{"a": {"shape": [1]}}'), ""),
        (header('{"a": {"shape": [1], "data_offsets": []}}'), ""),
        (header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', 7), "it was cut off"),
    ],
)
def test_an_incomplete_file(folder: Path, content: bytes, words: str, assert_rejected: Callable[..., None]) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert_rejected(
        folder, f"{folder / 'model.safetensors'} is not a complete safetensors file", words, "copy it again"
    )


def test_a_pointer_to_weights_is_named(folder: Path, assert_rejected: Callable[..., None]) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 538090408\n"
    (folder / "model.safetensors").write_text(pointer)
    assert_rejected(folder, "is a Git LFS pointer, and not the weights; run `git lfs pull` in its folder")


def test_one_byte_short(folder: Path, assert_rejected: Callable[..., None]) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)
    assert_rejected(folder, "it was cut off")


def test_a_shard_that_is_damaged_is_an_artifact_error(sharded: Path, find: Callable[..., ModelSource]) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.write_bytes(b"")
    with pytest.raises(ArtifactError, match=shard.name):
        find(sharded)


def test_a_missing_shard_is_named(sharded: Path, assert_rejected: Callable[..., None]) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    assert_rejected(sharded, gone.name, "model.safetensors.index.json lists", "copy the model again")


@pytest.mark.parametrize("place", ["../outside.safetensors", "/outside.safetensors", "below"])
def test_a_shard_that_is_no_file_of_the_folder_is_missing(
    sharded: Path, place: str, assert_rejected: Callable[..., None]
) -> None:
    (sharded / "below").mkdir()
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": place}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_rejected(sharded, place, "lists")


def test_a_shard_without_its_tensor_is_named(sharded: Path, assert_rejected: Callable[..., None]) -> None:
    """transformers would fill the gap with random numbers, and warn."""
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.gone.weight"] = shard
    path.write_text(json.dumps(index))
    assert_rejected(sharded, shard, "lacks model.gone.weight", "copy the model again")


@pytest.mark.parametrize("index", ["[", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(sharded: Path, index: str, assert_rejected: Callable[..., None]) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    assert_rejected(sharded, "model.safetensors.index.json")


def test_no_weights(folder: Path, assert_rejected: Callable[..., None]) -> None:
    (folder / "model.safetensors").unlink()
    assert_rejected(folder, str(folder), "has no .safetensors file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_by_name(folder: Path, name: str, assert_rejected: Callable[..., None]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04N.")
    assert_rejected(folder, name, "pickles", "convert them to safetensors with save_pretrained")


def test_weights_of_another_name(folder: Path, assert_rejected: Callable[..., None]) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert_rejected(
        folder, "model-00001-of-00002.safetensors", "neither model.safetensors nor model.safetensors.index.json"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no config.json; a model folder has config.json and weights"),
        (b"{", "config.json is not valid JSON"),
        (b"\xff\xfe", "config.json is not valid JSON"),
        (b"[1]", "config.json is not a JSON object"),
    ],
)
def test_a_config_that_is_none(
    folder: Path, content: bytes | None, words: str, assert_rejected: Callable[..., None]
) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    assert_rejected(folder, str(folder), words)


def test_joined_files_hold_the_tensors_of_all(tmp_path: Path) -> None:
    parts = [
        {"a": torch.arange(5, dtype=torch.uint8), "b": torch.randn(3, 2)},
        {},
        {"c": torch.randn(7).to(torch.bfloat16), "d": torch.tensor(3, dtype=torch.int64)},
    ]
    files = [tmp_path / f"{number}.safetensors" for number in range(len(parts))]
    for part, file in zip(parts, files, strict=True):
        save_file(part, file)
        assert data_bytes(file) == sum(tensor.nbytes for tensor in part.values())
    join(files, tmp_path / "all.safetensors")
    found = load_file(tmp_path / "all.safetensors")
    expected = {name: tensor for part in parts for name, tensor in part.items()}
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == tensor.dtype and found[name].equal(tensor) for name, tensor in expected.items())
    assert data_bytes(tmp_path / "all.safetensors") == sum(map(data_bytes, files))
