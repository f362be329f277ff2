"""A merge whose base is in memory one block at a time writes, to the bit, what a merge of the whole writes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_family
from safetensors.torch import load_file, save_file
from search_in_parts import assert_search_alike, searched
from sqft_sparsepeft import SparsePEFT
from torch import Tensor
from transformers import AutoModelForCausalLM

from sqft import Orchestrator, Recipe, Registry, Run
from sqft.checkpoints.safetensors import weight_files
from sqft.errors import ArtifactError
from sqft.kernels.grids import same
from sqft.modeling.adapters.adapted_linear import MergedLinear
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.quantized import read_quantized
from sqft.planning.plan import Plan
from sqft.stages.inputs import StageInputs
from sqft.stages.merge import MergeStage
from sqft.types import BaseWeight


def trained(raw: dict[str, Any], registry: Registry, store: Path) -> tuple[Plan, Run]:
    """All steps before the merge."""
    orchestrator = Orchestrator(registry, store)
    plan = orchestrator.plan(Recipe.parse(raw))
    return plan, orchestrator.run(plan, "search")


def stage(plan: Plan, run: Run, folder: Path, streamed: bool) -> MergeStage:
    """The merge of a base that is there as a whole, or in parts."""
    step = dataclasses.replace(plan.step("merge"), streamed=streamed)
    scratch = folder / ("streamed" if streamed else "whole")
    scratch.mkdir(exist_ok=True)
    return MergeStage(StageInputs(plan, step, run.inputs("merge"), scratch, "cpu"))


def tensors(folder: Path) -> dict[str, Tensor]:
    return dict(FolderReader(folder, weight_files(folder)).tensors())


def settings(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".json" and "index" not in file.name
    }


def assert_alike_both_ways(raw: dict[str, Any], registry: Registry, folder: Path) -> dict[str, Any]:
    """Returns the report of the merge in parts."""
    plan, run = trained(raw, registry, folder / "store")
    assert_search_alike(searched(raw, registry, folder / "store"), folder / "search")
    reports = []
    for streamed in (False, True):
        merge = stage(plan, run, folder, streamed)
        reports.append(merge.run())
        merge.verify()
    for report in reports:  # what each compares differs
        assert report.pop("logits_difference") < 1e-2
    assert reports[0] == reports[1]
    whole, streamed_ = (folder / way / "model" for way in ("whole", "streamed"))
    one, other = tensors(whole), tensors(streamed_)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.equal(other[name]), name
    assert settings(whole) == settings(streamed_)
    return reports[1]


@pytest.mark.parametrize(
    "changes",
    [{}, {"merger": "hira"}, {"merger": "hira", "sparsify": None}, {"dtype": "bfloat16"}],
    ids=["sparsepeft", "hira", "dense", "bfloat16"],
)
def test_same_as_the_whole(raw: dict[str, Any], registry: Registry, tmp_path: Path, changes: dict[str, Any]) -> None:
    if "sparsify" in changes:
        del raw["sparsify"], raw["evaluate"]
    raw["finetune"]["merger"] = changes.get("merger", "sparsepeft")
    raw["model"]["dtype"] = changes.get("dtype", "float32")
    report = assert_alike_both_ways(raw, registry, tmp_path)
    assert report["zeros_after"] >= report["zeros_before"] and report["layers"] > 0
    assert (report["zeros_before"] > 0) == ("sparsify" not in changes)
    AutoModelForCausalLM.from_pretrained(tmp_path / "streamed" / "model")


SCALES = {"name": "qa-sparsepeft", "options": {"learn_scales": True}}


@pytest.mark.parametrize(
    ("start", "merger", "sparse"),
    [
        ("floats", "qa-sparsepeft", True),
        ("codes", "qa-sparsepeft", False),
        ("compensated", SCALES, True),
        ("floats", SCALES, False),
        ("codes", "hira", True),
        ("floats", "hira", False),
    ],
    ids=str,
)
def test_codes_same_as_the_whole(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, start: str, merger: Any, sparse: bool
) -> None:
    """Merged layers, layers of codes without an adapter, and one that is left in floats and has one."""
    if not sparse:
        del raw["sparsify"]
        raw["evaluate"]["of"] = ["quantize", "merge"]
    raw["model"]["dtype"] = "bfloat16" if start == "codes" else "float32"
    options = {"bits": 4, "group_size": 32, "act_order": start == "compensated"}
    raw["quantize"] = {"quantizer": {"name": "gptq", "options": options}, "exclude": ["*.down_proj"]}
    raw["finetune"] |= {"merger": merger, "base": start, "learning_rate": 0.1, "targets": ["q_proj", "down_proj"]}
    report = assert_alike_both_ways(raw, registry, tmp_path)
    assert report["bits"] == 4 and report["codes_changed"] > 0 and report["layers"] == 4
    folders = [tmp_path / way / "model" for way in ("whole", "streamed")]
    read = [read_quantized(folder) for folder in folders]
    assert len(read[0]) == 12 and all(same(layer, read[1][name]) for name, layer in read[0].items())


def merged_into_codes(
    family: str, raw: dict[str, Any], registry: Registry, tokenizer: Any, folder: Path, start: str, sparse: bool
) -> dict[str, Any]:
    raw["model"] = {"path": str(folder / "model"), "dtype": "float32"}
    raw["sparsify"] = {"scorer": "magnitude", "exclude": list(FAMILIES[family].unseen)}
    if not sparse:
        del raw["sparsify"]
    exclude = [*FAMILIES[family].unseen, *FAMILIES[family].floats]
    raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": -1}}, "exclude": exclude}
    raw["finetune"] |= {"merger": "qa-sparsepeft", "steps": 1, "targets": ["*"], "base": start, "learning_rate": 0.1}
    raw.pop("evaluate", None)
    return assert_alike_both_ways(raw, registry, folder)


@pytest.mark.parametrize("start", ["floats", "codes"])
def test_codes_of_a_model_that_stores_weights_transposed(
    raw: dict[str, Any], registry: Registry, tokenizer: Any, tmp_path: Path, start: str
) -> None:
    save_family("GPT2", tokenizer, tmp_path / "model")
    merged_into_codes("GPT2", raw, registry, tokenizer, tmp_path, start, sparse=True)


@pytest.mark.parametrize("start", ["floats", "codes"])
def test_codes_under_a_head_of_its_own_and_without_a_prefix(
    raw: dict[str, Any], registry: Registry, tokenizer: Any, tmp_path: Path, start: str
) -> None:
    """The config ties the head, and the folder holds other values; names are those of the model without its head."""
    folder = save_family("Qwen2", tokenizer, tmp_path / "model")
    file = folder / "model.safetensors"
    stored = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    merged_into_codes("Qwen2", raw, registry, tokenizer, tmp_path, start, sparse=False)
    stored["lm_head.weight"] = 1.5 * stored["embed_tokens.weight"]
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"]
    merged_into_codes("Qwen2", raw, registry, tokenizer, tmp_path, start, sparse=False)
    for way in ("whole", "streamed"):
        merged = tensors(tmp_path / way / "model")
        assert merged["lm_head.weight"].equal(stored["lm_head.weight"])


def test_a_damaged_code_is_found(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
    raw["finetune"]["merger"] = "qa-sparsepeft"
    plan, run = trained(raw, registry, tmp_path / "store")
    merge = stage(plan, run, tmp_path, streamed=True)
    merge.run()
    merge.verify()
    file = merge.in_parts.parts.writer.files["model.layers.1"]
    stored = load_file(file)
    stored["model.layers.1.self_attn.o_proj.qweight"][0, 0] ^= 1  # a layer without an adapter
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"^merge \(merger 'qa-sparsepeft'.*o_proj"):
        merge.verify()


STREAMED = [name for name, one in FAMILIES.items() if one.walk == "blocks" and name not in ("Zamba2", "xLSTM")]
"""Families whose blocks are read one by one, without xLSTM, some of whose weights begin at zero: nothing can train."""


@pytest.mark.slow
@pytest.mark.parametrize("family", STREAMED)
def test_every_family(raw: dict[str, Any], registry: Registry, tokenizer: Any, tmp_path: Path, family: str) -> None:
    folder = save_family(family, tokenizer, tmp_path / "model", torch.float32)
    raw["model"] = {"path": str(folder), "dtype": "float32"}
    raw["sparsify"] = {"scorer": "magnitude", "exclude": list(FAMILIES[family].unseen)}
    raw["finetune"] |= {"merger": "sparsepeft", "steps": 1}
    raw["finetune"]["targets"] = ["*"]
    assert_alike_both_ways(raw, registry, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in STREAMED if not FAMILIES[name].experts])
def test_every_family_in_codes(
    raw: dict[str, Any], registry: Registry, tokenizer: Any, tmp_path: Path, family: str
) -> None:
    save_family(family, tokenizer, tmp_path / "model", torch.float32)
    merged_into_codes(family, raw, registry, tokenizer, tmp_path, "floats", sparse=True)


def test_a_killed_merge_goes_on_after_its_last_block(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, run = trained(raw, registry, tmp_path / "store")
    expected = stage(plan, run, tmp_path, streamed=False).run()
    effective = MergedLinear.effective
    merged: list[int] = []

    def killed(layer: MergedLinear) -> Tensor:
        merged.append(1)
        if len(merged) == 9:  # the second block's
            raise KeyboardInterrupt
        return effective(layer)

    monkeypatch.setattr(MergedLinear, "effective", killed)
    with pytest.raises(KeyboardInterrupt):
        stage(plan, run, tmp_path, streamed=True).run()
    before = len(merged)
    again = stage(plan, run, tmp_path, streamed=True)
    assert list(again.in_parts.parts.records) == ["", "model.layers.0"]
    report = again.run()
    again.verify()
    assert len(merged) - before == expected["layers"] // 2  # the second block's alone
    difference = report.pop("logits_difference")
    assert difference < 1e-2 and report == {k: v for k, v in expected.items() if k != "logits_difference"}
    one, other = (tensors(tmp_path / way / "model") for way in ("whole", "streamed"))
    assert all(one[name].equal(other[name]) for name in one.keys() | other.keys())


def test_parts_of_another_training_are_no_parts_of_this_one(
    raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    """A step before was made again, and did not come out the same."""
    plan, run = trained(raw, registry, tmp_path / "store")
    stage(plan, run, tmp_path, streamed=True).run()
    assert len(stage(plan, run, tmp_path, streamed=True).in_parts.parts.records) == 3
    manifest = run["finetune"].folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seconds": ', '"seconds": 1'))
    assert not stage(plan, run, tmp_path, streamed=True).in_parts.parts.records


@pytest.mark.parametrize("sparse", [True, False])
def test_a_merger_that_keeps_no_zeros(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse: bool
) -> None:
    """Of the base's mask it is given what it is given as a whole."""
    seen = list[bool]()

    def combine(_: Any, base: BaseWeight, delta: Tensor) -> Tensor:
        seen.append(base.mask is not None)
        return base.weight + delta

    if not sparse:
        del raw["sparsify"], raw["evaluate"]
    plan, run = trained(raw, registry, tmp_path / "store")
    monkeypatch.setattr(SparsePEFT, "keeps_mask", False)
    monkeypatch.setattr(SparsePEFT, "combine", combine)
    found = []
    for streamed in (False, True):
        seen.clear()
        merge = stage(plan, run, tmp_path, streamed)
        merge.run()
        merge.verify()
        found.append(set(seen))
    assert found == [{sparse}, {sparse}]
    one, other = (tensors(tmp_path / way / "model") for way in ("whole", "streamed"))
    assert all(one[name].equal(other[name]) for name in one.keys() | other.keys())


