"""`sqft plugins`."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from sqft import Registry
from sqft.cli import main
from sqft.components.registration import Broken


def test_all_components_are_listed() -> None:
    listed = CliRunner().invoke(main, ["plugins"])
    assert listed.exit_code == 0 and "hill-climbing" in listed.output
    rows = json.loads(CliRunner().invoke(main, ["plugins", "--json"]).output)
    assert {"kind", "name", "plugin", "provider", "summary"} == set(rows[0])


def test_a_plugin_can_be_left_out() -> None:
    rows = json.loads(CliRunner().invoke(main, ["plugins", "--json", "--disable", "wanda"]).output)
    assert rows and "wanda" not in {row["plugin"] for row in rows}


def test_a_broken_plugin_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Registry, "broken", lambda self: (Broken("old", "sqft-old 9", "needs sqft>=9"),))
    listed = CliRunner().invoke(main, ["plugins"])
    assert listed.exit_code == 0 and listed.output.splitlines()[-1].split()[:2] == ["broken", "old"]
    assert "sqft-old 9  needs sqft>=9" in listed.output
