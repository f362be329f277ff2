"""A component class as the registry holds it: who provides it, and which plugins cannot be used."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from sqft.components.kinds import Component
from sqft.utils.code_digest import cells_digest, digest_files, package_digest


@dataclass(frozen=True, slots=True)
class Provider:
    """Who offers a component: a plugin's name and its distribution ("sqft-ria 0.3")."""

    plugin: str
    source: str

    def __str__(self) -> str:
        return f"{self.plugin} ({self.source})"


@dataclass(frozen=True, slots=True)
class Registration:
    """A component class and its provider."""

    component: type[Component]
    provider: Provider

    @property
    def code(self) -> str:
        """Digest of every .py file of the component's top-level package, so that edits are noticed.

        For a class in a script, it is the digest of the script. For a class in a notebook, it is that of the cells that
        define the class and what it calls; if their source is not to be had, it is random, so that results are never
        reused.
        """
        package = self.component.__module__.partition(".")[0]
        if package != "__main__" and (digest := package_digest(package)):
            return digest
        script = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "")
        if package == "__main__" and script.is_file():
            return digest_files([script], script.parent)
        return cells_digest(self.component) or os.urandom(16).hex()

    def __str__(self) -> str:
        return f"{self.component.kind} '{self.component.name}' ({self.provider.source})"


@dataclass(frozen=True, slots=True)
class Broken:
    """A plugin, or one of its components, that cannot be used, and why."""

    plugin: str
    source: str
    reason: str

    def __str__(self) -> str:
        return f"plugin '{self.plugin}' ({self.source}) {self.reason}"
