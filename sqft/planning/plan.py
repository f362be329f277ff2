"""What will happen: a recipe and a registry make a list of steps, each with a fingerprint.

Pure data, no torch; `sqft.planning.planner` makes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.model_spec import ModelSpec
from sqft.components.kinds import Component
from sqft.components.options import input_paths
from sqft.components.registration import Registration
from sqft.planning.adapter_base import AdapterBase
from sqft.planning.estimates import Estimate
from sqft.planning.table import aligned, plan_table
from sqft.recipe.fields import Section
from sqft.recipe.recipe import Recipe
from sqft.utils.text import html_table

C = TypeVar("C", bound=Component)
K = TypeVar("K", bound=Component, covariant=True)


@dataclass(frozen=True)
class ResolvedComponent(Generic[K]):
    """A component of a step, of one kind: its entry in the registry and its validated options."""

    registration: Registration
    component: K

    @property
    def label(self) -> str:
        """The component as error messages name it, with its distribution."""
        return str(self.registration)

    @property
    def identity(self) -> dict[str, Any]:
        """What the fingerprint and the manifest say of it: name, provider, class, options (without paths: the files are
        the step's) and a digest of its code."""
        cls = self.registration.component
        return {
            "name": cls.name,
            "provider": self.registration.provider.source,
            "class": f"{cls.__module__}.{cls.__qualname__}",
            "options": self.component.model_dump(mode="json", exclude=set(input_paths(self.component))),
            "code": self.registration.code,
        }

    @property
    def files(self) -> dict[str, Path]:
        """The files and folders that its options name, by option."""
        return {name: Path(getattr(self.component, name)) for name in input_paths(self.component)}


@dataclass(frozen=True)
class Step:
    """One artifact to be: `name` is unique ("evaluate:search"), `inputs` map roles to steps' names."""

    name: str
    stage: str
    section: Section
    components: Mapping[str, ResolvedComponent[Component]]
    inputs: Mapping[str, str]
    estimate: Estimate
    layers: tuple[str, ...] = ()
    """The linear layers that it prunes, quantizes or adapts, in order."""
    streamed: bool = False
    """Whether it reads, changes and writes the model one decoder block at a time, and never has all of it in memory."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """What it reads, by role: "calibration", a place in its section, or an option ("scorer.folder")."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Content digest of each file or folder, as it enters the fingerprint."""
    fingerprint: str = ""
    """Digest of all that its result depends on."""
    measurements: Mapping[str, str] = field(default_factory=dict)
    """Of `evaluate`, what each measurement depends on: the fingerprint of a step that has no other."""

    def __repr__(self) -> str:
        named = [f"{kind} {one.registration.component.name}" for kind, one in self.components.items()]
        layers = [f"{len(self.layers):,} layers"] if self.layers else []
        return f"<Step {self.name}{': ' if named or layers else ''}{', '.join(named + layers)}>"

    def files_of_options(self) -> dict[str, Path]:
        """Return the files that its components' options name, by role: a kind and an option, "scorer.folder"."""
        found = ((kind, component.files) for kind, component in self.components.items())
        return {f"{kind}.{option}": path for kind, files in found for option, path in files.items()}

    def component(self, kind: type[C]) -> C:
        """Return this step's component of a kind: `step.component(Scorer)`."""
        return cast(C, self.components[kind.kind].component)

    def label(self, kind: type[Component]) -> str:
        """Return that component's name as error messages show it, with its distribution."""
        return self.components[kind.kind].label


def model_spec(recipe: Recipe, path: Path) -> ModelSpec:
    """Return how a recipe's own model is loaded, from where it was found."""
    return ModelSpec(path, recipe.model.dtype, recipe.model.trust_remote_code, recipe.model.dequantize)


@dataclass(frozen=True)
class Plan:
    """The steps of a recipe, in order, and which of them the store already has."""

    recipe: Recipe
    source: ModelSource
    adapter_base: AdapterBase
    """What lies under the adapters, or would if the recipe trained any."""
    steps: tuple[Step, ...]
    reused: frozenset[str] = frozenset()
    taught_by: ModelSource | None = None
    """The model that `finetune` learns from beside the labels, if there is one."""
    notes: tuple[str, ...] = ()
    """What the user should know before the run, though it hinders none: each begins with a place in the recipe."""

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("".join(step.fingerprint for step in self.steps).encode()).hexdigest()

    @property
    def model_spec(self) -> ModelSpec:
        """The recipe's own model, in the recipe's precision."""
        return model_spec(self.recipe, self.source.path)

    @property
    def teacher(self) -> ModelSpec | None:
        """The model whose predictions `finetune` learns, in the recipe's precision; None when there is none."""
        if (source := self.taught_by) is None:
            return None
        return dataclasses.replace(self.model_spec, path=source.path, dequantize=source.dequantize)

    def spec(self, path: Path) -> ModelSpec:
        """Return the spec of a model that a step wrote, in the precision it is stored in, or of the recipe's own."""
        if path == self.source.path:
            return self.model_spec
        return ModelSpec(path, trust_remote_code=self.recipe.model.trust_remote_code)

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    def __repr__(self) -> str:
        steps = [f"{step.name} (reused)" if step.name in self.reused else step.name for step in self.steps]
        return f"<Plan {self.recipe.name}: {', '.join(steps)}>"

    def __str__(self) -> str:
        return aligned(*self._table())

    def _repr_html_(self) -> str:
        """Return the table and the notes, as notebooks show them."""
        notes = "".join(f"<p>note: {escape(note)}</p>" for note in self.notes)
        return html_table(self.recipe.name, *self._table()) + notes

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        def components(step: Step) -> list[str]:
            offered = [component.registration for component in step.components.values()]
            return [f"{one.component.name} ({one.provider.source})" for one in offered]

        return plan_table((step.name, step.name in self.reused, components(step), step.estimate) for step in self.steps)
