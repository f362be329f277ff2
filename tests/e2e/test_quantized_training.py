"""QA-SparsePEFT and SQFT on a tiny model, against eq. 3–4 written out here in float64 and codes read by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sqft import Orchestrator, Recipe, Registry, Run
from sqft.checkpoints.model_spec import ModelSpec
from sqft.kernels import grids
from sqft.kernels.grids import dequantize
from sqft.kernels.masks import unpack_mask
from sqft.modeling.loading.quantized import read_quantized
from sqft.stages import adapted as tuning

LEARNT = {"merger": {"name": "qa-sparsepeft", "options": {"learn_scales": True}}}
"""Scales that train."""


@pytest.fixture
def quantized(raw: dict[str, Any]) -> dict[str, Any]:
    raw["quantize"] = {"quantizer": {"name": "gptq", "options": {"group_size": 32}}}
    raw["finetune"]["merger"] = "qa-sparsepeft"
    raw["evaluate"]["of"] = ["quantize", "finetune:maximal", "search", "merge"]
    return raw


def run(raw: dict[str, Any], registry: Registry, store: Path) -> Run:
    orchestrator = Orchestrator(registry, store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)))


@pytest.mark.parametrize(
    ("base", "options", "change"),
    [
        ("floats", {"group_size": 32}, {}),
        ("codes", {"group_size": 32}, LEARNT),
        ("compensated", {"group_size": 32, "symmetric": False, "act_order": True, "refine": 2, "target": "dense"}, {}),
        ("floats", {"group_size": 32, "symmetric": False, "act_order": True}, {"precision": "bfloat16"}),
        ("codes", {"group_size": -1, "bits": 3, "clip": True}, {"gradient_checkpointing": True}),
        ("floats", {"group_size": 32, "symmetric": False}, {"merger": "hira", "gradient_checkpointing": True}),
        ("compensated", {"group_size": 32}, {"merger": "hira", "learning_rate": 0.1}),
        ("compensated", {"group_size": -1, "bits": 3, "clip": True}, LEARNT),
    ],
)
def test_the_merged_codes_are_those_of_equation_3(
    quantized: dict[str, Any],
    registry: Registry,
    tmp_path: Path,
    base: str,
    options: dict[str, Any],
    change: dict[str, Any],
) -> None:
    quantized["quantize"]["quantizer"]["options"] = options
    quantized["quantize"]["exclude"] = ["k_proj"] if options.get("bits") == 3 else []  # 16 outputs fill no word
    quantized["quantize"]["exclude"] += ["v_proj"] if options.get("bits") == 3 else []
    quantized["finetune"] |= {"base": base, **change}
    finished = run(quantized, registry, tmp_path)
    floats = load_file(finished["sparsify"].folder / "model" / "model.safetensors")
    before = read_quantized(finished["quantize"].folder / "model")
    after = read_quantized(finished["merge"].folder / "model")
    adapter = load_file(finished["search"].folder / "adapter" / "adapter.safetensors")
    scales = json.loads((finished["search"].folder / "adapter" / "sqft_adapter.json").read_text())["scales"]
    masks = load_file(finished["sparsify"].folder / "masks.safetensors")
    rests = load_file(finished["quantize"].folder / "compensated.safetensors")
    assert before.keys() == after.keys() and not any("q_proj" in name for name in before.keys() - masks.keys())
    changed = moved = 0
    for name, layer in after.items():
        old = before[name]
        scale_multiplier = adapter.get(f"{name}.scale_multiplier", torch.ones(1))
        assert f"{name}.scale_multiplier" in adapter or "learn_scales" not in str(change) or name not in scales
        assert layer.grid.scale.equal((old.grid.scale.float() * scale_multiplier).half()) and layer.grid.zero.equal(
            old.grid.zero
        )
        index = old.grid.group_index
        size = layer.codes.shape[1] if old.grid.group_size == -1 else old.grid.group_size
        index = torch.arange(layer.codes.shape[1]) // size if index is None else index.long()
        scale, zero = old.grid.scale.double()[:, index], old.grid.zero.double()[:, index]
        mask = unpack_mask(masks[name], (layer.codes.shape[0], layer.codes.shape[1]))
        assert (layer.codes == zero)[~mask].all()
        if name not in scales:
            assert layer.codes.equal(old.codes)
            continue
        start = floats[f"{name}.weight"].double() if base == "floats" else scale * (old.codes.double() - zero)
        if base == "compensated":
            start = start + scale * rests[name].double() / 256
            assert not start[~mask].any() and rests[name][mask].float().abs().mean() > 20
        began = ((start / scale).round() + zero).clamp(0, 2**old.grid.bits - 1)
        low = scales[name] * (adapter[f"{name}.lora_B"].double() @ adapter[f"{name}.lora_A"].double())
        low *= start if change.get("merger") == "hira" else mask
        scale = layer.grid.scale.double()[:, index]
        exact = (start + low) / scale
        code = (exact.round() + zero).clamp(0, 2**old.grid.bits - 1)
        # float32 may fall on the other side of a half: only there may a code differ from float64's.
        sure = (exact - exact.floor() - 0.5).abs() > 1e-4
        assert layer.codes.double().equal(torch.where(sure, code, layer.codes.double()))
        assert sure.float().mean() > 0.99
        changed += int((layer.codes != old.codes).sum())
        moved += int((layer.codes != began).sum())
    report = finished["merge"].report
    assert changed == report["codes_unlike_base"]
    assert moved == report["codes_changed"] > 0 and (base == "floats" or moved == changed)
    assert finished["merge"].report["zeros_after"] >= finished["merge"].report["zeros_before"] > 0
    assert finished["merge"].report["logits_difference"] < 1e-4
    rows = {row["configuration"]: row for row in finished.report["rows"]}
    assert rows["search (hill-climbing)"]["perplexity"] == rows["merge"]["perplexity"]
    assert rows["search (hill-climbing)"]["sparsity"] == rows["merge"]["sparsity"]
    assert finished.result() == finished["merge"].folder / "model"


@pytest.mark.parametrize("size", [32, 64, 128, -1])
def test_the_grid_of_the_merge_is_the_grid_of_quantize(
    quantized: dict[str, Any], registry: Registry, tokenizer: Any, tmp_path: Path, size: int
) -> None:
    """Whatever the group size; and codes that training does not move are the base's, from what was rounded to them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    quantized["model"]["path"] = str(tmp_path / "wide")
    quantized["quantize"]["quantizer"]["options"] = {"group_size": size, "symmetric": False}
    del quantized["evaluate"], quantized["search"]
    for base, rate, moves in (("compensated", 1e-30, False), ("codes", 0.1, True), ("floats", 0.1, True)):
        quantized["finetune"] |= {"base": base, "learning_rate": rate, "steps": 2}
        finished = run(quantized, registry, tmp_path / "store")
        before = read_quantized(finished["quantize"].folder / "model")
        after = read_quantized(finished["merge"].folder / "model")
        assert len(before) == 7 and before.keys() == after.keys()
        for name, layer in after.items():
            assert grids.same(layer, replace(before[name], codes=layer.codes)), name
            width = layer.codes.shape[1]
            assert layer.grid.group_size == size and layer.grid.scale.shape[1] == width // (
                width if size == -1 else size
            )
        report = finished["merge"].report
        assert (report["codes_changed"] > 0) == (report["codes_unlike_base"] > 0) == moves


