"""The group that all commands belong to."""

from __future__ import annotations

import click

import sqft


@click.group()
@click.version_option(sqft.__version__, prog_name="sqft")
def main() -> None:
    """One small, fast model out of a large one: sparse, low-precision, fine-tuned, merged."""