@pytest.mark.parametrize("value", [100.0, math.nan])
def test_buffers_are_proved(
    raw: dict[str, Any], registry: Registry, tokenizer: Any, tmp_path: Path, value: float
) -> None:
    """The biases of GLM's routers are no parameters."""
    raw["model"] = {"path": str(save_family("Glm4Moe", tokenizer, tmp_path / "model", torch.float32))}
    raw["sparsify"] = {"scorer": "magnitude"}
    plan, run = trained(raw, registry, tmp_path / "store")
    merge = stage(plan, run, tmp_path, streamed=True)
    merge.run()
    spoil(tmp_path / "streamed" / "model", "model.layers.1.mlp.gate.e_score_correction_bias", value)
    with pytest.raises(ArtifactError, match="e_score_correction_bias as stored"):
        merge.verify()


def spoil(folder: Path, name: str, value: float) -> None:
    """Change the last entry of a tensor."""
    file = next(f for f in weight_files(folder) if name in load_file(f))
    written = load_file(file)
    written[name].view(-1)[-1] += value
    save_file(written, file, metadata={"format": "pt"})


@pytest.mark.parametrize("change", ["config.json", "tokenizer.json", "an index", "a file more"])
def test_the_folder_is_proved(raw: dict[str, Any], registry: Registry, tmp_path: Path, change: str) -> None:
    plan, run = trained(raw, registry, tmp_path / "store")
    merge = stage(plan, run, tmp_path, streamed=True)
    merge.run()
    folder = tmp_path / "streamed" / "model"
    if change == "a file more":
        (folder / "evil.py").write_text("")
    else:
        file = folder / ("model.safetensors.index.json" if change == "an index" else change)
        file.write_text(file.read_text() + "\n")
    with pytest.raises(ArtifactError, match="has changed since it was read back"):
        merge.verify()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_what_is_on_disk_is_proved(raw: dict[str, Any], registry: Registry, tmp_path: Path, name: str) -> None:
    plan, run = trained(raw, registry, tmp_path / "store")
    merge = stage(plan, run, tmp_path, streamed=True)
    merge.run()
    spoil(tmp_path / "streamed" / "model", name, 1)
    with pytest.raises(ArtifactError, match=f"merge .*: {name} as stored is not the weight that training used"):
        merge.verify()


def test_a_merged_weight_that_is_not_the_trained_one(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, run = trained(raw, registry, tmp_path / "store")
    effective = MergedLinear.effective
    monkeypatch.setattr(MergedLinear, "effective", lambda layer: effective(layer) * 1.5)
    with pytest.raises(ArtifactError, match="off those of the model that was trained"):
        stage(plan, run, tmp_path, streamed=True).run()


def test_a_zero_that_does_not_stay(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, run = trained(raw, registry, tmp_path / "store")
    effective = MergedLinear.effective
    monkeypatch.setattr(MergedLinear, "effective", lambda layer: effective(layer) + 1e-6)
    with pytest.raises(ArtifactError, match=r"merge .*: \d+ zeros of the base are not zero in model.layers.0"):
        stage(plan, run, tmp_path, streamed=True).run()
