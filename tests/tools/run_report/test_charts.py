"""Charts: SVG in the page's colour and font, without anything from elsewhere."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from sqft.errors import SqftError
from sqft.tools.run_report import charts

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def drawn() -> dict[str, str]:
    return {
        "line": charts.line_chart({"a": [(0, 1.0), (2, 3.0)], "b": [(0, 2.0), (2, 1.0)]}, "step", "loss"),
        "log": charts.line_chart({"a": [(0, 1e-6), (2, 1.0)]}, "block", "error", log=True),
        "error": charts.error_chart({"merge": [(0.7, 0.4, 0.1), (0.5, 0.6, 0.1)]}, "sparsity", "accuracy"),
        "rank": charts.rank_chart({"attn.q": {0: 16, 1: 32}, "mlp.up": {0: 24, 1: 16}}),
    }


@pytest.mark.parametrize("kind", ["line", "log", "error", "rank"])
def test_a_chart_fits_its_place_and_takes_the_pages_colour_and_font(kind: str) -> None:
    svg = drawn()[kind]
    root = ElementTree.fromstring(svg)
    assert root.get("viewBox") and root.get("width") is None and root.get("height") is None
    assert "currentColor" in svg and charts.INK not in svg
    assert not re.search("DejaVu|<style|<metadata|http(?!://www.w3.org)", svg)
    assert drawn()[kind] == svg  # the same data, the same bytes


def test_axes_and_labels_are_named() -> None:
    assert {"step", "loss", "a", "b"} <= set(texts(drawn()["line"]))
    assert {"sparsity", "accuracy"} <= set(texts(drawn()["error"])) and "merge" not in texts(drawn()["error"])
    assert {"rank 16", "rank 24", "rank 32", "q", "up"} <= set(texts(drawn()["rank"]))


def test_a_logarithmic_axis_has_powers_of_ten_and_zeros_need_a_linear_one() -> None:
    def heights(values: list[float]) -> list[float]:
        svg = charts.line_chart({"a": list(enumerate(values))}, "x", "y", log=True)
        marks = [
            float(use.get("y", 0)) for use in ElementTree.fromstring(svg).iter(f"{SVG}use") if use.get("clip-path")
        ]
        path = re.findall(r'<g clip-path="url\(#[^)]*\)">(.*?)</g>', svg, re.DOTALL)
        return marks or [float(y) for y in re.findall(r'y="([\d.]+)"', path[0])]

    even = heights([1e-4, 1e-2, 1.0])
    assert even[0] - even[1] == pytest.approx(even[1] - even[2], rel=1e-3)
    uneven = heights([0.0, 1e-2, 1.0])
    assert uneven[0] - uneven[1] < 0.02 * (uneven[1] - uneven[2])


def test_points_are_joined_in_order_of_x() -> None:
    assert charts.error_chart({"a": [(0.5, 0.6, 0.1), (0.7, 0.4, 0.1)]}, "x", "y") == charts.error_chart(
        {"a": [(0.7, 0.4, 0.1), (0.5, 0.6, 0.1)]}, "x", "y"
    )


@pytest.mark.parametrize(("label", "columns"), [("a", 3), ("1,024 to 4,095 records", 2), ("a long name: " * 5, 1)])
def test_a_legend_has_as_many_columns_as_fit(label: str, columns: int) -> None:
    svg = charts.line_chart({f"{label} {n}": [(0, n), (1, n)] for n in range(6)}, "x", "y")
    places = re.findall(r'translate\(([\d.]+) [\d.]+\)">([^<]*)</text>|x="([\d.]+)"[^>]*>([^<]*)</text>', svg)
    assert len({one[0] or one[2] for one in places if (one[1] or one[3]).startswith(label)}) == columns


def test_a_star_is_another_marker() -> None:
    lines = {"a": [(1.0, 0.5, 0.1)], "chosen": [(2.0, 0.6, 0.1)]}
    plain, starred = (charts.error_chart(lines, "x", "y", joined=False, starred=stars) for stars in ((), ("chosen",)))
    paths = [len(set(re.findall(r'<path id="m[^"]*" d="([^"]*)"', svg))) for svg in (plain, starred)]
    assert paths[1] == paths[0] + 1


def test_ids_of_two_charts_on_one_page() -> None:
    svg = drawn()["line"]
    own = charts.with_own_ids(svg, "c1")
    ids, used = set(re.findall(r' id="([^"]*)"', own)), set(re.findall(r'(?:href="#|url\(#)([^")]*)', own))
    assert used and used <= ids and all(name.startswith("c1-") for name in ids)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SqftError, match=r"pip install 'sqft\[report\]'"):
        charts.line_chart({"a": [(0, 1.0)]}, "x", "y")


def test_signs_of_mathematics_are_text() -> None:
    assert "cost $^$ 5" in texts(charts.line_chart({"a$b$c": [(0, 1.0)], "b": [(0, 2.0)]}, "step", "cost $^$ 5"))


def test_ranks_of_very_many_experts_stay_on_the_page() -> None:
    ranks = {f"mlp.experts.{n}.up_proj": {0: 8 if n % 2 else 4} for n in range(300)}
    root = ElementTree.fromstring(charts.rank_chart(ranks))
    assert float((root.get("viewBox") or "").split()[3]) < 72 * 8.5
    assert {"rank 4", "rank 8", "mlp.experts.0.up_proj"} <= set(texts(charts.rank_chart(ranks)))
