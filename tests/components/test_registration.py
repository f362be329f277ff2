"""What a registration says of itself, and the digest of its component's code."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqft_wanda import Wanda

from sqft.api import Scorer
from sqft.components.registration import Broken, Provider, Registration
from sqft.utils.code_digest import digest_files, package_digest

PROVIDER = Provider("mine", "sqft-mine 1.0")


def test_words_of_messages() -> None:
    assert str(PROVIDER) == "mine (sqft-mine 1.0)"
    assert str(Registration(Wanda, PROVIDER)) == "scorer 'wanda' (sqft-mine 1.0)"
    assert str(Broken("mine", "sqft-mine 1.0", "is broken")) == "plugin 'mine' (sqft-mine 1.0) is broken"


def test_the_code_of_a_package_is_all_of_its_files() -> None:
    assert Registration(Wanda, PROVIDER).code == package_digest("sqft_wanda") != ""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that is run as `__main__`."""
    main = ModuleType("__main__")
    main.__file__ = str(tmp_path / "script.py")
    (tmp_path / "script.py").write_text("a = 1\n")
    monkeypatch.setitem(sys.modules, "__main__", main)
    return tmp_path / "script.py"


def made_in(module: str) -> type[Scorer]:
    class Made(Scorer):
        """Made."""

        name = "made"

        def score(self, weight: Any, stats: Any) -> Any:
            return weight

    Made.__module__ = module
    return Made


def test_a_class_of_a_script_counts_by_the_script(script: Path) -> None:
    registration = Registration(made_in("__main__"), PROVIDER)
    before = registration.code
    assert before == digest_files([script], script.parent)
    script.write_text("a = 2\n")
    assert registration.code != before


def test_a_class_of_a_notebook_counts_by_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, the file that holds the method; where there is no source, it is never taken for an earlier one."""
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    registration = Registration(made_in("__main__"), PROVIDER)
    monkeypatch.setattr(registration.component.score, "__module__", "__main__")
    before = registration.code
    assert registration.code == before
    monkeypatch.setattr("linecache.getlines", lambda _: [])
    assert registration.code != registration.code != before
