"""Estimates of memory against sums written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.checkpoints.layout import ModelLayout
from sqft.checkpoints.model_source import ModelSource
from sqft.planning.estimates import (
    calibration_bytes,
    estimate_merge,
    estimate_search,
    estimate_sparsify,
    model_bytes,
    quantized_bytes,
    weights_in,
)
from sqft.recipe.sections import Calibration
from sqft.types import COMPARED_EXAMPLES, COMPARED_TOKENS, LinearShape, Statistic

SIZE = 4 * (258 * 32 + 2 * (9216 + 64) + 32)
"""The tiny model in float32."""
STATES = 3 * (4 * 32) * 32 * 4
BLOCK = 4 * (6 * 32**2 + 64**2)
"""The Hessians of a block: q, k, v, o, gate and up of 32 inputs, down of 64."""
CODES = 2 * 9216
WORK = 3 * 4 * 64**2


def memory(recipe: dict[str, Any], registry: Registry, folder: Path, step: str) -> int:
    kept = {key: recipe[key] for key in ("schema", "name", "model", "calibration", step)}
    found = Orchestrator(registry, folder).plan(Recipe.parse(kept)).step(step).estimate.memory
    return found - SIZE - (1 << 29)


@pytest.mark.parametrize(
    ("sparsify", "expected"),
    [
        ({"scorer": "wanda"}, SIZE),  # the second model that the proof reads is more
        ({"scorer": "magnitude"}, SIZE),
        ({"scorer": "sparsegpt"}, STATES + BLOCK + WORK),
        ({"scorer": "sparsegpt", "exclude": ["down_proj"]}, SIZE),
        ({"scorer": "sparsegpt", "allocator": "owl"}, STATES + BLOCK + WORK),
        # One input after the other: q, k, v and o are as much as down, and less than the second model.
        ({"scorer": "magnitude", "updater": "least-squares"}, max(SIZE, STATES + 4 * 4 * 32**2 + WORK)),
    ],
    ids=str,
)
def test_sparsify_counts_hessians(
    sparsify: dict[str, Any], expected: int, raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    assert memory(raw | {"sparsify": sparsify}, registry, tmp_path, "sparsify") == expected


@pytest.mark.parametrize(
    ("quantizer", "expected"),
    [("gptq", STATES + 4 * 4 * 32**2 + WORK), ("rtn", SIZE)],  # q, k, v and o are as much as down
)
def test_quantize_counts_those_of_one_module(
    quantizer: str, expected: int, raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    raw["quantize"] = {"quantizer": {"name": quantizer, "options": {"group_size": 32}}}
    assert memory(raw, registry, tmp_path, "quantize") == expected + 3 * CODES


def test_quantize_counts_the_weights_from_before_pruning(
    raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    sizes = {}
    for target in ("sparse", "dense"):
        options = {"group_size": 32, "refine": 1, "target": target}
        raw["quantize"] = {"quantizer": {"name": "gptq", "options": options}}
        kept = {key: raw[key] for key in ("schema", "name", "model", "calibration", "sparsify", "quantize")}
        kept["calibration"] |= {"samples": 64}  # so that the walk is what counts
        plan = Orchestrator(registry, tmp_path).plan(Recipe.parse(kept))
        sizes[target] = plan.step("quantize").estimate.memory
    assert sizes["dense"] - sizes["sparse"] == 4 * CODES


@pytest.mark.parametrize(
    ("merger", "base", "packed", "byte"),
    [
        ("qa-sparsepeft", "floats", False, False),
        ("qa-sparsepeft", "codes", True, False),
        ("qa-sparsepeft", "compensated", True, True),
        ("unmerged", "floats", True, False),
    ],
)
def test_codes_under_an_adapter_are_counted_packed(
    merger: str, base: str, packed: bool, byte: bool, raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    """With a byte for each weight of q, k, v, up and down of two layers where training starts from what was rounded;
    on disk every quantized weight has one."""
    raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
    for name in ("merge", "evaluate"):
        raw.pop(name)
    of_floats = {key: value for key, value in raw.items() if key != "quantize"}
    raw["finetune"] = {**raw["finetune"], "merger": merger, "base": base}
    orchestrator = Orchestrator(registry, tmp_path)
    floats, plan = orchestrator.plan(Recipe.parse(of_floats)), orchestrator.plan(Recipe.parse(raw))
    spared = SIZE - plan.step("quantize").estimate.storage + CODES
    spared -= byte * 2 * (32 * 32 + 2 * 32 * 16 + 2 * 32 * 64)
    assert spared > 0
    found = floats.step("finetune").estimate.memory - plan.step("finetune").estimate.memory
    assert found == (spared if packed else 0)


# -- pure sums ----------------------------------------------------------------------------------


LAYERS = tuple(
    LinearShape(f"m.layers.{block}.{name}", *shape)
    for block in range(2)
    for name, shape in (("mlp.experts.0.up", (64, 32)), ("mlp.experts.1.up", (64, 32)), ("mlp.down", (32, 64)))
)
SIZES = {"hidden_size": 32, "vocab_size": 10, "num_hidden_layers": 2, "intermediate_size": 64}
CALIBRATION = Calibration(data="a.txt", samples=2, length=8)


def source(*names: str) -> ModelSource:
    """A model of an embedding, the layers, and tensors of these names and one number each."""
    shapes: dict[str, tuple[int, ...]] = {f"{layer.name}.weight": (64, 32) for layer in LAYERS}
    shapes |= {"m.embed.weight": (10, 32), **dict.fromkeys(names, (1,))}
    return ModelSource("folder", Path("m"), "", shapes, ModelLayout(linears=LAYERS, sizes=SIZES))


def test_bytes_of_a_model() -> None:
    model = source()
    assert model.parameters == 6 * 2048 + 320 and weights_in(LAYERS) == 6 * 2048
    assert [model_bytes(model, dtype) for dtype in ("float32", "bfloat16", "float16")] == [
        4 * model.parameters, 2 * model.parameters, 2 * model.parameters,
    ]  # fmt: skip


@pytest.mark.parametrize(("bits", "code"), [(4, 5.5), (2, 3.5), (None, 17.5)])
def test_bytes_of_codes(bits: int | None, code: float) -> None:
    """A code, half a bit of its group's scale and zero point, a bit of the mask; a tied head is stored apart."""
    assert quantized_bytes(source("lm_head.weight"), "bfloat16", LAYERS, bits) == 321 * 2 + 6 * 2048 * code // 8
    assert quantized_bytes(source(), "bfloat16", LAYERS, bits) == (320 + 320) * 2 + 6 * 2048 * code // 8


