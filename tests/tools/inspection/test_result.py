"""What `sqft inspect` says of modules: patterns, types of layers, totals."""

from __future__ import annotations

from pathlib import Path

import pytest

from sqft.tools.inspection.result import Inspection, LayerType, Module


def layer(name: str, pattern: str | None = None, zeros: int | None = 50, linear: bool = True) -> Module:
    return Module(name, (10, 10), "float16", 100, zeros, 200, linear, pattern)


def said(*modules: Module) -> list[str]:
    found = Inspection(Path("m"), "Hugging Face floats", {}, 1, modules)
    return [line for line in found.lines() if line.startswith("pattern")]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["2:4"], "2:4 in all 1 pruned layer"),
        (["2:4", "2:4"], "2:4 in all 2 pruned layers"),
        ([None, None], "no N:M in 2 pruned layers"),
        (["4:8", "2:4", "2:4"], "2:4 in 2, 4:8 in 1 of 3 pruned layers"),
        (["2:4", None], "2:4 in 1 of 2 pruned layers; none in b.1.q"),
        (["2:4", *[None] * 5], "2:4 in 1 of 6 pruned layers; none in b.1.q, b.2.q, b.3.q and 2 more"),
    ],
)
def test_the_line_of_patterns(patterns: list[str | None], expected: str) -> None:
    dense, head = layer("b.9.k", zeros=0), layer("head", linear=False)
    unread = layer("b.9.v", zeros=None)
    modules = [layer(f"b.{index}.q", pattern) for index, pattern in enumerate(patterns)]
    assert said(*modules, dense, head, unread) == [f"pattern: {expected}"]
    assert said(dense, head, unread) == []


def test_types() -> None:
    modules = (
        layer("b.0.mlp.up"),
        layer("b.0.experts.0.up", zeros=0),
        layer("b.1.down", zeros=None),
        layer("b.1.seq.0"),
        layer("head", linear=False),
    )
    found = Inspection(Path("m"), "GGUF", {}, 1, modules)
    assert found.types == [
        LayerType("up", 2, 200, 0.25, 400),
        LayerType("down", 1, 100, None, 200),
        LayerType("seq", 1, 100, 0.5, 200),
    ]
    assert found.types[0].bits == 16
    assert found.types_table()[1][1] == ["down", "1", "100", "–", "16.00", "200 B"]
    assert found.linears.sparsity == pytest.approx(100 / 300) and found.all.modules == 4