def test_weights_before_and_after_quantization_are_not_in_memory_together(
    quantized: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized["quantize"]["exclude"] = ["v_proj"]
    orchestrator = Orchestrator(registry, tmp_path)
    plan = orchestrator.plan(Recipe.parse(quantized))
    done = orchestrator.run(plan, until="quantize")
    load, loaded, left = tuning.load_model, [], []

    def counting(*given: Any) -> Any:
        left.extend(sorted(n for n, p in loaded[0].named_parameters() if not p.is_meta) if loaded else ())
        loaded.append(load(*given)[0])
        return loaded[-1], None

    monkeypatch.setattr(tuning, "load_model", counting)
    folders = {"base": done["quantize"].folder, "floats": done["sparsify"].folder}
    adapted = tuning.build_adapted_model(plan, folders, 0, "cpu")
    assert len(loaded) == 2
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in left if ".layers." in name}
    assert names == {
        "o_proj",
        "gate_proj",
        "v_proj",
        "input_layernorm",
        "post_attention_layernorm",
    }  # no targets on codes
    floats = load_file(done["sparsify"].folder / "model" / "model.safetensors")
    for name, layer in adapted.layers.items():
        assert torch.equal(layer.base.dense(), floats[f"{name}.weight"])
    assert not any(parameter.is_meta for parameter in adapted.model.parameters())


