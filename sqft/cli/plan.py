"""`sqft plan`."""

from __future__ import annotations

from pathlib import Path

import click

from sqft.cli.options import disable_option, recipe_argument, set_option, store_option
from sqft.cli.output import report_errors


@click.command()
@recipe_argument
@set_option
@store_option
@disable_option
@report_errors
def plan(recipe: Path, changes: tuple[str, ...], store: Path, disable: tuple[str, ...]) -> None:
    """Check RECIPE and print its steps: what runs, what is reused, estimates. Loads no model."""
    from sqft.components.registry import Registry
    from sqft.execution.earlier_runs import remade_note
    from sqft.execution.memory import shortage_of
    from sqft.execution.orchestrator import Orchestrator
    from sqft.execution.preflight import disk_shortage, unusable

    orchestrator = Orchestrator(Registry.discover(disable), store)
    planned = orchestrator.load(recipe, changes)
    click.echo(str(planned))
    for note in planned.notes:
        click.echo(f"note: {note}")
    missing = [step for step in planned.steps if step.name not in planned.reused]
    if shortage := shortage_of(planned, [step.name for step in missing], "cpu", orchestrator.plan):
        click.echo(f"note: on this machine, {shortage.message}")
    if lacking := unusable(orchestrator.store) or disk_shortage(orchestrator.store, missing):
        click.echo(f"note: on this machine, {lacking}")
    if note := remade_note(orchestrator.store, planned.recipe, missing):
        click.echo(note)