@pytest.mark.parametrize(
    ("needs", "sequential", "hessians", "widest"),
    [
        ({Statistic.INPUT_NORM}, False, 0, 0),
        ({Statistic.HESSIAN}, False, 2 * 32**2 + 64**2, 64**2),
        ({Statistic.HESSIAN}, True, 64**2, 64**2),  # the experts of a block are one module: 2 · 32² is less
    ],
)
def test_bytes_of_the_walk(needs: set[Statistic], sequential: bool, hessians: int, widest: int) -> None:
    states = 3 * (2 * 8) * 32 * 4
    found = calibration_bytes(source(), CALIBRATION, frozenset(needs), LAYERS, sequential)
    assert found == states + 4 * hessians + 3 * 4 * widest
    assert calibration_bytes(source(), None, frozenset(needs), LAYERS, sequential) == 0


def test_what_holds_codes_needs_more() -> None:
    size, model = model_bytes(source(), "float32"), source()
    search = [estimate_search(model, "float32", 40, size, quantized).memory for quantized in (False, True)]
    assert search == [2 * size + 40 + (1 << 29), 3 * size + 40 + (1 << 29)]
    for opening, held in ((0, size), (size + 1, size + 1)):
        chosen = estimate_search(model, "float32", 40, size, True, opening, evaluates=False).memory
        assert chosen == held + 40 + (1 << 29)
    assert estimate_search(model, "float32", 40, size, True, evaluates=False, streamed=True).memory == 80 + (1 << 29)
    by_gradient = estimate_search(model, "float32", 40, size, True, evaluates=False, activations=99)
    assert by_gradient.memory == size + 99 + 40 + (1 << 29)
    merge = [estimate_merge(model, "float32", (), 40, 9, size, quantized).memory for quantized in (False, True)]
    assert merge == [3 * size + (1 << 29), 4 * size + 3 * model.parameters + (1 << 29)]
    assert estimate_merge(model, "float32", (), 40, 9, size, True).storage == 9


@pytest.mark.parametrize("experts", [(), ("model.layers.0.mlp",)])
def test_a_merge_in_parts_holds_one_block(experts: tuple[str, ...]) -> None:
    """Beside its adapted layers, merged; one whose experts are stored together is there three times."""
    shapes = {"embed": (3, 4)} | {f"model.layers.{i}.{n}.weight": (64, 64) for i in range(3) for n in "ab"}
    linears = tuple(LinearShape(name.removesuffix(".weight"), 64, 64) for name in shapes if name != "embed")
    model = ModelSource("folder", Path("m"), "", shapes, ModelLayout(linears=linears, experts=experts))
    adapted = ["model.layers.0.a", "model.layers.1.a", "model.layers.1.b"]
    found = estimate_merge(model, "bfloat16", adapted, 40, 9, 7, False, streamed=True)
    layer, copies = 2 * 64 * 64, 3 if experts else 1
    assert found.memory == 2 * 12 + copies * 2 * layer + 2 * layer + 40 + (1 << 29) and found.storage == 9


def test_a_merge_into_codes_in_parts_stores_a_tied_head_beside_the_embedding() -> None:
    """Codes of a byte each and the block of floats that was quantized are there too, all floats in bfloat16."""
    of_codes = [
        estimate_merge(source(*names), "bfloat16", (), 40, 9, 7, True, streamed=True).memory
        for names in ((), ("lm_head.weight",))
    ]
    assert of_codes[0] - of_codes[1] == 10 * 32 * 2 - 2
    logits = 3 * COMPARED_EXAMPLES * COMPARED_TOKENS * 10 * 4
    assert of_codes[0] == 2 * 320 * 2 + max(logits, 3 * 2048 * (2 + 1 + 2)) + 40 + (1 << 29)


@pytest.mark.parametrize("experts", [(), ("model.layers.0.mlp",)])
def test_a_block_of_experts_is_there_three_times_when_it_is_written(experts: tuple[str, ...]) -> None:
    """With ten small layers a block, of which one is copied while it is pruned."""
    shapes = {f"model.layers.0.e{i}.weight": (16, 16) for i in range(10)}
    linears = tuple(LinearShape(name.removesuffix(".weight"), 16, 16) for name in shapes)
    model = ModelSource("folder", Path("m"), "", shapes, ModelLayout(linears=linears, experts=experts))
    found = estimate_sparsify(model, "bfloat16", linears, None, frozenset(), False, streamed=True)
    block, layer = 10 * 2 * 16**2, 4 * 4 * 16**2
    assert found.memory - (1 << 29) == (3 * block if experts else 2 * block + layer)
