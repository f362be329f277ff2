"""The hub's cache without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from sqft.errors import SqftError
from sqft.utils.hub import HUB_FILES, HUB_ID, fetch


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
        with pytest.raises(SqftError, match=f"the Hugging Face {kind} 'owner/name' is not in the hub's cache"):
            fetch(kind, "owner/name", revision, HUB_FILES, Path("owner/name"))  # type: ignore[arg-type]
