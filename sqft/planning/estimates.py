"""What a step is expected to need: memory and storage, computed from headers and settings. Sizes are in bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sqft.checkpoints.model_source import ModelSource
from sqft.recipe.sections import Calibration
from sqft.types import COMPARED_EXAMPLES, COMPARED_TOKENS, HESSIAN_BYTES, LinearShape, Statistic

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

RUNTIME_OVERHEAD = 1 << 29
"""The process itself: Python, torch, transformers and the tokenizer."""

MASK_BITS = 1
"""A mask's entry, bit-packed."""

RESIDUAL_BYTES = 1
"""How far the float that was rounded lies from the value of its code, for each weight."""

GRID_BITS = 0.5
"""The scale and the zero point of a group, for each of its weights: 32 bits for groups of 64."""

WINDOWS_RUNNING = 4
"""Times that the activations of a window count, while it runs through a block."""

COPIES_OF_LAYER = 4
"""Copies of a layer in float32, while it is compressed: the weight, its scores, what it becomes."""

EVALUATION_OVERHEAD = 1 << 30
"""The process with the caches of generation and the harness."""

EVALUATION_WORK = 1 << 29
"""Activations and logits of a measurement."""

COPIES_OF_EXPERTS = 3
"""Copies of a block whose experts are stored together, while it is written: one by one, together, and as they are named
in the file."""

LARGEST_FILE = 5 * 10**9
"""Bytes of a file of weights, unless an exporter is told otherwise."""

RESULTS_BYTES = 1 << 16
"""The measurements that an evaluation stores."""

BLOCK = re.compile(r".*?\.\d+\.")
"""The start of the names of a decoder block's layers."""


@dataclass(frozen=True)
class Estimate:
    """What a step is expected to need, before anything is loaded.

    Args:
        parameters: that the step writes or trains.
        storage: bytes of its artifact, and of what it needs on disk until that is done.
        memory: bytes at its peak.
    """

    parameters: int
    storage: int
    memory: int


def model_bytes(model: ModelSource, dtype: str) -> int:
    """Return the bytes of a model in a precision."""
    return model.parameters * DTYPE_BYTES[dtype]


def weights_in(layers: Iterable[LinearShape]) -> int:
    """Return the number of weights of linear layers."""
    return sum(layer.out_features * layer.in_features for layer in layers)


def quantized_bytes(model: ModelSource, dtype: str, layers: Sequence[LinearShape], bits: float | None) -> int:
    """Return about the bytes of a model whose `layers` hold codes.

    Args:
        model: the model in floats.
        dtype: the precision of what is not quantized.
        layers: the quantized layers; each has a scale and a zero point for each group, and a mask.
        bits: of a code; None counts as many as a float's.
    """
    width, codes = DTYPE_BYTES[dtype], weights_in(layers)
    code_bits = (bits or 8 * width) + GRID_BITS + MASK_BITS
    return int((model.parameters - codes + own_head(model)) * width + codes * code_bits / 8)


def packed_bytes(model: ModelSource, dtype: str, layers: Sequence[LinearShape], sparsity: float) -> int:
    """Return about the bytes in memory of a model whose sparse `layers` are without their zeros, where that is less."""
    saved = weights_in(layers) * (DTYPE_BYTES[dtype] * sparsity - MASK_BITS / 8)
    return int(model_bytes(model, dtype) - max(0, saved))


def own_head(model: ModelSource) -> int:
    """Return the weights of the head that a quantized model has of its own, where the float model shares it with the
    embeddings; 0 where it has one anyway."""
    tied = not any(name.startswith("output.") or "lm_head." in name for name in model.shapes)
    return model.size("vocab_size") * model.size("hidden_size") if tied else 0


def estimate_sparsify(
    model: ModelSource,
    dtype: str,
    pruned: Sequence[LinearShape],
    calibration: Calibration | None,
    needs: frozenset[Statistic],
    sequential: bool,
    streamed: bool = False,
) -> Estimate:
    """Estimate `sparsify`: the model, beside it the calibration or the second model that is read back to verify it.

    Args:
        model: the recipe's model.
        dtype: its precision.
        pruned: the layers that get a mask.
        calibration: the section, when a component needs it.
        needs: what its components need of it.
        sequential: whether the layers of a block are pruned one input after the other.
        streamed: whether one block at a time is there.
    """
    size, masks = model_bytes(model, dtype), weights_in(pruned) * MASK_BITS // 8
    if streamed:
        meanwhile = meanwhile_bytes(model, calibration, pruned, 0)
        memory = streamed_bytes(model, dtype, pruned, calibration, needs, sequential)
        return Estimate(model.parameters, size + masks + meanwhile, memory)
    walk = calibration_bytes(model, calibration, needs, pruned, sequential)
    storage = size + masks + spilled_bytes(model, calibration)
    return Estimate(model.parameters, storage, size + max(size, walk) + RUNTIME_OVERHEAD)


