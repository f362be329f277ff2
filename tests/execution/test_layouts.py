"""What is known of models' modules is made once, and kept in the store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from sqft.checkpoints.layout import ModelLayout
from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.model_spec import ModelSpec
from sqft.execution import layouts
from sqft.execution.layouts import Layouts, layout_key

SPEC, SOURCE = ModelSpec(Path("m")), ModelSource("folder", Path("m"), "digest", {})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModelSpec]]:
    """Models that were described, in a process that has described none before."""
    calls: list[ModelSpec] = []

    def describe(spec: ModelSpec, source: ModelSource) -> ModelLayout:
        calls.append(spec)
        return ModelLayout(architecture=source.digest)

    monkeypatch.setattr("sqft.modeling.architecture.layout.describe", describe)
    monkeypatch.setattr(layouts, "_known", {})
    yield calls


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_known", {})


def test_a_model_is_described_once(made: list[ModelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Layouts(tmp_path)(SPEC, SOURCE) == ModelLayout(architecture="digest")
    Layouts(tmp_path)(SPEC, SOURCE)
    forget(monkeypatch)  # as in another process
    assert Layouts(tmp_path)(SPEC, SOURCE) == ModelLayout(architecture="digest")
    assert len(made) == 1


def test_every_store_keeps_what_its_runs_knew(made: list[ModelSpec], tmp_path: Path) -> None:
    for name in ("a", "b"):
        Layouts(tmp_path / name)(SPEC, SOURCE)
        assert len(list((tmp_path / name).iterdir())) == 1
    assert len(made) == 1


def test_a_damaged_file_is_made_again(made: list[ModelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Layouts(tmp_path)(SPEC, SOURCE)
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    forget(monkeypatch)
    Layouts(tmp_path)(SPEC, SOURCE)
    assert len(made) == 2


def test_without_a_store_none_is_made(made: list[ModelSpec], tmp_path: Path) -> None:
    Layouts(tmp_path / "store" / "layouts")(SPEC, SOURCE)
    assert made and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_does_no_harm(made: list[ModelSpec], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert Layouts(tmp_path / "file")(SPEC, SOURCE).architecture == "digest"
    assert made


def test_what_a_layout_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    first = layout_key(SPEC, SOURCE)
    elsewhere = dataclasses.replace(SPEC, path=Path("n"), dtype="bfloat16")
    assert layout_key(elsewhere, dataclasses.replace(SOURCE, path=Path("n"))) == first
    others = [
        layout_key(dataclasses.replace(SPEC, trust_remote_code=True), SOURCE),
        layout_key(SPEC, dataclasses.replace(SOURCE, digest="other")),
    ]
    monkeypatch.setattr(layouts, "version", lambda name: f"{name} 6")
    others.append(layout_key(SPEC, SOURCE))
    monkeypatch.undo()
    monkeypatch.setattr(layouts, "package_digest", lambda name: f"{name}, edited")
    others.append(layout_key(SPEC, SOURCE))
    assert len({first, *others}) == 5
