"""`sqft inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sqft.cli.options import json_option
from sqft.cli.output import console, report_errors, show_table


@click.command()
@click.argument("model", metavar="MODEL_DIR", type=click.Path(path_type=Path))
@json_option
@report_errors
def inspect(model: Path, as_json: bool) -> None:
    """Show how sparse the model in MODEL_DIR is and in what precision, layer by layer and by type of layer, and which
    N:M pattern its pruned layers keep.

    Reads floats, GPTQ and compressed-tensors checkpoints, adapters, GGUF files, and the folder of an artifact.
    A piece of a tensor, or a layer of codes, is in memory at a time.
    """
    from sqft.tools.inspection.reading import inspect_model
    from sqft.utils.progress import tracker

    inspection = inspect_model(model, tracker(console(err=True)))
    if as_json:
        click.echo(json.dumps(inspection.as_json(), indent=2))
        return
    for line in inspection.lines():
        click.echo(line)
    show_table(console(), str(inspection.path), *inspection.table())
    if inspection.types:
        show_table(console(), "linear layers by type", *inspection.types_table())
