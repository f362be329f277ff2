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
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
from packaging.requirements import InvalidRequirement, Requirement

import sqft
from sqft import hookspecs
from sqft.contracts import KINDS, BaseKind, Component, Statistic
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

        A class of a script enters by the whole script, one typed into a notebook by its own source, or, where
        even that cannot be had, by a random word: what it made is then never taken for something newer.
        """
        package = self.component.__module__.partition(".")[0]
        if package != "__main__" and (digest := package_digest(package)):
            return digest
        script = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "")
        if package == "__main__" and script.is_file():
            return digest_files([script], script.parent)
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
        """Add a module or object with hook implementations, or a component class by itself.

        Raises:
            PluginError: when it, or a component it offers, breaks the rules for plugins. Nothing of it is then added.
        """
        known, label = len(self._broken), str(getattr(plugin, "__name__", repr(plugin)))
        if inspect.isclass(plugin) and issubclass(plugin, Component) and getattr(plugin, "kind", None) in KINDS:
            offer = hookspecs.hookimpl(lambda component=plugin: [component])
            plugin = SimpleNamespace(**{hookspecs.COMPONENT_HOOKS[plugin.kind]: offer})
        provider = Provider(name or label, source)
        self._register(plugin, provider)
        if failures := self._broken[known:]:
            del self._broken[known:]
            if self._manager.get_plugin(provider.plugin) is plugin:
                self._manager.unregister(name=provider.plugin)
                for found in self._entries.values():
                    found[:] = [entry for entry in found if entry.provider != provider]
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

    def notify(self, hook: str, **arguments: object) -> Iterator[tuple[str, BaseException]]:
        """Call a notification on every plugin; yield (plugin, error) for those that raised."""
        for impl in getattr(self._manager.hook, hook).get_hookimpls():
            try:
                impl.function(**{name: arguments[name] for name in impl.argnames})
            except (Exception, SystemExit) as error:  # a tracker must never stop a run
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
        """Refuse what would be ignored: a marked function that is no hook of ours, a hook that is not marked, none."""
        hooks = [name for name in vars(hookspecs) if name.startswith("sqft_")]
        marked = [name for name in dir(plugin) if self._manager.parse_hookimpl_opts(plugin, name) is not None]
        for name in marked:
            if name not in hooks:
                close = difflib.get_close_matches(name, hooks, n=1)
                hint = f" Did you mean '{close[0]}'?" if close else f" Hooks: {', '.join(hooks)}."
                raise PluginError(f"there is no hook '{name}'.{hint}")
        if bare := [name for name in hooks if name not in marked and inspect.isroutine(getattr(plugin, name, None))]:
            raise PluginError(f"{bare[0]} is not marked; write @hookimpl (from sqft.api) above it")
        if not marked:
            raise PluginError(f"it implements none of {', '.join(hooks)}")

    def _collect(self, kind: str, hook: str, plugin: object, provider: Provider) -> None:
        """Ask one plugin for one kind, and take what keeps the rules."""
        for impl in getattr(self._manager.hook, hook).get_hookimpls():
            if impl.plugin is not plugin:
                continue
            try:
                offered = list(impl.function() or ())
            except (Exception, SystemExit) as error:
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
    if "name" in component.model_fields:
        return f'offers {label}, whose name is a field; write name = "…" without an annotation'
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return f"offers {label}, whose name is {name!r}; a name is lower-case letters, digits and dashes"
    abstract = [verb for verb, method in vars(base).items() if _is_stub(method)]
    spare = _spare(component)
    missing = [verb for verb in abstract if getattr(component, verb) is getattr(base, verb) and verb not in spare]
    if missing:
        return f"offers {kind} '{name}', which does not define {', '.join(f'{verb}()' for verb in missing)}"
    if kind == "merger" and not hasattr(component, "bases"):
        return f"offers merger '{name}', which does not say which `bases` it works on"
    for attribute, member in (("needs", Statistic), ("bases", BaseKind)):
        words: Any = getattr(component, attribute, frozenset())
        if not isinstance(words, frozenset) or not all(isinstance(word, member) for word in words):
            expected = f"a frozenset of {member.__name__}"
            return f"offers {kind} '{name}', whose `{attribute}` is {words!r}, expected {expected}"
    try:
        component.model_json_schema()
    except Exception as error:
        return f"offers {kind} '{name}', with an option that JSON cannot hold: {str(error).splitlines()[0]}"
    return None


def _spare(component: Any) -> set[str]:
    """The verbs that a component may leave undefined, for what it says of itself."""
    if component.kind == "scorer":
        return {"score"} if component.updates else {"prune"}
    return {"measure"} if component.kind == "allocator" and not component.needs else set()


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
    states = [file.stat() for file in files]
    return _digest(tuple(zip(files, (s.st_mtime_ns for s in states), (s.st_size for s in states), strict=True)), origin)


@cache
def _digest(states: tuple[tuple[Path, int, int], ...], origin: Path) -> str:
    """Files are read once for each state they are seen in: a module edited and reloaded is another."""
    return digest_files([file for file, _, _ in states], origin.parent)


def digest_files(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over names (relative to root) and contents."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(root).as_posix()}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
