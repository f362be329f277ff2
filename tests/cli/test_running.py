"""What run, merge and eval share: the output folder, and what is printed at the end."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from sqft.cli.running import check_output, open_orchestrator, print_result
from sqft.errors import SqftError


@pytest.mark.parametrize("name", ["absent", "empty", "link-to-empty", None])
def test_an_output_that_can_be_written(tmp_path: Path, name: str | None) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link-to-empty").symlink_to(tmp_path / "empty")
    check_output(tmp_path / name if name else None)


@pytest.mark.parametrize("name", ["file", "full", "dangling"])
def test_an_output_that_is_in_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SqftError, match=f"{name} exists and is not an empty folder; name another or empty it"):
        check_output(tmp_path / name)


def finished(folder: Path, result: Path | None) -> Any:
    return SimpleNamespace(folder=folder, report={"rows": [], "steps": []}, result=lambda: result)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setattr("sqft.execution.report.table", lambda _: ([], []))
    monkeypatch.setattr("sqft.execution.report.title", lambda _: "title")
    monkeypatch.setattr("sqft.execution.run.loading_instructions", lambda result, run: f"load {result.name}")
    facts = SimpleNamespace(ending_in=lambda result, loading: f"{result.name}, {loading}")
    monkeypatch.setattr("sqft.tools.run_report.facts.read_facts", lambda folder, root: facts)
    monkeypatch.setattr("sqft.tools.publishing.write_documents", lambda run, out: (out / "README.md").write_text(run))
    return Console(file=io.StringIO(), soft_wrap=True)


def said(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_a_result_is_copied_and_named(tmp_path: Path, screen: Console) -> None:
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "a").write_text("a")
    print_result(screen, finished(tmp_path, tmp_path / "result"), None)
    assert said(screen).endswith(f"report: {tmp_path}/report.md\nresult: {tmp_path}/result\nload result\n")
    print_result(screen, finished(tmp_path, tmp_path / "result"), tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "a" and said(screen).endswith("load out\n")
    assert (tmp_path / "out" / "README.md").read_text() == "result, load result"


def test_a_card_that_cannot_be_made_is_no_end_of_a_run(
    tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(run: Any, out: Path) -> None:
        raise SqftError("no card")

    monkeypatch.setattr("sqft.tools.publishing.write_documents", fails)
    (tmp_path / "result").mkdir()
    print_result(screen, finished(tmp_path, tmp_path / "result"), tmp_path / "out")
    assert "the model is complete, but has no card: no card" in said(screen) and said(screen).endswith("load out\n")


def test_without_a_result_there_is_nothing_to_copy(tmp_path: Path, screen: Console) -> None:
    print_result(screen, finished(tmp_path, None), None)
    assert "result: none to load yet" in said(screen)
    with pytest.raises(SqftError, match="there is nothing to put into --output"):
        print_result(screen, finished(tmp_path, None), tmp_path / "out")


def test_an_output_that_cannot_be_written_leaves_the_result(tmp_path: Path, screen: Console) -> None:
    (tmp_path / "result").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(SqftError, match=r"cannot be written: .*; the result stays in .*result$"):
        print_result(screen, finished(tmp_path, tmp_path / "result"), tmp_path / "file" / "out")


def test_processes_besides_the_first_are_muted_before_a_recipe_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr("sqft.cli.running.mute_unless_main", lambda: calls.append("muted"))
    monkeypatch.setattr("sqft.cli.running.console", lambda: calls.append("console") or Console())
    monkeypatch.setattr("sqft.execution.log.log_to_screen", lambda echo: None)
    open_orchestrator(tmp_path / "store", "cpu", ())
    assert calls[:2] == ["muted", "console"]
