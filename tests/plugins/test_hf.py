"""The Hugging Face exporter: what it carries over, what it writes, and what stock transformers makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from sqft_hf import HuggingFace
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.source import find_model
from sqft.modeling.loading.finished_model import FinishedModel
from sqft.modeling.loading.quantized import load_dequantized
from sqft.testing import check_exporter
from sqft.utils.digests import Digests

TENSORS = {
    "embed.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "layer.bias": torch.tensor([1, 2, 3]),
    "layer.weight": torch.tensor([[0.0, 1.1, -0.0], [1e-30, 0.0, -2.3]]),
}
CARRIED = [
    "LICENSE", "README.md", "additional_chat_templates/rag.jinja", "chat_template.jinja", "configuration_mine.py",
    "generation_config.json", "merges.txt", "mine.tiktoken", "tokenizer.json", "tokenizer.model", "vocab.json",
]  # fmt: skip
STALE = [
    "consolidated.safetensors", "flax_model.msgpack", "model-00001-of-00002.safetensors", "model.gguf", "model.h5",
    "model.safetensors.index.json", "optimizer.pt", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json",
    "training_args.bin", "weights.ckpt", "weights.pth",
]  # fmt: skip


class Reader(FinishedModel):
    """Tensors in an order of their own; it remembers which were asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked = list[str]()

    def names(self) -> Sequence[str]:
        return list(TENSORS)

    def tensor(self, name: str) -> Tensor:
        self.asked.append(name)
        return TENSORS[name]


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    folder = tmp_path / "source"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 4, "dtype": "float32", "torch_dtype": "float32"}))
    for name in CARRIED:
        (folder / name).write_text(f"of {name}")
    reader = Reader(folder)
    for name in STALE:
        (folder / name).write_text("stale")
    return reader


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        merged |= load_file(file)
    return merged


def config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def test_all_but_the_weights_is_carried_over(reader: Reader, target: Path) -> None:
    HuggingFace().export(reader, target)
    found = {file.relative_to(target).as_posix() for file in target.rglob("*") if file.is_file()}
    assert found == {"config.json", "model.safetensors", *CARRIED}
    assert all((target / name).read_text() == f"of {name}" for name in CARRIED)
    assert config(target) == config(reader.folder)


