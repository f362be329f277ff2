"""What compressing and tuning a large model takes, computed and not measured: memory and disk as the plan has them, and
floating-point operations from closed forms.

    python benchmarks/scale.py [--shapes 8b 70b 405b] [--samples 128] [--length 2048]
        [--batch-size 16] [--max-length 256] [--loss-chunk 128]

The shapes are Llama 3's, in bfloat16; half of the weights are pruned, codes are INT4 in groups of 128, and NLS adapters
of ranks 48, 32, 16 on q, k, v, up and down train with gradient checkpointing and a chunked loss. Nothing is run.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from sqft.checkpoints.layout import ModelLayout
from sqft.checkpoints.model_source import ModelSource
from sqft.planning import estimates
from sqft.planning.estimates import Estimate
from sqft.planning.training_memory import estimate_finetune
from sqft.recipe.sections import Calibration, Finetune
from sqft.types import LinearShape, Statistic

DTYPE, VOCABULARY, RANK = "bfloat16", 128256, 48
ADAPTED = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
SOLVER_STEPS = 12
"""Of `least-squares`, each a product of a weight's shape with its Hessian."""


@dataclass(frozen=True)
class Shape:
    """A Llama 3: sizes as its config names them."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int = 8

    @property
    def block(self) -> dict[str, tuple[int, int]]:
        """[out, in] of the linear layers of one block."""
        keys = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    def attention(self, length: int) -> int:
        """Operations of the attention of one token, to all tokens of its window."""
        return 4 * length * self.hidden * self.layers

    def forward(self, length: int) -> int:
        """Operations of one token in all blocks."""
        weights = sum(out * inputs for out, inputs in self.block.values())
        return 2 * weights * self.layers + self.attention(length)

    @property
    def source(self) -> ModelSource:
        """The model as its headers would describe it."""
        names = {f"model.layers.{i}.{name}": size for i in range(self.layers) for name, size in self.block.items()}
        tensors: dict[str, tuple[int, ...]] = {f"{name}.weight": size for name, size in names.items()}
        tensors |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, self.hidden))
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers}
        linears = tuple(LinearShape(name, *size) for name, size in names.items())
        return ModelSource(
            "folder", Path(), "", tensors, ModelLayout(sizes=sizes | {"vocab_size": VOCABULARY}, linears=linears)
        )


SHAPES = {
    "8b": Shape(4096, 14336, 32, 32),
    "70b": Shape(8192, 28672, 80, 64),
    "405b": Shape(16384, 53248, 126, 128),
}


@dataclass(frozen=True)
class Row:
    """One step: what the plan says of it, and its floating-point operations."""

    step: str
    estimate: Estimate
    operations: float


def rows(shape: Shape, calibration: Calibration, section: Finetune) -> list[Row]:
    """Return the steps of a model. A multiplication with its addition counts as two operations."""
    source, layers = shape.source, shape.source.layout.linears
    adapted = [layer for layer in layers if layer.name.endswith(ADAPTED)]
    trained = sum(RANK * (layer.out_features + layer.in_features) for layer in adapted)
    hessian, norms = frozenset({Statistic.HESSIAN}), frozenset({Statistic.INPUT_NORM})
    sparsify = estimates.estimate_sparsify(source, DTYPE, layers, calibration, norms, False, streamed=True)
    solved = estimates.estimate_sparsify(source, DTYPE, layers, calibration, norms | hessian, False, streamed=True)
    quantize = estimates.estimate_quantize(source, DTYPE, layers, calibration, hessian, 4, streamed=True)
    size = estimates.model_bytes(source, DTYPE)
    dense = estimate_finetune(source, DTYPE, section, trained, size)
    packed = estimates.packed_bytes(source, DTYPE, layers, 0.5)
    small = section.model_copy(update={"base": "packed"})
    names = [layer.name for layer in adapted]
    merge = estimates.estimate_merge(source, DTYPE, names, dense.storage, size, size, False, streamed=True)

    tokens = calibration.samples * calibration.length
    attention = tokens * shape.attention(calibration.length)
    once = tokens * shape.forward(calibration.length)
    hidden, inner = shape.hidden, shape.inner
    hessians = 2 * tokens * shape.layers * (3 * hidden**2 + inner**2)  # of four inputs, of which three are as wide
    solving = 2 * SOLVER_STEPS * sum(layer.out_features * layer.in_features**2 for layer in layers)
    # A block runs up to the inputs of o, of gate and up, and of down, and then as a whole.
    before = {name: out * inputs for name, (out, inputs) in shape.block.items()}
    at_o = sum(before[f"self_attn.{name}_proj"] for name in "qkv")
    at_mlp = at_o + before["self_attn.o_proj"]
    at_down = at_mlp + before["mlp.gate_proj"] + before["mlp.up_proj"]
    partly = 2 * tokens * shape.layers * (at_o + at_mlp + at_down) + 3 * attention
    rounding = sum(layer.out_features * layer.in_features**2 + layer.in_features**3 for layer in layers)

    step = section.batch_size * section.max_length
    through = step * shape.forward(section.max_length)
    # Forward, forward again, the gradient of what goes in, and that of each adapted weight; and B A three times.
    deltas = estimates.weights_in(adapted)
    training = 3 * through + 2 * step * deltas + 3 * 2 * RANK * deltas
    return [
        Row("sparsify: wanda", sparsify, 2 * once),
        Row("sparsify: wanda, least-squares", solved, 2 * once + hessians + solving),
        Row("quantize: gptq", quantize, once + partly + hessians + rounding),
        Row("finetune: one step", dense, training),
        Row(
            "finetune on the packed base: one step",
            estimate_finetune(source, DTYPE, small, trained, packed, streamed=True),
            training,
        ),
        Row("merge", merge, 2 * RANK * deltas),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--loss-chunk", type=int, default=128)
    arguments = parser.parse_args()
    calibration = Calibration.model_validate({"data": "a", "samples": arguments.samples, "length": arguments.length})
    settings = {"adapter": "nls", "merger": "sparsepeft", "data": "a", "gradient_checkpointing": True}
    settings |= {name: getattr(arguments, name) for name in ("batch_size", "max_length", "loss_chunk")}
    section = Finetune.model_validate(settings)
    print("| model | step | memory, GiB | disk, GiB | operations, 10¹² |\n|---|---|---|---|---|")
    for name in arguments.shapes:
        for row in rows(SHAPES[name], calibration, section):
            memory, disk = row.estimate.memory / 2**30, row.estimate.storage / 2**30
            print(f"| {name} | {row.step} | {memory:.1f} | {disk:.1f} | {row.operations / 1e12:,.0f} |")


if __name__ == "__main__":
    main()
