"""What `sqft data` shows is what training and evaluation are given."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.data.records import Record, split_off
from sqft.data.windows import calibration_windows
from sqft.errors import DataError, SqftError
from sqft.execution.run import Run
from sqft.tools.data_preview import Piece, Preview, previews
from tests.support.chats import chat_tokenizer, conversation


def test_every_data_set_of_a_recipe(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    raw["finetune"] |= {"packing": True, "max_length": 20}
    plan = Orchestrator(registry, tmp_path).plan(Recipe.parse(raw))
    found = {preview.place: preview for preview in previews(plan, 2)}
    places = ["calibration.data", "finetune.data", "search.data", "evaluate.perplexity", "evaluate.exact_match"]
    assert list(found) == places
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
    assert found["search.data"].facts["tokens with loss"] == "2 to 2, median 2, 24 in all"
    assert found["evaluate.exact_match"].facts["records"] == "10"
    assert found["evaluate.exact_match"].facts["cut to fit"] == "0 prompts"


def looked_at(raw: dict[str, Any], store: Path, *sections: str) -> dict[str, Preview]:
    plan = Orchestrator(Registry.discover(), store).plan(Recipe.parse(raw))
    return {preview.place: preview for preview in previews(plan, 2, sections)}


def test_calibration_and_text_are_the_windows_that_are_read(
    raw: dict[str, Any], registry: Registry, tokenizer: Any, tmp_path: Path
) -> None:
    found = looked_at(raw, tmp_path)
    step = Orchestrator(registry, tmp_path).plan(Recipe.parse(raw)).step("sparsify")
    seed = int.from_bytes(hashlib.sha256(b"0/calibration").digest()[:8], "big") >> 1
    drawn = calibration_windows(step.files["calibration"], tokenizer, 4, 32, seed)
    assert found["calibration.data"].facts == {"windows": "4 of 32 tokens, 128 in all"}
    assert found["calibration.data"].examples == [[Piece(tokenizer.decode(window), False)] for window in drawn[:2]]
    text = found["evaluate.perplexity"]
    assert text.facts == {"windows": "4", "tokens": "64 to 64, median 64, 256 in all"}
    assert [piece.learned for piece in text.examples[0]] == [False, True]  # a window's first token has no loss
    held_out = Path(raw["evaluate"]["perplexity"]["text"]).read_text()
    assert "".join(piece.text for shown in text.examples for piece in shown) == held_out[:128]


def test_training_is_shown_without_what_is_held_out_and_as_often_as_it_comes(
    raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    sums = raw["finetune"]["data"]
    raw["finetune"] |= {
        "data": [{"path": sums, "limit": 20, "weight": 2.5}, {"path": sums, "limit": 30}],
        "holdout": 0.25, "validation": sums, "packing": True, "max_length": 24, "steps": 1,
    }  # fmt: skip
    raw["search"] = {"searcher": raw["search"]["searcher"], "metric": "exact_match"}
    found = looked_at(raw, tmp_path / "store")
    places = ["finetune.data.0", "finetune.data.1", "finetune.data", "finetune.holdout", "finetune.validation"]
    assert [place for place in found if place.startswith("finetune")] == places
    first, second, both, held, validation = (found[place].facts for place in places)
    out = int(held["records"])
    assert 0 < out < 50 and first["each comes"] == "2.5 times an epoch"
    assert int(first["held out"].split()[0]) + int(second["held out"].split()[0]) == out
    assert "tokens of a prompt" in held  # the search asks for answers
    assert validation["records"] == "64" and "packed" not in first and "packed" not in validation
    orchestrator = Orchestrator(registry, tmp_path / "store")
    report = orchestrator.run(orchestrator.plan(Recipe.parse(raw)), until="finetune")["finetune"].report
    assert both["packed"] == f"{report['rows']} rows of 24 tokens"
    assert both["examples"] == str(report["examples"]) == str(int(first["examples"]) + int(second["examples"]))


def test_the_first_token_of_a_text_is_not_learned(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "abc"}\n')
    raw["finetune"]["data"] = str(tmp_path / "text.jsonl")
    training = looked_at(raw, tmp_path / "store", "finetune")["finetune.data"]
    assert training.examples == [[Piece("a", False), Piece("bc<|im_end|>", True)]]
    assert training.facts["tokens with loss"] == "3 to 3, median 3, 3 in all"


def test_prompts_beyond_the_window_are_shown_cut(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a" * 300 + "=", "completion": "1"}) + "\n")
    raw["evaluate"]["exact_match"]["data"] = str(tmp_path / "long.jsonl")
    asked = looked_at(raw, tmp_path / "store", "evaluate.exact_match")["evaluate.exact_match"]
    assert asked.facts["cut to fit"] == "1 prompts" and asked.examples[0][0].text == "a" * 251 + "="


def test_what_is_left_out_is_counted(raw: dict[str, Any], tmp_path: Path) -> None:
    lines = [{"prompt": "a" * length + "=", "completion": "1"} for length in (50, 3, 40, 4)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"path": str(tmp_path / "mixed.jsonl")}
    raw["finetune"] |= {"data": [data, data], "max_length": 10, "truncation": "drop"}
    found = looked_at(raw, tmp_path / "store", "finetune")
    assert [found[f"finetune.{role}"].facts["left out"] for role in ("data.0", "data.1", "data")] == [
        "2 examples, too long", "2 examples, too long", "4 examples, too long",
    ]  # fmt: skip
    assert found["finetune.data.0"].titles == ["record 2"] and found["finetune.data"].facts["examples"] == "4"
    raw["finetune"]["truncation"] = "left"
    facts = looked_at(raw, tmp_path / "store", "finetune")["finetune.data"].facts
    assert "left out" not in facts and facts["cut to fit"].startswith("4 examples")


def test_a_set_of_which_nothing_is_left_is_noted(
    raw: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As training has it: the others are learnt. Where nothing at all is left, both refuse it in the same words."""
    for name, lengths in {"long": (50, 40), "short": (3, 4)}.items():
        lines = [{"prompt": "a" * length + "=", "completion": "1"} for length in lengths]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sets = [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("long", "short")]
    raw["finetune"] |= {"data": sets, "max_length": 10, "truncation": "drop", "packing": True}
    found = looked_at(raw, tmp_path / "store", "finetune")
    lost, kept, mixed = (found[f"finetune.{role}"] for role in ("data.0", "data.1", "data"))
    assert lost.notes == ["nothing of it is learnt: all 2 examples are too long, and left out"] and not kept.notes
    assert (lost.examples, lost.facts["examples"], lost.facts["tokens"]) == ([], "0", "none")
    assert (kept.facts["examples"], mixed.facts["examples"]) == ("2", "2")
    assert mixed.facts["left out"] == "2 examples, too long"

    def trained() -> Run:
        orchestrator = Orchestrator(Registry.discover(), tmp_path / "store")
        return orchestrator.run(orchestrator.plan(Recipe.parse(raw)), until="finetune")

    assert (trained()["finetune"].report["examples"], trained()["finetune"].report["dropped"]) == (2, 2)
    assert "finetune.data.0: nothing of this data set is learnt" in caplog.text
    assert "finetune.data.1: nothing" not in caplog.text

    refused = "all . examples are longer than max_length .10 tokens., and truncation"
    for several in ([sets[0]] * 2, sets[0]):
        raw["finetune"]["data"] = several
        for look in (lambda: looked_at(raw, tmp_path / "store", "finetune"), trained):
            with pytest.raises(DataError, match=refused):
                look()
    raw["finetune"]["data"] = [sets[0]] * 2
    assert looked_at(raw, tmp_path / "store", "finetune.data.1")["finetune.data.1"].notes


