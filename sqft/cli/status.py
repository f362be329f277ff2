"""`sqft status`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from sqft.cli.options import json_option, store_option
from sqft.cli.output import console, report_errors, show_table
from sqft.errors import SqftError
from sqft.store.artifacts import Store
from sqft.store.status import ArtifactStatus, prune, scan_store, total
from sqft.utils.text import human_size


@click.command()
@store_option
@json_option
@click.option(
    "--prune",
    "pruning",
    is_flag=True,
    help="Delete the artifacts that no run needs, and unfinished work that no process is busy with; say why others "
    "are kept.",
)
@click.option("--yes", is_flag=True, help="Do not ask before deleting.")
@report_errors
def status(store: Path, as_json: bool, pruning: bool, yes: bool) -> None:
    """Show what a store holds: runs and their results, artifacts, which runs need them, and how large they are.

    To free what one run alone needs, delete the run's folder, then --prune. Unfinished work is what an interrupted
    run would resume from.
    """
    opened, screen = Store(store), console()
    content = scan_store(opened)
    if not as_json:
        show_table(screen, "runs", *content.runs_table())
        show_table(screen, "artifacts", *content.artifacts_table())
        click.echo(f"in all: {human_size(content.size)}; --prune would delete {human_size(total(content.prunable))}")
    deleted: list[ArtifactStatus] = []
    tried: list[ArtifactStatus] = []
    if pruning and content.prunable:
        for artifact in content.prunable:
            run = f" (run {artifact.runs[0]} would resume from it)" if artifact.runs else ""
            click.echo(f"  {artifact.state} {artifact.folder}: {human_size(artifact.size)}{run}", err=True)
        if yes or _confirmed(content.prunable):
            tried = content.prunable
            deleted = prune(opened, tried)
    if as_json:
        names = [artifact.folder.name for artifact in deleted]
        click.echo(json.dumps(content.as_json() | ({"deleted": names} if pruning else {}), indent=2))
    elif pruning:
        click.echo(f"deleted {len(deleted)} folders, {human_size(total(deleted))}")
        for artifact in scan_store(opened).artifacts:
            if artifact.kept or artifact.folder in [other.folder for other in tried]:
                click.echo(f"kept {artifact.folder}: {artifact.kept or 'a run was busy with it a moment ago'}")


def _confirmed(artifacts: Sequence[ArtifactStatus]) -> bool:
    """Ask whether these artifacts may be deleted."""
    try:
        return click.confirm(f"delete these {len(artifacts)} folders, {human_size(total(artifacts))} in all?", err=True)
    except click.Abort:
        raise SqftError("there was no answer, so nothing is deleted; without a terminal, add --yes") from None
