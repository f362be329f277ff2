"""What exporters write with: sizes, shards and their index, config entries, and which layers are floats."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from sqft.checkpoints.export import float_layers, in_bytes, parameters, write_config, write_shards
from sqft.checkpoints.safetensors import safetensors_header, weight_files
from sqft.types import Grid, Quantized


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, 1), ("5MB", 5_000_000), ("0.5 gb", 500_000_000), (" 2.25KB ", 2250), ("1TB", 10**12), ("0.0015KB", 1)],
)
def test_sizes(size: int | str, expected: int) -> None:
    assert in_bytes(size) == expected


@pytest.mark.parametrize("size", [0, -1, True, 1.5, None, "", "5", "5 MiB", "-1MB", "0.0001KB", "1e3MB", "five MB"])
def test_what_is_not_a_size(size: Any) -> None:
    with pytest.raises(ValueError, match=r"is not a size; give .* such as '5GB'"):
        in_bytes(size)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(1, 60))
def test_shards_hold_every_tensor_once_and_their_limit(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{n}": torch.full((size,), n, dtype=torch.float32) for n, size in enumerate(sizes)}
    write_shards(iter(tensors.items()), folder, limit)
    files = weight_files(folder)
    assert {file.name for file in files} == {file.name for file in folder.glob("*.safetensors")}
    stored = [(name, tensor) for file in sorted(files) for name, tensor in load_file(file).items()]
    assert sorted(name for name, _ in stored) == sorted(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stored)
    for file, listed in files.items():
        header = safetensors_header(file)
        assert not listed or listed == set(header)
        assert len(header) == 1 or sum(tensors[name].nbytes for name in header) <= limit
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    asked: list[int] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number in range(4):
            asked.append(len(list(tmp_path.glob("part-*.safetensors"))))
            yield f"t{number}", torch.zeros(4)

    write_shards(tensors(), tmp_path, 16)
    assert asked == [0, 0, 1, 2]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"model-{number}-of-00004.safetensors" for number in ("00001", "00002", "00003", "00004")
    ]


def test_entries_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    write_config(tmp_path, dtype="bfloat16", more=[1])
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model_type": "llama", "dtype": "bfloat16", "more": [1],
    }  # fmt: skip


class Reader:
    """A model with one quantized layer, and weights that no format would quantize."""

    tensors = {
        "m.embed.weight": torch.zeros(5, 4),
        "m.layers.0.q.weight": torch.zeros(4, 4),
        "m.layers.0.norm.weight": torch.zeros(4),
        "m.layers.0.down.weight": torch.zeros(2, 4),
        "m.layers.0.down.bias": torch.zeros(2),
        "lm_head.weight": torch.zeros(5, 4),
    }

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def floats(self) -> Sequence[str]:
        return [name for name in self.tensors if name != "m.layers.0.q.weight"]

    def quantized(self) -> Sequence[str]:
        return ["m.layers.0.q"]

    def codes(self, layer: str) -> Quantized:
        grid = Grid(torch.ones(4, 1), torch.ones(4, 1, dtype=torch.int32), -1, 4)
        return Quantized(torch.full((4, 4), 7, dtype=torch.uint8), grid)

    def float_layers(self) -> Sequence[str]:
        return ["m.layers.0.down"]

    def blocks(self) -> str:
        return "model.layers"

    def towers(self) -> Sequence[str]:
        return []

    def copy_settings(self, folder: Path) -> None: ...


def test_layers_of_floats() -> None:
    assert float_layers(Reader()) == ["m.layers.0.down"]


def test_parameters_with_codes_in_the_place_of_a_weight() -> None:
    named = dict(parameters(Reader(), lambda layer: {"codes": layer.codes, "scale": layer.grid.scale}))
    expected = {name: tensor for name, tensor in Reader.tensors.items() if name != "m.layers.0.q.weight"}
    assert named.keys() == {*expected, "m.layers.0.q.codes", "m.layers.0.q.scale"}
    assert all(named[name] is tensor for name, tensor in expected.items())
    assert (named["m.layers.0.q.codes"] == 7).all()
