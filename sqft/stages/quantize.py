"""Put the weights on a low-precision grid, one layer after the other, and keep pruned ones zero (paper §2.1)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sqft.checkpoints.gptq import GPTQ_PARTS
from sqft.components import checks
from sqft.components.kinds import Quantizer
from sqft.errors import ArtifactError, ContractError, StageError
from sqft.kernels.grids import dequantize, group_index
from sqft.kernels.masks import pack_mask, unpack_mask
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.architecture.linears import as_stored
from sqft.modeling.loading import load_model
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.quantized import read_quantized, save_quantized
from sqft.recipe.sections import Quantize
from sqft.stages.compress import assign_weight, run_calibration
from sqft.stages.inputs import Report, StageInputs
from sqft.types import LinearStats, Quantized
from sqft.utils.files import write_json
from sqft.utils.patterns import selected

DIGESTS = "digests.json"
"""What the quantizer gave for each layer, to hold against what is read back."""


class QuantizeStage:
    """The stage `quantize`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs = inputs

    def run(self) -> Report:
        return _run(self.inputs)

    def verify(self) -> None:
        _verify(self.inputs)


def _run(inputs: StageInputs) -> Report:
    """Write `model/`, a GPTQ checkpoint (version 1) with the base's tokenizer and settings, and `masks.safetensors`
    (bit-packed, true where the base kept a weight: codes do not say, since a kept one may be rounded to zero)."""
    section = inputs.section(Quantize)
    quantizer, label = inputs.component(Quantizer), inputs.label(Quantizer)
    model, tokenizer = load_model(inputs.plan.spec(inputs.model_path()))
    layers = {n: linear for n, linear in linears(model).items() if selected(n, section.include, section.exclude)}
    if not layers:
        raise StageError("quantize.include matches no linear layer of the model's decoder blocks")
    quantized: dict[str, Quantized] = {}
    masks: dict[str, Tensor] = {}
    report: dict[str, Any] = {}

    def compress(name: str, linear: nn.Linear, stats: LinearStats) -> None:
        weight = linear.weight.detach().to(torch.float32, copy=True)
        # What is zero in the base stays zero, whether sqft pruned it or the model came sparse.
        mask = weight != 0
        kept = weight.clone()
        generator = torch.Generator(weight.device).manual_seed(inputs.seed_for("quantize", name))
        stats = LinearStats(stats.tokens, stats.input_sq_sum, stats.hessian, generator)
        with checks.statistics_unchanged(label, {name: stats}):
            result = quantizer.quantize(weight, mask, stats)
        checks.check_unchanged(label, name, kept, weight)
        checks.check_unchanged(label, name, kept != 0, mask, "the mask")
        checks.check_quantized(label, name, result, kept, mask)
        value = dequantize(result)
        assign_weight(label, name, linear, value)
        _check_storable(label, name, result, next(iter(quantized.values()), result))
        quantized[name] = _on_cpu(result)
        masks[name] = pack_mask(mask).cpu()
        report[name] = _error(kept, value, stats.hessian)

    run_calibration(inputs, model, tokenizer, layers, quantizer.needs, compress, "quantizing", sequential=True)
    save_quantized(model, tokenizer, quantized, inputs.scratch / "model")
    save_file(masks, inputs.scratch / "masks.safetensors")
    write_json(inputs.scratch / DIGESTS, {name: _digest(layer) for name, layer in quantized.items()})
    weights = sum(linear.weight.numel() for linear in layers.values())
    zeros = sum(int((linear.weight == 0).sum()) for linear in layers.values())
    grid = next(iter(quantized.values())).grid
    return {
        "bits": grid.bits,
        "group_size": grid.group_size,
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights,
        "layers": report,
    }


