"""Write docs/reference from the code: python docs/generate.py (a test compares)."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from sqft import Registry
from sqft.cli import main
from sqft.components import hookspecs
from sqft.recipe.diagnostics import model_in
from sqft.recipe.recipe import Recipe
from sqft.tools.json_schema import option_lines

FOLDER = Path(__file__).parent / "reference"


def hooks() -> Iterator[str]:
    yield "# Hooks"
    for name, hook in inspect.getmembers(hookspecs, inspect.isfunction):
        if name.startswith("sqft_"):
            yield f"## `{name}`"
            yield _code(_signature(name, hook))
            yield inspect.getdoc(hook) or ""


def components() -> Iterator[str]:
    yield "# Components"
    for entry in Registry.discover().entries():
        if entry.provider.source.startswith("sqft "):
            yield f"## {entry.component.kind} `{entry.component.name}`"
            yield inspect.getdoc(entry.component) or ""
            if lines := list(option_lines(entry.component)):
                yield "\n".join("- `{}`:{}".format(*line.split(":", 1)) for line in lines)


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


def _section(annotation: object) -> type | None:
    if inspect.isclass(annotation) and hasattr(annotation, "model_fields"):
        return annotation
    return next(filter(None, map(_section, getattr(annotation, "__args__", ()))), None)


PYTHON: dict[str, tuple[str, tuple[str, ...]]] = {
    "sqft": ("To plan and run recipes.", ()),
    "sqft.api": ("To write plugins: all that one may import of the core, with `sqft.kernels`.", ()),
    "sqft.testing": ("To test plugins.", ()),
    "sqft.kernels.masks": ("", ()),
    "sqft.kernels.grids": ("", ()),
    "sqft.kernels.packing": ("", ()),
    "sqft.kernels.statistics": ("", ()),
}
"""Modules, what they are for where they do not say it, and which names, if not all public ones."""


class _Bare(str):
    """A string that shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def python() -> Iterator[str]:
    yield "# Python"
    for place, (purpose, names) in PYTHON.items():
        module = importlib.import_module(place)
        yield f"## {place}"
        yield purpose or inspect.getdoc(module) or ""
        for name in names or public_names(place):
            value = getattr(module, name)
            yield f"### `{name}`"
            if inspect.isclass(value):
                yield from _class(value)
            elif inspect.isfunction(value):
                yield _code(_signature(name, value))
                yield _doc(value)
            else:
                yield _said_of(name)


def public_names(place: str) -> list[str]:
    """What a module offers: its `__all__`, or the functions and classes that it defines."""
    module = importlib.import_module(place)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == place]
    return [name for name in getattr(module, "__all__", own) if not name.startswith("_")]


def _class(cls: type) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    body = []
    for name, text, said in _names(ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0], inspect.getsource(cls)):
        if not name.startswith("_") and name != "model_config":
            body += [f"# {line}" for line in said.splitlines()] + [text]
    init = vars(cls).get("__init__")
    if getattr(init, "__qualname__", "") == f"{cls.__name__}.__init__" and not hasattr(cls, "__dataclass_fields__"):
        body.append(_signature("__init__", init))
    head = f"class {cls.__name__}" + (f"({bases})" if bases else "")
    yield _code(f"{head}:\n{textwrap.indent(chr(10).join(body), '    ')}" if body else head)
    yield _doc(cls)
    for name, member in vars(cls).items():
        how = {classmethod: "@classmethod\n", property: "@property\n"}.get(type(member), "")
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if not inspect.isfunction(function) or not function.__module__.startswith("sqft"):
            continue
        if name == "__call__" or (function.__doc__ and not name.startswith("_")):
            yield f"**`{cls.__name__}.{name}`**"
            yield _code(how + _signature(name, function))
            yield _doc(function) if function.__doc__ else ""


def _names(tree: ast.AST, source: str) -> Iterator[tuple[str, str, str]]:
    """What a module's or class's body gives a name to: the name, the line as it stands, the string below it."""
    lines = textwrap.dedent(source).splitlines()
    body: list[ast.stmt] = getattr(tree, "body", [])
    for statement, after in zip(body, [*body[1:], None], strict=True):
        target = getattr(statement, "target", None) or next(iter(getattr(statement, "targets", ())), None)
        if isinstance(target, ast.Name):
            text = textwrap.dedent("\n".join(lines[statement.lineno - 1 : statement.end_lineno]))
            said = after.value if isinstance(after, ast.Expr) else None
            yield target.id, text, inspect.cleandoc(str(said.value)) if isinstance(said, ast.Constant) else ""


def _said_of(name: str) -> str:
    """The string below a name of the core that is neither a class nor a function."""
    for file in sorted((Path(__file__).parents[1] / "sqft").rglob("*.py")):
        for found, _, said in _names(ast.parse(file.read_text()), file.read_text()):
            if found == name and said:
                return said
    raise SystemExit(f"nothing says what {name} is: put a string below it")


def _code(text: str) -> str:
    return f"```py\n{text}\n```"


def _doc(value: object) -> str:
    """A docstring, with what is raised as a sentence."""
    head, raises, tail = (inspect.getdoc(value) or "").partition("Raises:\n")
    if raises:
        name, _, when = inspect.cleandoc(tail).partition(":")
        head += f"Raises `{name}` {' '.join(when.split())}"
    return head.strip()


def _signature(name: str, function: Callable[..., Any]) -> str:
    """As it is written, long ones broken between arguments."""
    signature = inspect.signature(function)
    parameters = []
    for parameter in signature.parameters.values():
        default = parameter.default
        default = _Bare(default.__name__) if inspect.isfunction(default) else default
        parameters.append(parameter.replace(annotation=_bare(parameter.annotation), default=default))
    whole = signature.replace(parameters=parameters, return_annotation=_bare(signature.return_annotation))
    unbroken = re.sub(r"(?<!,) ", "\xa0", f"def {name}{whole}")
    lines = textwrap.wrap(unbroken, 84, subsequent_indent=" " * 8, break_on_hyphens=False)
    return "\n".join(lines).replace("\xa0", " ")


def _bare(annotation: Any) -> Any:
    return _Bare(annotation) if isinstance(annotation, str) else annotation


PAGES = {"hooks": hooks, "components": components, "commands": commands, "recipe": recipe, "python": python}


def page(name: str) -> str:
    return "\n\n".join(PAGES[name]()) + "\n"


if __name__ == "__main__":
    for name in PAGES:
        (FOLDER / f"{name}.md").write_text(page(name))
