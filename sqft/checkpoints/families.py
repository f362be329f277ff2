"""The linear layers of a model, guessed from the names and shapes in a checkpoint's headers, without torch.

This is the header side of `sqft.modeling.architecture`, which knows the same things from a model's modules. The plan
uses the guess; before weights are loaded, a run compares it with the modules and stops where they differ. A test in
`tests/e2e/test_architectures.py` runs every family through both. What faces what:

| here | there |
|---|---|
| `TRANSPOSED`, by family | `linears.Transposed`, by class |
| `_is_router` | `blocks._is_router` |
| `_is_plain_mixture`, `_split_experts` | `linears._is_plain_mixture`, `linears.Experts` |
| `IN_A_BLOCK` | `blocks.decoder_blocks` |
| `BARE_PREFIX`, `GRANITE_NAMES`, `MIXTRAL_NAMES` | transformers' own renaming while it loads a checkpoint |
"""

from __future__ import annotations

import re

from sqft.types import LinearShape

IN_A_BLOCK = re.compile(r"\.\d+\.(.*\.)?(?!embed|wte|wpe)\w+\.weight$")
"""A weight in a numbered block that is not an embedding table (DeepSeek's last block has one)."""

IN_A_MIXTURE = re.compile(r"(.*\.\d+\.\w+)\.experts\.")
"""A tensor of a mixture's experts; the group is the name of the mixture."""

TRANSPOSED = {"gpt2", "openai-gpt"}
"""Families whose checkpoints hold linear layers as [in, out]."""

ROUTER = "router"
"""A part of a layer's name that says that it decides which experts act on a token."""

LAYERS_IN_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The tensors that hold all experts of a plain mixture, and the layers of an expert that each is made of, by rows."""

BARE_PREFIX = {
    "gpt2": "transformer.",
    "bloom": "transformer.",
    "falcon": "transformer.",
    "gptj": "transformer.",
    "gpt_neo": "transformer.",
    "gpt_neox": "gpt_neox.",
    "opt": "model.",
}
"""The prefix of module names that older checkpoints of these families leave out."""

GRANITE_NAMES = (
    (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
    (r"\.block_sparse_moe\.router\.layer\.weight$", ".block_sparse_moe.router.weight"),
)
"""Names of a mixture's tensors in Granite's checkpoints, and in transformers."""

MIXTRAL_NAMES = (
    (r"\.block_sparse_moe\.experts\.(\d+)\.w(?=\d$)", r".mlp.experts.\1.w"),
    (r"(\.experts\.\d+)\.w1$", r"\1.gate_proj"),
    (r"(\.experts\.\d+)\.w2$", r"\1.down_proj"),
    (r"(\.experts\.\d+)\.w3$", r"\1.up_proj"),
)
"""Names of an expert's layers in Mixtral's checkpoints, and in transformers."""

Shapes = dict[str, tuple[int, ...]]


def guess_linears(shapes: Shapes, family: str = "", packed: bool = False) -> tuple[LinearShape, ...]:
    """Return the linear layers of the decoder blocks, without routers, in order, by their names in transformers.

    Args:
        shapes: Shape of every tensor by its name in the checkpoint.
        family: The config's `model_type`.
        packed: Whether the shapes are those of unpacked GPTQ codes, which are [out, in] in every family.
    """
    prefix = BARE_PREFIX.get(family, "")
    bare = not any(name.startswith(prefix) for name in shapes)
    for old, new in GRANITE_NAMES:
        shapes = {re.sub(old, new, name): shape for name, shape in shapes.items()}
    mixtures = {match[1] for name in shapes if (match := IN_A_MIXTURE.match(name))}
    layers = []
    for name, shape in _split_experts(shapes).items():
        layer = f"{prefix if bare else ''}{name}".removesuffix(".weight")
        if len(shape) != 2 or not IN_A_BLOCK.search(f".{name}") or _is_router(layer, mixtures):
            continue
        for old, new in MIXTRAL_NAMES:
            layer = re.sub(old, new, layer)
        out, inputs = shape[::-1] if family in TRANSPOSED and not packed else shape
        layers.append(LinearShape(layer, out, inputs))
    return tuple(sorted(layers, key=lambda linear: in_order(linear.name)))


def _is_router(layer: str, mixtures: set[str]) -> bool:
    """Return whether a layer decides which experts act on a token, or how much: it is a sibling of the experts."""
    return ROUTER in layer.split(".") or layer.rpartition(".")[0] in mixtures


def _split_experts(shapes: Shapes) -> Shapes:
    """Replace tensors that hold all experts of a mixture by one weight [out, in] for each expert and layer.

    gate_up_proj [experts, 2 · inner, in] becomes gate_proj and up_proj [inner, in]; down_proj [experts, in, inner]
    becomes [in, inner] each.
    """
    split: Shapes = {}
    for name, shape in shapes.items():
        mixture, _, part = name.rpartition(".")
        if len(shape) == 3 and mixture.endswith(".experts") and _is_plain_mixture(mixture, name, shapes):
            layers = LAYERS_IN_FUSED.get(part, (part,))
            one = (shape[1] // len(layers), shape[2])
            split |= {f"{mixture}.{index}.{layer}.weight": one for index in range(shape[0]) for layer in layers}
        else:
            split[name] = shape
    return split


def _is_plain_mixture(mixture: str, name: str, shapes: Shapes) -> bool:
    """Return whether a mixture's tensors are [experts, out, in] without biases; other mixtures are not split."""
    gate_up, down = (shapes.get(f"{mixture}.{part}", ()) for part in LAYERS_IN_FUSED)
    return len(down) == 3 and gate_up[1:] == (2 * down[2], down[1]) and f"{name}_bias" not in shapes


def in_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts module names with their numbers as numbers: layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
