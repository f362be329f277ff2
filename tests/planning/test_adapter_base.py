"""What lies under the adapters: of every way in which a recipe can make it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.planning.adapter_base import AdapterBase
from sqft.types import BaseKind

OWN = Path("/models/own")
FOLDERS = {"base": Path("/store/base"), "floats": Path("/store/floats")}


@pytest.mark.parametrize(
    ("base", "model", "floats", "masks"),
    [
        (AdapterBase(BaseKind.DENSE, OWN), OWN, None, None),
        (AdapterBase(BaseKind.SPARSE, OWN, "sparsify"), FOLDERS["base"] / "model", None, None),
        (AdapterBase(BaseKind.QUANTIZED, OWN), OWN, None, None),  # a model that came as codes
        (
            AdapterBase(BaseKind.QUANTIZED, OWN, "quantize"),
            FOLDERS["base"] / "model",
            OWN,
            FOLDERS["base"] / "masks.safetensors",
        ),
        (
            AdapterBase(BaseKind.QUANTIZED, OWN, "quantize", "sparsify"),
            FOLDERS["base"] / "model",
            FOLDERS["floats"] / "model",
            FOLDERS["base"] / "masks.safetensors",
        ),
    ],
)
def test_where_the_weights_are(base: AdapterBase, model: Path, floats: Path | None, masks: Path | None) -> None:
    folders = {role: FOLDERS[role] for role in base.inputs}
    assert (base.model(folders), base.floats(folders), base.masks(folders)) == (model, floats, masks)
    if masks:
        assert base.residuals(folders) == FOLDERS["base"] / "compensated.safetensors"


@pytest.mark.parametrize(
    ("sections", "kind", "inputs"),
    [
        ((), BaseKind.DENSE, {}),
        (("sparsify",), BaseKind.SPARSE, {"base": "sparsify"}),
        (("quantize",), BaseKind.QUANTIZED, {"base": "quantize"}),
        (("sparsify", "quantize"), BaseKind.QUANTIZED, {"base": "quantize", "floats": "sparsify"}),
    ],
    ids=str,
)
def test_the_plan_knows_it(
    sections: tuple[str, ...],
    kind: BaseKind,
    inputs: dict[str, str],
    raw: dict[str, Any],
    registry: Registry,
    tmp_path: Path,
) -> None:
    raw = copy.deepcopy(raw)
    raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
    raw["finetune"]["merger"] = "unmerged"
    for name in {"sparsify", "quantize", "merge", "evaluate"} - set(sections):
        raw.pop(name, None)
    plan = Orchestrator(registry, tmp_path).plan(Recipe.parse(raw))
    assert (plan.adapter_base.kind, plan.adapter_base.inputs) == (kind, inputs)
    assert plan.step("finetune").inputs == inputs
    assert plan.step("search").inputs == {"finetune": "finetune", **inputs}


def test_a_model_that_came_as_codes(
    raw: dict[str, Any], quantized_folder: Path, registry: Registry, tmp_path: Path
) -> None:
    raw["model"] = {"path": str(quantized_folder), "dtype": "bfloat16"}
    raw["finetune"]["merger"] = "unmerged"
    for name in ("sparsify", "merge", "evaluate"):
        raw.pop(name)
    base = Orchestrator(registry, tmp_path).plan(Recipe.parse(raw)).adapter_base
    assert base.quantized and base.model({}) == quantized_folder and base.floats({}) is base.masks({}) is None
