"""What is installed, by whom, and what is broken.

Distributions are walked here and not by pluggy's loader, which skips a second entry point of one
name without a word and stops at the first import that fails. A plugin that fails is kept as
`Broken`: it never stops an unrelated run, and is repeated in the error of whoever misses it.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pluggy
from packaging.requirements import InvalidRequirement, Requirement

import sqft
from sqft import hookspecs
from sqft.contracts import KINDS, Component
from sqft.errors import PluginError

GROUP = "sqft"
NAME = re.compile(r"[a-z][a-z0-9-]*")
INSTALL_FREE = "added by this process"


@dataclass(frozen=True, slots=True)
class Provider:
    """Who offers a component: a plugin's name and its distribution ("sqft-ria 0.3")."""

    plugin: str
    source: str

    def __str__(self) -> str:
        return f"{self.plugin} ({self.source})"


@dataclass(frozen=True, slots=True)
class Entry:
    """A component class and its provider."""

    component: type[Component]
    provider: Provider

    @property
    def code(self) -> str:
        """Digest of every .py file of the component's top-level package, so that edits are noticed.

        A class typed into a script or notebook enters by its own source, or, where even that cannot
        be had, by a random word: what it made is then never taken for something newer.
        """
        package = self.component.__module__.partition(".")[0]
        if package != "__main__" and (digest := package_digest(package)):
            return digest
        try:
            return hashlib.sha256(inspect.getsource(self.component).encode()).hexdigest()
        except (OSError, TypeError):
            return os.urandom(16).hex()

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


