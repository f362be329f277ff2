"""What training is expected to need, computed from headers and settings. Sizes are in bytes."""

from __future__ import annotations

from sqft.checkpoints.model_source import ModelSource
from sqft.planning.estimates import DTYPE_BYTES, RUNTIME_OVERHEAD, Estimate, model_bytes, weights_in
from sqft.planning.optimizers import OPTIMIZERS
from sqft.recipe.sections import Finetune

TRAINED_BYTES_PER_PARAMETER = 8
"""A float32 parameter that trains, and its gradient; the optimizer's state comes on top."""

DELTA_BYTES_PER_PARAMETER = 4
"""A trained parameter as it is stored, in float32."""


def estimate_finetune(
    model: ModelSource,
    dtype: str,
    section: Finetune,
    trained: int,
    base: int,
    teacher: ModelSource | None = None,
    streamed: bool = False,
) -> Estimate:
    """Estimate `finetune`.

    Args:
        model: the recipe's model.
        dtype: its precision, and the teacher's.
        section: how it is trained.
        trained: the number of parameters that train.
        base: bytes of the base in memory.
        teacher: the model that is learnt from, if there is one: it is freed before the base is loaded.
        streamed: whether a packed base is read one block at a time.
    """
    training = (TRAINED_BYTES_PER_PARAMETER + OPTIMIZERS[section.optimizer].state) * trained
    student = base + training + activation_bytes(model, dtype, section)
    reading = model_bytes(model, dtype) if section.base == "packed" and not streamed else 0
    if teacher:
        taught = model_bytes(teacher, dtype) + layer_bytes(teacher, dtype, section) + logits_bytes(model, section)
        reading = max(reading, taught)
    return Estimate(trained, DELTA_BYTES_PER_PARAMETER * trained, max(student, reading) + RUNTIME_OVERHEAD)


def activation_bytes(source: ModelSource, dtype: str, section: Finetune) -> int:
    """Return the bytes kept for backward: an upper bound, for every example as long as max_length."""
    layers, layer = source.size("num_hidden_layers", default=1), layer_bytes(source, dtype, section)
    kept = layers * layer
    if section.gradient_checkpointing:  # what goes into each layer, and one layer that is computed again
        tokens = section.batch_size * section.max_length
        kept = layers * tokens * source.size("hidden_size") * DTYPE_BYTES[dtype] + layer
    return kept + logits_bytes(source, section)


def gradient_bytes(source: ModelSource, dtype: str, section: Finetune) -> int:
    """Return the bytes kept for the gradients of one example after training, as `activation_bytes` does."""
    alone = {"batch_size": 1, "gradient_checkpointing": False, "teacher": None, "precision": "float32"}
    return activation_bytes(source, dtype, section.model_copy(update=alone))


def layer_bytes(source: ModelSource, dtype: str, section: Finetune) -> int:
    """Return the bytes of a batch in one layer: an upper bound, as in `activation_bytes`.

    Twice what Llama keeps of its hidden states, for families with more norms, and all that it keeps between the two
    halves of its MLP. In 16 bits, norms keep what they are given in float32. Autocast to fewer bits keeps a copy of
    each frozen weight.
    """
    hidden = source.size("hidden_size")
    inner = source.size("intermediate_size", default=4 * hidden)
    width = min(DTYPE_BYTES[dtype], DTYPE_BYTES[section.precision])
    of_norms = 8 * hidden if width < DTYPE_BYTES["float32"] else 0
    layers = source.size("num_hidden_layers", default=1)
    copied = width * weights_in(source.layout.linears) // layers if width < DTYPE_BYTES[dtype] else 0
    return section.batch_size * section.max_length * (width * (14 * hidden + 4 * inner) + of_norms) + copied


def logits_bytes(source: ModelSource, section: Finetune) -> int:
    """Return the bytes of a batch's logits and of all that their loss computes from them, counted at its peak.

    Beside a teacher these are more; its complete predictions are there for the whole batch, whatever the chunk.
    """
    vocabulary = source.size("vocab_size")
    tokens = section.batch_size * section.max_length
    labels = tokens if section.loss_on == "all" else tokens // 4
    at_once = min(labels, section.loss_chunk or labels)
    if section.teacher is None:
        rows = 3 * at_once
    elif section.teacher.keeps_all(vocabulary):
        rows = 7 * at_once + labels
    else:
        rows = 6 * at_once
    return 4 * vocabulary * rows
