"""`sqft doctor`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from sqft.cli.options import json_option, store_option
from sqft.cli.output import report_errors

MARKS = {"ok": "ok", "absent": "-", "wrong": "!"}


@click.command()
@store_option
@json_option
@report_errors
def doctor(store: Path, as_json: bool) -> None:
    """Check this machine and this installation: what works, and what is missing.

    Status 0, or 2 when something that sqft needs is missing or has an unsupported version.
    """
    from sqft.tools.doctor import checks

    done, group = [], ""
    for check in checks(store):
        done.append(check)
        if as_json:
            continue
        if check.group != group:
            group = check.group
            click.echo(f"{group}:")
        note = f"  {check.note}" if check.note else ""
        click.echo(f"  {MARKS[check.state]:2}  {check.name:18}  {check.found}{note}")
    failed = [check for check in done if check.fails]
    if as_json:
        click.echo(json.dumps({"ok": not failed, "checks": [asdict(check) for check in done]}, indent=2))
    if failed:
        lines = "\n".join(f"  {check.name}: {check.found}; {check.note}" for check in failed)
        click.echo(f"error: what sqft needs is missing or wrong\n{lines}", err=True)
        sys.exit(2)
