"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click

disable_option = click.option("--disable", multiple=True, metavar="PLUGIN", help="Skip a plugin (repeatable).")


store_option = click.option(
    "--store",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("store"),
    show_default=True,
    help="Folder of artifacts and runs.",
)


set_option = click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change the recipe (repeatable): sparsify.sparsity=0.6",
)


json_option = click.option("--json", "as_json", is_flag=True, help="As JSON.")
