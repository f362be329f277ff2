"""The stage by itself: what it writes, and that what is on disk is proved and not what it remembers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sqft_gptq import Gptq, Rtn
from torch import Tensor

from sqft import Orchestrator, Recipe, Registry
from sqft.api import LinearStats, Quantized
from sqft.errors import ArtifactError
from sqft.kernels.grids import dequantize
from sqft.kernels.masks import unpack_mask
from sqft.modeling.loading.quantized import read_quantized
from sqft.stages.inputs import StageInputs
from sqft.stages.quantize import QuantizeStage

Q, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.embed_tokens.weight"


def quantize(raw: dict[str, Any], registry: Registry, folder: Path, **section: Any) -> QuantizeStage:
    """The stage on a base of which one layer has zeros."""
    kept = {key: raw[key] for key in ("schema", "name", "model", "calibration")}
    kept["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}, **section}
    plan = Orchestrator(registry, folder / "store").plan(Recipe.parse(kept))
    (folder / "scratch").mkdir()
    return QuantizeStage(StageInputs(plan, plan.step("quantize"), {}, folder / "scratch", "cpu"))


@pytest.fixture
def sparse(raw: dict[str, Any], tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    """A recipe on the tiny model with some of one layer's weights at zero."""
    folder = tmp_path / "sparse"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    edit(folder / "model.safetensors", f"{Q}.weight", lambda weight: weight * (weight > 0))
    raw["model"]["path"] = str(folder)
    return raw


def edit(file: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed.contiguous()}, file, {"format": "pt"})


def test_what_it_writes(sparse: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    stage = quantize(sparse, registry, tmp_path, exclude=["o_proj"])
    report = stage.run()
    stage.verify()
    base = load_file(tmp_path / "sparse" / "model.safetensors")
    layers = read_quantized(tmp_path / "scratch" / "model")
    masks = load_file(tmp_path / "scratch" / "masks.safetensors")
    rests = load_file(tmp_path / "scratch" / "compensated.safetensors")
    assert sorted(layers) == sorted(masks) == sorted(rests) == sorted(report["layers"]) and len(layers) == 2 * 6
    for name, layer in layers.items():
        weight = base[f"{name}.weight"]
        kept = unpack_mask(masks[name], (weight.shape[0], weight.shape[1]))
        assert kept.equal(weight != 0) and not dequantize(layer)[~kept].any()
        assert report["layers"][name]["weight"] < 0.02
        floats = dequantize(layer, rests[name])  # of rounding to nearest, the weight itself
        assert rests[name].dtype == torch.int8 and not floats[~kept].any()
        assert (floats - weight).abs().max() < layer.grid.scale.float().max() / 64  # the largest are beyond the grid
    assert not (base[f"{Q}.weight"] != 0).all()
    stored = load_file(tmp_path / "scratch" / "model" / "model.safetensors")
    assert stored[EMBEDDING].equal(base[EMBEDDING]) and stored["lm_head.weight"].equal(base[EMBEDDING])
    assert (report["bits"], report["group_size"]) == (4, 32)


def test_a_quantizer_that_does_not_say_what_it_rounded(
    sparse: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rtn, "gives_compensated", False)
    stage = quantize(sparse, registry, tmp_path)
    stage.run()
    stage.verify()
    assert not (tmp_path / "scratch" / "compensated.safetensors").exists()


def test_what_was_rounded_is_not_kept_if_nobody_wants_it(
    sparse: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    stage = quantize(sparse, registry, tmp_path, keep_compensated=False)
    stage.run()
    stage.verify()
    assert not (tmp_path / "scratch" / "compensated.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "name", "change", "message"),
    [
        (
            "model/model.safetensors",
            f"{Q}.qweight",
            lambda t: t ^ 1,
            f"codes or grid of {Q} as stored are not the",
        ),
        (
            "model/model.safetensors",
            f"{Q}.scales",
            lambda t: t * 2,
            f"codes or grid of {Q} as stored are not the",
        ),
        ("model/model.safetensors", EMBEDDING, lambda t: t * 2, f"{EMBEDDING} as stored is not the base's"),
        ("model/model.safetensors", EMBEDDING, lambda t: t.half(), f"{EMBEDDING} as stored is not the base's"),
        ("model/model.safetensors", EMBEDDING, lambda t: None, f"{EMBEDDING} of the base is not stored"),
        ("masks.safetensors", Q, lambda t: ~t, f"the mask of {Q} as stored is not the base's"),
        ("masks.safetensors", Q, lambda t: None, f"the mask of {Q} as stored is not the base's"),
        ("compensated.safetensors", Q, lambda t: -t, f"the compensated floats of {Q} as stored are not the"),
        ("compensated.safetensors", Q, lambda t: None, f"the compensated floats of {Q} as stored are not the"),
    ],
)
def test_what_is_on_disk_is_proved(
    sparse: dict[str, Any],
    registry: Registry,
    tmp_path: Path,
    file: str,
    name: str,
    change: Callable[[Tensor], Tensor | None],
    message: str,
) -> None:
    stage = quantize(sparse, registry, tmp_path)
    stage.run()
    stage.verify()
    edit(tmp_path / "scratch" / file, name, change)
    with pytest.raises(ArtifactError, match=re.escape(message)):
        stage.verify()


def test_codes_that_make_up_for_pruning_see_the_weight_from_before_it(raw: dict[str, Any], tmp_path: Path) -> None:
    """The one of the recipe's model, in float32; the report says how near the outputs come to the dense layers'."""
    kept = {key: raw[key] for key in ("schema", "name", "model", "calibration", "sparsify")}
    dense = load_file(Path(raw["model"]["path"]) / "model.safetensors")
    seen = {}

    class Seeing(Gptq):
        name = "seeing"

        def quantize(self, weight: Tensor, mask: Tensor | None, stats: LinearStats) -> Quantized:
            assert stats.dense is not None and mask is not None and weight.equal(stats.dense * mask)
            seen[len(seen)] = stats.dense.clone()
            return super().quantize(weight, mask, stats)

    registry = Registry.discover()
    registry.add(Seeing)
    orchestrator = Orchestrator(registry, tmp_path)
    errors = {}
    for target in ("sparse", "dense"):
        options = {"group_size": 32, "refine": 3, "refine_damp": 0, "target": target}
        name = "seeing" if target == "dense" else "gptq"
        quantizer = {"quantizer": {"name": name, "options": options}}
        run = orchestrator.run(orchestrator.plan(Recipe.parse({**kept, "quantize": quantizer})))
        errors[target] = run["quantize"].report["layers"]
    layers = errors["dense"]
    assert all(seen[i].equal(dense[f"{layer}.weight"].float()) for i, layer in enumerate(layers)) and len(seen) == 14
    assert all("dense_output" not in layer for layer in errors["sparse"].values())
    for name, layer in layers.items():  # nearer to the dense layer's output than to the sparse one's
        assert layer["dense_output"] < layer["output"] and layer["output"] > errors["sparse"][name]["output"]
