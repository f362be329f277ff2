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
from sqft.utils.code_digest import class_digest, digest_files, package_digest

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


def test_a_class_without_a_file_counts_by_its_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    made = made_in("__main__")
    assert Registration(made, PROVIDER).code == class_digest(made)
