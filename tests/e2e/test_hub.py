"""A Hugging Face id: fetched from a hub, which here is a server on loopback that speaks its protocol."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny"


class Hub(BaseHTTPRequestHandler):
    """One repository at one commit, from a folder; what was asked for is written down."""

    folder: Path
    asked: list[str]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        self.asked.append(self.path)
        files = {file.name: file for file in self.folder.iterdir()}
        name = self.path.rpartition("/")[2]
        api = self.path.replace("/api/datasets/", "/api/models/")
        if api.startswith(f"/api/models/{REPO}/revision/"):
            siblings = [{"rfilename": name} for name in sorted(files)]
            content = json.dumps({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings}).encode()
        elif api.startswith(f"/api/models/{REPO}/tree/{COMMIT}"):
            sizes = {name: file.stat().st_size for name, file in sorted(files.items())}
            listed = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes.items()]
            content = json.dumps(listed).encode()
        elif self.path.removeprefix("/datasets").startswith(f"/{REPO}/resolve/") and name in files:
            content = files[name].read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(model_folder: Path, tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Its address, the folder it serves, what it was asked for."""
    folder = tmp_path / "served"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody may fetch")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code that nobody may run')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_tiny.Tiny"}
    (folder / "config.json").write_text(json.dumps(config))
    asked: list[str] = []
    handler = type("Handler", (Hub,), {"folder": folder, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder, asked
        server.shutdown()


def test_a_model_from_the_hub(hub: tuple[str, Path, list[str]], raw: dict[str, Any], tmp_path: Path) -> None:
    address, _, asked = hub
    raw["model"] = {"path": REPO, "revision": "main"}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({key: raw[key] for key in ("schema", "name", "model", "calibration", "sparsify")}))
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")}

    def run(command: str, offline: str) -> subprocess.CompletedProcess[str]:
        switches = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), offline)
        words = [sys.executable, "-m", "sqft", command, str(recipe), "--store", str(tmp_path / "store")]
        return subprocess.run(words, env=environment | switches, capture_output=True, text=True)

    done = run("run", offline="0")
    assert done.returncode == 0, done.stderr
    (artifact,) = (tmp_path / "store" / "artifacts").glob("sparsify-*")
    assert (artifact / "model" / "tokenizer.json").is_file()
    assert any("model.safetensors" in path for path in asked)
    assert not any("pytorch_model.bin" in path for path in asked)
    cached = run("plan", offline="1")  # what was fetched once is enough
    assert cached.returncode == 0 and "reuse" in cached.stdout, cached.stderr


def test_an_id_that_cannot_be_had(hub: tuple[str, Path, list[str]], raw: dict[str, Any], tmp_path: Path) -> None:
    raw["model"] = {"path": "someone/else"}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    environment = {**os.environ, "HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "sqft", "plan", str(recipe), "--store", str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the Hugging Face model 'someone/else' is not in the hub's cache and could not be downloaded" in done.stderr


def test_a_data_set_from_the_hub(
    hub: tuple[str, Path, list[str]], raw: dict[str, Any], tmp_path: Path, data: Path
) -> None:
    address, folder, asked = hub
    for file in folder.iterdir():
        file.unlink()
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    for split in ("train", "test"):
        renamed = [{"question": row["prompt"], "answer": f"{split} {row['completion']}"} for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    (folder / "sums.py").write_text("raise SystemExit('code that nobody may run')")
    raw["finetune"]["data"] = {"path": REPO, "split": "test[:20%]", "prompt": "gsm8k", "limit": 9}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")}
    environment |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "0")
    command = [sys.executable, "-m", "sqft", "run", str(recipe), "--until", "finetune"]
    done = subprocess.run(
        [*command, "--store", str(tmp_path / "store")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (manifest,) = (tmp_path / "store" / "artifacts").glob("finetune-*/manifest.json")
    assert json.loads(manifest.read_text())["report"]["examples"] == 9
    assert any("test.jsonl" in path for path in asked) and not any("sums.py" in path for path in asked)


COUNT = """
import sys
from pathlib import Path
from sqft.data.hub import fetch_data_set
from sqft.data.records import records_of
from sqft.recipe.data import Data
print(len(records_of(fetch_data_set(sys.argv[1], None, Path("nowhere")), Data(path=sys.argv[1]), {})))
"""
"""Without torch, in a process of its own, as the hub's address is read when its library is imported."""

TEXT = b"one line\nanother\n"
LINES = b'{"text": "a record"}\n'


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        ({"train.jsonl.gz": gzip.compress(LINES * 3)}, "3"),
        ({"corpus.txt": TEXT}, "2"),
        ({"corpus.jsonl": LINES, "LICENSE.txt": TEXT, "requirements.txt": TEXT}, "1"),
        (
            {
                "README.md": b"---\nconfigs:\n- config_name: default\n  data_files: words.txt\n---\nText.\n",
                "other.json": LINES,
                "words.txt": TEXT,
            },
            "2",
        ),
        ({"train.tar": b"", "README.md": b"Pictures, and a list in list.txt."}, None),
    ],
    ids=["gz", "text", "licence", "card", "none"],
)
def test_what_files_of_a_data_set_are_fetched(
    hub: tuple[str, Path, list[str]], tmp_path: Path, files: dict[str, bytes], shown: str | None
) -> None:
    address, folder, asked = hub
    for file in folder.iterdir():
        file.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", COUNT, REPO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if shown is None:
        assert done.returncode and "DataError" in done.stderr
        assert "has no data file; supported formats: .jsonl, .json" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == shown
    assert not any("LICENSE.txt" in path or "requirements.txt" in path for path in asked)
