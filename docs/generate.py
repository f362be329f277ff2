"""Write docs/reference and the tables of families from the code: python docs/generate.py (a test compares)."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import runpy
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from pydantic import BaseModel

from sqft import Registry, kernels
from sqft.cli import main
from sqft.components import hookspecs
from sqft.recipe.fields import fields_of, section_in, short_form_of
from sqft.recipe.recipe import Recipe
from sqft.recipe.sections import ComponentRef
from sqft.tools.field_facts import field_facts

FOLDER = Path(__file__).parent / "reference"


def hooks() -> Iterator[str]:
    yield "# Hooks"
    for name, hook in inspect.getmembers(hookspecs, inspect.isfunction):
        if name.startswith("sqft_"):
            yield f"## `{name}`"
            yield _code(_signature(name, hook))
            yield _doc(hook)


def components() -> Iterator[str]:
    yield "# Components"
    for entry in Registry.discover().entries():
        if entry.provider.source.startswith("sqft "):
            yield f"## {entry.component.kind} `{entry.component.name}`"
            yield inspect.getdoc(entry.component) or ""
            yield from _facts(entry.component)


def commands() -> Iterator[str]:
    yield "# Commands"
    for name, command in sorted(main.commands.items()):
        context = click.Context(command, info_name=f"sqft {name}", max_content_width=100, terminal_width=100)
        yield f"## sqft {name}"
        yield f"```text\n{command.get_help(context)}\n```"


READING = """For each field: its name, type, limits and default, and below them what it is for. A required field must be
given where its section is. A text in place of an object is short for the object: `"wanda"` for `{"name": "wanda"}`.
[Components](components.md) have options of their own; `sqft show KIND NAME` prints them, those of other plugins too."""


def recipe() -> Iterator[str]:
    yield "# Recipe"
    yield inspect.getdoc(Recipe) or ""
    yield READING
    yield "## The recipe itself"
    yield from _facts(Recipe)
    parts: dict[type[BaseModel], list[str]] = {}
    for name, field in fields_of(Recipe).items():
        if section := section_in(field):
            yield f"## `{name}`"
            yield inspect.getdoc(section) or ""
            yield from _facts(section, f"{name}.")
            _collect_parts(section, name, parts)
    for section, places in parts.items():
        yield "## " + ", ".join(f"`{place}`" for place in places)
        yield inspect.getdoc(section) or ""
        yield from _facts(section, f"{places[0]}.")


def _collect_parts(section: type[BaseModel], place: str, parts: dict[type[BaseModel], list[str]]) -> None:
    """Collect the sections inside a section, and the places of each; components have a page of their own."""
    for name, field in fields_of(section).items():
        inner = section_in(field)
        if inner not in (None, ComponentRef):
            parts.setdefault(inner, []).append(f"{place}.{name}")
            _collect_parts(inner, f"{place}.{name}", parts)


def _facts(model: type[BaseModel], place: str = "") -> Iterator[str]:
    """Yield a model's fields as one list, if it has any: type, limits and default, and below them what it is."""
    rows = []
    for (name, field), facts in zip(fields_of(model).items(), field_facts(model), strict=True):
        section, short = section_in(field), short_form_of(field)
        takes = facts.takes
        if section is ComponentRef:
            takes = takes.replace("text", f"name of a component ({', '.join(_named(name))})")
            takes = takes.replace("object", "object with `name` and `options`")
        elif section:
            takes = takes.replace("text", f"text (its `{short.field}`)") if short else takes
            takes = takes.replace("object", f"object (see `{place}{name}` below)")
        row = f"- `{facts.name}`: {takes}; {facts.default}"
        rows.append(f"{row}\\\n  {facts.description}" if facts.description else row)
    if rows:
        yield "\n".join(rows)


def _named(kind: str) -> list[str]:
    """Return the names of our components of a kind."""
    entries = [entry for entry in Registry.discover().entries() if entry.provider.source.startswith("sqft ")]
    return [f"`{entry.component.name}`" for entry in entries if entry.component.kind == kind]


PYTHON = {
    "sqft": "Plan and run recipes.",
    "sqft.api": "Write a plugin. This module and `sqft.kernels` are all that a plugin may import from the core.",
    "sqft.testing": "Test a plugin.",
}
"""The public modules besides the kernels, and what each is for."""


class _Bare(str):
    """A string that shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def python() -> Iterator[str]:
    yield "# Python"
    for module_name in [
        *PYTHON,
        *(f"{kernels.__name__}.{found.name}" for found in pkgutil.iter_modules(kernels.__path__)),
    ]:
        module = importlib.import_module(module_name)
        yield f"## `{module_name}`"
        yield PYTHON.get(module_name) or inspect.getdoc(module) or ""
        for name in public_names(module):
            value = getattr(module, name)
            yield f"### `{name}`"
            if inspect.isclass(value):
                yield from _class(value)
            elif inspect.isfunction(value):
                yield _code(_signature(name, value))
                yield _doc(value)
            else:
                yield _constant_doc(module, name)


def public_names(module: ModuleType) -> list[str]:
    """Return the names in a module's `__all__`, or else of the functions and classes that it defines."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return [name for name in getattr(module, "__all__", own) if not name.startswith("_")]


def _class(cls: type) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    body = []
    for name, text, doc in _assignments(inspect.getsource(cls)):
        if not name.startswith("_") and name != "model_config":
            body += [f"# {line}" for line in doc.splitlines()] + [text]
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


