"""The layout of a model, as it is kept between plans."""

from __future__ import annotations

import pytest

from sqft.checkpoints.layout import LeftOut, ModelLayout
from sqft.types import LinearShape


def test_a_layout_is_the_same_after_it_was_stored() -> None:
    layout = ModelLayout(
        architecture="A",
        linears=(LinearShape("b.0.q", 4, 8),),
        left_out=(LeftOut("vision", 12, "a tower"),),
        outside={"head": "the head"},
        narrow=("b.0.q",),
        walk="model",
        shared={"b.0.q": "b.1.q"},
        problems=("one",),
    )
    assert ModelLayout.from_json(layout.to_json()) == layout
    assert ModelLayout.from_json(ModelLayout().to_json()) == ModelLayout()


@pytest.mark.parametrize(
    "text", ["{}", "[]", "x", '{"linears": [], "left_out": [], "colour": 1}', '{"linears": [[1]]}']
)
def test_another_text_is_no_layout(text: str) -> None:
    with pytest.raises(ValueError):
        ModelLayout.from_json(text)