class Registry:
    """The plugins of one process.

    `Registry.discover()` finds the installed ones; `Registry()` is empty, and `add` takes a module or
    object with hook implementations, installed or not. Nothing here is global.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("sqft")
        self._manager.add_hookspecs(hookspecs)
        self._entries: dict[tuple[str, str], list[Entry]] = {}
        self._broken: list[Broken] = []

    @classmethod
    def discover(cls, disable: Iterable[str] = ()) -> Registry:
        """A registry of every installed plugin, less those named here or in SQFT_DISABLE (commas)."""
        registry = cls()
        skipped = {*disable, *filter(None, os.environ.get("SQFT_DISABLE", "").split(","))}
        for distribution in _distributions():
            for point in distribution.entry_points.select(group=GROUP):
                if point.name not in skipped:
                    registry._load(point, distribution)
        return registry

    def add(self, plugin: object, name: str | None = None, source: str = INSTALL_FREE) -> None:
        """Add a module or object with hook implementations.

        Raises:
            PluginError: when it, or a component it offers, breaks the rules for plugins.
        """
        known = len(self._broken)
        self._register(plugin, Provider(name or str(getattr(plugin, "__name__", repr(plugin))), source))
        if failures := self._broken[known:]:
            raise PluginError("\n".join(map(str, failures)))

    def get(self, kind: str, name: str) -> Entry:
        """The entry of that kind and name; "plugin/name" picks one when several offer the name.

        Raises:
            PluginError: when there is none (with suggestions and broken plugins) or more than one.
        """
        plugin, _, bare = name.rpartition("/")
        found = self._entries.get((kind, bare), [])
        if plugin:
            found = [entry for entry in found if entry.provider.plugin == plugin]
        if len(found) == 1:
            return found[0]
        if found:
            offers = ", ".join(
                f"{entry.provider.plugin}/{bare} ({entry.provider.source})"
                for entry in sorted(found, key=lambda entry: str(entry.provider))
            )
            raise PluginError(f"{kind} '{bare}' is offered more than once: {offers}. Write the one you mean.")
        raise PluginError(self._missing(kind, name))

    def entries(self) -> list[Entry]:
        """Every usable component, by kind and name."""
        order = list(KINDS)
        flat = [entry for found in self._entries.values() for entry in found]
        return sorted(flat, key=lambda e: (order.index(e.component.kind), e.component.name, str(e.provider)))

    def broken(self) -> list[Broken]:
        """What could not be used, and why."""
        return list(self._broken)

    def notify(self, hook: str, **arguments: object) -> Iterator[tuple[str, Exception]]:
        """Call a notification on every plugin; yield (plugin, error) for those that raised."""
        for impl in getattr(self._manager.hook, hook).get_hookimpls():
            try:
                impl.function(**{name: arguments[name] for name in impl.argnames})
            except Exception as error:  # a tracker must never stop a run
                yield impl.plugin_name, error

    def _missing(self, kind: str, name: str) -> str:
        names = sorted({bare for (other, bare) in self._entries if other == kind})
        message = f"no {kind} named '{name}'; installed: {', '.join(names) or 'none'}."
        if close := difflib.get_close_matches(name.rpartition("/")[2], names, n=1):
            message += f" Did you mean '{close[0]}'?"
        return "\n    ".join([message, *map(str, self._broken)])

    def _load(self, point: metadata.EntryPoint, distribution: metadata.Distribution) -> None:
        provider = Provider(point.name, f"{distribution.name} {distribution.version}")
        if wrong := _version_mismatch(distribution):
            self._break(provider, wrong)
            return
        try:
            plugin = point.load()
        except (Exception, SystemExit) as error:
            self._break(provider, f"could not be loaded: {type(error).__name__}: {error}")
            return
        self._register(plugin, provider)

    def _register(self, plugin: object, provider: Provider) -> None:
        name = provider.plugin
        if self._manager.has_plugin(name) or self._manager.is_registered(plugin):
            self._break(provider, "is a second plugin of that name; the first one is used")
            return
        try:
            self._manager.register(plugin, name=name)
            self._check_hook_names(plugin)
        except (pluggy.PluginValidationError, PluginError) as error:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            self._break(provider, f"does not fit sqft's hooks: {str(error).splitlines()[-1]}")
            return
        for kind, hook in hookspecs.COMPONENT_HOOKS.items():
            self._collect(kind, hook, plugin, provider)

    def _check_hook_names(self, plugin: object) -> None:
        """Refuse a marked function that is no hook of ours: a misspelt hook would be ignored."""
        hooks = [name for name in vars(hookspecs) if name.startswith("sqft_")]
        for name in dir(plugin):
            marked = self._manager.parse_hookimpl_opts(plugin, name) is not None
            if marked and name not in hooks:
                close = difflib.get_close_matches(name, hooks, n=1)
                hint = f" Did you mean '{close[0]}'?" if close else f" Hooks: {', '.join(hooks)}."
                raise PluginError(f"there is no hook '{name}'.{hint}")

    def _collect(self, kind: str, hook: str, plugin: object, provider: Provider) -> None:
        """Ask one plugin for one kind, and take what keeps the rules."""
        for impl in getattr(self._manager.hook, hook).get_hookimpls():
            if impl.plugin is not plugin:
                continue
            try:
                offered = list(impl.function() or ())
            except Exception as error:
                self._break(provider, f"failed in {hook}: {type(error).__name__}: {error}")
                continue
            for component in offered:
                if wrong := _component_mistake(kind, hook, component):
                    self._break(provider, wrong)
                    continue
                entry = Entry(component, provider)
                self._entries.setdefault((kind, component.name), []).append(entry)

    def _break(self, provider: Provider, reason: str) -> None:
        self._broken.append(Broken(provider.plugin, provider.source, reason))


def _component_mistake(kind: str, hook: str, component: Any) -> str | None:
    """What keeps this object from being a component of that kind, or None."""
    base = KINDS[kind]
    label = getattr(component, "__name__", repr(component))
    if not inspect.isclass(component) or not issubclass(component, base):
        return f"offers {label!r} through {hook}, which takes classes derived from {base.__name__}"
    name = getattr(component, "name", None)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return f"offers {label}, whose name is {name!r}; a name is lower-case letters, digits and dashes"
    abstract = [verb for verb, method in vars(base).items() if _is_stub(method)]
    missing = [verb for verb in abstract if getattr(component, verb) is getattr(base, verb)]
    if missing:
        return f"offers {kind} '{name}', which does not define {', '.join(f'{verb}()' for verb in missing)}"
    if kind == "merger" and not hasattr(component, "bases"):
        return f"offers merger '{name}', which does not say which `bases` it works on"
    return None


def _is_stub(method: object) -> bool:
    return inspect.isfunction(method) and method.__code__.co_names == ("NotImplementedError",)


def _distributions() -> Iterator[metadata.Distribution]:
    """Installed distributions, each once (the first on the path is the one Python imports)."""
    seen: set[str] = set()
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name and name not in seen:
            seen.add(name)
            yield distribution


def _version_mismatch(distribution: metadata.Distribution) -> str | None:
    """Compare the plugin's own requirement on sqft with this version, before importing it."""
    for line in distribution.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ours = requirement.name == "sqft" and applies and distribution.name != "sqft"
        if ours and not requirement.specifier.contains(sqft.__version__, prereleases=True):
            return f"needs sqft{requirement.specifier}, this is sqft {sqft.__version__}"
    return None


@cache
def package_digest(package: str) -> str:
    """Digest of every .py file of an importable top-level package or module; "" when it has no files."""
    try:
        spec = util.find_spec(package)
    except ValueError:  # a module made by hand has no spec
        spec = None
    if spec is None or spec.origin is None or not spec.has_location:
        return ""
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    return digest_files(files, origin.parent)


def digest_files(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over names (relative to root) and contents."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(root).as_posix()}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
