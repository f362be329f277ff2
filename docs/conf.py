"""The site: `make docs` builds it into site/, any warning an error. docs/index.md is its one list of pages."""

from __future__ import annotations

import re
from typing import Any

project = "sqft"
author = "the sqft authors"
extensions = ["myst_parser", "sphinx_copybutton"]
myst_heading_anchors = 3  # as on GitHub: links inside a page
html_theme = "furo"
html_title = "sqft"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = html_copy_source = html_show_copyright = False
smartquotes = False  # what is quoted here is often to be typed


def setup(app: Any) -> None:
    app.connect("source-read", add_navigation)


def add_navigation(app: Any, page: str, source: list[str]) -> None:
    """Make the navigation of the links under each heading of the index, which stays plain Markdown elsewhere."""
    if page != "index":
        return
    for part in source[0].split("\n## ")[1:]:
        heading, _, text = part.partition("\n")
        pages = "\n".join(re.findall(r"\]\(([^)]+)\.md\)", text))
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{pages}\n```\n"
