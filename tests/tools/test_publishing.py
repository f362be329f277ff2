"""What stands beside a result that leaves, and its way to a hub: here a server on loopback."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import ArtifactError, SqftError
from sqft.execution.run import Run
from sqft.tools.publishing import documents, format_of, push, without_local_paths, write_documents
from sqft.tools.run_report.facts import RunFacts, read_facts
from tests.support.hub import cached


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


def test_no_path_leaves_of_a_moved_store_of_options_or_of_texts(
    facts: RunFacts, made_store: Path, tmp_path: Path
) -> None:
    shutil.copytree(made_store, tmp_path / "moved")
    moved = read_facts(tmp_path / "moved" / "runs" / facts.name, tmp_path / "moved")
    recipe = json.loads(json.dumps(facts.recipe))
    recipe["sparsify"]["scorer"] = {"name": "not-installed", "options": {"folder": "/home/alice/masks"}}
    rows = [
        {**row, "texts": {f"{who}/t.txt": {"perplexity": 2.0} for who in ("alice", "bob")}}
        for row in facts.report["rows"]
    ]
    moved = dataclasses.replace(moved, recipe=recipe, report={**facts.report, "rows": rows})
    texts = documents(moved, "someone/small")
    assert not any(word in text for text in texts.values() for word in ("alice", str(made_store), str(tmp_path)))
    assert "perplexity t.txt (2)" in texts["README.md"]
    names = [result.dataset_name for result in ModelCard(texts["README.md"]).data.eval_results or []]
    assert {"t.txt", "t.txt (2)"} <= set(names)


def test_a_card_says_what_an_adapter_is(facts: RunFacts, made: tuple[Run, Run]) -> None:
    adapter = facts.ending_in(made[0]["search"].folder / "adapter", "merge it")
    card = ModelCard(documents(adapter, "x")["README.md"])
    assert format_of(adapter) == "sqft" and card.data.library_name is None and "acts through its merger" in card.text
    assert "such results with" not in card.text


def test_a_record_of_an_earlier_sqft_is_made_again(facts: RunFacts) -> None:
    record = {name: value for name, value in facts.record.items() if name != "loading"}
    with pytest.raises(SqftError, match="does not say what its result is; run its recipe again"):
        documents(dataclasses.replace(facts, record=record), "x")


def test_ids_of_the_hub_stay(facts: RunFacts, tmp_path: Path) -> None:
    recipe = json.loads(json.dumps(facts.recipe))
    recipe["model"]["path"] = "HuggingFaceTB/SmolLM2-135M"
    recipe["finetune"]["data"] = {"path": "openai/gsm8k", "split": "train", "prompt": "alpaca"}
    found = without_local_paths(recipe)
    assert (
        found["model"]["path"] == "HuggingFaceTB/SmolLM2-135M" and found["finetune"]["data"]["path"] == "openai/gsm8k"
    )
    recipe["evaluate"]["exact_match"]["data"] = "someone/questions"
    recipe["finetune"]["teacher"] = {"model": "someone/teacher"}
    card = ModelCard(documents(dataclasses.replace(facts, recipe=recipe), "x")["README.md"])
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M" and card.data.datasets == ["openai/gsm8k"]


def test_the_licence_is_the_base_models(facts: RunFacts, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    recipe = {**facts.recipe, "model": {"path": str(tmp_path)}}
    named = dataclasses.replace(facts, recipe=recipe)
    assert ModelCard(documents(named, "x")["README.md"]).data.license == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntitle: a: b: [c\n---\n")  # no YAML
    assert ModelCard(documents(named, "x")["README.md"]).data.license is None


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


def test_a_push_from_a_store_with_a_relative_path(
    made: tuple[Run, Run], hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the commands name it unless told otherwise."""
    store = made[0].folder.parents[1]
    monkeypatch.chdir(store.parent)
    push(read_facts(Path(store.name, "runs", made[0].folder.name), Path(store.name)), "someone/small")
    assert {"config.json", "README.md"} <= hub["files"].keys()


