"""`sqft schema`."""

from __future__ import annotations

import json

import click

from sqft.cli.options import disable_option
from sqft.cli.output import report_errors


@click.command()
@disable_option
@report_errors
def schema(disable: tuple[str, ...]) -> None:
    """Print the JSON Schema of a recipe, with the options of every installed plugin."""
    from sqft.components.registry import Registry
    from sqft.tools.json_schema import recipe_schema

    click.echo(json.dumps(recipe_schema(Registry.discover(disable)), indent=2))
