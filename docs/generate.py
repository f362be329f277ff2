"""Write docs/reference from the code: python docs/generate.py (a test compares)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from sqft import Registry, hookspecs
from sqft.cli import main
from sqft.mistakes import model_in
from sqft.recipe import Recipe
from sqft.schema import option_lines

FOLDER = Path(__file__).parent / "reference"


def hooks() -> Iterator[str]:
    yield "# Hooks"
    for name, hook in inspect.getmembers(hookspecs, inspect.isfunction):
        if name.startswith("sqft_"):
            yield f"## `{name}{inspect.signature(hook)}`".replace("'", "")
            yield inspect.getdoc(hook) or ""


def components() -> Iterator[str]:
    yield "# Components"
    for entry in Registry.discover().entries():
        if entry.provider.source.startswith("sqft "):
            yield f"## {entry.component.kind} `{entry.component.name}`"
            yield inspect.getdoc(entry.component) or ""
            if lines := list(option_lines(entry.component)):
                yield "\n".join(f"- `{line}`" for line in lines)


def commands() -> Iterator[str]:
    yield "# Commands"
    for name, command in sorted(main.commands.items()):
        context = click.Context(command, info_name=f"sqft {name}", max_content_width=100, terminal_width=100)
        yield f"## sqft {name}"
        yield f"```text\n{command.get_help(context)}\n```"


def recipe() -> Iterator[str]:
    yield "# Recipe"
    yield inspect.getdoc(Recipe) or ""
    for name, field in Recipe.model_fields.items():
        yield f"## `{field.alias or name}`"
        section = model_in(field.annotation)
        if section is None:
            yield field.description or f"Default: {field.default!r}."
            continue
        yield inspect.getdoc(section) or ""
        rows = [
            f"- `{key}`" + (f": {f.description}" if f.description else "") for key, f in section.model_fields.items()
        ]
        yield "\n".join(rows)


PAGES = {"hooks": hooks, "components": components, "commands": commands, "recipe": recipe}


def page(name: str) -> str:
    return "\n\n".join(PAGES[name]()) + "\n"


if __name__ == "__main__":
    for name in PAGES:
        (FOLDER / f"{name}.md").write_text(page(name))
