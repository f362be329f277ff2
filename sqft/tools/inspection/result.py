"""What was found in a model's folder: its modules, sums over them, and how they are shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sqft.utils.text import human_size

PACKED = ("FP8", "MXFP4")
"""Formats that a recipe reads as floats."""
PRUNED = 0.01
"""Part of a layer's weights that are zero from which on it counts as pruned: dense floats have a few zeros, too."""
NAMED = 3
"""Layers without a pattern that are named."""


@dataclass(frozen=True)
class Module:
    """A tensor, or a layer that is stored as several tensors, under the name of its module."""

    name: str
    shape: tuple[int, ...]
    precision: str
    weights: int
    zeros: int | None
    """None when they are packed in a way that is not read here."""
    bytes: int
    """Of its tensors on disk."""
    linear: bool
    """Whether it is a linear layer of a decoder block; without a config.json, whether its name and shape look so."""
    pattern: str | None
    """The N:M that every group of M neighbours along a row of a linear layer keeps; see `GroupCounts.pattern`."""

    @property
    def pruned(self) -> bool:
        return self.linear and bool(self.zeros) and (self.zeros or 0) >= PRUNED * self.weights

    @property
    def type(self) -> str:
        """The layer's own name, without its block's: "q_proj"."""
        parts = self.name.split(".")
        return next((part for part in reversed(parts) if not part.isdecimal()), self.name)


@dataclass(frozen=True)
class Total:
    """Sums over the modules whose zeros can be counted."""

    modules: int
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float | None:
        return self.zeros / self.weights if self.weights else None


@dataclass(frozen=True)
class LayerType:
    """Sums over the linear layers of one name in all decoder blocks, such as "q_proj"."""

    name: str
    layers: int
    weights: int
    sparsity: float | None
    """Of the layers whose zeros can be counted."""
    bytes: int
    """On disk."""

    @property
    def bits(self) -> float:
        """Bits on disk for each weight: of codes, with their scales and zero points."""
        return 8 * self.bytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Inspection:
    """A model's modules in the order of their names, and its settings."""

    path: Path
    format: str
    details: dict[str, Any]
    size: int
    """Bytes on disk of all files in the folder."""
    modules: tuple[Module, ...]

    @property
    def linears(self) -> Total:
        """Sums over the linear layers of decoder blocks."""
        return _total(module for module in self.modules if module.linear)

    @property
    def all(self) -> Total:
        """Sums over everything: embeddings, norms and the head too."""
        return _total(self.modules)

    @property
    def precision(self) -> dict[str, int]:
        """Number of weights in each precision, largest first."""
        counts: dict[str, int] = {}
        for module in self.modules:
            counts[module.precision] = counts.get(module.precision, 0) + module.weights
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def types(self) -> list[LayerType]:
        """The linear layers by their own names, in the order in which the model has them."""
        groups: dict[str, list[Module]] = {}
        for module in self.modules:
            if module.linear:
                groups.setdefault(module.type, []).append(module)
        return [
            LayerType(
                name,
                len(group),
                sum(module.weights for module in group),
                _total(group).sparsity,
                sum(module.bytes for module in group),
            )
            for name, group in groups.items()
        ]

    @cached_property
    def pruned(self) -> list[Module]:
        """The linear layers that are pruned."""
        return [module for module in self.modules if module.pruned]

    @property
    def patterns(self) -> dict[str, int]:
        """The number of pruned layers that keep each N:M pattern, largest first."""
        return dict(Counter(module.pattern for module in self.pruned if module.pattern).most_common())

    @property
    def without_pattern(self) -> list[str]:
        """The names of the pruned layers that keep no N:M pattern."""
        return [module.name for module in self.pruned if not module.pattern]

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        totals = {"linears": self.linears, "all": self.all}
        return {
            "path": str(self.path),
            "format": self.format,
            "details": self.details,
            "size": self.size,
            "precision": self.precision,
            "patterns": {
                "pruned_layers": len(self.pruned),
                "layers": self.patterns,
                "without_pattern": self.without_pattern,
            },
            "totals": {name: asdict(total) | {"sparsity": total.sparsity} for name, total in totals.items()},
            "types": [asdict(one) | {"bits": one.bits} for one in self.types],
            "modules": [asdict(module) for module in self.modules],
        }

    def lines(self) -> list[str]:
        """Return everything but the tables as lines of text."""
        details = ", ".join(f"{key} {value}" for key, value in self.details.items())
        weights = ", ".join(f"{count:,} {precision}" for precision, count in self.precision.items())
        lines = [
            f"format: {self.format}" + (f" ({details})" if details else ""),
            f"size on disk: {human_size(self.size)}",
            f"precision: {weights}",
        ]
        if self.pruned:
            lines.append(f"pattern: {self._pattern()}")
        if self.format in PACKED:
            lines.append('a recipe reads these weights as floats with "dequantize": true in its model')
        if unread := sum(module.zeros is None for module in self.modules):
            lines.append(f"not counted: {unread} tensors, whose packed values are not read here")
        return lines

    def _pattern(self) -> str:
        """Return which N:M patterns the pruned layers keep, and the first ones that keep none."""
        count, without = len(self.pruned), self.without_pattern
        layers = f"{count} pruned layer" + ("s" if count > 1 else "")
        if not self.patterns:
            return f"no N:M in {layers}"
        if list(self.patterns.values()) == [count]:
            return f"{next(iter(self.patterns))} in all {layers}"
        text = f"{', '.join(f'{pattern} in {number}' for pattern, number in self.patterns.items())} of {layers}"
        more = f" and {len(without) - NAMED} more" if len(without) > NAMED else ""
        return text + (f"; none in {', '.join(without[:NAMED])}{more}" if without else "")

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return heads and rows: matrices one by one, then the totals. Norms and biases are only in the totals."""
        heads = ["module", "shape", "precision", "weights", "zeros", "sparsity", "pattern"]
        cells = []
        for module in self.modules:
            if len(module.shape) > 1:
                share = module.zeros / module.weights if module.zeros is not None and module.weights else None
                shape = "×".join(map(str, module.shape))
                counts = _counts(module.weights, module.zeros, share)
                cells.append([module.name, shape, module.precision, *counts, module.pattern or "–"])
        for name, total in (("linear layers in decoder blocks", self.linears), ("all", self.all)):
            if not total.modules:  # an adapter has none
                continue
            counts = _counts(total.weights, total.zeros, total.sparsity)
            cells.append([f"total, {name}", f"{total.modules} modules", "", *counts, ""])
        return heads, cells

    def types_table(self) -> tuple[list[str], list[list[str]]]:
        """Return heads and rows: the linear layers by their own names."""
        cells = [
            [
                one.name,
                f"{one.layers}",
                f"{one.weights:,}",
                _share(one.sparsity),
                f"{one.bits:.2f}",
                human_size(one.bytes),
            ]
            for one in self.types
        ]
        return ["layer type", "layers", "weights", "sparsity", "bits per weight", "size on disk"], cells


def _total(modules: Iterable[Module]) -> Total:
    counted = [module for module in modules if module.zeros is not None]
    return Total(len(counted), sum(m.weights for m in counted), sum(m.zeros or 0 for m in counted))


def _counts(weights: int, zeros: int | None, share: float | None) -> list[str]:
    return [f"{weights:,}", f"{zeros:,}" if zeros is not None else "–", _share(share)]


def _share(share: float | None) -> str:
    return f"{share:.2%}" if share is not None else "–"
