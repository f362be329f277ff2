"""`sqft run`."""

from __future__ import annotations

from pathlib import Path

import click

from sqft.cli.completion import complete_stage
from sqft.cli.options import (
    device_option,
    disable_option,
    output_option,
    recipe_argument,
    set_option,
    store_option,
)
from sqft.cli.output import report_errors
from sqft.cli.running import check_output, open_orchestrator, print_result


@click.command()
@recipe_argument
@set_option
@click.option("--until", metavar="STAGE", shell_complete=complete_stage, help="Stop after this stage.")
@click.option(
    "--fresh",
    metavar="STAGE",
    shell_complete=complete_stage,
    help="Make this stage, and all steps that depend on it, again.",
)
@device_option
@store_option
@output_option
@disable_option
@report_errors
def run(
    recipe: Path,
    changes: tuple[str, ...],
    until: str | None,
    fresh: str | None,
    device: str,
    store: Path,
    output: Path | None,
    disable: tuple[str, ...],
) -> None:
    """Run RECIPE: reuse the steps that are done, run the others, print the results."""
    check_output(output)
    screen, orchestrator = open_orchestrator(store, device, disable)
    print_result(screen, orchestrator.run(orchestrator.load(recipe, changes), until, fresh), output)
