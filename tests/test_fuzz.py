"""Arbitrary and mutated files: what reads them gives what it promises or an SqftError, and no other exception."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sqft import Orchestrator, Recipe, Registry
from sqft.checkpoints.gptq import gptq_settings
from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.safetensors import safetensors_header
from sqft.checkpoints.source import find_model
from sqft.data.records import Record, read_records
from sqft.errors import ArtifactError, DataError, RecipeError, SqftError
from sqft.modeling.loading.quantized import read_quantized
from sqft.planning.plan import Plan
from sqft.store.artifacts import Artifact, Store
from sqft.utils.digests import Digests

MORE = int(os.environ.get("SQFT_FUZZ", "1"))
"""How many times as many examples, and then other ones each time."""
HELD = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]  # files are written anew for each example


def examples(count: int) -> Any:
    return settings(deadline=None, max_examples=count * MORE, suppress_health_check=HELD, derandomize=MORE == 1)


scalars = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(
        [0, -1, 2**31, 2**63, 2**70, 1e308, "", "\0", "../x", "~nobody/x", "a/b", "/", "x" * 300, "*", "["]
    )
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def places(content: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside plain data."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [found for key, value in items for found in ((*here, key), *places(value, (*here, key)))]


@st.composite
def mutated(draw: st.DrawFn, content: Any) -> Any:
    """Plain data with one to three of its values replaced, taken out, renamed, or moved elsewhere."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        if not (known := places(content)):
            break
        *parents, last = draw(st.sampled_from(known))
        here = content
        for part in parents:
            here = here[part]
        match draw(st.integers(0, 3 if isinstance(here, dict) else 1)):
            case 0:
                here[last] = draw(values)
            case 1:
                del here[last]
            case 2:
                here[draw(st.text(max_size=8))] = here.pop(last)
            case _:
                here[last] = copy.deepcopy(here[draw(st.sampled_from(list(here)))])
    return content


@st.composite
def spoilt(draw: st.DrawFn, whole: bytes, upto: int | None = None) -> bytes:
    """Bytes with a few of them changed, or cut off."""
    changed = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        changed[draw(st.integers(0, min(len(whole), upto or len(whole)) - 1))] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.integers(0, len(whole)))] if draw(st.integers(0, 3)) == 0 else changed)


@examples(150)
@given(content=st.binary(max_size=200) | values.map(lambda v: json.dumps(v).encode()))
def test_any_file_as_a_recipe(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.json"
    file.write_bytes(content)
    with pytest.raises(RecipeError):
        Recipe.load(file)


@examples(120)
@given(data=st.data())
def test_a_recipe_mutated(raw: dict[str, Any], registry: Registry, tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(data.draw(mutated(raw))))
    try:
        assert isinstance(Orchestrator(registry, tmp_path / "store").load(file), Plan)
    except SqftError as error:
        assert str(error)
    assert not (tmp_path / "store").exists()


@examples(100)
@given(change=st.text(max_size=20) | st.builds("{}={}".format, st.sampled_from(
    ["seed", "finetune.adapter", "finetune.adapter.options.ranks.0", "evaluate.of.0", "export.0.exporter", "a.b"]
), values.map(json.dumps) | st.text(max_size=8)))  # fmt: skip
def test_any_change_on_the_command_line(raw: dict[str, Any], tmp_path: Path, change: str) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(raw))
    try:
        assert isinstance(Recipe.load(file, [change]), Recipe)
    except SqftError as error:
        assert str(error)


HEADER = {
    "__metadata__": {"format": "pt"},
    "model.layers.0.mlp.up_proj.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "model.norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]},
}


def shapes_or_refused(file: Path) -> None:
    try:
        shapes = safetensors_header(file)
    except ArtifactError as error:
        assert str(file) in str(error)
    else:
        assert all(
            isinstance(name, str) and all(type(size) is int and size >= 0 for size in shape)
            for name, shape in shapes.items()
        )


@examples(300)
@given(content=st.binary(max_size=100) | (values | mutated(HEADER)).map(
    lambda v: struct.pack("<Q", len(text := json.dumps(v).encode())) + text + bytes(24)
))  # fmt: skip
def test_any_file_as_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    shapes_or_refused(tmp_path / "x.safetensors")


def found_or_refused(folder: Path) -> None:
    try:
        assert isinstance(find_model(str(folder), Path, None, Digests()), ModelSource)
    except SqftError as error:
        assert str(folder) in str(error)


