"""`sqft plugins`."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import click

from sqft.cli.options import disable_option, json_option
from sqft.cli.output import report_errors


@click.command()
@json_option
@disable_option
@report_errors
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
    offered = Counter((row["kind"], row["name"]) for row in rows)
    for row in rows:
        if row["kind"] != "broken" and offered[row["kind"], row["name"]] > 1:
            row["name"] = f"{row['plugin']}/{row['name']}"  # which a recipe may write
    heads = ("kind", "name", "provider", "summary")
    lines = [[head.upper() for head in heads], *([row[head] for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads) - 1)] + [0]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _summary(component: type[Any]) -> str:
    return (component.__doc__ or "").strip().partition("\n")[0]
