"""What is installed: plugins, their components, the recipe's schema."""

from __future__ import annotations

import json
from typing import Any

import click

from sqft.cli.group import main
from sqft.cli.options import disable_option, json_option
from sqft.cli.output import explained
from sqft.errors import PluginError


def _kinds(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """What a shell may complete a kind to."""
    from sqft.components.kinds import KINDS

    return [kind for kind in KINDS if kind.startswith(incomplete)]


def _names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """What a shell may complete the name of a component of the kind before it to."""
    from sqft.components.registry import Registry

    entries = [registration.component for registration in Registry.discover().entries()]
    kind = context.params.get("kind")
    return [
        registration.name
        for registration in entries
        if registration.kind == kind and registration.name.startswith(incomplete)
    ]


@main.command()
@json_option
@disable_option
@explained
def plugins(as_json: bool, disable: tuple[str, ...]) -> None:
    """List every installed component and every plugin that is broken."""
    from sqft.components.registry import Registry

    registry = Registry.discover(disable)
    rows = [
        {
            "kind": registration.component.kind,
            "name": registration.component.name,
            "plugin": registration.provider.plugin,
            "provider": registration.provider.source,
            "summary": _summary(registration.component),
        }
        for registration in registry.entries()
    ]
    rows += [
        {"kind": "broken", "name": b.plugin, "plugin": b.plugin, "provider": b.source, "summary": b.reason}
        for b in registry.broken()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    heads = ("kind", "name", "provider", "summary")
    lines = [[head.upper() for head in heads], *([row[head] for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads) - 1)] + [0]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@main.command()
@click.argument("kind", shell_complete=_kinds)
@click.argument("name", shell_complete=_names)
@disable_option
@explained
def show(kind: str, name: str, disable: tuple[str, ...]) -> None:
    """Help of one component: what it does, its options with defaults and ranges.

    KIND is a word of the first column of `sqft plugins`, NAME of the second.
    """
    import inspect

    from sqft.components.kinds import KINDS
    from sqft.components.registry import Registry
    from sqft.tools.json_schema import option_lines

    if kind not in KINDS:
        raise PluginError(f"there is no kind '{kind}' of component; kinds: {', '.join(KINDS)}")
    registration = Registry.discover(disable).get(kind, name)
    click.echo(f"{kind} {registration.component.name}, offered by {registration.provider}\n")
    click.echo(inspect.getdoc(registration.component) or "(no description)")
    click.echo("\noptions:" if registration.component.model_fields else "\nno options")
    for line in option_lines(registration.component):
        click.echo(f"  {line}")


@main.command()
@disable_option
@explained
def schema(disable: tuple[str, ...]) -> None:
    """Print the JSON Schema of a recipe, with the options of every installed plugin."""
    from sqft.components.registry import Registry
    from sqft.tools.json_schema import recipe_schema

    click.echo(json.dumps(recipe_schema(Registry.discover(disable)), indent=2))


def _summary(component: type[Any]) -> str:
    return (component.__doc__ or "").strip().partition("\n")[0]
