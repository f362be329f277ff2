"""Conversations whose history the template rewrites, through training, search, merge and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sqft import Orchestrator, Recipe, Registry
from tests.conftest import make_model
from tests.support.chats import chat_tokenizer, conversation


def test_a_rewritten_history_is_learnt_searched_and_asked(
    raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    tokenizer = chat_tokenizer("qwen3")
    make_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    records = [
        conversation(("user", f"{n}+1?"), ("assistant", str(n + 1)), ("user", "and 1?"), ("assistant", str(n + 2)))
        for n in range(8)
    ]
    records[0]["messages"][1]["weight"] = 0
    talk = tmp_path / "talk.jsonl"
    talk.write_text("".join(json.dumps(record) + "\n" for record in records))
    raw["model"] = {"path": str(tmp_path / "model"), "chat_template_kwargs": {"enable_thinking": False}}
    raw["finetune"] |= {
        "data": {"path": str(talk), "limit": 6, "weight": 2},
        "validation": str(talk),
        "packing": True,
        "max_length": 120,
    }
    raw["search"] |= {"data": str(talk), "metric": "exact_match", "max_new_tokens": 4}
    raw["evaluate"] = {"of": ["merge"], "exact_match": {"data": str(talk), "max_new_tokens": 4}}
    orchestrator = Orchestrator(registry, tmp_path / "store")
    run = orchestrator.run(orchestrator.plan(Recipe.parse(raw)))
    report = run["finetune"].report
    # Six conversations of two turns, one of them switched off; each comes twice.
    assert (report["examples"], report["answers"], report["ends"], report["truncated"]) == (22, 22, 22, 0)
    assert report["rows"] < 22
    asked = (run["evaluate:merge"].folder / "predictions.jsonl").read_text().splitlines()
    first = json.loads(asked[0])
    assert first["prompt"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") and first["expected"] == "2"
