"""Tensors of a folder in several files, one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sqft.errors import ArtifactError
from sqft.modeling.loading.folder_reader import FolderReader

TENSORS = {name: torch.full((2, 3), float(index)) for index, name in enumerate(("b.weight", "a.weight", "c.weight"))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({name: TENSORS[name] for name in ("b.weight", "a.weight")}, tmp_path / "model-1.safetensors")
    save_file({"c.weight": TENSORS["c.weight"]}, tmp_path / "model-2.safetensors")
    return tmp_path


def test_names_and_tensors_of_all_files(folder: Path) -> None:
    reader = FolderReader(folder)
    assert reader.names() == ["a.weight", "b.weight", "c.weight"]
    assert "c.weight" in reader and "d.weight" not in reader
    assert all(reader.tensor(name).equal(value) for name, value in TENSORS.items())
    assert [name for name, value in reader.tensors() if value.equal(TENSORS[name])] == reader.names()


def test_a_missing_tensor_is_named(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no tensor d\.weight"):
        FolderReader(folder).tensor("d.weight")


def test_a_damaged_file_is_named(folder: Path) -> None:
    file = folder / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ArtifactError, match=r"model-2\.safetensors is not a complete safetensors file"):
        FolderReader(folder).names()


def test_a_folder_is_listed_once(folder: Path) -> None:
    reader = FolderReader(folder)
    assert len(reader.names()) == 3
    (folder / "model-2.safetensors").unlink()
    assert len(reader.names()) == 3
    with pytest.raises(ArtifactError, match="model-2"):
        reader.tensor("c.weight")


@pytest.mark.parametrize("shape", [(7, 5), (7,), (), (0, 4), (3, 0), (2, 3, 4)])
@pytest.mark.parametrize("size", [1, 8, 40, 1 << 20])
def test_pieces_are_the_tensor(tmp_path: Path, shape: tuple[int, ...], size: int) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    pieces = list(FolderReader(tmp_path).pieces("w", size))
    assert (torch.cat(pieces) if shape else pieces[0]).equal(tensor) and pieces[0].dtype == torch.float16
    row = tensor[:1].nbytes if shape else tensor.nbytes
    assert all(piece.nbytes <= max(size, row) for piece in pieces)
