"""Options that name files: which marks count, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field
from torch import Tensor

from sqft.api import InputPath, LinearStats, Scorer
from sqft.components.options import input_paths, path_marks
from sqft.components.validation import component_mistake


class Files(Scorer):
    name = "files"
    plain: Annotated[Path, InputPath()] = Path("a")
    folder: Annotated[str, InputPath(folder=True)] | None = None
    outside: Annotated[str | None, InputPath()] = None
    word: Annotated[str, InputPath(words=("dense",))] = "dense"
    number: Annotated[int, Field(ge=0)] | None = None

    def score(self, weight: Tensor, stats: LinearStats) -> Tensor:
        return weight.abs()


def test_a_mark_is_found_wherever_it_is_written() -> None:
    assert list(path_marks(Files)) == ["plain", "folder", "outside", "word"]
    assert component_mistake("scorer", "hook", Files) is None


def test_none_and_words_are_no_paths() -> None:
    assert list(input_paths(Files())) == ["plain"]
    assert list(input_paths(Files(folder="b", outside="c", word="d"))) == ["plain", "folder", "outside", "word"]


@pytest.mark.parametrize(
    ("annotation", "default", "mistake"),
    [
        (Annotated[list[str], InputPath()], [], "names a file and is not str, Path or None"),
        (list[Annotated[str, InputPath()]], [], "names a file and is not str, Path or None"),
        (Annotated[str, InputPath()] | int, 0, "names a file and is not str, Path or None"),
        (Annotated[str, InputPath(hub=True)], "", "may be a Hugging Face id"),
        (Annotated[str, InputPath()], Field("", alias="from"), "names a file and has an alias"),
    ],
)
def test_a_mark_that_cannot_be_honoured_is_refused(annotation: Any, default: Any, mistake: str) -> None:
    body = {"__module__": __name__, "__annotations__": {"file": annotation}, "file": default, "name": "mine"}
    wrong = component_mistake("scorer", "hook", type("Mine", (Files,), body))
    assert wrong and wrong.startswith("offers scorer 'mine', whose option 'file'") and mistake in wrong
