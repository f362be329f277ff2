"""Fetch models and data sets from the Hugging Face hub: files by pattern, never a pickle."""

from __future__ import annotations

import re
from pathlib import Path

from sqft.errors import SqftError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
"""What is fetched of a Hugging Face id, and what a folder's digest is of: never a pickle. Code runs only when the
recipe trusts it, and then it makes the result."""


def fetched(name: str, revision: str | None, place: Path, what: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kind = "dataset" if what == "data set" else "model"
    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SqftError(
            f"there is no folder {place}, and the Hugging Face {what} '{name}' cannot be had, "
            f"here or from the hub: {reason}"
        ) from None
