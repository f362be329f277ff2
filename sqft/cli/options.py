"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click

from sqft.cli.completion import complete_setting

recipe_argument = click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
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
    shell_complete=complete_setting,
    help="Change the recipe (repeatable): sparsify.sparsity=0.6",
)
device_option = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
output_option = click.option(
    "--output", type=click.Path(path_type=Path), help="Also copy the finished model or adapter to this folder."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