def estimate_quantize(
    model: ModelSource,
    dtype: str,
    layers: Sequence[LinearShape],
    calibration: Calibration | None,
    needs: frozenset[Statistic],
    bits: float | None,
    dense: bool = False,
    compensated: bool = False,
    streamed: bool = False,
) -> Estimate:
    """Estimate `quantize`: as `sparsify`, with codes and masks of a byte for each weight until they are stored, and
    a byte that says what was rounded, if that is kept.

    Args:
        model: the recipe's model.
        dtype: its precision.
        layers: the layers that are quantized.
        calibration: the section, when the quantizer needs it.
        needs: what the quantizer needs of it.
        bits: of a code, where the quantizer has such an option.
        dense: whether the weights from before pruning are there too.
        compensated: whether the floats that were rounded are kept.
        streamed: whether one block at a time is there.
    """
    size = model_bytes(model, dtype)
    residuals = RESIDUAL_BYTES * weights_in(layers) if compensated else 0
    stored = quantized_bytes(model, dtype, layers, bits) + residuals
    if streamed:
        stored += meanwhile_bytes(model, calibration, layers, residuals)
        head = own_head(model) * DTYPE_BYTES[dtype]
        memory = streamed_bytes(model, dtype, layers, calibration, needs, sequential=True, head=head)
        return Estimate(model.parameters, stored, memory)
    walk = calibration_bytes(model, calibration, needs, layers, sequential=True)
    walk += weights_in(layers) * DTYPE_BYTES[dtype] if dense else 0
    memory = size + max(size, walk) + 2 * weights_in(layers) + residuals + RUNTIME_OVERHEAD
    return Estimate(model.parameters, stored + spilled_bytes(model, calibration), memory)


def streamed_bytes(
    model: ModelSource,
    dtype: str,
    layers: Sequence[LinearShape],
    calibration: Calibration | None,
    needs: frozenset[Statistic],
    sequential: bool,
    head: int = 0,
) -> int:
    """Return the bytes of a step that has one block of a model at a time in memory, or what lies outside the blocks.

    Args:
        model: the recipe's model.
        dtype: its precision.
        layers: those that are compressed.
        calibration: the section; None when there is no walk.
        needs: what components need of it.
        sequential: see `calibration_bytes`.
        head: bytes of a head that is written beside the embedding with which it is tied.
    """
    outside, block = outside_and_block(model, dtype)
    widest = 4 * max((layer.out_features * layer.in_features for layer in layers), default=0)
    states = hessians = 0
    if calibration:
        hessians = hessian_bytes(needs, layers, sequential)
        inner = model.size("intermediate_size", default=4 * model.size("hidden_size"))
        kept = hidden_bytes(model, calibration) * DTYPE_BYTES[dtype] // 4
        running = WINDOWS_RUNNING * calibration.length * (model.size("hidden_size") + inner) * 4
        states = min(kept, calibration.memory_bytes) + running
    written = COPIES_OF_EXPERTS * block if model.layout.experts else 0
    compressed = 2 * block + COPIES_OF_LAYER * widest + hessians
    return max(outside + max(block, head), compressed, written) + states + RUNTIME_OVERHEAD


def outside_and_block(model: ModelSource, dtype: str) -> tuple[int, int]:
    """Return the bytes of what lies outside the decoder blocks, and of the largest block."""
    blocks = by_block(model.layout.linears, dtype)
    return model_bytes(model, dtype) - blocks.total(), max(blocks.values(), default=0)


def by_block(layers: Iterable[LinearShape], dtype: str) -> Counter[str]:
    """Return the bytes of these layers in each decoder block."""
    blocks = Counter[str]()
    for layer in layers:
        start = BLOCK.match(layer.name)
        blocks[start[0] if start else ""] += layer.out_features * layer.in_features * DTYPE_BYTES[dtype]
    return blocks


def hidden_bytes(source: ModelSource, calibration: Calibration) -> int:
    """Return the bytes of the hidden states of all calibration windows, at most."""
    return calibration.samples * calibration.length * source.size("hidden_size") * 4


def meanwhile_bytes(
    source: ModelSource, calibration: Calibration | None, layers: Sequence[LinearShape], residuals: int
) -> int:
    """Return the bytes on disk that a streamed step takes beside its artifact until it is done: what is beside each
    block's weights is there twice, and hidden states may be in a file."""
    return weights_in(layers) * MASK_BITS // 8 + residuals + spilled_bytes(source, calibration)


def spilled_bytes(source: ModelSource, calibration: Calibration | None) -> int:
    """Return the bytes of hidden states that do not stay in memory."""
    return max(0, hidden_bytes(source, calibration) - calibration.memory_bytes) if calibration else 0


def estimate_search(
    model: ModelSource,
    dtype: str,
    deltas: int,
    base: int,
    quantized: bool,
    opening: int = 0,
    evaluates: bool = True,
    streamed: bool = False,
    activations: int = 0,
) -> Estimate:
    """Estimate `search`.

    Args:
        model: the recipe's model.
        dtype: its precision.
        deltas: bytes of the trained deltas.
        base: bytes of the base in memory.
        quantized: whether the base holds codes; effective weights are then cached beside the floats.
        opening: bytes of the base at the peak of loading it.
        evaluates: whether the searcher does; otherwise no effective weight is cached.
        streamed: whether nothing of the base is loaded.
        activations: bytes that are kept for gradients, where the searcher needs them.
    """
    if streamed:
        return Estimate(0, deltas, 2 * deltas + RUNTIME_OVERHEAD)  # stored, and read back
    copies = (2 if quantized else 1) if evaluates else 0
    working = max(copies * model_bytes(model, dtype), activations)
    return Estimate(0, deltas, max(opening, base + working) + RUNTIME_OVERHEAD + deltas)


