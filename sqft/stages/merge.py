"""Fold the chosen sub-adapter into the base: the weight stored is the weight trained through."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from sqft.components.kinds import Merger
from sqft.data.encoding import Tokenization
from sqft.errors import ArtifactError
from sqft.kernels import grids
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.adapters.frozen_weight import PackedWeight
from sqft.modeling.adapters.saving import read_ranks
from sqft.modeling.loading import load_model
from sqft.modeling.loading.quantized import read_quantized, save_quantized
from sqft.modeling.loading.transformers_io import save_model
from sqft.recipe.sections import Finetune, Search
from sqft.stages.adapted import load_adapted_model
from sqft.stages.inputs import Report, StageInputs
from sqft.types import Quantized

log = logging.getLogger("sqft")

COMPARED = 4
"""Examples whose logits are compared, the merged model's with the adapted one's."""
TOLERANCE = 1e-2
"""How far they may be apart, as a share of the largest; equal weights give equal logits but for the order of sums."""


class MergeStage:
    """The stage `merge`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs = inputs

    def run(self) -> Report:
        return _run(self.inputs)

    def verify(self) -> None:
        _verify(self.inputs)


def _run(inputs: StageInputs) -> Report:
    """Write `model/`, a Hugging Face folder in the base's precision: floats, or codes as GPTQ stores them."""
    adapted, base_path = _chosen(inputs), inputs.plan.adapter_base.model(inputs.folders)
    effective, codes = _effective(adapted)
    model, tokenizer = load_model(inputs.plan.spec(base_path))
    zeros_before = zeros_after = weights = 0
    for name, merged in effective.items():
        zeros_before += int((~_kept(adapted, name)).sum())
        zeros_after += int((merged == 0).sum())
        weights += merged.numel()
        model.get_parameter(f"{name}.weight").data.copy_(merged)
    folder, report = inputs.scratch / "model", {}
    if inputs.plan.adapter_base.quantized:
        before = read_quantized(base_path)
        report = {
            "bits": next(iter(before.values())).grid.bits,
            "codes_changed": sum(_apart(codes[name], _start(adapted, name)) for name in codes),
            "codes_unlike_base": sum(_apart(codes[name], before[name]) for name in codes),
        }
        if inputs.device != "cpu":  # where it trained, sums may come in another order
            report["codes_unlike_on_device"] = _unlike(adapted, codes, inputs.device)
        if any(bool((layer.grid.zero == 0).any()) for layer in before.values()):
            log.warning("the base has zero points of 0, which gptqmodel misreads in this format; auto-gptq does not")
        save_quantized(model, tokenizer, before | codes, folder)
    else:
        save_model(model, tokenizer, folder)
    return {
        "layers": len(effective),
        "weights": weights,
        "zeros_before": zeros_before,
        "zeros_after": zeros_after,
        "sparsity": zeros_after / weights,
        "logits_difference": _logits_apart(inputs, adapted),
        **report,
    }


def _verify(inputs: StageInputs) -> None:
    """Stored = trained through, bit for bit; every zero of the base is zero; nothing else has moved."""
    adapted, base_path = _chosen(inputs), inputs.plan.adapter_base.model(inputs.folders)
    effective, codes = _effective(adapted)
    base, _ = load_model(inputs.plan.spec(base_path))
    folder, finetune = inputs.scratch / "model", inputs.plan.step("finetune")
    merger, label = inputs.component(Merger, finetune), inputs.label(Merger, finetune)
    if inputs.plan.adapter_base.quantized:
        stored, expected = (
            read_quantized(folder),
            read_quantized(base_path) | codes,
        )
        for name in stored.keys() | expected.keys():
            if not (name in stored and name in expected and grids.same(stored[name], expected[name])):
                raise ArtifactError(f"merge ({label}): codes or grid of {name} as stored are not those trained through")
    merged, original = load_model(inputs.plan.spec(folder))[0], _tensors(base)
    for name, tensor in _tensors(merged).items():
        layer = name.removesuffix(".weight")
        if not tensor.isfinite().all():
            raise ArtifactError(f"merge ({label}): {name} as stored holds values that are not finite")
        if tensor.dtype != original[name].dtype or not torch.equal(tensor, effective.get(layer, original[name])):
            raise ArtifactError(f"merge ({label}): {name} as stored is not the weight trained through")
        lost = int(((tensor != 0) & ~_kept(adapted, layer)).sum()) if layer in effective else 0
        if lost and merger.keeps_mask:
            raise ArtifactError(f"merge ({label}): {lost} zeros of the base are not zero in {name}")


