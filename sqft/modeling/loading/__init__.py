"""Models and tokenizers in and out of memory: what a `ModelSpec` names, loaded in one of four ways."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sqft.checkpoints.model_spec import ModelSpec
from sqft.modeling.loading.quantized import load_dequantized, load_packed, quantization_of
from sqft.modeling.loading.transformers_io import load_floats, load_skeleton, load_tokenizer

__all__ = ["load_model", "load_packed", "load_skeleton", "load_tokenizer"]


def load_model(spec: ModelSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model with its tokenizer, on the CPU, in evaluation mode; whatever is packed becomes floats.

    Raises:
        ModelError: when transformers cannot load it, or a weight is missing, mis-shaped or not finite.
        ArtifactError: when a part of a GPTQ checkpoint is missing or does not fit the others.
    """
    if spec.is_gguf or spec.dequantize or quantization_of(spec.path) is None:
        return load_floats(spec)
    return load_dequantized(spec), load_tokenizer(spec)
