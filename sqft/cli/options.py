"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

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
    help="Change the recipe (repeatable): sparsify.sparsity=0.6",
)
device_option = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
output_option = click.option(
    "--output", type=click.Path(path_type=Path), help="Also copy the finished model or adapter to this folder."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def complete_run(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a run: the names in the store, or else a path."""
    runs = Path(context.params.get("store") or "store") / "runs"
    names = sorted(file.parent.name for file in runs.glob("*/recipe.json") if file.parent.name.startswith(incomplete))
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]
