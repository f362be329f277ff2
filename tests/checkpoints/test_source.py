"""Models and files from outside, by headers and content: what is found, and how what is wrong is refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.safetensors import safetensors_header
from sqft.checkpoints.source import find_model
from sqft.errors import ArtifactError, SqftError
from sqft.types import LinearShape
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
LINEARS = {LinearShape(f"model.layers.{n}.{name}", *shape) for n in range(2) for name, shape in BLOCK.items()}


def find(place: Path | str, digests: Digests | None = None) -> ModelSource:
    return find_model(str(place), Path, None, digests or Digests())


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def sharded(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    return tmp_path / "sharded"


# -- folders ------------------------------------------------------------------------------------


def test_a_folder(model_folder: Path, model: LlamaForCausalLM) -> None:
    found = find(model_folder)
    assert (found.kind, found.path) == ("folder", model_folder)
    assert set(found.linears) == LINEARS and len(found.linears) == len(LINEARS)
    assert found.parameters == model.num_parameters()
    assert found.size("no_such", "hidden_size") == 32 and found.size("no_such", default=7) == 7


def test_shards_are_one_model(sharded: Path, model_folder: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 1
    found, single = find(sharded), find(model_folder)
    assert (found.linears, found.shapes) == (single.linears, single.shapes)


def test_only_the_files_that_transformers_reads_count(folder: Path) -> None:
    """Mistral's repositories have the weights twice, once in names of their own."""
    whole = find(folder)
    save_file({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, folder / "consolidated.safetensors")
    assert find(folder).shapes == whole.shapes and find(folder).linears == whole.linears


def test_the_digest_is_of_what_makes_the_result(folder: Path, tmp_path: Path) -> None:
    digest = find(folder).digest
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert find(folder.rename(tmp_path / "elsewhere")).digest == digest
    for name in ("tokenizer.json", "modeling_mine.py", "model.safetensors"):
        with (tmp_path / "elsewhere" / name).open("ab") as stream:
            stream.write(b"\n")
        changed = find(tmp_path / "elsewhere").digest
        assert changed != digest, name
        digest = changed


@pytest.mark.parametrize("sizes", [[64, 128], "64", None])
def test_a_size_that_is_no_number_is_none(folder: Path, sizes: Any) -> None:
    """Some configs give a number for each layer."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": sizes}))
    assert find(folder).size("intermediate_size", default=1) == 1


def assert_rejected(place: Path | str, *words: str) -> None:
    with pytest.raises(SqftError) as caught:
        find(place)
    for word in words:
        assert word in str(caught.value)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert_rejected(folder, str(folder), "holds no .safetensors file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_by_name(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04N.")
    assert_rejected(folder, name, "pickles", "convert them to safetensors with save_pretrained")


def test_weights_of_another_name(folder: Path) -> None:
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
def test_a_config_that_is_none(folder: Path, content: bytes | None, words: str) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    assert_rejected(folder, str(folder), words)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    assert_rejected(sharded, gone.name, "model.safetensors.index.json names", "copy the model again")


@pytest.mark.parametrize("place", ["../outside.safetensors", "/outside.safetensors", "below"])
def test_a_shard_that_is_no_file_of_the_folder_is_missing(sharded: Path, place: str) -> None:
    (sharded / "below").mkdir()
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": place}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_rejected(sharded, place, "names")


def test_a_shard_without_its_tensor_is_named(sharded: Path) -> None:
    """transformers would fill the gap with random numbers, and warn."""
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.gone.weight"] = shard
    path.write_text(json.dumps(index))
    assert_rejected(sharded, shard, "lacks model.gone.weight", "copy the model again")


@pytest.mark.parametrize("index", ["[", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(sharded: Path, index: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    assert_rejected(sharded, "model.safetensors.index.json")


def test_what_is_no_place_at_all(tmp_path: Path, data: Path) -> None:
    assert_rejected("not there", "no file or folder", "is no Hugging Face id")
    assert_rejected(data / "train.jsonl", "neither a folder nor a .gguf file")


# -- safetensors headers ------------------------------------------------------------------------


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
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "the header is longer than the file"),
        (header("{"), ""),
        (header("[]"), ""),
        (header("[" * 100_000), ""),
        (header('{"a": 1}'), ""),
        (header('{"a": {"shape": [1]}}'), ""),
        (header('{"a": {"shape": [1], "data_offsets": []}}'), ""),
        (header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', 7), "it was cut off"),
    ],
)
def test_a_file_that_is_not_whole(folder: Path, content: bytes, words: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert_rejected(folder, f"{folder / 'model.safetensors'} is no whole safetensors file", words, "copy it again")


def test_one_byte_short(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)
    assert_rejected(folder, "it was cut off")


# -- what is taken for a linear layer -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "taken"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 4), True),
        ("model.layers.10.mlp.experts.3.up_proj.weight", (8, 4), True),
        ("transformer.h.0.mlp.0.weight", (8, 4), True),
        ("model.embed_tokens.weight", (8, 4), False),
        ("model.layers.61.embed_tokens.weight", (8, 4), False),
        ("lm_head.weight", (8, 4), False),
        ("model.layers.0.input_layernorm.weight", (8,), False),
        ("model.layers.0.self_attn.q_norm.weight", (8,), False),
        ("model.layers.0.self_attn.q_proj.bias", (8,), False),
        ("model.layers.0.mixer.conv1d.weight", (8, 1, 4), False),
        ("model.layers.0.mlp.experts.weight", (2, 8, 4), False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,), False),
    ],
)
def test_linears_are_guessed(folder: Path, name: str, shape: tuple[int, ...], taken: bool) -> None:
    save_file({name: torch.zeros(shape)}, folder / "model.safetensors")
    expected = (LinearShape(name.removesuffix(".weight"), 8, 4),) if taken else ()
    assert find(folder).linears == expected


def test_linears_come_in_the_order_of_their_numbers(folder: Path) -> None:
    names = ["m.layers.2.a.q", "m.layers.2.b.q", "m.layers.10.a.q", "m.layers.more.0.a.q", "m.vision.3.q"]
    save_file({f"{name}.weight": torch.zeros(2, 2) for name in names[::-1]}, folder / "model.safetensors")
    found = [linear.name for linear in find(folder).linears]
    assert set(found) == set(names)
    assert [name for name in found if "layers" in name and "more" not in name] == names[:3]


# -- GGUF ---------------------------------------------------------------------------------------


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


def test_a_gguf_file(tmp_path: Path) -> None:
    found = find(write_gguf(tmp_path / "tiny.gguf"))
    assert found.kind == "gguf" and found.digest == Digests().file(tmp_path / "tiny.gguf")
    assert set(found.linears) == {linear for linear in LINEARS if ".0." in linear.name}
    assert found.parameters == 10 * 32 + 32 + sum(out * into for out, into in BLOCK.values())
    sizes = ["hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "vocab_size"]
    assert [found.size(name) for name in sizes] == [32, 64, 1, 128, 10]


@pytest.mark.parametrize("cut", [0, 3, 20, 200, 500, -100])
def test_a_gguf_file_that_is_cut_off(tmp_path: Path, cut: int) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[:cut])
    assert_rejected(tmp_path / "tiny.gguf", "tiny.gguf is no whole GGUF file", "copy it again")


def test_a_gguf_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not at all a model" * 100)
    assert_rejected(tmp_path / "x.gguf", "x.gguf is no whole GGUF file")
    assert_rejected(write_gguf(tmp_path / "vocabulary.gguf", tensors=False), "holds no tensors")


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_rejected(write_gguf(tmp_path / "tiny.gguf"), "pip install 'sqft[gguf]'")


# -- the hub ------------------------------------------------------------------------------------


def cached(cache: Path, folder: Path) -> Path:
    """The folder as the hub's cache holds `owner/name`."""
    home = cache / "models--owner--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copytree(folder, home / "snapshots" / ("0" * 40)))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hub_id_that_is_not_here_and_no_network(cache: Path) -> None:
    assert_rejected(
        "owner/name",
        "there is no folder owner/name",
        "the Hugging Face model 'owner/name' cannot be had, here or from the hub",
    )
    assert_rejected("owner/--", "cannot be had")


def test_a_hub_id_that_is_in_the_cache(cache: Path, model_folder: Path) -> None:
    snapshot = cached(cache, model_folder)
    found = find("owner/name")
    assert found.path == snapshot and found.digest == find(model_folder).digest


def test_a_hub_id_whose_download_was_cut_off(cache: Path, sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[0]
    gone.unlink()
    cached(cache, sharded)
    assert_rejected("owner/name", gone.name)


# -- digests ------------------------------------------------------------------------------------


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqft.utils.digests.SETTLED", 0)


def plant(memory: Path) -> None:
    """Replace what is remembered, to see whether it is what is answered."""
    memory.write_text(json.dumps(dict.fromkeys(json.loads(memory.read_text()), "planted")))


@pytest.mark.usefixtures("settled")
def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    memory, file = tmp_path / "digests.json", tmp_path / "file"
    file.write_bytes(b"abc")
    assert Digests(memory).file(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    plant(memory)
    assert Digests(memory).file(file) == "planted"


def in_place(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.write(b"x")


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"xbc")
    os.replace(other, file)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", [in_place, replaced])
def test_a_changed_file_is_read_again_whatever_its_time_says(tmp_path: Path, change: Callable[[Path], None]) -> None:
    memory, file = tmp_path / "digests.json", tmp_path / "file"
    file.write_bytes(b"abc")
    times, before = file.stat(), Digests(memory).file(file)
    plant(memory)
    change(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Digests(memory).file(file) not in (before, "planted")


def test_a_file_that_has_just_changed_is_not_trusted(tmp_path: Path) -> None:
    """A change within one tick of the clock shows nowhere but in the content."""
    digests, file = Digests(tmp_path / "digests.json"), tmp_path / "file"
    for _ in range(50):
        file.write_bytes(b"abc")
        before = digests.file(file)
        in_place(file)
        assert digests.file(file) != before
    assert not (tmp_path / "digests.json").exists()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": {}}', "\udcff"])
def test_a_memory_that_is_none_is_forgotten(tmp_path: Path, content: str) -> None:
    memory, file = tmp_path / "digests.json", tmp_path / "file"
    file.write_bytes(b"abc")
    memory.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert Digests(memory).file(file) == Digests().file(file)
    assert list(json.loads(memory.read_text()).values()) == [Digests().file(file)]


@pytest.mark.usefixtures("settled")
def test_what_is_remembered_is_no_digest_then_it_is_made(tmp_path: Path) -> None:
    memory, file = tmp_path / "digests.json", tmp_path / "file"
    file.write_bytes(b"abc")
    digest = Digests(memory).file(file)
    memory.write_text(json.dumps(dict.fromkeys(json.loads(memory.read_text()), 5)))
    assert Digests(memory).file(file) == digest


@pytest.mark.usefixtures("settled")
def test_a_memory_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    (tmp_path / "digests.json").mkdir()
    for memory in (tmp_path / "digests.json", file / "digests.json", tmp_path / "no" / "digests.json"):
        assert Digests(memory).file(file) == Digests().file(file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digests.json", "file"]


def test_the_digest_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    (folder / "below").mkdir(parents=True)
    (folder / "a.yaml").write_text("task: a")
    (folder / "below" / "b.py").write_text("b = 1")
    seen = [Digests().path(folder)]

    def changed() -> bool:
        seen.append(Digests().path(folder))
        return seen[-1] not in seen[:-1]

    (folder / "a.yaml").rename(folder / "c.yaml")
    assert changed()
    (folder / "c.yaml").rename(folder / "below" / "c.yaml")
    assert changed()
    (folder / "below" / "b.py").write_text("b = 2")
    assert changed()
    (folder / "empty").write_text("")
    assert changed()
    (folder / "below" / "__pycache__").mkdir()
    (folder / "below" / "__pycache__" / "b.cpython-311.pyc").write_bytes(b"compiled")
    assert not changed(), "a run compiles a task's code"
    assert Digests().path(folder.rename(tmp_path / "elsewhere")) == seen[-1]


def test_what_cannot_be_read_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(SqftError, match="gone cannot be read: No such file"):
        Digests().path(tmp_path / "gone")


def test_a_shard_that_is_damaged_is_an_artifact_error(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.write_bytes(b"")
    with pytest.raises(ArtifactError, match=shard.name):
        find(sharded)


def test_what_is_hidden_or_the_store_is_no_data(tmp_path: Path) -> None:
    """A data set's folder may hold the store, whose files sqft itself writes."""
    (tmp_path / "store").mkdir()
    (tmp_path / "train.jsonl").write_text("{}")
    digests = Digests(tmp_path / "store" / "digests.json")
    before = digests.path(tmp_path)
    (tmp_path / "store" / "more").write_text("more")
    (tmp_path / ".train.jsonl.swp").write_text("an editor's")
    assert digests.path(tmp_path) == before
    (tmp_path / "more.jsonl").write_text("{}")
    assert digests.path(tmp_path) != before
    inside = digests.path(tmp_path / "store")  # data below a store are data
    (tmp_path / "store" / "more").write_text("other")
    assert digests.path(tmp_path / "store") != inside
