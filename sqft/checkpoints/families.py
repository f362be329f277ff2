"""The linear layers of a model as far as names and shapes in a checkpoint's headers tell. No torch."""

from __future__ import annotations

import re

from sqft.types import LinearShape

IN_A_BLOCK = re.compile(r"\.\d+\.(.*\.)?(?!embed|wte|wpe)\w+\.weight$")
"""A weight below a number, and no table of embeddings (DeepSeek's last block has one)."""


IN_A_MIXTURE = re.compile(r"(.*\.\d+\.\w+)\.experts\.")


TRANSPOSED = {"gpt2", "openai-gpt"}
"""Families whose checkpoints hold linear layers as [in, out]."""


BARE_PREFIX = {
    "gpt2": "transformer.",
    "bloom": "transformer.",
    "falcon": "transformer.",
    "gptj": "transformer.",
    "gpt_neo": "transformer.",
    "gpt_neox": "gpt_neox.",
    "opt": "model.",
}
"""What the modules' names begin with, of families whose older checkpoints leave it out."""


FUSED_NAMES = (
    (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
    (r"\.block_sparse_moe\.router\.layer\.weight$", ".block_sparse_moe.router.weight"),
)
"""How Granite's checkpoints call a mixture's tensors, and how transformers does."""


EXPERT_NAMES = (
    (r"\.block_sparse_moe\.experts\.(\d+)\.w(?=\d$)", r".mlp.experts.\1.w"),
    (r"(\.experts\.\d+)\.w1$", r"\1.gate_proj"),
    (r"(\.experts\.\d+)\.w2$", r"\1.down_proj"),
    (r"(\.experts\.\d+)\.w3$", r"\1.up_proj"),
)
"""How Mixtral's checkpoints call the layers of an expert, and how transformers does."""


Shapes = dict[str, tuple[int, ...]]


def guess_linears(shapes: Shapes, family: str = "", packed: bool = False) -> tuple[LinearShape, ...]:
    """Two-dimensional weights below a numbered block, under the names that sqft gives their layers: a guess, which the
    run checks."""
    prefix = BARE_PREFIX.get(family, "")
    bare = not any(name.startswith(prefix) for name in shapes)
    for old, new in FUSED_NAMES:
        shapes = {re.sub(old, new, name): shape for name, shape in shapes.items()}
    mixtures = {match[1] for name in shapes if (match := IN_A_MIXTURE.match(name))}
    found = []
    for name, shape in _experts(shapes).items():
        layer = f"{prefix if bare else ''}{name}".removesuffix(".weight")
        if len(shape) != 2 or not IN_A_BLOCK.search(f".{name}"):
            continue
        if "router" in layer.split(".") or layer.rpartition(".")[0] in mixtures:
            continue  # what stands beside the experts routes tokens
        for old, new in EXPERT_NAMES:
            layer = re.sub(old, new, layer)
        out, inputs = shape[::-1] if family in TRANSPOSED and not packed else shape
        found.append(LinearShape(layer, out, inputs))
    return tuple(sorted(found, key=lambda linear: in_order(linear.name)))


def _experts(shapes: Shapes) -> Shapes:
    """Shapes with the experts that lie in one tensor taken apart: gate and up [experts, 2 · inner, in], and down."""
    apart: Shapes = {}
    for name, shape in shapes.items():
        mixture, _, part = name.rpartition(".")
        both, down = (shapes.get(f"{mixture}.{each}", ()) for each in ("gate_up_proj", "down_proj"))
        # Others hold them transposed, or with biases.
        plain = both[1:] == (2 * down[2], down[1]) and f"{name}_bias" not in shapes if len(down) == 3 else False
        if len(shape) == 3 and mixture.endswith(".experts") and plain:
            split = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
            one = (shape[1] // len(split), shape[2])
            apart |= {f"{mixture}.{index}.{each}.weight": one for index in range(shape[0]) for each in split}
        else:
            apart[name] = shape
    return apart


def in_order(name: str) -> list[tuple[int, str]]:
    """A key to sort names of modules by: layer 10 after layer 9, and names among them."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
