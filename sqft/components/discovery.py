"""Find installed plugins: distributions with entry points, and whether they fit this version."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

import sqft

GROUP = "sqft"


def distributions() -> Iterator[metadata.Distribution]:
    """Installed distributions, each once (the first on the path is the one Python imports)."""
    seen: set[str] = set()
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name and name not in seen:
            seen.add(name)
            yield distribution


def version_mismatch(distribution: metadata.Distribution) -> str | None:
    """Compare the plugin's own requirement on sqft with this version, before importing it."""
    for line in distribution.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ours = requirement.name == "sqft" and applies and distribution.name != "sqft"
        if ours and not requirement.specifier.contains(sqft.__version__, prereleases=True):
            return f"needs sqft{requirement.specifier}, this is sqft {sqft.__version__}"
    return None
