"""A run's result as it would be served, and how fast it is and how much memory it takes: on the CPU, in bfloat16."""

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
from sqft.modeling.adapters.frozen_weight import FrozenWeight, PackedWeight
from sqft.modeling.adapters.saving import read_ranks
from sqft.modeling.loading import load_model, load_packed
from sqft.modeling.loading.quantized import quantization_of
from sqft.planning.plan import Plan
from sqft.stages.adapted import load_adapted_model

SERVED = torch.bfloat16


@dataclass(frozen=True)
class Speed:
    """Tokens a second, medians: `prefill` of a whole prompt at once, `decode` of one token after the other."""

    prefill: float
    decode: float


def merged_as_served(spec: ModelSpec) -> PreTrainedModel:
    """A finished model's folder: floats as they are, codes as codes."""
    spec = replace(spec, dtype="bfloat16")
    model = load_model(spec)[0] if quantization_of(spec.path) is None else load_packed(spec)
    return prepare_for_serving(model)


def adapted_as_served(plan: Plan, folders: Mapping[str, Path], deltas: Path, choice: Path) -> PreTrainedModel:
    """The base, from the artifacts by role, with the chosen adapter beside it, which could not be merged."""
    adapted = load_adapted_model(plan, folders, deltas, "cpu")
    adapted.set_ranks(read_ranks(choice))
    return prepare_for_serving(adapted.model)


def prepare_for_serving(model: PreTrainedModel) -> PreTrainedModel:
    """In place: parameters in bfloat16; codes, with their grids as they are, laid out for the int4 kernel as well."""
    for module in model.modules():
        if isinstance(module, FrozenWeight):
            module.dtype = SERVED
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(SERVED)
        if isinstance(module, PackedWeight):
            module.prepare_int4_kernel()
    return model.eval()


def count_kernel_layers(model: nn.Module) -> tuple[int, int]:
    """How many packed layers the int4 kernel takes, and how many there are."""
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    return sum(module.kernel is not None for module in packed), len(packed)


@torch.inference_mode()
def speed(model: PreTrainedModel, prompt: int, generated: int, repeats: int) -> Speed:
    """Greedy generation of `generated` tokens after a prompt of `prompt` tokens, one sequence."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, prompt), generator=generator)
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
