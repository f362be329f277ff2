"""Layers chosen by globs."""

from __future__ import annotations

import pytest

from sqft.utils.globs import covering, names_itself, selected

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


def test_globs_that_cover_layers_and_no_others() -> None:
    names = [f"layers.{block}.{part}" for block in (0, 1) for part in ("a.up", "b.up", "b.down", "gate")]
    for chosen in (names[::2], names[:1], [names[0], names[4]], names[2:3] + names[6:7], names):
        others = [name for name in names if name not in chosen]
        globs = covering(chosen, others)
        assert [name for name in names if selected(name, globs, ())] == chosen
    assert covering(["layers.0.a.up", "layers.1.a.up"], ["layers.0.b.up"]) == ["*.a.up"]
    assert covering(["layers.0.b.down", "layers.0.gate"], [], ["gate"]) == ["gate", "*.down"]