def _assignments(source: str) -> Iterator[tuple[str, str, str]]:
    """Yield each name that a module's or class's body assigns, the line that does so, and the string below it."""
    source = textwrap.dedent(source)
    lines, body = source.splitlines(), ast.parse(source).body
    if len(body) == 1 and isinstance(body[0], ast.ClassDef):
        body = body[0].body
    for statement, after in zip(body, [*body[1:], None], strict=True):
        target = getattr(statement, "target", None) or next(iter(getattr(statement, "targets", ())), None)
        if isinstance(target, ast.Name):
            text = textwrap.dedent("\n".join(lines[statement.lineno - 1 : statement.end_lineno]))
            below = after.value if isinstance(after, ast.Expr) else None
            yield target.id, text, inspect.cleandoc(str(below.value)) if isinstance(below, ast.Constant) else ""


def _constant_doc(module: ModuleType, name: str) -> str:
    """Return the string below a constant, in this module or in the one that it is imported from."""
    source = inspect.getsource(module)
    for assigned, _, doc in _assignments(source):
        if assigned == name and doc:
            return doc
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and name in [alias.name for alias in node.names]:
            return _constant_doc(importlib.import_module(node.module), name)
    raise SystemExit(f"{module.__name__}.{name} has no description: write a string below it")


def _code(text: str) -> str:
    return f"```py\n{text}\n```"


SECTION = re.compile(r"^(Args|Returns|Raises|Example):\n((?: {4}.*\n?|\n)+)", re.MULTILINE)
"""A section of a docstring, and the indented lines below its heading."""


def _doc(value: object) -> str:
    """Return a docstring as Markdown: arguments as a list, results and errors as sentences, examples as they are."""
    return SECTION.sub(_section, inspect.getdoc(value) or "").strip()


def _section(match: re.Match[str]) -> str:
    heading, entries = match[1], re.split(r"\n(?=\S)", textwrap.dedent(match[2]).strip())
    if heading == "Example":
        return textwrap.dedent(match[2]).strip() + "\n\n"
    if heading == "Returns":
        return f"Returns {' '.join(match[2].split())}\n\n"
    pairs = [(name, " ".join(text.split())) for name, _, text in (entry.partition(":") for entry in entries)]
    if heading == "Args":
        return "\n".join(f"- `{name}`: {text}" for name, text in pairs) + "\n\n"
    return "\n\n".join(f"Raises `{name}` {text}" for name, text in pairs) + "\n\n"


def _signature(name: str, function: Callable[..., Any]) -> str:
    """Return a function's signature as its source has it, broken between arguments where it is long."""
    signature = inspect.signature(function)
    parameters = []
    for parameter in signature.parameters.values():
        default = parameter.default
        default = _Bare(default.__name__) if inspect.isfunction(default) else default
        parameters.append(parameter.replace(annotation=_bare(parameter.annotation), default=default))
    complete = signature.replace(parameters=parameters, return_annotation=_bare(signature.return_annotation))
    unbroken = re.sub(r"(?<!,) ", "\xa0", f"def {name}{complete}")
    lines = textwrap.wrap(unbroken, 84, subsequent_indent=" " * 8, break_on_hyphens=False)
    return "\n".join(lines).replace("\xa0", " ")


def _bare(annotation: Any) -> Any:
    return _Bare(annotation) if isinstance(annotation, str) else annotation


def _families() -> dict[str, Any]:
    """Return the table of families that tests/e2e/test_architectures.py takes from end to end."""
    found: dict[str, Any] = runpy.run_path(str(FOLDER.parents[1] / "tests" / "support" / "families.py"))["FAMILIES"]
    return found


def families() -> Iterator[str]:
    yield "| family | class | floats | INT4 | notes |\n|---|---|---|---|---|"
    for family in _families().values():
        yield f"| {family.title} | `{family.architecture()}` | yes | yes | {'; '.join(family.notes())} |"


def families_before() -> Iterator[str]:
    yield "| family | 0.1.0 | now |\n|---|---|---|"
    for family in _families().values():
        yield f"| {family.title} | {family.before} | passes, INT4 too |"


PARTS = {"how-to/models.md": families, "results/families.md": families_before}
"""Tables inside pages, each below a comment that says where it comes from."""

MARK = "<!-- written by docs/generate.py -->\n\n"


def with_part(place: str, text: str) -> str:
    """Return the text of a page with its table as the code has it now."""
    before, after = text.split(MARK)
    rest = after.partition("\n\n")[2]
    return before + MARK + "\n".join(PARTS[place]()) + "\n\n" + rest


def linked_python() -> Iterator[str]:
    """Yield the parts of the page of Python; below each block of code, links to the types in it, as code has none."""
    parts = list(python())
    headings = [part.removeprefix("### `").removesuffix("`") for part in parts if part.startswith("### ")]
    types = {name for name in headings if name[0].isupper() and not name.isupper() and headings.count(name) == 1}
    heading = ""
    for part in parts:
        yield part
        heading = part if part.startswith("### ") else heading
        if part.startswith("```py\n"):
            named = [
                name for name in dict.fromkeys(re.findall(r"\w+", part)) if name in types and f"`{name}`" not in heading
            ]
            if named:
                yield "Types: " + ", ".join(f"[`{name}`](#{name.lower()})" for name in named)


PAGES = {"hooks": hooks, "components": components, "commands": commands, "recipe": recipe, "python": linked_python}


def page(name: str) -> str:
    return "\n\n".join(PAGES[name]()) + "\n"


if __name__ == "__main__":
    for name in PAGES:
        (FOLDER / f"{name}.md").write_text(page(name))
    for name in PARTS:
        path = FOLDER.parent / name
        path.write_text(with_part(name, path.read_text()))
