"""What is installed, by whom, and what is broken.

Distributions are walked here and not by pluggy's loader, which skips a second entry point of one
name without a word and stops at the first import that fails. A plugin that fails is kept as
`Broken`: it never stops an unrelated run, and is repeated in the error of whoever misses it.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from importlib import metadata
from types import SimpleNamespace

import pluggy

from sqft import __version__
from sqft.components import hookspecs
from sqft.components.discovery import GROUP, distributions, version_mismatch
from sqft.components.kinds import KINDS, Component
from sqft.components.registration import Broken, Provider, Registration
from sqft.components.validation import component_mistake
from sqft.errors import PluginError

OURS = f"sqft {__version__}"
"""The source of the plugins that come with sqft."""
NOT_INSTALLED = "added by this process"
"""The source of a plugin that `Registry.add` was given, in the place of a distribution's name and version."""


class Registry:
    """The plugins of one process.

    `Registry.discover()` finds the installed ones; `Registry()` is empty, and `add` takes a module or
    object with hook implementations, installed or not. Nothing here is global.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("sqft")
        self._manager.add_hookspecs(hookspecs)
        self._entries: dict[tuple[str, str], list[Registration]] = {}
        self._broken: list[Broken] = []

    @classmethod
    def discover(cls, disable: Iterable[str] = ()) -> Registry:
        """Return a registry of every installed plugin, except those named here or in SQFT_DISABLE (commas)."""
        registry = cls()
        skipped = {*disable, *filter(None, os.environ.get("SQFT_DISABLE", "").split(","))}
        for distribution in distributions():
            for point in distribution.entry_points.select(group=GROUP):
                if point.name not in skipped:
                    registry._load(point, distribution)
        return registry

    def add(self, plugin: object, name: str | None = None, source: str = NOT_INSTALLED) -> None:
        """Add a module or object with hook implementations, or a component class by itself.

        A class that is defined again, as by running a cell of a notebook again, takes the place of the first one.

        Raises:
            PluginError: when it, or a component it offers, breaks the rules for plugins. Nothing of it is then added.
        """
        known, label = len(self._broken), str(getattr(plugin, "__name__", repr(plugin)))
        provider = Provider(name or label, source)
        if inspect.isclass(plugin) and issubclass(plugin, Component) and getattr(plugin, "kind", None) in KINDS:
            offer = hookspecs.hookimpl(lambda component=plugin: [component])
            hook = hookspecs.COMPONENT_HOOKS[plugin.kind]
            if wrong := component_mistake(plugin.kind, hook, plugin):
                raise PluginError(str(Broken(provider.plugin, provider.source, wrong)))
            if self._is_new_version(plugin, provider):
                self._remove(provider)
            plugin = SimpleNamespace(**{hook: offer})
        self._register(plugin, provider)
        if failures := self._broken[known:]:
            del self._broken[known:]
            if self._manager.get_plugin(provider.plugin) is plugin:
                self._remove(provider)
            raise PluginError("\n".join(map(str, failures)))

    def _is_new_version(self, component: type[Component], provider: Provider) -> bool:
        """Return whether a class stands where the one stood that `provider` offers, as after an edit.

        All classes that a function makes stand in one place: of these, only those of one component's name are versions.
        """
        offered = [one.component for one in self.entries() if one.provider == provider]
        places = {(one.__module__, one.__qualname__) for one in offered}
        named_alike = all((one.kind, one.name) == (component.kind, component.name) for one in offered)
        made_by_function = "<locals>" in component.__qualname__
        return places == {(component.__module__, component.__qualname__)} and (named_alike or not made_by_function)

    def _remove(self, provider: Provider) -> None:
        self._manager.unregister(name=provider.plugin)
        left = {
            name: [registration for registration in offered if registration.provider != provider]
            for name, offered in self._entries.items()
        }
        self._entries = {name: offered for name, offered in left.items() if offered}

    def get(self, kind: str, name: str) -> Registration:
        """Return the registration of that kind and name; "plugin/name" picks one when several offer the name.

        Of installed plugins that offer one name, sqft's own is taken, so that no other package changes a recipe.

        Raises:
            PluginError: when there is none (with suggestions and broken plugins) or more than one.
        """
        plugin, _, bare = name.rpartition("/")
        offered = self._entries.get((kind, bare), [])
        if plugin:
            offered = [registration for registration in offered if registration.provider.plugin == plugin]
        elif not any(registration.provider.source == NOT_INSTALLED for registration in offered):
            offered = [registration for registration in offered if registration.provider.source == OURS] or offered
        if len(offered) == 1:
            return offered[0]
        if offered:
            offers = ", ".join(
                f"{registration.provider.plugin}/{bare} ({registration.provider.source})"
                for registration in sorted(offered, key=lambda registration: str(registration.provider))
            )
            raise PluginError(f"{kind} '{bare}' is offered more than once: {offers}. Write the one you mean.")
        raise PluginError(self._missing(kind, name))

    def entries(self) -> list[Registration]:
        """Return every usable component, sorted by kind and name."""
        order = list(KINDS)
        flat = [registration for offered in self._entries.values() for registration in offered]
        return sorted(flat, key=lambda e: (order.index(e.component.kind), e.component.name, str(e.provider)))

    def broken(self) -> list[Broken]:
        """Return the plugins and components that cannot be used, and why."""
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
        if wrong := version_mismatch(distribution):
            self._break(provider, wrong)
            return
        try:
            with redirect_stdout(sys.stderr):  # what a plugin prints is no output of a command
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
                with redirect_stdout(sys.stderr):
                    offered = list(impl.function() or ())
            except (Exception, SystemExit) as error:
                self._break(provider, f"failed in {hook}: {type(error).__name__}: {error}")
                continue
            for component in offered:
                if wrong := component_mistake(kind, hook, component):
                    self._break(provider, wrong)
                    continue
                registration = Registration(component, provider)
                self._entries.setdefault((kind, component.name), []).append(registration)

    def _break(self, provider: Provider, reason: str) -> None:
        self._broken.append(Broken(provider.plugin, provider.source, reason))
