"""A model or an adapter as the hub's cache holds it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path


def cached(cache: Path, folder: Path, name: str = "owner/name", revision: str = "main") -> Path:
    """Copy a folder into a cache as a branch of a repository of models, and return its snapshot: of main, 000…"""
    home = cache / f"models--{name.replace('/', '--')}"
    commit = "0" * 40 if revision == "main" else hashlib.sha1(revision.encode()).hexdigest()
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(commit)
    return Path(shutil.copytree(folder, home / "snapshots" / commit))
