"""What stands beside a result that leaves, and its way to a hub: here a server on loopback."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from sqft.errors import SqftError
from sqft.execution.run import Run
from sqft.tools.publishing import documents, format_of, push, without_local_paths, write_documents
from sqft.tools.run_report.facts import RunFacts, read_facts


@pytest.fixture(scope="session")
def facts(made: tuple[Run, Run], made_store: Path) -> RunFacts:
    return read_facts(made[0].folder, made_store)


def test_the_card_says_what_was_made_and_how_it_is_loaded(facts: RunFacts, made: tuple[Run, Run]) -> None:
    card = ModelCard(documents(facts, "someone/small")["README.md"])
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.tags == ["sqft", "sparse", "fine-tuned"]
    assert card.data.base_model is None  # a folder of this machine
    merged = next(row for row in made[0].report["rows"] if row["configuration"] == "merge")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert values == {
        "accuracy": pytest.approx(merged["accuracy"], abs=1e-5),
        "perplexity": pytest.approx(merged["perplexity"], abs=1e-5),
    }
    assert 'from_pretrained("someone/small", dtype="auto")' in card.text and "50.00% of the weights" in card.text


def test_no_path_of_this_machine_leaves(facts: RunFacts, made_store: Path) -> None:
    texts = documents(facts, "someone/small")
    assert texts.keys() == {"README.md", "sqft-recipe.json", "sqft-report.html"}
    roots = {str(made_store.parents[1]), str(Path(facts.recipe["model"]["path"]).parent)}
    for name, text in texts.items():
        assert not any(root in text for root in roots), name
    assert json.loads(texts["sqft-recipe.json"])["finetune"]["data"] == {"path": "train.jsonl"}


def test_ids_of_the_hub_stay(facts: RunFacts, tmp_path: Path) -> None:
    recipe = json.loads(json.dumps(facts.recipe))
    recipe["model"]["path"] = "HuggingFaceTB/SmolLM2-135M"
    recipe["finetune"]["data"] = {"path": "openai/gsm8k", "split": "train", "prompt": "alpaca"}
    found = without_local_paths(recipe)
    assert (
        found["model"]["path"] == "HuggingFaceTB/SmolLM2-135M" and found["finetune"]["data"]["path"] == "openai/gsm8k"
    )
    named = RunFacts(facts.folder, facts.report, recipe, facts.record, facts.artifacts)
    card = ModelCard(documents(named, "x")["README.md"])
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M" and card.data.datasets == ["openai/gsm8k"]


def test_the_licence_is_the_base_models(facts: RunFacts, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    recipe = {**facts.recipe, "model": {"path": str(tmp_path)}}
    named = RunFacts(facts.folder, facts.report, recipe, facts.record, facts.artifacts)
    assert ModelCard(documents(named, "x")["README.md"]).data.license == "apache-2.0"


def test_a_result_before_the_merge_has_its_own_numbers(facts: RunFacts, made: tuple[Run, Run]) -> None:
    sparse = facts.ending_in(made[0]["sparsify"].folder / "model", "load it")
    card = ModelCard(documents(sparse, "x")["README.md"])
    row = next(row for row in made[0].report["rows"] if row["configuration"] == "sparsify")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert values["perplexity"] == pytest.approx(row["perplexity"], abs=1e-5) and card.data.tags == ["sqft", "sparse"]


def test_documents_beside_a_copy(facts: RunFacts, tmp_path: Path) -> None:
    write_documents(facts, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "sqft-recipe.json", "sqft-report.html"}
    assert format_of(facts) == "floats"


class Hub(BaseHTTPRequestHandler):
    """A hub that takes one commit: what it received is in `received`."""

    received: dict[str, Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.setdefault("tokens", set()).add(self.headers.get("Authorization"))
        if self.received.get("refuses"):
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path == "/api/repos/create":
            self.received["repo"] = json.loads(body)
            answer: Any = {"url": f"http://{self.headers['Host']}/someone/small", "name": "someone/small"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        else:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.received["files"] = {file["path"]: base64.b64decode(file["content"]) for file in files}
            answer = {
                "commitUrl": "https://huggingface.co/someone/small/commit/0",
                "commitOid": "0" * 40,
                "pullRequestUrl": None,
            }
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    received: dict[str, Any] = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"received": received})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield received
        server.shutdown()


def test_a_push_uploads_the_result_with_its_documents(facts: RunFacts, hub: dict[str, Any]) -> None:
    address = push(facts, "someone/small")
    assert address.endswith("someone/small") and hub["repo"]["visibility"] == "private"
    assert facts.result is not None
    for file in facts.result.iterdir():
        assert hub["files"][file.name] == file.read_bytes(), file
    assert {"README.md", "sqft-recipe.json", "sqft-report.html"} <= hub["files"].keys()
    assert hub["tokens"] == {"Bearer hf_secret"}
    assert not any(b"hf_secret" in content for content in hub["files"].values())
    assert not any(b"hf_secret" in file.read_bytes() for file in facts.folder.rglob("*") if file.is_file())


def test_a_hub_that_refuses_is_named(facts: RunFacts, hub: dict[str, Any]) -> None:
    hub["refuses"] = True
    with pytest.raises(SqftError, match=r"someone/small could not be uploaded: .*hf auth login"):
        push(facts, "someone/small")


def test_an_adapter_stays(facts: RunFacts, made: tuple[Run, Run]) -> None:
    adapter = facts.ending_in(made[0]["search"].folder / "adapter", "")
    with pytest.raises(SqftError, match="is an adapter, and its base is only in this store; merge it"):
        push(adapter, "someone/small")
