"""What will happen: a recipe and a registry make a list of steps, each with a fingerprint.

Pure data, no torch; `sqft.planning.planner` makes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.model_spec import ModelSpec
from sqft.components.kinds import Component
from sqft.components.registration import Registration
from sqft.planning.estimates import Estimate
from sqft.recipe.fields import Section
from sqft.recipe.recipe import Recipe
from sqft.utils.text import human


@dataclass(frozen=True)
class ResolvedComponent:
    """A component of a step: its entry in the registry and its validated options."""

    registration: Registration
    component: Component

    @property
    def identity(self) -> dict[str, Any]:
        cls = self.registration.component
        return {
            "name": cls.name,
            "provider": self.registration.provider.source,
            "class": f"{cls.__module__}.{cls.__qualname__}",
            "options": self.component.model_dump(mode="json"),
            "code": self.registration.code,
        }


@dataclass(frozen=True)
class Step:
    """One artifact to be: `name` is unique ("evaluate:search"), `inputs` map roles to steps' names."""

    name: str
    stage: str
    section: Section
    components: Mapping[str, ResolvedComponent]
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

    @property
    def model_spec(self) -> ModelSpec:
        """The recipe's own model, in the recipe's precision."""
        model = self.recipe.model
        return ModelSpec(self.source.path, model.dtype, model.trust_remote_code)

    def spec(self, folder: Path | None) -> ModelSpec:
        """A model folder that a step wrote, in the precision it is stored in; for None, the recipe's own model."""
        if folder is None or folder == self.source.path:
            return self.model_spec
        return ModelSpec(folder, trust_remote_code=self.recipe.model.trust_remote_code)

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    def __str__(self) -> str:
        rows = [("STEP", "", "PARTS", "PARAMETERS", "STORAGE", "MEMORY")]
        for step in self.steps:
            rows.append(
                (
                    step.name,
                    "reuse" if step.name in self.reused else "run",
                    ", ".join(
                        f"{p.registration.component.name} ({p.registration.provider.source})"
                        for p in step.components.values()
                    ),
                    f"{step.estimate.parameters:,}",
                    human(step.estimate.storage),
                    human(step.estimate.memory),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