def estimate_merge(
    model: ModelSource,
    dtype: str,
    adapted: Collection[str],
    deltas: int,
    stored: int,
    base: int,
    quantized: bool,
    streamed: bool = False,
) -> Estimate:
    """Estimate `merge`.

    Args:
        model: the recipe's model.
        dtype: its precision.
        adapted: the layers that have adapters.
        deltas: bytes of the trained deltas.
        stored: bytes of the base as it is stored; the merged model is as large.
        base: bytes of the base in memory.
        quantized: whether the base holds codes.
        streamed: whether one block at a time is there.
    """
    size = model_bytes(model, dtype)
    if streamed:
        outside, block = outside_and_block(model, dtype)
        copies = COPIES_OF_EXPERTS if model.layout.experts else 1
        merged = by_block((layer for layer in model.layout.linears if layer.name in adapted), dtype)
        blocks = copies * block + max(merged.values(), default=0)
        if quantized:  # codes of a byte each until they are stored, and the block of floats that was quantized
            blocks += block // DTYPE_BYTES[dtype] + block
            outside += own_head(model) * DTYPE_BYTES[dtype]
        # Of both models, and what lies between them.
        logits = 3 * COMPARED_EXAMPLES * COMPARED_TOKENS * model.size("vocab_size") * 4
        return Estimate(model.parameters, stored, outside + max(blocks, logits) + deltas + RUNTIME_OVERHEAD)
    # The adapted and the effective weights, and the base that they are written into. Of codes also copies to be stored,
    # and the codes of the base, of the merged model and of the start of training.
    copies = size + 3 * model.parameters if quantized else 0
    return Estimate(model.parameters, stored, base + 2 * size + copies + RUNTIME_OVERHEAD)


def estimate_export(model: ModelSource, dtype: str) -> Estimate:
    """Estimate `export`: exporters take a tensor at a time, and may hold those of one file."""
    size = model_bytes(model, dtype)
    return Estimate(model.parameters, size, min(size, LARGEST_FILE) + RUNTIME_OVERHEAD)


def estimate_evaluate(model: ModelSource, dtype: str, adapter: int = 0) -> Estimate:
    """Estimate one measurement of `evaluate`: what is no floats in the file is there twice while it is loaded.

    An adapter of so many values is beside the model in float32, and once more while it is loaded.
    """
    size = model_bytes(model, dtype) + 4 * adapter
    beside = max(EVALUATION_WORK, size if model.kind == "gguf" or model.dequantize else 0)
    beside = max(beside, 4 * adapter)
    return Estimate(model.parameters + adapter, RESULTS_BYTES, size + beside + EVALUATION_OVERHEAD)


def calibration_bytes(
    source: ModelSource,
    calibration: Calibration | None,
    needs: frozenset[Statistic],
    layers: Iterable[LinearShape],
    sequential: bool = False,
) -> int:
    """Return the bytes that the calibration walk takes beside the model.

    These are the hidden states of all windows and, where a component needs them, the Hessians of a block's layers,
    which are summed at once, with three more of the widest's size for whoever inverts it.

    Args:
        source: the model.
        calibration: the section; None when there is no walk.
        needs: what components need of it.
        layers: the layers that are compressed.
        sequential: whether the Hessians of one module and width only are summed at once, up to `HESSIAN_BYTES`.
    """
    if calibration is None:
        return 0
    states = 3 * min(hidden_bytes(source, calibration), calibration.memory_bytes)
    return states + hessian_bytes(needs, layers, sequential)


def hessian_bytes(needs: frozenset[Statistic], layers: Iterable[LinearShape], sequential: bool) -> int:
    """Return the bytes of the Hessians of a block's layers, where a component needs them, with three more of the
    widest's size for whoever inverts it. See `calibration_bytes`."""
    summed: set[tuple[str, str, int]] = set()
    together: Counter[tuple[str, ...]] = Counter()
    widest = 0
    for layer in layers if Statistic.HESSIAN in needs else ():
        block, inner = BLOCK.match(layer.name), layer.in_features
        within = layer.name[block.end() :] if block else layer.name
        start, path = block[0] if block else "", within.rpartition(".")[0]
        if sequential and (start, path, inner) in summed:  # queries, keys and values have one input, and one sum
            continue
        summed.add((start, path, inner))
        # Experts are one module, whatever their number.
        module = (re.sub(r"\d+", "*", path), str(inner)) if sequential else ()
        together[start, *module] += 4 * inner**2
        widest = max(widest, 4 * inner**2)
    at_once = max(together.values(), default=0)
    return (min(at_once, max(HESSIAN_BYTES, widest)) if sequential else at_once) + 3 * widest