def test_as_it_is(reader: Reader, target: Path) -> None:
    HuggingFace().export(reader, target)
    found = stored(target)
    assert found.keys() == TENSORS.keys()
    assert all(found[name].dtype == kept.dtype and found[name].equal(kept) for name, kept in TENSORS.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_precision(reader: Reader, target: Path, dtype: Any) -> None:
    HuggingFace(dtype=dtype).export(reader, target)
    found, wanted = stored(target), getattr(torch, dtype)
    for name, kept in TENSORS.items():
        if kept.is_floating_point():
            assert found[name].dtype == wanted and found[name].equal(kept.to(wanted))
            assert not found[name][kept == 0].any()
        else:
            assert found[name].dtype == kept.dtype and found[name].equal(kept)
    assert config(target) == {"hidden_size": 4, "dtype": dtype, "torch_dtype": dtype}


def test_a_read_only_config_is_no_obstacle(reader: Reader, target: Path) -> None:
    (reader.folder / "config.json").chmod(0o444)
    HuggingFace(dtype="float16").export(reader, target)
    assert (target / "config.json").stat().st_mode & 0o200


def test_shards_and_their_index(reader: Reader, target: Path) -> None:
    HuggingFace(max_shard_size=48).export(reader, target)  # bytes: embed 48, bias 24, weight 24
    index = json.loads((target / "model.safetensors.index.json").read_text())
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(file.name for file in target.glob("*.safetensors")) == names
    assert index["weight_map"] == dict(zip(TENSORS, [names[0], names[1], names[1]], strict=True))
    assert index["metadata"]["total_size"] == 96
    for name, file in index["weight_map"].items():
        assert load_file(target / file)[name].equal(TENSORS[name])


def test_each_tensor_is_read_once(reader: Reader, target: Path) -> None:
    HuggingFace(dtype="bfloat16", max_shard_size=24).export(reader, target)
    assert reader.asked == list(TENSORS)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(reader: Reader, target: Path) -> None:
    HuggingFace(max_shard_size=1).export(reader, target)
    assert len(list(target.glob("model-*-of-00003.safetensors"))) == 3
    assert stored(target).keys() == TENSORS.keys()


def test_the_contract(reader: Reader, target: Path) -> None:
    check_exporter(HuggingFace(dtype="bfloat16", max_shard_size="1 kb"), reader, target)


@pytest.mark.parametrize("size", ["50KB", "0.05MB", "50 kb", " 50KB ", 50_000])
def test_sizes_in_the_words_of_save_pretrained(size: int | str, model_folder: Path, tmp_path: Path) -> None:
    """Larger than the largest tensor, and smaller than the model."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(theirs, max_shard_size=size)
    ours.mkdir()
    HuggingFace(max_shard_size=size).export(FinishedModel(model_folder), ours)
    for folder in (theirs, ours):
        sizes = [sum(t.nbytes for t in load_file(file).values()) for file in folder.glob("*.safetensors")]
        assert len(sizes) > 1 and max(sizes) <= 50_000


@pytest.mark.parametrize("size", ["", "5", "5 potatoes", "5GiB", "-5GB", "0KB", "inf GB", 0, -1, True, 1.5, None])
def test_what_is_no_size_is_refused_and_says_what_is(size: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        HuggingFace(max_shard_size=size)
    (error,) = caught.value.errors()
    assert error["loc"] == ("max_shard_size",)
    assert f"{size!r} is not a size" in error["msg"] and "such as '5GB'" in error["msg"]


@pytest.mark.parametrize("limit", [4_000, "5GB"])
@pytest.mark.parametrize("tied", [True, False])
def test_stock_transformers_loads_it(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    target: Path,
    tied: bool,
    limit: int | str,
) -> None:
    source, original = tmp_path / "source", model
    if not tied:
        original.config.tie_word_embeddings = False
        original.lm_head.weight = torch.nn.Parameter(torch.randn_like(original.lm_head.weight))
    original.save_pretrained(source)
    tokenizer.save_pretrained(source)
    HuggingFace(max_shard_size=limit).export(FinishedModel(source), target)
    assert len(list(target.glob("*.safetensors"))) > 3 or limit == "5GB"
    assert ("lm_head.weight" in stored(target)) is not tied
    loaded, told = AutoModelForCausalLM.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not any(told.values()), told
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    expected = original.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in loaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(target).chat_template == tokenizer.chat_template
    assert find_model(str(target), Path, None, Digests()).parameters == original.num_parameters()


def test_a_second_copy_of_tied_weights_stays_when_the_source_has_it(model_folder: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "out"
    shutil.copytree(model_folder, source)
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    HuggingFace().export(FinishedModel(source), target)
    assert stored(target).keys() == tensors.keys()
    assert AutoModelForCausalLM.from_pretrained(target).lm_head.weight.equal(tensors["lm_head.weight"])


def test_a_quantized_model_becomes_floats(quantized_folder: Path, target: Path) -> None:
    """In the precision of what stayed floats; stock transformers finds nothing of the codes."""
    HuggingFace().export(FinishedModel(quantized_folder), target)
    assert "quantization_config" not in config(target)
    loaded, told = AutoModelForCausalLM.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not any(told.values()), told
    expected = load_dequantized(ModelSpec(quantized_folder)).state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in loaded.state_dict().items())


def test_several_chat_templates_stay(model_folder: Path, target: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder, source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    templates = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(source)
    HuggingFace().export(FinishedModel(source), target)
    assert AutoTokenizer.from_pretrained(target).chat_template == templates
