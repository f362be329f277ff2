"""What `sqft data` shows is what training and evaluation are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from sqft import Orchestrator, Recipe, Registry
from sqft.cli import main
from sqft.preview import Piece, previews


def test_every_data_set_of_a_recipe(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    raw["finetune"] |= {"packing": True, "max_length": 20}
    plan = Orchestrator(registry, tmp_path).plan(Recipe.parse(raw))
    found = {preview.place: preview for preview in previews(plan, 2)}
    assert list(found) == ["finetune.data", "search.data", "evaluate.exact_match"]
    training = found["finetune.data"]
    assert training.examples == [
        [Piece("0+0=", False), Piece("0<|im_end|>", True)],
        [Piece("0+1=", False), Piece("1<|im_end|>", True)],
    ]
    # 4 tokens of a sum, 1 or 2 of its result, 1 of the end; 64 records, 21 of them with two digits (10 to 14).
    two = sum(a + b > 9 for a in range(8) for b in range(8))
    assert training.facts["tokens"] == f"6 to 7, median 6, {64 * 6 + two} in all"
    assert training.facts["tokens with loss"] == f"2 to 3, median 2, {64 * 2 + two} in all"
    assert training.facts["packed"] == "22 rows of 20 tokens"
    assert found["evaluate.exact_match"].facts["records"] == "10"


def test_conversations_and_what_is_cut(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "so?"), ("assistant", "no")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(record) + "\n")
    raw["finetune"] |= {"data": str(tmp_path / "talk.jsonl"), "max_length": 60}
    plan = Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw))
    shown = next(iter(previews(plan, 1)))
    learned = [piece.text for piece in shown.examples[0] if piece.learned]
    assert learned == ["yes<|im_end|>\n", "no<|im_end|>\n"] or learned[-1] == "no<|im_end|>\n"
    assert shown.facts["cut to fit"].startswith(("0 examples", "1 examples"))


def test_the_command(raw: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    command = ["data", str(recipe), "--store", str(tmp_path / "store")]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "0+1=⟪1<|im_end|>⟫" in shown.output and "tokens: 6 to 7" in shown.output
    whole = json.loads(CliRunner().invoke(main, [*command, "--json", "--examples", "1"]).stdout)
    assert [len(preview["examples"]) for preview in whole] == [1, 1, 1]
    recipe.write_text(json.dumps({key: raw[key] for key in ("schema", "name", "model", "calibration", "sparsify")}))
    assert "names no records" in CliRunner().invoke(main, command).output
    assert not list((tmp_path / "store").glob("artifacts/*"))
