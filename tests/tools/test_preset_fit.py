"""A recipe to start from fits its model: the plan accepts it for families whose layers have names of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sqft import Orchestrator, Recipe, Registry
from sqft.checkpoints.layout import ModelLayout
from sqft.errors import ModelError, SqftError
from sqft.tools import preset_fit
from sqft.tools.preset_fit import KnownModel, fit, look_at, targets_of
from sqft.tools.presets import PIPELINES, TARGETS, starting_recipe
from sqft.types import LinearShape
from tests.support.families import save_family
from tests.support.packed_checkpoints import pack_folder

ALL_OF_DEEPSEEK = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
FAMILIES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "Qwen3": (TARGETS, TARGETS, []),
    "Phi3": (["o_proj", "qkv_proj", "gate_up_proj", "down_proj"],) * 2 + ([],),
    "GPT2": (["c_attn", "c_proj", "c_fc"],) * 2 + ([],),
    "Mixtral": (TARGETS, ["q_proj", "k_proj", "v_proj"], []),  # PEFT cannot adapt one expert
    "DeepseekV3": ([*ALL_OF_DEEPSEEK, "gate_proj", "up_proj", "down_proj"], ALL_OF_DEEPSEEK, []),
    "Mamba": (["in_proj", "x_proj", "dt_proj", "out_proj"], ["in_proj", "x_proj", "out_proj"], ["*.dt_proj"]),
    "Gemma3n": (TARGETS, TARGETS, ["*.correction_coefs"]),
}
"""Targets with a merger that merges, with one that does not, and what `sparsify` has to exclude."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_accepts_what_is_written(
    family: str, tokenizer: PreTrainedTokenizerFast, registry: Registry, data: Path, tmp_path: Path
) -> None:
    folder = str(save_family(family, tokenizer, tmp_path / "model"))
    model = look_at(folder)
    assert model and not (model.codes or model.packed)
    merged, beside, excluded = FAMILIES[family]
    for name, targets in {"sparsepeft": merged, "hira-int4": merged, "shears": beside, "gptq": None}.items():
        raw = starting_recipe(name, tmp_path / "r.json", folder, str(data))
        fit(raw, model, registry)
        assert Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw, tmp_path)).steps
        assert raw["sparsify"].get("exclude", []) == excluded
        if targets:
            assert sorted(raw["finetune"]["targets"]) == sorted(targets)
            assert raw["finetune"]["max_length"] == 256  # the window
        if "quantize" in raw:
            assert raw["quantize"]["quantizer"]["options"]["group_size"] == 32  # some layers have 32 inputs


def test_what_fits_already_stays_as_it_is(registry: Registry) -> None:
    layers = tuple(LinearShape(f"model.layers.0.x.{name}", 64, 128) for name in TARGETS)
    layout = ModelLayout(linears=layers, sizes={"max_position_embeddings": 4096})
    for name in ("hira-int4", "gptq"):
        raw: dict[str, Any] = starting_recipe(name, Path("r.json"))
        fit(raw, KnownModel(layout), registry)
        assert raw == starting_recipe(name, Path("r.json"))


def test_layers_that_share_a_weight_and_narrow_ones_are_no_targets() -> None:
    names = ["in_proj", "gate", "out_proj", "tied"]
    layers = tuple(LinearShape(f"layers.{block}.{name}", 64, 64) for block in (0, 1) for name in names)
    shared = {"layers.0.tied": "layers.1.tied", "layers.1.tied": "layers.0.tied"}
    layout = ModelLayout(linears=layers, shared=shared, narrow=("layers.0.gate", "layers.1.gate"))
    assert targets_of(layout, merges=True) == ["in_proj", "out_proj"]


def test_of_a_model_on_the_hub_only_its_config_is_read(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_family("Phi3", tokenizer, tmp_path / "whole")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    asked = []
    monkeypatch.setattr(preset_fit, "fetch", lambda *given: asked.append(given) or tmp_path / "cache")
    model = look_at("someone/phi")
    assert model and "qkv_proj" in targets_of(model.layout, merges=True)
    look_at("someone/phi", trust_remote_code=True)
    assert [given[3] for given in asked] == [("config.json",), ("config.json", "*.py")]
    assert asked[0] == ("model", "someone/phi", None, ("config.json",), Path("someone/phi"))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_model_that_came_as_codes(
    name: str, quantized_folder: Path, registry: Registry, data: Path, tmp_path: Path
) -> None:
    """The plan accepts every pipeline that trains on codes, without what makes codes; the others are refused."""
    model = look_at(str(quantized_folder))
    assert model and model.codes and not model.packed
    raw = starting_recipe(name, tmp_path / "r.json", str(quantized_folder), str(data))
    if name in ("sparsify", "quantize", "gptq", "sparsepeft"):
        with pytest.raises(SqftError, match=f"pipeline '{name}' does not train on them; these do: lora, shears, hira"):
            fit(raw, model, registry)
        return
    fit(raw, model, registry)
    plan = Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw, tmp_path))
    made = ["finetune", "search", *(["merge"] if "merge" in raw else [])]
    assert [step.name for step in plan.steps] == [*made, "evaluate:model", *(f"evaluate:{one}" for one in made[1:])]
    assert not raw.keys() & {"calibration", "sparsify", "quantize"}


@pytest.mark.parametrize(("family", "method"), [("Qwen3", "fp8"), ("GptOss", "mxfp4")])
def test_weights_to_be_dequantized(
    family: str, method: str, tokenizer: PreTrainedTokenizerFast, registry: Registry, data: Path, tmp_path: Path
) -> None:
    folder = save_family(family, tokenizer, tmp_path / "model")
    pack_folder(folder, method)
    model = look_at(str(folder))
    assert model and model.packed and not model.codes
    for name in ("hira-int4", "sparsify"):
        raw = starting_recipe(name, tmp_path / "r.json", str(folder), str(data))
        fit(raw, model, registry)
        plan = Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw, tmp_path))
        assert plan.model_spec.dequantize and plan.recipe.model.dtype == "bfloat16"


def test_a_format_that_sqft_does_not_read(model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SqftError, match=r"is already quantized \(awq\)"):
        look_at(str(tmp_path))


def test_models_that_are_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert look_at(str(tmp_path / "not" / "there" / "yet")) is None
    with pytest.raises(SqftError, match="someone/unknown"):
        look_at("someone/unknown")
    (tmp_path / "config.json").write_text('{"model_type": "none-such"}')
    with pytest.raises(ModelError, match="transformers cannot make"):
        look_at(str(tmp_path))
