"""The page: complete, one file, nothing from elsewhere; seen in a browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sqft.execution.run import Run
from sqft.tools.run_report.facts import read_facts
from sqft.tools.run_report.page import render

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Tags, ids and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name.endswith(("src", "href")):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


@pytest.fixture(scope="session")
def pages(made: tuple[Run, Run], made_store: Path) -> tuple[str, str]:
    """Of one run, and of two."""
    one, two = (read_facts(run.folder, made_store) for run in made)
    return render([one]), render([one, two])


def test_a_page_needs_nothing_from_elsewhere(pages: tuple[str, str]) -> None:
    for text in pages:
        page = Page(text)
        assert all(link.startswith("#") for link in page.links) and "script" not in page.tags
        assert "default-src 'none'" in text and len(page.ids) == len(set(page.ids))


def test_a_page_shows_what_the_run_did(pages: tuple[str, str], made: tuple[Run, Run]) -> None:
    page = Page(pages[0])
    heads = {
        "Sparsity by layer",
        "Error of pruning: masked",
        "Error of pruning: updated",
        "Loss of fine-tuning",
        "Search",
        "Chosen ranks",
    }
    assert heads <= set(page.texts) and page.tags.count("svg") == len(heads)
    assert {"Cost of each step", "Recipe", "Versions", "How to load the result"} <= set(page.texts)
    for row in made[0].report["rows"]:
        assert row["configuration"] in page.texts and f"{row['perplexity']:.2f}" in page.texts
    assert "by-sparsity" not in page.ids and "differences" in page.ids


def test_several_runs_share_a_table_and_a_chart_by_sparsity(pages: tuple[str, str], made: tuple[Run, Run]) -> None:
    page = Page(pages[1])
    assert {"by-sparsity", "differences", "results"} <= set(page.ids) and "accuracy by sparsity" in page.texts
    for run in made:
        assert f"{run.folder.name}: merge" in page.texts


def test_names_are_not_markup(made: tuple[Run, Run], made_store: Path) -> None:
    facts = read_facts(made[0].folder, made_store)
    text = render([facts.ending_in(made_store, "<script>alert(1)</script>")])
    assert "<script>" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine, so the page is not seen in a browser")
def test_in_a_browser_no_part_is_wider_than_the_page_and_nothing_fails(
    pages: tuple[str, str], tmp_path: Path, width: int
) -> None:
    """The page's own width is measured in the browser, by a script in a frame around it."""
    (tmp_path / "page.html").write_text(re.sub(r"<meta http-equiv[^>]*>", "", pages[1]))
    (tmp_path / "frame.html").write_text(
        f'<iframe id="f" src="page.html" width="{width}" height="800" frameborder="0"></iframe><p id="out"></p>'
        "<script>"
        "f.onload = () => { const d = f.contentDocument; out.textContent = JSON.stringify(["
        "d.documentElement.scrollWidth, d.querySelectorAll('svg').length,"
        "[...d.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 50)]) }</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr"]
    command = [
        str(BROWSER),
        *flags,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000",
        "--dump-dom",
    ]
    done = subprocess.run([*command, f"file://{tmp_path / 'frame.html'}"], capture_output=True, text=True, timeout=120)
    found = re.search(r'id="out">\[(\d+),(\d+),(\w+)\]', done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    assert int(found[1]) <= width and int(found[2]) == pages[1].count("<svg") and found[3] == "true"
    assert "CONSOLE" not in done.stderr
    # As it is shipped: what its own policy forbids, such as any request, is reported to the console.
    (tmp_path / "shipped.html").write_text(pages[1])
    shipped = subprocess.run(
        [*command, f"file://{tmp_path / 'shipped.html'}"], capture_output=True, text=True, timeout=120
    )
    assert "Cost of each step" in shipped.stdout and "CONSOLE" not in shipped.stderr
