"""Deltas, rank configurations and adapters as files, under names that PEFT knows or refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sqft_sparsepeft import QASparsePEFT
from sqft_unmerged import Unmerged

from sqft.api import RankConfig
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.adapters.saving import (
    adapter_tensors,
    read_ranks,
    space_from,
    store_adapter,
    store_deltas,
    store_ranks,
)

Make = Callable[..., AdaptedModel]
TWO = RankConfig((2, 2))


def test_deltas_and_space_come_back(adapted_model: Make, tmp_path: Path) -> None:
    adapted = adapted_model(QASparsePEFT(), True)
    store_deltas(adapted, tmp_path)
    stored = load_file(tmp_path / "deltas.safetensors")
    assert stored.keys() == adapted.deltas().keys() and "h.0.one.grid.scale_multiplier" in stored
    assert all(value.equal(adapted.deltas()[name]) for name, value in stored.items())
    assert space_from(json.loads((tmp_path / "space.json").read_text())) == adapted.space


def test_ranks_come_back(tmp_path: Path) -> None:
    store_ranks(RankConfig((8, 4)), tmp_path)
    assert read_ranks(tmp_path) == RankConfig((8, 4))


def test_a_masked_adapter_has_names_of_its_own(adapted_model: Make, tmp_path: Path) -> None:
    """Stock PEFT would compute W + BA for it without a word."""
    adapted = adapted_model(QASparsePEFT(), True)
    store_adapter(adapted, TWO, "base", tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {"adapter.safetensors", "sqft_adapter.json"}
    stored = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert stored.keys() == {
        f"h.0.{layer}.{part}" for layer in ("one", "two") for part in ("lora_A", "lora_B", "scale_multiplier")
    }
    settings = json.loads((tmp_path / "adapter" / "sqft_adapter.json").read_text())
    assert settings == {
        "merger": "qa-sparsepeft",
        "base_model": "base",
        "ranks": {"h.0.one": 2, "h.0.two": 2},
        "scales": {"h.0.one": 2.0, "h.0.two": 2.0},
    }


def test_an_adapter_beside_its_base_is_a_peft_checkpoint(adapted_model: Make, tmp_path: Path) -> None:
    """alpha / rank is the scale of the largest rank."""
    adapted = adapted_model(Unmerged())
    store_adapter(adapted, TWO, "base", tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored.keys() == {
        f"base_model.model.h.0.{layer}.lora_{which}.weight" for layer in ("one", "two") for which in "AB"
    }
    assert stored["base_model.model.h.0.one.lora_A.weight"].shape == (2, 8)
    assert stored["base_model.model.h.0.one.lora_B.weight"].shape == (6, 2)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "base" and not settings["fan_in_fan_out"]
    assert settings["rank_pattern"] == {"h.0.one": 2, "h.0.two": 2} and settings["r"] == 2
    assert settings["alpha_pattern"] == {"h.0.one": 4.0, "h.0.two": 4.0}
    assert sorted(settings["target_modules"]) == ["h.0.one", "h.0.two"]


def test_a_layer_whose_stored_weight_is_transposed(adapted_model: Make, tmp_path: Path) -> None:
    adapted = adapted_model(Unmerged())
    adapted.layers["h.0.one"].stored_transposed = True
    store_adapter(adapted, TWO, "base", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"]


@pytest.mark.parametrize("merger", [QASparsePEFT(), Unmerged()], ids=lambda m: m.name)
def test_what_is_stored_is_what_the_names_say(adapted_model: Make, merger: object, tmp_path: Path) -> None:
    """Search proves an adapter with the same function that wrote it."""
    adapted = adapted_model(merger)
    store_adapter(adapted, TWO, "base", tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    stored, expected = load_file(file), adapter_tensors(adapted, TWO)
    assert stored.keys() == expected.keys() and all(stored[name].equal(value) for name, value in expected.items())