def test_a_hub_that_refuses_is_named(facts: RunFacts, hub: dict[str, Any]) -> None:
    hub["refuses"] = True
    with pytest.raises(SqftError, match=r"someone/small could not be uploaded: .*hf auth login"):
        push(facts, "someone/small")


def test_a_result_that_has_changed_stays(made: tuple[Run, Run], hub: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(made[0].folder.parents[1], tmp_path / "store")
    facts = read_facts(tmp_path / "store" / "runs" / made[0].folder.name, tmp_path / "store")
    assert facts.result is not None
    weights = facts.result / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ArtifactError, match=r"model.safetensors has changed since it was stored"):
        push(facts, "someone/small")
    assert not hub


def test_an_error_without_words_is_told(facts: RunFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    with pytest.raises(SqftError, match="someone/small could not be uploaded"):
        push(facts, "someone/small")


def test_an_adapter_stays(facts: RunFacts, made: tuple[Run, Run]) -> None:
    adapter = facts.ending_in(made[0]["search"].folder / "adapter", "")
    with pytest.raises(SqftError, match=r"an adapter that nobody else could load.* Merge it \(`sqft merge tiny-"):
        push(adapter, "someone/small")


@pytest.fixture
def of_hub(tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFacts:
    """A LoRA on a model of the hub, which is in the hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cached(tmp_path / "cache", Path(tiny_recipe["model"]["path"]), "owner/base")
    tuned = tiny_recipe["finetune"] | {"adapter": {"name": "lora", "options": {"rank": 4}}, "merger": "unmerged"}
    raw = {"schema": 1, "name": "beside", "model": {"path": "owner/base", "revision": "main"}, "finetune": tuned}
    orchestrator = Orchestrator(Registry.discover(), tmp_path / "store")
    run = orchestrator.run(orchestrator.plan(Recipe.parse(raw)))
    return read_facts(run.folder, tmp_path / "store")


def test_an_adapter_on_a_model_of_the_hub_is_pushed(
    of_hub: RunFacts, hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What arrives names the base by its id, and stock peft makes of both what the run made."""
    push(of_hub, "someone/small")
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    for name, content in hub["files"].items():
        (pulled / name).write_bytes(content)
        assert str(tmp_path).encode() not in content, name
    card = ModelCard((pulled / "README.md").read_text())
    assert (card.data.base_model, card.data.library_name) == ("owner/base", "peft")
    commit = "0" * 40  # what the branch of the recipe was when it was trained
    assert f'AutoModelForCausalLM.from_pretrained("owner/base", revision="{commit}", dtype="auto")' in card.text
    assert "PeftModel.from_pretrained(" in card.text and '"someone/small")' in card.text

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    named = PeftConfig.from_pretrained(pulled)
    assert (named.base_model_name_or_path, named.revision) == ("owner/base", commit)
    ids = torch.arange(5, 25)[None]
    outputs = []
    assert of_hub.result
    for adapter in (pulled, of_hub.result):
        base = AutoModelForCausalLM.from_pretrained(
            named.base_model_name_or_path, revision=named.revision, cache_dir=tmp_path / "cache"
        )
        outputs.append(PeftModel.from_pretrained(base, adapter)(ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(named.base_model_name_or_path, cache_dir=tmp_path / "cache")
    assert torch.equal(*outputs) and not torch.equal(outputs[0], plain(ids).logits)


@pytest.mark.parametrize(
    "change",
    [
        {"sparsify": {"scorer": "wanda"}},
        {"quantize": {}},
        {"model": {"path": "/m"}},
        {"model": {"path": "owner/base", "dequantize": True}},
    ],
)
def test_an_adapter_on_a_model_that_is_only_here_stays(of_hub: RunFacts, change: dict[str, Any]) -> None:
    with pytest.raises(SqftError, match=r"only a LoRA beside a model of the hub, .* with a merger that merges, or"):
        push(dataclasses.replace(of_hub, recipe={**of_hub.recipe, **change}), "someone/beside")
