"""Charts as SVG that stands in a page: made by matplotlib, in the page's own text colour, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqft.errors import SqftError
from sqft.tools.run_report.facts import Series

WIDTH, HEIGHT = 4.4, 2.8
"""Inches. At 72 points an inch this is about the width of a phone, so that texts can be read there."""
TALLEST, MOST_LABELS = 7.0, 40
"""Inches of the rows of a chart of ranks, and how many of them have a label."""
INK = "#010203"
"""Drawn in this colour, a line or text takes the page's (`currentColor`)."""
COLOURS = ("#3b82c4", "#d9772b", "#3a9d5d", "#b5485f", "#8464b8", "#8a8d30", "#2a9d9d", "#c45ba0")
"""Colours that are told apart on white and on black."""
MISSING = "charts need matplotlib: pip install 'sqft[report]'"


def line_chart(lines: Series, x: str, y: str, log: bool = False, limits: tuple[float, float] | None = None) -> str:
    """Draw lines of points (x, y), each with its label; the y axis is logarithmic if `log`, or between `limits`."""
    with _axes(x, y) as (axes, svg):
        marker = "o" if max(map(len, lines.values())) < 25 else ""
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), label=label, marker=marker, markersize=3, linewidth=1.4)
        if log and all(value > 0 for points in lines.values() for _, value in points):
            axes.set_yscale("log")
        if limits:
            axes.set_ylim(*limits)
        if len(lines) > 1:
            _legend(axes)
    return svg[0]


def error_chart(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    x: str,
    y: str,
    joined: bool = True,
    starred: Collection[str] = (),
) -> str:
    """Draw points (x, y, error of y).

    Args:
        lines: points by the label of their line.
        x: the name of the x axis.
        y: the name of the y axis.
        joined: whether the points of a line are joined.
        starred: labels whose points are stars, before all others.
    """
    with _axes(x, y) as (axes, svg):
        for label, points in lines.items():
            places, values, errors = zip(*sorted(points), strict=True)
            style = {"linewidth": 1.4, "capsize": 2} if joined else {"linestyle": "", "elinewidth": 0.7}
            star = label in starred
            style |= {"marker": "*", "markersize": 9, "zorder": 5} if star else {"marker": "o", "markersize": 3}
            axes.errorbar(places, values, errors, label=label, **style)
        if len(lines) > 1:
            _legend(axes)
    return svg[0]


def rank_chart(ranks: Mapping[str, Mapping[int, int]]) -> str:
    """Draw the rank of each group of layers: a row for each name in the block, a column for each block."""
    import numpy

    height = 0.9 + min(max(0.6, 0.32 * len(ranks)), TALLEST)
    with _axes("block", "", height) as (axes, svg):
        from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgb
        from matplotlib.patches import Patch

        known = sorted({rank for row in ranks.values() for rank in row.values()})
        shades = [(*to_rgb(COLOURS[0]), (index + 1) / len(known)) for index in range(len(known))]  # faint to full
        table = numpy.full((len(ranks), 1 + max(max(row) for row in ranks.values())), numpy.nan)
        for index, row in enumerate(ranks.values()):
            for block, rank in row.items():
                table[index, block] = known.index(rank)
        norm = BoundaryNorm([index - 0.5 for index in range(len(known) + 1)], max(len(known), 1))
        edges = numpy.arange(table.shape[1] + 1) - 0.5
        axes.pcolormesh(edges, numpy.arange(len(ranks) + 1) - 0.5, table, cmap=ListedColormap(shades), norm=norm, lw=0)
        every = -(-len(ranks) // MOST_LABELS)  # of very many rows, as experts have, some are named
        axes.set_yticks(range(0, len(ranks), every), [short_name(name) for name in [*ranks][::every]])
        axes.invert_yaxis()
        patches = [Patch(color=shade, label=f"rank {rank}") for shade, rank in zip(shades, known, strict=True)]
        _legend(axes, handles=patches)
    return svg[0]


def short_name(layer: str) -> str:
    """Return a layer's name without the module that holds it: "q_proj+k_proj+v_proj" of "self_attn.q_proj+…"."""
    return layer.rpartition(".")[2] if "experts" not in layer else layer


@contextmanager
def _axes(x: str, y: str, height: float = HEIGHT) -> Iterator[tuple[Any, list[str]]]:
    """Yield axes to draw on, and a list that holds the SVG when the block has ended.

    Raises:
        SqftError: when matplotlib is not installed.
    """
    try:
        from cycler import cycler
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise SqftError(MISSING) from None
    ink = dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK)
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "sqft",
        "text.parse_math": False,
        "font.size": 9,
        "font.family": "sans-serif",
    }
    cycle = {"axes.prop_cycle": cycler(color=COLOURS)}
    with rc_context(style | ink | cycle):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        svg: list[str] = []
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, color=INK)
        axes.set_axisbelow(True)
        yield axes, svg
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        svg.append(embedded(file.getvalue()))


def _legend(axes: Any, **handles: Any) -> None:
    """Add a legend above the axes, in as many columns as fit, three at most."""
    style = {"loc": "outside upper left", "frameon": False, "labelcolor": INK, "fontsize": 8}
    for columns in (3, 2, 1):
        legend = axes.figure.legend(ncols=columns, **style, **handles)
        if columns == 1 or legend.get_window_extent().width <= axes.figure.bbox.width:
            return
        legend.remove()


def embedded(svg: str) -> str:
    """Return an SVG file's text as a part of a page: as wide as its place, in the page's colour and font."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, mark, body = svg.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head) + ' style="stroke-linejoin: round; stroke-linecap: butt"'
    body = re.sub(r"font(-family)?: [^;\"]*", lambda found: _size(found[0]), body)
    return (head + mark + body).replace(INK, "currentColor")


def with_own_ids(svg: str, prefix: str) -> str:
    """Return an SVG whose ids begin with `prefix`: on one page, no two charts may share an id."""
    return re.sub(r'( id="|url\(#|href="#)', rf"\1{prefix}-", svg)


def _size(font: str) -> str:
    """Return a CSS font without its families: of "font: 9px 'DejaVu Sans', …, sans-serif" the size."""
    size = re.search(r"[\d.]+px", font)
    return f"font-size: {size[0]}" if size else "font-family: inherit"
