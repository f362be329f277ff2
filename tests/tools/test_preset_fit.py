"""A recipe to start from fits its model: the plan accepts it for families whose layers have names of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sqft import Orchestrator, Recipe, Registry
from sqft.checkpoints.layout import ModelLayout
from sqft.errors import ModelError, SqftError
from sqft.tools import preset_fit
from sqft.tools.preset_fit import fit, layout_of, targets_of
from sqft.tools.presets import TARGETS, starting_recipe
from sqft.types import LinearShape
from tests.support.families import save_family

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
    layout = layout_of(folder)
    assert layout
    merged, beside, excluded = FAMILIES[family]
    for name, targets in {"sparsepeft": merged, "hira-int4": merged, "shears": beside, "gptq": None}.items():
        raw = starting_recipe(name, tmp_path / "r.json", folder, str(data))
        fit(raw, layout, registry)
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
        fit(raw, layout, registry)
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
    layout = layout_of("someone/phi")
    assert layout and "qkv_proj" in targets_of(layout, merges=True)
    assert asked == [("model", "someone/phi", None, ("config.json",), Path("someone/phi"))]


def test_models_that_are_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert layout_of(str(tmp_path / "not" / "there" / "yet")) is None
    with pytest.raises(SqftError, match="someone/unknown"):
        layout_of("someone/unknown")
    (tmp_path / "config.json").write_text('{"model_type": "none-such"}')
    with pytest.raises(ModelError, match="transformers cannot make"):
        layout_of(str(tmp_path))
