"""`sqft report`."""

from __future__ import annotations

from pathlib import Path

import click

from sqft.cli.completion import complete_run_or_sweep
from sqft.cli.options import store_option
from sqft.cli.output import report_errors


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, shell_complete=complete_run_or_sweep)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write.  [default: report.html in the folder of the first run]",
)
@store_option
@report_errors
def report(runs: tuple[str, ...], output: Path | None, store: Path) -> None:
    """Write a page that shows what runs did: results, loss, search, ranks, errors of layers, cost, recipe.

    RUN is a folder of store/runs, its name, or the recipe's name (then its newest run is taken). Several runs are
    compared on the same items with the first. It may also be one sweep, a folder of store/sweeps or its name: each
    measure is then drawn by the axis of numbers. The page is one file and needs no network.
    """
    from sqft.errors import SqftError
    from sqft.store.runs import find_run
    from sqft.tools.run_report.facts import read_facts
    from sqft.tools.run_report.page import render
    from sqft.tools.sweep.page import find_sweep, render_sweep
    from sqft.utils.files import reason, write_text

    if sweep := next(filter(None, (find_sweep(run, store) for run in runs)), None):
        if len(runs) > 1:
            raise SqftError(f"{sweep} is a sweep, with a page of its own; name it alone, or name runs only")
        page, folder = render_sweep(sweep), sweep
    else:
        folders = {folder.resolve(): root for folder, root in (find_run(run, store) for run in runs)}
        found = [read_facts(folder, root) for folder, root in folders.items()]
        page, folder = render(found), found[0].folder
    file = output or folder / "report.html"
    try:
        write_text(file, page)
    except OSError as error:
        raise SqftError(f"{file} cannot be written: {reason(error)}; name another with --output") from None
    click.echo(f"page: {file}")
