"""Data that a recipe names, found and read while it is planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import RecipeError
from sqft.planning.plan import Plan


def planned(raw: dict[str, Any], store: Path) -> Plan:
    return Orchestrator(Registry.discover(), store).plan(Recipe.parse(raw))


def problems(raw: dict[str, Any], store: Path) -> list[tuple[str, str]]:
    with pytest.raises(RecipeError) as caught:
        planned(raw, store)
    return [(problem.place, problem.message) for problem in caught.value.problems]


def test_a_slice_is_part_of_the_fingerprint(raw: dict[str, Any], tmp_path: Path) -> None:
    sums = raw["finetune"]["data"]
    found = []
    for split in ("train", "train[:32]", "train[:50%]", "train[50%:]", "train[:32]"):
        raw["finetune"]["data"] = {"path": sums, "split": split}
        plan = planned(raw, tmp_path)
        found.append([plan.step(name).fingerprint for name in ("finetune", "search", "merge")])
    assert found[1] == found[4]
    for name in range(3):
        assert len({prints[name] for prints in found}) == 4


def test_a_wrong_slice_is_one_problem(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["finetune"]["data"] = [raw["finetune"]["data"], {"path": raw["finetune"]["data"], "split": "train[:10"}]
    raw["search"]["data"] = {"path": "owner/never-fetched", "split": "test[a:]"}
    (first, said), (second, _) = problems(raw, tmp_path)
    assert (first, second) == ("finetune.data.1.split", "search.data.split")
    assert said.startswith("Unrecognized instruction format: train[:10; write slices as datasets does: train[:100]")


@pytest.mark.parametrize(
    ("how", "place", "words"),
    [
        ({"split": "test"}, "finetune.data.split", "a single file has only the split 'train', or slices of it"),
        (
            {"split": "train[:5]+test"},
            "finetune.data.split",
            "a single file has only the split 'train', or slices of it",
        ),
        ({"config": "main"}, "finetune.data.path", "is a single file and has no config"),
        ({"split": "train[70:]"}, "finetune.data.path", "split 'train[70:]', has no records"),
    ],
)
def test_what_one_file_does_not_have(
    raw: dict[str, Any], tmp_path: Path, how: dict[str, str], place: str, words: str
) -> None:
    raw["finetune"]["data"] = {"path": raw["finetune"]["data"], **how}
    ((found, said),) = problems(raw, tmp_path)
    assert found == place and words in said


def test_slices_of_one_file_train_and_validate(raw: dict[str, Any], tmp_path: Path) -> None:
    from sqft.tools.data_preview import previews

    path = raw["finetune"]["data"]
    raw["finetune"] |= {
        "data": {"path": path, "split": "train[:75%]"},
        "validation": {"path": path, "split": "train[75%:]"},
    }
    shown = {preview.place: preview.facts["records"] for preview in previews(planned(raw, tmp_path), 1, ["finetune"])}
    assert shown == {"finetune.data": "48", "finetune.validation": "16"}
