"""Which distributions are looked at, and which of them fit this version before they are imported."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

import sqft
from sqft.components.discovery import GROUP, distributions, version_mismatch


def distribution(site: Path, name: str, *requires: str) -> metadata.Distribution:
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {line}" for line in requires)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    return metadata.Distribution.at(info)


def test_each_distribution_once_the_first_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for site, name in (("second", "sqft-mine"), ("first", "SQFT_Mine")):
        distribution(tmp_path / site, name)
        monkeypatch.syspath_prepend(tmp_path / site)
    mine = [found.name for found in distributions() if found.name.lower().replace("_", "-") == "sqft-mine"]
    assert mine == ["SQFT_Mine"]


def test_our_own_entry_points_are_found_once() -> None:
    names = [point.name for found in distributions() for point in found.entry_points.select(group=GROUP)]
    assert "wanda" in names and len(names) == len(set(names))


@pytest.mark.parametrize(
    ("requires", "fits"),
    [
        ([], True),
        (["sqft"], True),
        ([f"sqft=={sqft.__version__}"], True),
        (["sqft>=0.1.0.dev1,<2"], True),
        (["sqft>=9"], False),
        (["numpy>=99", "sqft<0.0.1"], False),
        (["sqft>=9; extra == 'all'"], True),  # an extra that is not asked for
        (["sqft>=9; python_version < '3'"], True),
        (["sqft >= no version", "torch"], True),  # pip would have refused it
    ],
    ids=str,
)
def test_the_requirement_on_sqft_is_compared(tmp_path: Path, requires: list[str], fits: bool) -> None:
    mismatch = version_mismatch(distribution(tmp_path, "sqft-mine", *requires))
    assert (mismatch is None) == fits
    if mismatch:
        assert mismatch.startswith("needs sqft") and mismatch.endswith(f", this is sqft {sqft.__version__}")
