"""Layers chosen by globs."""

from __future__ import annotations

import pytest

from sqft.utils.globs import names_itself, selected

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        (["*"], [], True),
        ([], [], False),
        (["q_proj"], [], True),
        (["*_proj"], [], True),
        (["Q_PROJ"], [], False),
        (["self_attn.q_proj"], [], False),
        (["*.layers.0.*"], [], True),
        (["*.layers.1.*", "k_proj"], [], False),
        (["*"], ["q_proj"], False),
        (["q_proj"], ["*.layers.0.*"], False),
        (["q_proj"], ["*.layers.1.*"], True),
        (["[kq]_proj"], [], True),
    ],
)
def test_a_glob_matches_the_full_name_or_its_last_part(include: list[str], exclude: list[str], chosen: bool) -> None:
    assert selected(LAYER, include, exclude) is chosen


@pytest.mark.parametrize(
    ("globs", "named"),
    [
        (["*"], False),
        (["*.self_attn.*"], False),
        (["*.q_proj"], True),
        (["*", "q_*"], True),
        (["k_proj", "?_proj"], True),
        (["*.mlp.q_proj"], False),
    ],
)
def test_a_glob_that_means_the_layer_itself(globs: list[str], named: bool) -> None:
    assert names_itself(LAYER, globs) is named
