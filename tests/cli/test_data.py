"""sqft data: what it prints, and which sections."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from sqft.cli import main
from tests.conftest import make_model
from tests.support.chats import chat_tokenizer, conversation


def test_the_command(raw: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    command = ["data", str(recipe), "--store", str(tmp_path / "store")]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "0+1=⟪1<|im_end|>⟫" in shown.output and "tokens: 6 to 7" in shown.output
    whole = json.loads(CliRunner().invoke(main, [*command, "--json", "--examples", "1"]).stdout)
    assert [len(preview["examples"]) for preview in whole] == [1] * 5
    one = CliRunner().invoke(main, [*command, "--section", "search"])
    assert one.exit_code == 0 and one.stdout.startswith("search.data\n") and "finetune" not in one.stdout
    wrong = CliRunner().invoke(main, [*command, "--section", "merge"])
    assert wrong.exit_code == 2 and "reads no data in 'merge'" in wrong.stderr
    raw["sparsify"]["scorer"] = "magnitude"
    recipe.write_text(json.dumps({key: raw[key] for key in ("schema", "name", "model", "calibration", "sparsify")}))
    assert "reads no data" in CliRunner().invoke(main, command).output
    assert not list((tmp_path / "store").glob("artifacts/*"))


def test_each_example_of_a_conversation_has_a_title(raw: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("qwen3")
    make_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    record = conversation(("user", "2+2?"), ("assistant", "4"), ("user", "and 1?"), ("assistant", "5"))
    (tmp_path / "talk.jsonl").write_text(json.dumps(record) + "\n")
    raw["model"], raw["finetune"]["data"] = {"path": str(tmp_path / "model")}, str(tmp_path / "talk.jsonl")
    (tmp_path / "recipe.json").write_text(json.dumps(raw))
    command = ["data", str(tmp_path / "recipe.json"), "--store", str(tmp_path / "store"), "--section", "finetune"]
    shown = CliRunner().invoke(main, command).output
    assert "— record 1, example 1 of 2 —" in shown and "— record 1, example 2 of 2 —" in shown
    assert "note: 1 of 1 conversations are one example for each assistant turn" in shown
    assert "assistant\n⟪<think>\n\n</think>\n\n5<|im_end|>⟫" in shown


def test_a_long_text_is_shortened_on_the_screen_alone(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "a" * 1500 + "b" * 1500}) + "\n")
    raw["model"]["path"] = str(wide(Path(raw["model"]["path"]), tmp_path / "model"))
    raw["finetune"] |= {"data": str(tmp_path / "long.jsonl"), "max_length": 4096}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    command = ["data", str(recipe), "--store", str(tmp_path / "store"), "--section", "finetune"]
    assert f"{'a' * 1000} [… 1009 characters …] {'b' * 990}<|im_end|>⟫" in CliRunner().invoke(main, command).stdout
    assert "b" * 1500 in CliRunner().invoke(main, [*command, "--json"]).stdout


def wide(model: Path, folder: Path) -> Path:
    """The same model with a window of 4096 tokens."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder
