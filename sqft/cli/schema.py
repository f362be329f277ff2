"""`sqft schema`."""

from __future__ import annotations

import json

import click

from sqft.cli.options import disable_option
from sqft.cli.output import report_errors


@click.command()
@click.option("--sweep", is_flag=True, help="Of a sweep's file, in place of a recipe.")
@disable_option
@report_errors
def schema(sweep: bool, disable: tuple[str, ...]) -> None:
    """Print the JSON Schema of a recipe, or of a sweep, with the options of every installed plugin."""
    from sqft.components.registry import Registry
    from sqft.tools.json_schema import recipe_schema, sweep_schema

    made = (sweep_schema if sweep else recipe_schema)(Registry.discover(disable))
    click.echo(json.dumps(made, indent=2))