def test_sqft_leaves_a_stock_adapter_beside_the_codes(
    quantized: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    """The adapter on the dequantized base in stock PEFT gives the loss that training saw."""
    from peft import PeftModel

    quantized["finetune"]["merger"] = "unmerged"
    quantized.pop("merge")
    quantized["evaluate"]["of"] = ["quantize", "search"]
    finished = run(quantized, registry, tmp_path)
    model = PeftModel.from_pretrained(finished["quantize"].load_model(), finished["search"].folder / "adapter")
    rows = {row["configuration"]: row for row in finished.report["rows"]}
    from sqft.data.windows import text_windows
    from sqft.modeling.evaluation import perplexity
    from sqft.modeling.loading import load_tokenizer
    from sqft.utils.progress import silent

    tokenizer = load_tokenizer(ModelSpec(finished["quantize"].folder / "model"))
    windows = text_windows(Path(quantized["evaluate"]["perplexity"]["text"]), tokenizer, 256, 64)
    theirs = perplexity(model, windows, silent)["perplexity"]
    assert theirs == pytest.approx(rows["search (hill-climbing)"]["perplexity"], rel=1e-5)
    assert theirs != pytest.approx(rows["quantize"]["perplexity"], rel=1e-4)
    config = json.loads((finished["search"].folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(finished["quantize"].folder / "model")


def test_scales_do_not_decay(quantized: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    """Towards 0 they would leave the base's grid."""
    quantized["finetune"] |= {
        "merger": {"name": "qa-sparsepeft", "options": {"learn_scales": True}},
        "learning_rate": 0.05, "weight_decay": 1.0, "schedule": "constant",
    }  # fmt: skip
    quantized.pop("evaluate")
    finished = run(quantized, registry, tmp_path)
    adapter = load_file(finished["search"].folder / "adapter" / "adapter.safetensors")
    gains = torch.cat([tensor.flatten() for name, tensor in adapter.items() if name.endswith(".scale_multiplier")])
    assert 0.9 < float(gains.mean()) < 1.2  # six steps of 5% of decay alone would leave 0.74
    factors = [tensor for name, tensor in adapter.items() if "scale_multiplier" not in name]
    assert finished["search"].report["trainable"] > sum(factor.numel() for factor in factors)


def test_a_zero_point_of_zero_is_kept_and_named(
    quantized: dict[str, Any], registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import save_file

    first = {key: value for key, value in quantized.items() if key not in ("finetune", "search", "merge", "evaluate")}
    theirs = tmp_path / "theirs"
    shutil.copytree(run(first, registry, tmp_path / "one")["quantize"].folder / "model", theirs)
    tensors, layer = load_file(theirs / "model.safetensors"), "model.layers.0.mlp.up_proj"
    tensors[f"{layer}.qzeros"][0, 0] |= 0xF  # 0 less one, in its own four bits
    save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
    quantized["model"]["path"] = str(theirs)
    for section in ("sparsify", "quantize", "calibration", "evaluate"):
        quantized.pop(section)
    with caplog.at_level("WARNING", logger="sqft"):
        finished = run(quantized, registry, tmp_path / "two")
    merged = read_quantized(finished["merge"].folder / "model")[layer].grid.zero
    assert merged[0, 0] == 0 and merged[1:].eq(8).all()
    assert "zero points of 0, which gptqmodel misreads" in caplog.text


def test_sparse_layers_that_were_left_in_floats(quantized: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    """In a model that came as codes: the floats show their zeros, and keep them."""
    first = {key: value for key, value in quantized.items() if key not in ("finetune", "search", "merge", "evaluate")}
    first["quantize"]["exclude"] = ["down_proj"]
    theirs = run(first, registry, tmp_path / "one")["quantize"].folder / "model"
    quantized["model"]["path"] = str(theirs)
    for section in ("sparsify", "quantize", "calibration", "evaluate"):
        quantized.pop(section)
    finished = run(quantized, registry, tmp_path / "two")
    name = "model.layers.0.mlp.down_proj.weight"
    before = load_file(theirs / "model.safetensors")[name]
    after = load_file(finished["merge"].folder / "model" / "model.safetensors")[name]
    assert not after.equal(before) and not after[before == 0].any()


@pytest.mark.parametrize("merger", ["unmerged", "qa-sparsepeft", "qa-sparsepeft, mask of codes", "hira"])
def test_somebodys_quantized_model_as_a_base(
    quantized: dict[str, Any], registry: Registry, tmp_path: Path, merger: str
) -> None:
    """Written by another program: float16, no index of groups, a bias of zeros."""
    from safetensors.torch import save_file

    first = {key: value for key, value in quantized.items() if key not in ("finetune", "search", "merge", "evaluate")}
    theirs = tmp_path / "theirs"
    shutil.copytree(run(first, registry, tmp_path / "one")["quantize"].folder / "model", theirs)
    tensors = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor
        for name, tensor in load_file(theirs / "model.safetensors").items()
        if not name.endswith("g_idx")
    }
    del tensors["lm_head.weight"]  # it is tied
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(64, dtype=torch.float16)
    save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
    quantized["model"]["path"] = str(theirs)
    for section in ("sparsify", "quantize", "calibration"):
        quantized.pop(section)
    merger, _, masked = merger.partition(",")
    quantized["finetune"] |= {"merger": merger, "mask": "codes" if masked else "base"}
    quantized["finetune"]["learning_rate"] = 0.1 if merger == "hira" else 0.01  # its deltas are relative
    quantized["evaluate"]["of"] = ["model", "search"]
    if merger == "unmerged":
        quantized.pop("merge")
    finished = run(quantized, registry, tmp_path / "two")
    rows = {row["configuration"]: row for row in finished.report["rows"]}
    assert rows["model"]["perplexity"] != rows["search (hill-climbing)"]["perplexity"]
    if merger == "unmerged":
        return
    before, after = read_quantized(theirs), read_quantized(finished["merge"].folder / "model")
    assert sum(int((after[name].codes != before[name].codes).sum()) for name in after) > 0
    lost = sum(int(((dequantize(after[n]) != 0) & (dequantize(before[n]) == 0)).sum()) for n in after)
    assert lost == 0 if masked or merger == "hira" else lost > 0
    assert finished["merge"].report["logits_difference"] < 1e-4
    assert finished["merge"].load_model().dtype == torch.float32
