"""Download models and data sets from the Hugging Face hub: files by pattern, never a pickle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from sqft.errors import HubError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py")
"""The files of a model that are downloaded, and that its digest covers: no pickles. Code is among them: it runs only
when the recipe sets trust_remote_code, and then it can change the result."""


def is_hub_id(name: str, local: Path) -> bool:
    """Return whether a name is a Hugging Face id, and not something on this machine: what is there, or a misspelt path,
    which begins with a folder that is there or ends as a GGUF file does.

    Args:
        name: What the user wrote.
        local: The file or folder that it would be on this machine.
    """
    here = local.exists() or local.parent.is_dir() or local.suffix == ".gguf"
    return HUB_ID.fullmatch(name) is not None and not here


def not_asked(name: str, local: Path) -> str:
    """Return what to add to a message that `local` is not there: why a name that may be an id is taken for a path."""
    may_be = HUB_ID.fullmatch(name) and local.parent.is_dir()
    return f" (and the hub is not asked for '{name}', since {local.parent} is a folder here)" if may_be else ""


def fetch(
    kind: Literal["model", "dataset"], name: str, revision: str | None, patterns: tuple[str, ...], local: Path
) -> Path:
    """Return the folder of a repository in the hub's cache, downloading what is missing from it.

    Args:
        kind: What the repository is.
        name: Its id, "owner/name".
        revision: Branch, tag or commit; None for the main branch.
        patterns: Globs of the files to download.
        local: The folder on this machine that was looked for first, for messages.

    Raises:
        HubError: when it is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise HubError(
            f"there is no folder {local}, and the Hugging Face {kind} '{name}' is not in the hub's cache and could not "
            f"be downloaded: {_reason(kind, name, error)}"
        ) from None


def _reason(kind: str, name: str, error: Exception) -> str:
    """Return why a repository could not be downloaded, and what to do about it."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"its owner must let you in; ask on the {kind}'s page on the hub, and {login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no {kind} of this name, or it is private; correct the name, or {login}"
    if isinstance(error, RevisionNotFoundError):
        return f"the {kind} has no branch, tag or commit of this name; correct its revision"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the hub does not let you in; {login}"
    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids it; `sqft plan` fills the cache where there is a network (HF_HOME is its folder)"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
