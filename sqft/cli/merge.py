"""`sqft merge`."""

from __future__ import annotations

from pathlib import Path

import click

from sqft.cli.completion import complete_run
from sqft.cli.options import device_option, disable_option, output_option, set_option, store_option
from sqft.cli.output import report_errors
from sqft.cli.running import check_output, open_orchestrator, print_result


@click.command()
@click.argument("run", metavar="RUN", shell_complete=complete_run)
@set_option
@device_option
@store_option
@output_option
@disable_option
@report_errors
def merge(
    run: str, changes: tuple[str, ...], device: str, store: Path, output: Path | None, disable: tuple[str, ...]
) -> None:
    """Run the recipe of RUN up to the merge. The store keeps the recipe; its own file is not needed.

    RUN is a folder of store/runs, its name, or the recipe's name (then its newest run is taken).
    """
    from sqft.store.runs import find_run

    check_output(output)
    folder, store = find_run(run, store)
    screen, orchestrator = open_orchestrator(store, device, disable)
    plan = orchestrator.load(folder / "recipe.json", ["merge={}", *changes])
    print_result(screen, orchestrator.run(plan, "merge"), output)