@pytest.mark.parametrize("quantized", [False, True])
@examples(80)
@given(data=st.data())
def test_a_models_files_mutated(
    model_folder: Path, quantized_folder: Path, tmp_path: Path, data: st.DataObject, quantized: bool
) -> None:
    source, folder = quantized_folder if quantized else model_folder, tmp_path / "model"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    if data.draw(st.booleans()):
        whole = (source / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data.draw(spoilt(whole, 4000)))
    else:
        config = json.loads((source / "config.json").read_text())
        text = data.draw(mutated(config).map(lambda v: json.dumps(v).encode()) | spoilt(json.dumps(config).encode()))
        (folder / "config.json").write_bytes(text)
    found_or_refused(folder)


@examples(60)
@given(index=values | mutated({"metadata": {}, "weight_map": {"model.norm.weight": "a.safetensors"}}))
def test_any_index(tmp_path: Path, index: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found_or_refused(tmp_path)


SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq"}


@examples(300)
@given(found=values | mutated(SETTINGS))
def test_any_settings_of_gptq(found: Any) -> None:
    try:
        known = gptq_settings(Path("somewhere"), {"quantization_config": found})
    except SqftError as error:
        assert "somewhere" in str(error)
    else:
        assert (known is None) == (found is None)


@examples(60)
@given(data=st.data())
def test_a_checkpoint_of_gptq_mutated(quantized_folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Parts of other shapes, types and values, and settings of any kind."""
    folder = tmp_path / "model"
    shutil.copytree(quantized_folder, folder, dirs_exist_ok=True)
    tensors = load_file(quantized_folder / "model.safetensors")
    parts = sorted(name for name in tensors if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx"))
    for name in data.draw(st.lists(st.sampled_from(parts), min_size=1, max_size=2, unique=True)):
        part = tensors.pop(name)
        dtype = data.draw(
            st.sampled_from([part.dtype, torch.int32, torch.int64, torch.float16, torch.float32, torch.bool])
        )
        shape = data.draw(st.sampled_from([tuple(part.shape), (0,), (1,), (1, 1), (3, 5), (2, 2, 2), ()]))
        fill = data.draw(st.sampled_from([None, 0, 1, -1, 2**30, float("inf"), float("nan")]))
        if shape != tuple(part.shape):
            part = torch.zeros(shape, dtype=dtype)
        elif not (isinstance(fill, float) and not dtype.is_floating_point):
            part = part.to(dtype) if fill is None else torch.full(shape, fill).to(dtype)
        if data.draw(st.integers(0, 4)):
            tensors[name] = part.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantized_folder / "config.json").read_text())
    if data.draw(st.booleans()):
        config["quantization_config"] = data.draw(mutated(config["quantization_config"]))
    (folder / "config.json").write_text(json.dumps(config))
    found_or_refused(folder)
    try:
        for layer in read_quantized(folder).values():
            assert layer.codes.ndim == 2 and layer.grid.scale.isfinite().all()
    except SqftError as error:
        assert str(folder) in str(error)


RECORDS = (
    b'{"prompt": "1+1=", "completion": "2"}\n{"messages": [{"role": "assistant", "content": "a"}]}\n{"text": "b"}\n'
)


@examples(400)
@given(content=st.binary(max_size=80) | spoilt(RECORDS) | st.lists(
    (values | mutated({"messages": [{"role": "assistant", "content": "a"}]})).map(json.dumps), max_size=4
).map(lambda lines: "\n".join(lines).encode()), limit=st.none() | st.integers(1, 3))  # fmt: skip
def test_any_file_as_records(tmp_path: Path, content: bytes, limit: int | None) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    try:
        records = read_records(file, limit)
    except DataError as error:
        assert str(file) in str(error)
    else:
        assert 0 < len(records) <= (limit or len(records))
        assert all(isinstance(record, Record) and record.location.startswith(f"{file}:") for record in records)


@examples(120)
@given(data=st.data())
def test_any_manifest(tmp_path: Path, data: st.DataObject) -> None:
    store, fingerprint = Store(tmp_path / "store"), "ab" * 32
    if (artifact := store.folder("merge", fingerprint)).exists():
        shutil.rmtree(artifact)
    with store.begin("merge", fingerprint) as scratch:
        (scratch / "a.json").write_text("{}")
        made = store.commit(scratch, {"stage": "merge", "fingerprint": fingerprint, "report": {"sparsity": 0.5}})
    whole = (made.folder / "manifest.json").read_bytes()
    manifest = json.loads(whole)
    content = data.draw(
        st.binary(max_size=60) | spoilt(whole) | (values | mutated(manifest)).map(lambda v: json.dumps(v).encode())
    )
    (made.folder / "manifest.json").write_bytes(content)
    try:
        found = store.find("merge", fingerprint)
        assert isinstance(found, Artifact)
        store.verify(found)
    except ArtifactError as error:
        assert str(made.folder) in str(error) and "--fresh merge" in str(error)
    else:
        assert isinstance(found.report, dict) and found.size == 2
        assert found == made or b'"checksum"' not in content
