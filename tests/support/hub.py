"""A model or an adapter as the hub's cache holds it."""

from __future__ import annotations

import shutil
from pathlib import Path


def cached(cache: Path, folder: Path, name: str = "owner/name") -> Path:
    """Copy a folder into a cache as the main branch of a repository of models, and return its snapshot."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copytree(folder, home / "snapshots" / ("0" * 40)))
