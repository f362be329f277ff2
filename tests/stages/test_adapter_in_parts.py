"""A search that evaluates nothing stores the same sub-adapter, whether the base is read or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_family
from safetensors.torch import load_file
from search_in_parts import assert_search_alike, search_in_parts, searched

from sqft import Registry
from sqft.checkpoints.model_spec import ModelSpec
from sqft.modeling.loading.parts import PartedModel
from sqft.stages.adapter_in_parts import AdapterInParts
from sqft.stages.inputs import StageInputs

INT4 = {"quantizer": {"name": "gptq", "options": {"bits": 4, "group_size": 32}}, "exclude": ["*.down_proj"]}
SCALES = {"name": "qa-sparsepeft", "options": {"learn_scales": True}}


@pytest.mark.parametrize(
    ("merger", "quantize", "start"),
    [
        ("sparsepeft", None, "floats"),
        ("sparsepeft", None, "packed"),
        ("hira", INT4, "codes"),
        ("unmerged", None, "floats"),
        ("unmerged", INT4, "floats"),
        (SCALES, INT4, "floats"),
        (SCALES, INT4, "compensated"),
    ],
    ids=str,
)
def test_same_as_the_whole(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, merger: Any, quantize: Any, start: str
) -> None:
    raw["finetune"] |= {"merger": merger, "base": start, "targets": ["q_proj", "down_proj"]}
    if quantize:
        raw["quantize"] = quantize
    for section in ("merge", "evaluate"):
        raw.pop(section, None)
    run = searched(raw, registry, tmp_path / "store")
    assert not run.plan.step("search").streamed  # small models are opened as a whole
    assert_search_alike(run, tmp_path / "parts")


def test_an_adapter_beside_transposed_weights(
    raw: dict[str, Any], registry: Registry, tokenizer: Any, tmp_path: Path
) -> None:
    save_family("GPT2", tokenizer, tmp_path / "model")
    raw["model"] = {"path": str(tmp_path / "model"), "dtype": "float32"}
    raw["sparsify"] = {"scorer": "magnitude", "exclude": list(FAMILIES["GPT2"].unseen)}
    raw["finetune"] |= {"merger": "unmerged", "targets": ["*"]}
    for section in ("merge", "evaluate"):
        raw.pop(section, None)
    run = searched(raw, registry, tmp_path / "store")
    assert_search_alike(run, tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_no_weight_is_read(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    run = searched(raw, registry, tmp_path / "store")
    model = search_in_parts(run, tmp_path).adapted.model
    assert {tensor.device.type for name, tensor in model.named_parameters() if ".delta." not in name} == {"meta"}


def test_a_part_that_is_in_memory(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    """Its adapters lie over the base's weights; afterwards the base's own layers are there again."""
    run = searched(raw, registry, tmp_path / "store")
    source = ModelSpec(run["sparsify"].folder / "model", "float32")
    opened, stored = PartedModel(source), load_file(source.path / "model.safetensors")
    inputs = StageInputs(run.plan, run.plan.step("search"), run.inputs("search"), tmp_path, "cpu")
    adapter = AdapterInParts(inputs, opened, source)
    before = dict(opened.model.named_modules())
    part = opened.part_of(next(iter(adapter.linears)))
    with opened.held(part):
        layers = adapter.attach(part)
        assert layers and all(torch.equal(layer.weight, stored[f"{name}.weight"]) for name, layer in layers.items())
        adapter.detach(list(layers))
    assert all(dict(opened.model.named_modules())[name] is before[name] for name in layers)
