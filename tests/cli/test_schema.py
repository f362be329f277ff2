"""`sqft schema`."""

from __future__ import annotations

import json

from click.testing import CliRunner

from sqft.cli import main


def test_schema_knows_the_plugins() -> None:
    schema = json.loads(CliRunner().invoke(main, ["schema"]).output)
    text = json.dumps(schema["$defs"]["Search"]["properties"]["searcher"])
    assert '"turns"' in text and '"heuristic"' in text


def test_schema_of_a_sweep() -> None:
    schema = json.loads(CliRunner().invoke(main, ["schema", "--sweep"]).output)
    assert schema["required"] == ["name", "axes"] and '"turns"' in json.dumps(schema["$defs"]["Search"])
