"""Linear layers so narrow that pruning or quantizing them saves nothing and can cost much. No torch.

Such a layer gives a few numbers for each token, mostly one for each head: the decay and the step of linear attention
(`in_proj_a`, `in_proj_b` of Qwen3.5, `b_proj` of Kimi-Linear), gates of heads, weights of an indexer. All else that a
head does is multiplied by them. In the models of 2026 they have 16 to 64 outputs and 32 times as many inputs or more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqft.types import LinearShape

OUTPUTS, RATIO = 64, 16
"""A narrow layer has at most this many outputs, and at least this many times as many inputs."""

NARROW = f"at most {OUTPUTS} outputs and {RATIO} times as many inputs"
"""What a narrow layer is, for messages."""


def narrow_layers(linears: Sequence[LinearShape], heads: Mapping[str, int] | None = None) -> tuple[str, ...]:
    """Return the names of the narrow layers.

    A layer that fills a head is none: keys and values, where one head serves all. Nor is the first half of a low-rank
    pair (DeepSeek's `kv_a_proj`, Mamba's `x_proj`), whatever its size: another layer of the same module takes what it
    gives, or a part of it.

    Args:
        linears: layers by full name.
        heads: the size of one head of a module, by the module's full name, where it has heads.
    """
    heads, inputs = heads or {}, dict[str, set[int]]()
    for layer in linears:
        inputs.setdefault(_owner(layer), set()).add(layer.in_features)
    return tuple(
        layer.name
        for layer in linears
        if layer.out_features <= OUTPUTS
        and layer.in_features >= RATIO * layer.out_features
        and min(inputs[_owner(layer)]) > layer.out_features
        and heads.get(_owner(layer), OUTPUTS + 1) > layer.out_features
    )


def _owner(layer: LinearShape) -> str:
    return layer.name.rpartition(".")[0]
