"""The adapter that `evaluate` measures: where it is looked for, what is refused, and what it takes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import RecipeError
from sqft.planning.estimates import EVALUATION_WORK
from sqft.planning.plan import Plan
from tests.support.hub import cached

SHAPES = {"lora_A": (64, 3000), "lora_B": (3000, 64)}
VALUES = sum(map(math.prod, SHAPES.values()))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """What the plan reads of an adapter: its config, and the header of its file."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def planned(raw: dict[str, Any], **settings: Any) -> Plan:
    measured = {"of": ["model"], "perplexity": raw["evaluate"]["perplexity"], **settings}
    recipe = Recipe.parse({name: raw[name] for name in ("schema", "name", "model")} | {"evaluate": measured})
    return Orchestrator(Registry(), "/nowhere").plan(recipe)


def test_its_values_count(raw: dict[str, Any], adapter: Path) -> None:
    """In float32 beside the model, as stock peft has them; while they are loaded, twice."""
    without, beside = (planned(raw, **more).steps[0].estimate for more in ({}, {"adapter": str(adapter)}))
    assert beside.parameters - without.parameters == VALUES
    assert beside.memory - without.memory == 4 * VALUES + max(0, 4 * VALUES - EVALUATION_WORK)


def test_one_of_the_hub(raw: dict[str, Any], adapter: Path, cache: Path) -> None:
    """It is the same adapter, wherever it is; a revision is looked for, and is no part of the fingerprint."""
    (step,) = planned(raw, adapter=str(adapter)).steps
    (adapter / "README.md").write_text("It changes nothing.")
    snapshot = cached(cache, adapter, "someone/lora")
    (of_hub,) = planned(raw, adapter="someone/lora").steps
    assert of_hub.files["adapter"].parent == snapshot and of_hub.fingerprint == step.fingerprint
    assert planned(raw, adapter="someone/lora", adapter_revision="0" * 40).steps[0].fingerprint == step.fingerprint
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1}))
    assert planned(raw, adapter=str(adapter)).steps[0].fingerprint != step.fingerprint
    with pytest.raises(RecipeError, match=r"evaluate.adapter: .*'someone/lora' is not in the hub's cache"):
        planned(raw, adapter="someone/lora", adapter_revision="v2")
    (snapshot / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(RecipeError, match=r"evaluate.adapter: .*adapter_model.safetensors"):
        planned(raw, adapter="someone/lora")


def test_what_is_not_there(raw: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    for name, words in {
        "someone/lora": "the Hugging Face model 'someone/lora' is not in the hub's cache",
        str(tmp_path / "none"): "there is no folder",
        str(tmp_path): "has no adapter_config.json; name the folder of an adapter",
    }.items():
        with pytest.raises(RecipeError, match=f"evaluate.adapter: .*{words}"):
            planned(raw, adapter=name)


def test_a_misspelt_folder_is_not_asked_of_the_hub(
    raw: dict[str, Any], adapter: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapter.parent.parent)
    misspelt = adapter.parent / "adaptor"
    with pytest.raises(RecipeError) as caught:
        planned(raw, adapter=f"{adapter.parent.name}/adaptor")
    (problem,) = caught.value.problems
    assert str(problem).startswith(f"evaluate.adapter: there is no folder {misspelt} (and the hub is not asked for")


def test_an_adapter_as_a_pickle(raw: dict[str, Any], adapter: Path, cache: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    cached(cache, adapter, "some/bin")
    for name, called in (("some/bin", "the hub's some/bin"), (str(adapter), str(adapter))):
        with pytest.raises(RecipeError) as caught:
            planned(raw, adapter=name)
        (problem,) = caught.value.problems
        assert str(problem).startswith(f"evaluate.adapter: {called} has no adapter_model.safetensors")
        assert "sqft reads no pickles" in str(problem) and "safe_serialization" in str(problem)


@pytest.mark.parametrize(("key", "value"), [("base_model_name_or_path", 5), ("revision", 7), ("peft_type", ["LORA"])])
def test_a_config_with_a_number_for_a_text(
    raw: dict[str, Any], adapter: Path, cache: Path, key: str, value: object
) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", key: value}))
    cached(cache, adapter, "someone/lora")
    for name, called in (("someone/lora", "the hub's someone/lora"), (str(adapter), str(adapter))):
        with pytest.raises(RecipeError) as caught:
            planned(raw, adapter=name)
        (problem,) = caught.value.problems
        found = f"adapter_config.json of {called}: {key} is {json.dumps(value)}, and must be a text"
        assert str(problem).startswith(f"evaluate.adapter: {found}")


def test_a_revision_of_what_has_none(raw: dict[str, Any], adapter: Path) -> None:
    for name, words in ((str(adapter), f"{adapter} is no Hugging Face id"), (None, "there is no adapter")):
        with pytest.raises(RecipeError) as caught:
            planned(raw, adapter=name, adapter_revision="v2")
        (problem,) = caught.value.problems
        assert str(problem).startswith(f"evaluate.adapter_revision: {words}") and "remove this" in str(problem)


def test_it_acts_on_the_recipes_own_model_alone(raw: dict[str, Any], adapter: Path) -> None:
    raw["evaluate"] |= {"adapter": str(adapter)}
    with pytest.raises(
        RecipeError, match=r"evaluate.adapter: acts on the recipe's own model alone; set evaluate.of to"
    ):
        Orchestrator(Registry.discover(), "/nowhere").plan(Recipe.parse(raw))
