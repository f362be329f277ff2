"""Put the weights on a low-precision grid, one layer after the other, and keep pruned ones zero (paper §2.1)."""

from __future__ import annotations

from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sqft import checks
from sqft.contracts import LinearStats, Quantized, Quantizer
from sqft.data.batches import calibration_windows
from sqft.errors import ArtifactError, StageError
from sqft.kernels.grids import dequantize
from sqft.kernels.masks import unpack_mask
from sqft.modeling.blocks import linears
from sqft.modeling.calibrate import walk
from sqft.modeling.checkpoint import read_quantized, save_quantized
from sqft.modeling.load import FolderReader
from sqft.modeling.tuning import base_model
from sqft.plan import selected
from sqft.recipe import Quantize
from sqft.stages.base import Context


def run(context: Context) -> dict[str, Any]:
    """Write `model/`, a GPTQ checkpoint (version 1) with the base's tokenizer and settings."""
    section = cast(Quantize, context.step.section)
    recipe, quantizer, who = context.plan.recipe, context.component(Quantizer), context.who(Quantizer)
    model, tokenizer = base_model(context.plan, context.model_folder())
    layers = {n: linear for n, linear in linears(model).items() if selected(n, section.include, section.exclude)}
    if not layers:
        raise StageError("quantize.include matches no linear layer of the model's decoder blocks")
    masks = _masks(context)
    quantized: dict[str, Quantized] = {}
    report: dict[str, Any] = {}

    def compress(name: str, linear: nn.Linear, stats: LinearStats) -> None:
        weight = linear.weight.detach().to(torch.float32, copy=True)
        mask = masks[name].to(weight.device) if name in masks else None
        kept = weight.clone()
        generator = torch.Generator(weight.device).manual_seed(context.seed_for("quantize", name))
        stats = LinearStats(stats.tokens, stats.input_sq_sum, stats.hessian, generator)
        result = quantizer.quantize(weight, mask, stats)
        checks.check_unchanged(who, name, kept, weight)
        checks.check_quantized(who, name, result, kept, mask)
        value = dequantize(result)
        linear.weight.data.copy_(value)
        quantized[name] = result
        report[name] = _error(kept, value, stats.hessian)

    if quantizer.needs:
        assert recipe.calibration is not None
        calibration = recipe.calibration
        windows = calibration_windows(
            context.step.files["calibration"],
            tokenizer,
            calibration.samples,
            calibration.length,
            context.seed_for("calibration"),
        )
        walk(model, windows, set(layers), quantizer.needs, compress, context.device, context.track)
    else:
        for name, linear in context.track(layers.items(), "quantizing", len(layers)):
            compress(name, linear, LinearStats(tokens=0))
    save_quantized(model, tokenizer, quantized, context.folder / "model")
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


def prove(context: Context) -> None:
    """Codes read back, pruned weights are exactly zero, and what is not quantized is the base's bit for bit."""
    base, _ = base_model(context.plan, context.model_folder())
    folder, who = context.folder / "model", context.who(Quantizer)
    layers, masks = read_quantized(folder), _masks(context)
    original = base.state_dict()
    for name, layer in layers.items():
        if layer.codes.shape != original[f"{name}.weight"].shape:
            raise ArtifactError(f"quantize ({who}): {name} as stored has another shape than the base's")
        value = dequantize(layer)
        if not value.isfinite().all():
            raise ArtifactError(f"quantize ({who}): {name} as stored holds values that are not finite")
        if name in masks and (lost := int((value[~masks[name]] != 0).sum())):
            raise ArtifactError(f"quantize ({who}): {lost} pruned weights of {name} are not zero as stored")
    for name, tensor in FolderReader(folder).tensors():
        if name.rpartition(".")[0] not in layers and not torch.equal(tensor, original[name]):
            raise ArtifactError(f"quantize ({who}): {name} as stored is not the base's")


def _masks(context: Context) -> dict[str, Tensor]:
    """What the sparse base keeps, by layer; nothing when the base is dense."""
    base = context.inputs.get("base")
    if base is None:
        return {}
    reader = FolderReader(base.folder / "model")
    masks = {}
    for name, packed in load_file(base.folder / "masks.safetensors").items():
        out, inputs = reader.tensor(f"{name}.weight").shape
        masks[name] = unpack_mask(packed, (out, inputs))
    return masks


def _error(weight: Tensor, value: Tensor, hessian: Tensor | None) -> dict[str, float]:
    """Relative errors: ‖W − Ŵ‖² / ‖W‖², and where calibration saw the inputs ‖(W − Ŵ) X‖² / ‖W X‖²."""
    difference = value - weight
    errors = {"weight": float(difference.square().sum() / weight.square().sum().clamp(min=1e-30))}
    if hessian is not None:
        output = float((weight @ hessian * weight).sum())
        errors["output"] = float((difference @ hessian * difference).sum()) / max(output, 1e-30)
    return errors
