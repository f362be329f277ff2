"""What will happen: a recipe and a registry make a list of steps, each with a fingerprint.

Pure data, no torch; `sqft.planner` makes it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqft.contracts import Component, LinearShape, Statistic
from sqft.recipe import Calibration, Finetune, Recipe
from sqft.registry import Entry
from sqft.sections import Section
from sqft.source import ModelSource

BLOCK = re.compile(r".*?\.\d+\.")
"""What the names of a decoder block's layers begin with."""
HESSIANS = 4 << 30
"""Bytes of Hessians that are summed at once where layers are compressed one input after the other."""


@dataclass(frozen=True)
class Part:
    """A component of a step: its entry in the registry and its validated options."""

    entry: Entry
    component: Component

    @property
    def identity(self) -> dict[str, Any]:
        cls = self.entry.component
        return {
            "name": cls.name,
            "provider": self.entry.provider.source,
            "class": f"{cls.__module__}.{cls.__qualname__}",
            "options": self.component.model_dump(mode="json"),
            "code": self.entry.code,
        }


@dataclass(frozen=True)
class Estimate:
    """What a step is expected to need: numbers from headers and settings, before anything is loaded."""

    parameters: int
    storage: int  # bytes its artifact will take
    memory: int  # bytes at its peak


@dataclass(frozen=True)
class Step:
    """One artifact to be: `name` is unique ("evaluate:search"), `inputs` map roles to steps' names."""

    name: str
    stage: str
    section: Section
    parts: Mapping[str, Part]
    inputs: Mapping[str, str]
    fingerprint: str
    estimate: Estimate
    files: Mapping[str, Path] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of each file, or folder, as the fingerprint has it."""


@dataclass(frozen=True)
class Plan:
    """The steps of a recipe, in order, and which of them the store already has."""

    recipe: Recipe
    source: ModelSource
    steps: tuple[Step, ...]
    reused: frozenset[str] = frozenset()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("".join(step.fingerprint for step in self.steps).encode()).hexdigest()

    @property
    def quantized(self) -> bool:
        """Whether codes lie under the adapters."""
        return self.recipe.quantize is not None or self.source.quantization is not None

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    def __str__(self) -> str:
        rows = [("STEP", "", "PARTS", "PARAMETERS", "STORAGE", "MEMORY")]
        for step in self.steps:
            rows.append(
                (
                    step.name,
                    "reuse" if step.name in self.reused else "run",
                    ", ".join(f"{p.entry.component.name} ({p.entry.provider.source})" for p in step.parts.values()),
                    f"{step.estimate.parameters:,}",
                    human(step.estimate.storage),
                    human(step.estimate.memory),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def activation_bytes(source: ModelSource, section: Finetune) -> int:
    """Bytes kept for backward: an upper bound, for every example as long as max_length."""
    size = source.size
    hidden, layers = size("hidden_size"), size("num_hidden_layers", default=1)
    inner = size("intermediate_size", default=4 * hidden)
    tokens = section.batch_size * section.max_length
    kept = (hidden if section.gradient_checkpointing else 14 * hidden + 4 * inner) * layers
    labels = tokens if section.loss_on == "all" else tokens // 4
    logits = size("vocab_size") * 3 * min(labels, section.loss_chunk or labels)
    return 4 * (tokens * kept + logits)


def calibration_bytes(
    source: ModelSource,
    calibration: Calibration | None,
    needs: frozenset[Statistic],
    layers: Iterable[LinearShape],
    sequential: bool = False,
) -> int:
    """Bytes that the calibration walk takes beside the model: hidden states of all windows and, where a component needs
    them, the Hessians of a block's layers, which are summed at once (with `sequential`, those of one module and width,
    up to `HESSIANS`), with three more of the widest's size for whoever inverts it."""
    if calibration is None:
        return 0
    states = 3 * calibration.samples * calibration.length * source.size("hidden_size") * 4
    together: Counter[tuple[str, ...]] = Counter()
    widest = 0
    for layer in layers if Statistic.HESSIAN in needs else ():
        block, inner = BLOCK.match(layer.name), layer.in_features
        within = layer.name[block.end() :] if block else layer.name
        # Experts are one module, whatever their number.
        place = (re.sub(r"\d+", "*", within.rpartition(".")[0]), str(inner)) if sequential else ()
        together[block[0] if block else "", *place] += 4 * inner**2
        widest = max(widest, 4 * inner**2)
    at_once = max(together.values(), default=0)
    return states + (min(at_once, max(HESSIANS, widest)) if sequential else at_once) + 3 * widest


def human(size: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def selected(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Whether a layer's full name, or its last part, matches a glob of `include` and none of `exclude`."""
    last = name.rpartition(".")[2]

    def hit(patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(last, p) for p in patterns)

    return hit(include) and not hit(exclude)
