"""The config that peft saves beside the weights of an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sqft.errors import ArtifactError

CONFIG = "adapter_config.json"
TEXTS = ("peft_type", "base_model_name_or_path", "revision")
"""Keys of it that sqft reads: texts, or null."""


def read_config(folder: Path, called: str) -> dict[str, Any]:
    """Return the config of an adapter.

    Args:
        folder: Holds it.
        called: What messages call the adapter: the folder, or its id on the hub.

    Raises:
        ArtifactError: when it cannot be read, or one of `TEXTS` is something else.
    """
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{CONFIG} of {called} cannot be read: {error}; copy the adapter again") from None
    if not isinstance(config, dict):
        raise ArtifactError(f"{CONFIG} of {called} is not a JSON object; copy the adapter again")
    for key in TEXTS:
        if not isinstance(value := config.get(key), str | None):
            raise ArtifactError(
                f"{CONFIG} of {called}: {key} is {json.dumps(value)}, and must be a text or null; correct it in a copy "
                "of the adapter"
            )
    return config
