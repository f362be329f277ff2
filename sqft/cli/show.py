"""`sqft show`."""

from __future__ import annotations

import click

from sqft.cli.completion import complete_kind, complete_name
from sqft.cli.options import disable_option
from sqft.cli.output import report_errors
from sqft.errors import PluginError


@click.command()
@click.argument("kind", shell_complete=complete_kind)
@click.argument("name", required=False, shell_complete=complete_name)
@disable_option
@report_errors
def show(kind: str, name: str | None, disable: tuple[str, ...]) -> None:
    """Print the help of one component: what it does, its options with defaults and ranges.

    KIND is a word of the first column of `sqft plugins`, NAME of the second. Without NAME, list the components of KIND.
    """
    import inspect

    from sqft.components.kinds import KINDS
    from sqft.components.registry import Registry
    from sqft.tools.field_facts import field_facts

    if kind not in KINDS:
        raise PluginError(f"there is no kind '{kind}' of component; kinds: {', '.join(KINDS)}")
    registry = Registry.discover(disable)
    if name is None:
        for registration in registry.entries():
            if registration.component.kind == kind:
                summary = (inspect.getdoc(registration.component) or "(no description)").partition("\n")[0]
                click.echo(f"{registration.component.name}: {summary}")
        return
    registration = registry.get(kind, name)
    click.echo(f"{kind} {registration.component.name}, offered by {registration.provider}\n")
    click.echo(inspect.getdoc(registration.component) or "(no description)")
    click.echo("\noptions:" if registration.component.model_fields else "\nno options")
    for facts in field_facts(registration.component):
        click.echo(f"  {facts}")