def _chosen(inputs: StageInputs) -> AdaptedModel:
    """The adapted model under the chosen configuration, on the CPU."""
    adapted = load_adapted_model(inputs.plan, inputs.folders, inputs.folders["finetune"], "cpu")
    adapted.set_ranks(read_ranks(inputs.folders["search"]))
    return adapted


def _effective(adapted: AdaptedModel) -> tuple[dict[str, Tensor], dict[str, Quantized]]:
    """Every adapted layer's effective weight, and the codes of those that lie on a grid."""
    codes = {name: layer.codes() for name, layer in adapted.merged.items() if layer.base.grid() is not None}
    effective = {
        name: grids.dequantize(codes[name]).to(layer.base.dtype) if name in codes else layer.effective()
        for name, layer in adapted.merged.items()
    }
    return effective, codes


def _start(adapted: AdaptedModel, name: str) -> Quantized:
    """The codes that training began with: the base's own, or those of the floats before quantization."""
    base = adapted.layers[name].base
    if isinstance(base, PackedWeight):
        return base.codes()
    grid = base.grid()
    assert grid is not None
    return Quantized(grids.quantize(base.block().weight, grid), grid)


def _apart(one: Quantized, other: Quantized) -> int:
    return int((one.codes != other.codes).sum())


def _unlike(adapted: AdaptedModel, codes: Mapping[str, Quantized], device: str) -> int:
    """How many codes come out otherwise on a device than on the CPU, where the merge is made."""
    unlike = 0
    layers = adapted.merged
    for name, known in codes.items():
        layer = layers[name].to(device)
        unlike += int((layer.codes().codes.cpu() != known.codes).sum())
        layer.to("cpu")
    return unlike


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _kept(adapted: AdaptedModel, name: str) -> Tensor:
    """Bool [out, in], true where the base under an adapter keeps a weight; codes without a mask keep them all."""
    base = adapted.layers[name].base
    block = base.block()
    if block.mask is not None:
        return block.mask
    return torch.ones_like(block.weight, dtype=torch.bool) if isinstance(base, PackedWeight) else block.weight != 0


@torch.no_grad()
def _logits_apart(inputs: StageInputs, adapted: AdaptedModel) -> float:
    """The largest difference between the logits of the merged model, read back, and of the model that trained.

    Raises:
        ArtifactError: when it is larger than rounding explains, or is no number.
    """
    # Validation examples where there are some: what was not trained on.
    search = inputs.plan.step("search")
    given, section = cast(Search, search.section).data, cast(Finetune, inputs.plan.step("finetune").section)
    if given:
        records = inputs.data.of("search").records("data", given)
    else:
        training, held = inputs.data.training_records()
        records = held or training
    tokenization = Tokenization(adapted.tokenizer, section.max_length, section.loss_on)
    examples = tokenization.encode(records[:COMPARED]).examples
    merged, _ = load_model(inputs.plan.spec(inputs.scratch / "model"))
    gaps, sizes = [0.0], [0.0]
    for example in examples:
        ids = torch.tensor([example.input_ids])
        theirs = adapted.model(input_ids=ids, use_cache=False).logits.float()
        ours = merged(input_ids=ids, use_cache=False).logits.float()
        gaps.append(float((ours - theirs).abs().max()))
        sizes.append(float(theirs.abs().max()))
    apart, largest = (float(torch.tensor(found).max()) for found in (gaps, sizes))  # max() would pass over NaN
    if not (math.isfinite(apart) and math.isfinite(largest)):
        raise ArtifactError("merge: the logits of the merged model, or of the model that trained, are not finite")
    if apart > TOLERANCE * largest:
        raise ArtifactError(f"merge: logits of the merged model are {apart:.3g} off those of the model that trained")
    return apart
