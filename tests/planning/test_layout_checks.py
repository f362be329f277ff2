"""The layers that a recipe chooses, against what is known of a model's modules."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from sqft_compressed_tensors import CompressedTensors
from sqft_gptq import GptqCheckpoint
from sqft_hf import HuggingFace

from sqft.checkpoints.layout import LeftOut, ModelLayout
from sqft.checkpoints.model_source import ModelSource
from sqft.errors import Problem
from sqft.planning import layout_checks
from sqft.types import LinearShape

Q, K, EXPERT = (LinearShape(name, 4, 8) for name in ("b.0.q", "b.0.k", "b.0.experts.2.up"))
LAYERS = (Q, K, EXPERT)


def said(problems: Iterable[Problem]) -> list[str]:
    return [str(problem) for problem in problems]


def source(**layout: object) -> ModelSource:
    return ModelSource("folder", Path("m"), "", {}, ModelLayout("A", linears=LAYERS, **layout))  # type: ignore[arg-type]


class Beside:
    name, merges = "unmerged", False


class Into:
    name, merges = "into", True


def test_every_problem_of_the_headers_is_the_models() -> None:
    found = said(layout_checks.check_headers(source(problems=("lacks b.0.q", "b.0.k is [1]"))))
    assert found == ["model.path: m: lacks b.0.q", "model.path: m: b.0.k is [1]"]


def test_layers_that_share_a_weight() -> None:
    layout = ModelLayout(shared={"b.0.q": "b.1.q"})
    assert said(layout_checks.check_own_weights(layout, LAYERS, "sparsify.include")) == [
        "sparsify.include: b.0.q is one weight with b.1.q; exclude layers that share a weight"
    ]
    assert not said(layout_checks.check_own_weights(layout, [K], "sparsify.include"))


def test_layers_that_calibration_does_not_see() -> None:
    layout = ModelLayout(unseen=("b.0.k",))
    (problem,) = said(layout_checks.check_seen(layout, LAYERS, "quantize.include"))
    assert problem.startswith("quantize.include: calibration measures") and "itself: b.0.k; exclude them" in problem
    assert not said(layout_checks.check_seen(layout, [Q], "quantize.include"))


def test_layers_that_servers_join_are_quantized_together() -> None:
    linears = tuple(LinearShape(f"b.{n}.a.{x}_proj", 4, 8) for n in (0, 1) for x in "qkvo")
    layout = ModelLayout("A", linears=linears)
    (note,) = layout_checks.half_joined(layout, [layer for layer in linears if "v_proj" not in layer.name])
    assert note.startswith(
        "leaves v_proj in floats: vLLM and SGLang join q_proj, k_proj, v_proj, and refuse or misread"
    )
    for chosen in (linears, [linears[3]], []):
        assert not list(layout_checks.half_joined(layout, chosen))


def test_layers_whose_codes_are_stored_apart() -> None:
    layout = ModelLayout("A", unnamed={EXPERT.name: "its checkpoint holds it in b.0.up, with others"})
    assert list(layout_checks.codes_apart(layout, LAYERS)) == [
        "codes of b.0.experts.2.up are stored layer by layer, where a checkpoint of A has none (its checkpoint holds "
        "it in b.0.up, with others): sqft reads them, other programs only if they know such names"
    ]
    assert not list(layout_checks.codes_apart(layout, [Q, K]))


def test_an_exporter_whose_readers_would_miss_codes() -> None:
    layout = ModelLayout("A", unnamed={EXPERT.name: "its checkpoint holds it in b.0.up, with others"})
    (problem,) = said(layout_checks.check_codes_apart(layout, LAYERS, CompressedTensors(), "export.0.exporter"))
    assert problem.startswith("export.0.exporter: A joins b.0.experts.2.up in its checkpoints (its checkpoint holds it")
    assert problem.endswith('put "*.experts.*" into quantize.exclude, or use the exporter hf')
    assert not said(layout_checks.check_codes_apart(layout, [Q, K], CompressedTensors(), "export.0.exporter"))
    for other in (GptqCheckpoint(), HuggingFace()):
        assert not said(layout_checks.check_codes_apart(layout, LAYERS, other, "export.0.exporter"))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ModelLayout(experts=("b.0.experts.2",)), "names b.0.experts.2.up, and PEFT, for which 'unmerged' writes its"),
        (ModelLayout("A", unseen=("b.0.q",)), "A does not call b.0.q, and PEFT, for which 'unmerged' writes its"),
    ],
)
def test_an_adapter_that_peft_could_not_apply(layout: ModelLayout, message: str) -> None:
    beside, into = Beside(), Into()
    (problem,) = said(layout_checks.check_peft(layout, LAYERS, beside))  # type: ignore[arg-type]
    assert problem.startswith(f"finetune.targets: {message}")
    assert not said(layout_checks.check_peft(layout, LAYERS, into))  # type: ignore[arg-type]
    assert not said(layout_checks.check_peft(layout, [K], beside))  # type: ignore[arg-type]


def test_what_is_left_alone_is_said() -> None:
    towers = tuple(LeftOut(name, 1200, "outside the text model") for name in ("vision", "audio"))
    mixture = LeftOut("b.1.experts", 3, "experts that cannot be split")
    dropped = (LeftOut("mtp", 5, "as A has no place for it"),)
    assert list(layout_checks.notes(ModelLayout("A", left_out=(*towers, mixture), dropped=dropped))) == [
        "left as it is, outside the text model: vision (1,200 weights), audio (1,200 weights)",
        "left as it is, experts that cannot be split: b.1.experts (3 weights)",
        "left out, as A has no place for it: mtp (5 weights)",
    ]
    assert not list(layout_checks.notes(ModelLayout()))


def test_many_parts_are_counted() -> None:
    dropped = tuple(LeftOut(f"b.{index}.bias", 500, "as A has no place for it") for index in range(5))
    assert list(layout_checks.notes(ModelLayout("A", dropped=dropped))) == [
        "left out, as A has no place for it: b.0.bias (500 weights), b.1.bias (500 weights), b.2.bias (500 weights) "
        "and 2 more; 2,500 weights in all"
    ]
