"""The hub's cache without a network, and a hub that refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from sqft.errors import HubError
from sqft.utils.hub import HUB_FILES, HUB_ID, fetch, is_hub_id, not_asked


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("owner/name", True),
        ("a-b.c/d_e.f-1", True),
        ("name", False),
        ("a/b/c", False),
        ("../x", False),
        ("/a/b", False),
    ],
)
def test_ids(name: str, valid: bool) -> None:
    assert bool(HUB_ID.fullmatch(name)) is valid


def test_what_is_here_or_was_to_be_here_is_no_id(tmp_path: Path) -> None:
    (tmp_path / "runs" / "lora").mkdir(parents=True)
    ids = {"runs/lora": False, "runs/lor": False, "out/model.gguf": False, "someone/lora": True, "lora": False}
    assert {name: is_hub_id(name, tmp_path / name) for name in ids} == ids
    assert f"'runs/lor', since {tmp_path / 'runs'} is a folder here" in not_asked("runs/lor", tmp_path / "runs" / "lor")
    assert not any(not_asked(name, tmp_path / name) for name in ("out/model.gguf", "lora"))


def test_what_is_in_the_cache_is_found_and_what_is_not_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--owner--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert fetch("model", "owner/name", None, HUB_FILES, Path("owner/name")) == snapshot
    for kind, revision in (("model", "v2"), ("dataset", None)):
        with pytest.raises(HubError, match=f"the Hugging Face {kind} 'owner/name' is not in .*HF_HUB_OFFLINE forbids"):
            fetch(kind, "owner/name", revision, HUB_FILES, Path("owner/name"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", "its owner must let you in"),
        (404, "RepoNotFound", "the hub has no model of this name, or it is private"),
    ],
)
def test_a_hub_that_refuses(tmp_path: Path, status: int, code: str, said: str) -> None:
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        script = "from pathlib import Path; from sqft.utils.hub import fetch"
        script += "; fetch('model', 'owner/name', None, ('*',), Path('owner/name'))"
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        server.shutdown()
    assert said in done.stderr and "`hf auth login`, or set HF_TOKEN" in done.stderr
