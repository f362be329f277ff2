"""Models are found: folders, shards and Hugging Face ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from sqft.checkpoints.model_source import ModelSource
from tests.support.hub import cached


def test_a_folder(model_folder: Path, model: LlamaForCausalLM, find: Callable[..., ModelSource]) -> None:
    found = find(model_folder)
    assert (found.kind, found.path) == ("folder", model_folder)
    assert found.shapes == {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert found.parameters == model.num_parameters()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_precision_is_that_of_most_floats(folder: Path, find: Callable[..., ModelSource], dtype: str) -> None:
    """Whatever the config says, and though a norm and the positions are stored in others."""
    weights = {
        name: weight.to(getattr(torch, dtype)) for name, weight in load_file(folder / "model.safetensors").items()
    }
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.bfloat16)
    save_file(weights | {"positions": torch.zeros(10**6, dtype=torch.int64)}, folder / "model.safetensors")
    found = find(folder).dtype
    assert found == ("bfloat16" if dtype == "float64" else dtype)


def test_shards_are_one_model(sharded: Path, model_folder: Path, find: Callable[..., ModelSource]) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert find(sharded).shapes == find(model_folder).shapes


def test_only_the_files_that_transformers_reads_count(folder: Path, find: Callable[..., ModelSource]) -> None:
    """Mistral's repositories have the weights twice, once in names of their own."""
    whole = find(folder)
    save_file({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, folder / "consolidated.safetensors")
    assert find(folder).shapes == whole.shapes


def test_the_digest_is_of_what_makes_the_result(folder: Path, tmp_path: Path, find: Callable[..., ModelSource]) -> None:
    digest = find(folder).digest
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert find(folder.rename(tmp_path / "elsewhere")).digest == digest
    for name in ("tokenizer.json", "modeling_mine.py", "model.safetensors"):
        with (tmp_path / "elsewhere" / name).open("ab") as stream:
            stream.write(b"\n")
        changed = find(tmp_path / "elsewhere").digest
        assert changed != digest, name
        digest = changed


def test_an_adapter_beside_the_model_is_refused(folder: Path, assert_rejected: Callable[..., None]) -> None:
    """transformers would load both as one, and what is measured as the model would be another one."""
    (folder / "adapter_config.json").write_text("{}")
    assert_rejected(folder, "holds a PEFT adapter beside the model", "merge the adapter first, or move its files")


@pytest.mark.parametrize("sizes", [[64, 128], "64", None])
def test_a_size_that_is_no_number_is_none(folder: Path, sizes: Any, find: Callable[..., ModelSource]) -> None:
    """Some configs give a number for each layer."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": sizes}))
    assert find(folder).size("intermediate_size", default=1) == 1


def test_what_is_no_place_at_all(tmp_path: Path, data: Path, assert_rejected: Callable[..., None]) -> None:
    assert_rejected("not there", "no file or folder", "is not a Hugging Face id")
    assert_rejected(data / "train.jsonl", "neither a folder nor a .gguf file")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hub_id_that_is_not_here_and_no_network(cache: Path, assert_rejected: Callable[..., None]) -> None:
    assert_rejected(
        "owner/name",
        "there is no folder owner/name",
        "the Hugging Face model 'owner/name' is not in the hub's cache and could not be downloaded",
    )
    assert_rejected("owner/--", "is not in the hub's cache and could not be downloaded")


def test_a_hub_id_that_is_in_the_cache(cache: Path, model_folder: Path, find: Callable[..., ModelSource]) -> None:
    snapshot = cached(cache, model_folder)
    found = find("owner/name")
    assert found.path == snapshot and found.digest == find(model_folder).digest


def test_an_adapter_beside_a_model_of_the_hub(cache: Path, folder: Path, assert_rejected: Callable[..., None]) -> None:
    """Nobody can move its files; `sqft eval` can still measure the adapter."""
    (folder / "adapter_config.json").write_text("{}")
    cached(cache, folder)
    asked = "sqft eval owner/name --set model.path=BASE --set evaluate.adapter=owner/name"
    assert_rejected("owner/name", "the hub's owner/name holds a PEFT adapter beside the model", asked)


def test_a_hub_id_whose_download_was_cut_off(cache: Path, sharded: Path, assert_rejected: Callable[..., None]) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[0]
    gone.unlink()
    cached(cache, sharded)
    assert_rejected("owner/name", gone.name)
