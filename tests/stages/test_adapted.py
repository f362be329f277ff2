"""The adapted model that several stages build: which layers, which masks, which deltas."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_family
from safetensors.torch import load_file, save_file

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import StageError
from sqft.kernels.grids import dequantize
from sqft.kernels.masks import pack_mask
from sqft.modeling.adapters.frozen_weight import FloatWeight, PackedWeight
from sqft.modeling.adapters.saving import store_deltas
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.planning.plan import Plan
from sqft.stages.adapted import build_adapted_model, load_adapted_model, load_deltas

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def plan(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> Plan:
    return planned({**raw, "sparsify": None}, registry, tmp_path)


def planned(raw: dict[str, Any], registry: Registry, tmp_path: Path, **finetune: Any) -> Plan:
    raw = {key: raw[key] for key in ("schema", "name", "model", "finetune")}
    raw["finetune"] = raw["finetune"] | {"targets": ["q_proj", "down_proj"]} | finetune
    return Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw))


def test_the_targets_are_adapted_and_nothing_else_trains(plan: Plan) -> None:
    adapted = build_adapted_model(plan, {}, 0, "cpu")
    assert {name.rpartition(".")[2] for name in adapted.layers} == {"q_proj", "down_proj"} and len(adapted.layers) == 4
    training = {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}
    assert training and all(".delta." in name for name in training)


def test_an_untrained_delta_changes_nothing(plan: Plan) -> None:
    adapted = build_adapted_model(plan, {}, 0, "cpu")
    for layer in adapted.mergeable.values():
        assert layer.effective().equal(layer.base.dense())


def test_deltas_come_from_the_seed(plan: Plan) -> None:
    first, again, other = (build_adapted_model(plan, {}, seed, "cpu").deltas() for seed in (1, 1, 2))
    assert all(first[name].equal(again[name]) for name in first)
    assert not all(first[name].equal(other[name]) for name in first)


def test_deltas_that_were_stored_come_back(plan: Plan, tmp_path: Path) -> None:
    trained = build_adapted_model(plan, {}, 1, "cpu")
    for layer in trained.layers.values():
        layer.delta.B.data.normal_()  # type: ignore[attr-defined]
    store_deltas(trained, tmp_path)
    loaded = load_adapted_model(plan, {}, tmp_path, "cpu")
    assert all(value.equal(trained.deltas()[name]) for name, value in loaded.deltas().items())
    for layer in loaded.layers.values():
        layer.delta.B.data.zero_()  # type: ignore[attr-defined]
    load_deltas(loaded, tmp_path, "adapter")  # over whatever is there
    assert all(value.equal(trained.deltas()[name]) for name, value in loaded.deltas().items())


@pytest.mark.parametrize("mask", ["base", "codes"])
def test_a_base_that_came_as_codes(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, quantized_folder: Path, mask: str
) -> None:
    """Codes stay codes; its mask is that of the codes when asked for, and a layer left in floats keeps its floats."""
    raw["model"] = {"path": str(quantized_folder)}
    plan = planned(raw, registry, tmp_path, merger="qa-sparsepeft", base="codes", mask=mask)
    bases = {name: layer.base for name, layer in build_adapted_model(plan, {}, 0, "cpu").layers.items()}
    for name, base in bases.items():
        assert isinstance(base, FloatWeight if name.endswith("down_proj") else PackedWeight)
    block = bases[Q].block()
    assert block.mask is None if mask == "base" else block.mask is not None and block.mask.equal(block.weight != 0)


@pytest.mark.parametrize("base", ["floats", "codes", "compensated"])
def test_a_base_that_the_recipe_quantizes(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, quantized_folder: Path, model_folder: Path, base: str
) -> None:
    """The floats before quantization, with the grids; or the codes with the masks of what was kept, and what was
    rounded to them."""
    raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
    raw["finetune"] |= {"targets": ["q_proj"], "merger": "qa-sparsepeft", "base": base}
    raw = {key: raw[key] for key in ("schema", "name", "model", "quantize", "finetune")}
    plan = Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw))
    made = tmp_path / "made"
    made.mkdir()
    (made / "model").symlink_to(quantized_folder)
    kept = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    save_file({Q: pack_mask(kept)}, made / "masks.safetensors")
    rest = torch.randint(-127, 128, (32, 32), dtype=torch.int8)
    second = {Q.replace("0", "1"): rest.clone()}
    for held in (second, second | {Q: rest}) if base == "compensated" else ():  # refused without the file, or a layer
        with pytest.raises(StageError, match=r"^finetune.base: .*compensated.safetensors has nothing of the floats"):
            build_adapted_model(plan, {"base": made}, 0, "cpu")
        save_file(held, made / "compensated.safetensors")
    weight = build_adapted_model(plan, {"base": made}, 0, "cpu").layers[Q].base
    assert isinstance(weight, FloatWeight if base == "floats" else PackedWeight) and weight.grid() is not None
    if base != "floats":
        mask = weight.block().mask
        assert mask is not None and mask.equal(kept)
        expected = dequantize(weight.codes(), rest if base == "compensated" else None)  # type: ignore[attr-defined]
        assert weight.block().weight.equal(expected)
    else:
        assert weight.dense().equal(load_file(model_folder / "model.safetensors")[f"{Q}.weight"])


@pytest.mark.parametrize("merger", ["sparsepeft", "hira", "unmerged"])
@pytest.mark.parametrize("streamed", [True, False])
def test_packed_floats_train_and_merge_to_the_same_bits(
    raw: dict[str, Any],
    registry: Registry,
    tmp_path: Path,
    merger: str,
    streamed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether read one block at a time or as a whole; layers without adapters are packed too."""
    raw["model"]["dtype"] = "bfloat16"
    raw["finetune"] |= {"merger": merger, "targets": ["q_proj", "down_proj"], "gradient_checkpointing": True}
    if merger == "unmerged":
        del raw["merge"]
        raw["evaluate"]["of"] = ["search"]
    if streamed:
        monkeypatch.setattr("sqft.planning.streaming.STREAM_FROM", 0)
    made, orchestrator = [], Orchestrator(registry, tmp_path / "store")
    for base in ("floats", "packed"):
        raw["finetune"]["base"] = base
        plan = orchestrator.plan(Recipe.parse(raw))
        assert plan.step("finetune").streamed == (streamed and base == "packed")
        run = orchestrator.run(plan)
        layers = build_adapted_model(plan, run.inputs("finetune"), 0, "cpu")
        kinds = Counter(type(module).__name__ for module in layers.model.modules())
        assert (kinds["SparseWeight"], kinds["PackedLinear"]) == ((14, 10) if base == "packed" else (0, 0))
        deltas = load_file(run["finetune"].folder / "deltas.safetensors")
        merged = dict(FolderReader(run["merge"].folder / "model").tensors()) if merger != "unmerged" else {}
        made.append((deltas, merged, run.report["rows"]))
    (deltas, merged, rows), (packed_deltas, packed_merged, packed_rows) = made
    assert deltas.keys() == packed_deltas.keys() and all(deltas[name].equal(packed_deltas[name]) for name in deltas)
    assert merged.keys() == packed_merged.keys() and all(merged[name].equal(packed_merged[name]) for name in merged)
    for one, other in zip(rows, packed_rows, strict=True):
        assert one["accuracy"] == other["accuracy"] and one["perplexity"] == other["perplexity"]


def test_an_adapter_beside_a_packed_base_is_stored_as_beside_floats(
    raw: dict[str, Any], registry: Registry, tokenizer: Any, tmp_path: Path
) -> None:
    """GPT-2 stores its weights transposed, which stock PEFT must know."""
    folder = save_family("GPT2", tokenizer, tmp_path / "model")
    raw["model"], raw["sparsify"] = {"path": str(folder)}, {"scorer": "magnitude"}
    raw["finetune"] |= {"merger": "unmerged", "targets": ["c_attn"], "steps": 1}
    del raw["merge"], raw["evaluate"]
    orchestrator, found = Orchestrator(registry, tmp_path / "store"), []
    for base in ("floats", "packed"):
        raw["finetune"]["base"] = base
        run = orchestrator.run(orchestrator.plan(Recipe.parse(raw)))
        config = json.loads((run["search"].folder / "adapter" / "adapter_config.json").read_text())
        found.append((config["fan_in_fan_out"], load_file(run["finetune"].folder / "deltas.safetensors")))
    assert found[0][0] is found[1][0] is True
    assert all(tensor.equal(found[1][1][name]) for name, tensor in found[0][1].items())
