"""`sqft bench`."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from sqft.cli.options import json_option, set_option, store_option
from sqft.cli.output import report_errors


@click.command()
@click.argument("recipes", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path))
@set_option
@store_option
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Measurements of each recipe.")
@click.option("--steps", type=click.IntRange(min=2), default=8, show_default=True, help="Training steps in each round.")
@json_option
@report_errors
def bench(
    recipes: tuple[Path, ...], changes: tuple[str, ...], store: Path, rounds: int, steps: int, as_json: bool
) -> None:
    """Compare RECIPES that fine-tune: storage, speed, memory and accuracy, with ratios to the first.

    Recipes that have not been run are run first. Serving is measured on the CPU, in bfloat16.
    """
    from sqft.tools.bench import HEADS, bench, table

    with redirect_stdout(sys.stderr):  # only the table is output
        rows = bench(recipes, changes, store, rounds, steps, lambda line: click.echo(line, err=True))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for line in (HEADS, ["---"] * len(HEADS), *table(rows)):
        click.echo("| " + " | ".join(line) + " |")
