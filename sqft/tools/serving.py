"""Load a run's result for generation on the CPU, in bfloat16, and measure its speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from sqft.checkpoints.model_spec import ModelSpec
from sqft.modeling.adapters.frozen_weight import FrozenWeight, PackedWeight, SparseWeight
from sqft.modeling.adapters.saving import read_ranks
from sqft.modeling.loading import load_model, load_packed
from sqft.modeling.loading.quantized import quantization_of
from sqft.planning.plan import Plan
from sqft.stages.adapted import load_adapted_model

SERVING_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Speed:
    """Median tokens per second: `prefill` of a complete prompt at once, `decode` of one token after the other."""

    prefill: float
    decode: float


def load_merged_for_serving(spec: ModelSpec) -> PreTrainedModel:
    """Load a finished model's folder: floats as floats, codes as codes."""
    spec = replace(spec, dtype="bfloat16")
    model = load_model(spec)[0] if quantization_of(spec.path) is None else load_packed(spec)
    return prepare_for_serving(model)


def load_adapted_for_serving(plan: Plan, folders: Mapping[str, Path], deltas: Path, choice: Path) -> PreTrainedModel:
    """Load a base with an adapter beside it that cannot be merged.

    Args:
        plan: the run's plan.
        folders: artifact folders of the inputs of fine-tuning, by role.
        deltas: the folder of the fine-tuning's artifact.
        choice: the folder of the search's artifact, with the ranks that were chosen.
    """
    adapted = load_adapted_model(plan, folders, deltas, "cpu")
    adapted.set_ranks(read_ranks(choice))
    return prepare_for_serving(adapted.model)


def prepare_for_serving(model: PreTrainedModel) -> PreTrainedModel:
    """Change a model in place and return it: parameters in bfloat16; codes laid out for the int4 kernel as well."""
    for module in model.modules():
        if isinstance(module, FrozenWeight):
            module.dtype = SERVING_DTYPE
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(SERVING_DTYPE)
        if isinstance(module, PackedWeight):
            module.prepare_int4_kernel()
        if isinstance(module, SparseWeight):  # no kernel runs it: served as the floats that it is
            module.held = module.dense()
    return model.eval()


def count_kernel_layers(model: nn.Module) -> tuple[int, int]:
    """Return how many packed layers run in the int4 kernel, and how many packed layers there are."""
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    return sum(module.kernel is not None for module in packed), len(packed)


@torch.inference_mode()
def measure_speed(model: PreTrainedModel, prompt: int, generated: int, repeats: int) -> Speed:
    """Measure greedy generation of `generated` tokens after one prompt of `prompt` tokens, `repeats` times."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, prompt), generator=generator)
    prefill, decode = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefill.append(prompt / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(generated):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        decode.append(generated / (time.perf_counter() - start))
    return Speed(statistics.median(prefill), statistics.median(decode))