@pytest.mark.parametrize("read", [True, False], ids=["read", "not read"])
def test_held_out_records_of_which_nothing_is_left(raw: dict[str, Any], tmp_path: Path, read: bool) -> None:
    """Only a search that takes the loss of them refuses them."""
    lines = [{"prompt": "a" * length + "=", "completion": "1"} for length in (50, 3)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    raw["finetune"] |= {"data": str(tmp_path / "mixed.jsonl"), "max_length": 10, "truncation": "drop", "holdout": 0.5}
    raw["search"] = raw["search"] | {"data": None} if read else {}
    numbered = [Record({"n": 0}), Record({"n": 1})]
    raw["seed"] = next(seed for seed in range(100) if split_off(numbered, 0.5, seed)[1] == numbered[:1])
    assert "left out" not in looked_at(raw, tmp_path / "store", "finetune.data")["finetune.data"].facts
    if read:
        with pytest.raises(DataError, match="all 1 examples are longer than max_length"):
            looked_at(raw, tmp_path / "store", "finetune.holdout")
    else:
        held = looked_at(raw, tmp_path / "store", "finetune.holdout")["finetune.holdout"]
        assert held.facts["records"] == "1" and held.notes[0].startswith("nothing of it is learnt: all 1 examples")


def test_sections(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["finetune"]["data"] = [raw["finetune"]["data"]] * 2
    assert list(looked_at(raw, tmp_path, "evaluate", "calibration.data")) == [
        "calibration.data", "evaluate.perplexity", "evaluate.exact_match",
    ]  # fmt: skip
    assert list(looked_at(raw, tmp_path, "finetune.data.1")) == ["finetune.data.1"]
    assert list(looked_at(raw, tmp_path, "finetune.data")) == ["finetune.data.0", "finetune.data.1", "finetune.data"]
    with pytest.raises(
        SqftError, match=r"no data in 'finetune\.val'; it reads data in calibration\.data, finetune\.data\.0, "
    ):
        looked_at(raw, tmp_path, "finetune.val")


def test_each_example_of_a_conversation_is_shown(raw: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = chat_tokenizer("qwen3")
    tokenizer.save_pretrained(tmp_path / "model")
    record = conversation(("user", "2+2?"), ("assistant", "4"), ("user", "and 1?"), ("assistant", "5"))
    (tmp_path / "talk.jsonl").write_text((json.dumps(record) + "\n") * 3)
    raw["model"] = {"path": str(tmp_path / "model"), "chat_template_kwargs": {"enable_thinking": False}}
    raw["finetune"]["data"] = str(tmp_path / "talk.jsonl")
    raw["evaluate"]["exact_match"]["data"] = str(tmp_path / "talk.jsonl")
    found = looked_at(raw, tmp_path / "store", "finetune", "evaluate.exact_match")
    asked = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    more = "<|im_end|>\n<|im_start|>user\nand 1?<|im_end|>\n<|im_start|>assistant\n"
    no_thought = "<think>\n\n</think>\n\n"
    training = found["finetune.data"]
    examples = [
        [Piece(asked + no_thought, False), Piece("4<|im_end|>", True)],
        [Piece(asked + "4" + more + no_thought, False), Piece("5<|im_end|>", True)],
    ]
    assert training.examples == examples * 2
    titles = [f"record {record}, example {number} of 2" for record in (1, 2) for number in (1, 2)]
    assert training.titles == titles
    assert training.facts["records"] == "3" and training.facts["examples"] == "6"
    assert training.facts["answers"] == "6 learnt; to their end: 6 (<|im_end|>)"
    assert training.notes[0].startswith("3 of 3 conversations are one example for each assistant turn")
    prompt = [Piece(asked + "4" + more + no_thought, False), Piece("5", True)]
    assert found["evaluate.exact_match"].examples == [prompt] * 2


def test_conversations_and_what_is_cut(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "so?"), ("assistant", "no")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(record) + "\n")
    raw["finetune"] |= {"data": str(tmp_path / "talk.jsonl"), "max_length": 60}
    plan = Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw))
    shown = next(iter(previews(plan, 1, ["finetune"])))
    learned = [piece.text for piece in shown.examples[0] if piece.learned]
    assert learned == ["yes<|im_end|>", "no<|im_end|>"]
    assert shown.facts["cut to fit"].startswith(("0 examples", "1 examples"))