def _verify(inputs: StageInputs) -> None:
    """Codes and grids read back are the quantizer's, zeros of the base are zero, all else is the base's bit for bit."""
    base, _ = load_model(inputs.plan.spec(inputs.model_path()))
    folder, label = inputs.scratch / "model", inputs.label(Quantizer)
    layers, original = read_quantized(folder), base.state_dict()
    masks = load_file(inputs.scratch / "masks.safetensors")
    digests = json.loads((inputs.scratch / DIGESTS).read_text("utf-8"))
    if odd := sorted(layers.keys() ^ digests.keys()):
        raise ArtifactError(f"quantize ({label}): {odd[0]} was quantized and is not stored, or the other way round")
    for name, layer in layers.items():
        if layer.codes.shape != original[f"{name}.weight"].shape:
            raise ArtifactError(f"quantize ({label}): {name} as stored has another shape than the base's")
        value = dequantize(layer)
        if not value.isfinite().all():
            raise ArtifactError(f"quantize ({label}): {name} as stored holds values that are not finite")
        if _digest(layer) != digests[name]:
            raise ArtifactError(f"quantize ({label}): codes or grid of {name} as stored are not the quantizer's")
        if not unpack_mask(masks[name], (layer.codes.shape[0], layer.codes.shape[1])).equal(
            original[f"{name}.weight"] != 0
        ):
            raise ArtifactError(f"quantize ({label}): the mask of {name} as stored is not the base's")
        if lost := int(((original[f"{name}.weight"] == 0) & (value != 0)).sum()):
            raise ArtifactError(f"quantize ({label}): {lost} zeros of the base are not zero in {name} as stored")
    as_it_was = as_stored(base, fused=False)
    if lacking := sorted(
        as_it_was.keys() - {f"{layer}.weight" for layer in layers} - set(FolderReader(folder).names())
    ):
        raise ArtifactError(f"quantize ({label}): {lacking[0]} of the base is not stored")
    for name, tensor in FolderReader(folder).tensors():
        owner, _, part = name.rpartition(".")
        if not (owner in layers and part in GPTQ_PARTS) and not torch.equal(tensor, as_it_was[name]):
            raise ArtifactError(f"quantize ({label}): {name} as stored is not the base's")


def _check_storable(label: str, name: str, result: Quantized, first: Quantized) -> None:
    """A checkpoint has one number of bits and one group size for all layers, whole words, and float16 scales."""
    grid, (out, inputs) = result.grid, result.codes.shape
    if grid.bits not in (2, 3, 4, 8) or inputs * grid.bits % 32 or out * grid.bits % 32:
        raise ContractError(f"{label} gave {name} [{out}, {inputs}] {grid.bits} bits, which fill no words of 32")
    if (grid.bits, grid.group_size) != (first.grid.bits, first.grid.group_size):
        raise ContractError(f"{label} gave {name} other bits or another group size than the layers before")
    if not grid.scale.half().to(grid.scale.dtype).equal(grid.scale):
        raise ContractError(f"{label} gave {name} scales that float16 does not hold; round them before taking codes")


def _on_cpu(layer: Quantized) -> Quantized:
    grid = layer.grid
    index = grid.group_index.cpu() if grid.group_index is not None else None
    moved = dataclasses.replace(grid, scale=grid.scale.cpu(), zero=grid.zero.cpu(), group_index=index)
    return Quantized(layer.codes.cpu(), moved)


def _digest(layer: Quantized) -> str:
    """SHA-256 over codes, scales, zero points and the group of each input."""
    grid = layer.grid
    parts = (
        layer.codes.to(torch.uint8),
        grid.scale.half(),
        grid.zero.to(torch.uint8),
        group_index(grid, layer.codes.shape[1]).to(torch.int32),
    )
    total = hashlib.sha256()
    for part in parts:
        total.update(part.contiguous().numpy().tobytes())
    return total.hexdigest()


def _error(weight: Tensor, value: Tensor, hessian: Tensor | None) -> dict[str, float]:
    """Relative errors: ‖W − Ŵ‖² / ‖W‖², and where calibration saw the inputs ‖(W − Ŵ) X‖² / ‖W X‖²."""
    difference = value - weight
    errors = {"weight": float(difference.square().sum() / weight.square().sum().clamp(min=1e-30))}
    if hessian is not None:
        output = float((weight @ hessian * weight).sum())
        errors["output"] = float((difference @ hessian * difference).sum()) / max(output, 1e-30)
    return errors
