"""Commands that look and run nothing: at a model, a store, this machine."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sqft.cli.base import console, explained, json_option, main, show_table


@main.command()
@click.argument("model", metavar="MODEL_DIR", type=click.Path(path_type=Path))
@json_option
@explained
def inspect(model: Path, as_json: bool) -> None:
    """Say how sparse the model in MODEL_DIR is and in what precision, layer by layer.

    Floats, GPTQ and compressed-tensors checkpoints, adapters, GGUF files; an artifact's folder will do.
    One tensor is in memory at a time.
    """
    from sqft.inspection import inspect_model
    from sqft.progress import tracker

    found = inspect_model(model, tracker(console(err=True)))
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
        return
    for line in found.lines():
        click.echo(line)
    show_table(console(), str(found.path), *found.table())
