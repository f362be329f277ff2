"""Where Hugging Face's libraries keep what they download and prepare, when there is no home to write to."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from sqft.utils.files import existing_parent, unwritable


def use_writable_caches(fallback: Path) -> None:
    """Point Hugging Face's libraries to `fallback` where their own folder cannot be written.

    That is so without HOME for a user without an entry in passwd, or with a home that is read-only. Models and a token
    that lie in the folder stay in use. The libraries read the environment when they are first imported.
    """
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(os.path.expanduser(os.environ.get("HF_HOME") or f"{parent}/huggingface"))
    known = home.is_absolute()  # otherwise it still begins with "~"
    folders = (home, home / "hub", home / "datasets")
    if known and all(_writable(folder) for folder in folders):
        return
    os.environ["HF_HOME"] = str(fallback.resolve())
    for variable, kept in (("HF_HUB_CACHE", home / "hub"), ("HF_TOKEN_PATH", home / "token")):
        if known and kept.exists():
            os.environ.setdefault(variable, str(kept))


def _writable(folder: Path) -> bool:
    """Return whether a folder can be written, or made: what permits it may still refuse it, as /proc does."""
    if unwritable(folder):
        return False
    try:
        with TemporaryDirectory(dir=existing_parent(folder)):
            return True
    except OSError:
        return False
