"""Put the weights on a low-precision grid, one layer after the other, and keep pruned ones zero (paper §2.1)."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sqft.checkpoints.gptq import GPTQ_BITS, GPTQ_PARTS
from sqft.components import checks
from sqft.components.kinds import Quantizer
from sqft.errors import ArtifactError, ContractError
from sqft.kernels import grids
from sqft.kernels.checksums import sha256
from sqft.kernels.grids import dequantize, group_index
from sqft.kernels.masks import pack_mask, unpack_mask
from sqft.kernels.words import fills_words
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.loading import load_model
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.quantized import other_tensors, read_quantized, save_quantized
from sqft.stages.compress import assign_weight, chosen_layers, guarded, output_error, run_calibration
from sqft.stages.inputs import Report, StageInputs
from sqft.types import LinearStats, Quantized


class QuantizeStage:
    """The stage `quantize`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs = inputs
        self.quantizer, self.label = inputs.step.component(Quantizer), inputs.step.label(Quantizer)
        # Digests of what is to be read back: codes and grids, the floats that were rounded to them, the base's masks,
        # and every tensor left as it was.
        self.codes: dict[str, str] = {}
        self.residuals: dict[str, str] = {}
        self.masks: dict[str, str] = {}
        self.others: dict[str, str] = {}

    def run(self) -> Report:
        """Write `model/`, a GPTQ checkpoint (version 1) with the base's tokenizer and settings; `masks.safetensors`
        (bit-packed, true where the base kept a weight: codes do not say, since a kept one may be rounded to zero); and,
        if the quantizer gives them, the floats that it rounded in `compensated.safetensors`, as residuals of a byte."""
        scratch = self.inputs.scratch
        source = self.inputs.plan.spec(self.inputs.model_path())
        model, tokenizer = load_model(source)
        self.names = CheckpointNames(model)
        layers = chosen_layers(model, self.inputs.step)
        others = other_tensors(model, self.names, layers, source)
        self.others = {name: sha256(tensor) for name, tensor in others.items()}
        self.masks = {name: sha256(pack_mask(linear.weight != 0)) for name, linear in layers.items()}
        dense = self._dense()
        quantized: dict[str, Quantized] = {}
        masks: dict[str, Tensor] = {}
        residuals: dict[str, Tensor] = {}
        errors: dict[str, dict[str, float]] = {}

        def quantize(name: str, linear: nn.Linear, stats: LinearStats) -> None:
            if name in dense:
                before = dense.pop(name).to(linear.weight.device, torch.float32)
                stats = dataclasses.replace(stats, dense=before)
            result, masks[name], errors[name] = self._quantize(name, linear, stats)
            _check_storable(self.label, name, result, next(iter(quantized.values()), result))
            if self.quantizer.gives_compensated:
                residuals[name] = grids.residual(result).cpu()
            quantized[name] = _on_cpu(result)

        needs = self.quantizer.needs
        run_calibration(self.inputs, model, tokenizer, layers, needs, quantize, "quantizing", sequential=True)
        self.codes = {name: _digest(layer) for name, layer in quantized.items()}
        self.residuals = {name: sha256(tensor) for name, tensor in residuals.items()}
        save_quantized(model, tokenizer, quantized, scratch / "model", source)
        save_file(masks, scratch / "masks.safetensors")
        if residuals:
            save_file(residuals, scratch / "compensated.safetensors")
        weights = sum(linear.weight.numel() for linear in layers.values())
        zeros = sum(int((linear.weight == 0).sum()) for linear in layers.values())
        grid = next(iter(quantized.values())).grid
        return {
            "bits": grid.bits,
            "group_size": grid.group_size,
            "weights": weights,
            "zeros": zeros,
            "sparsity": zeros / weights,
            "layers": errors,
        }

    def verify(self) -> None:
        """Check that codes and grids as stored are the quantizer's, that zeros of the base are zero, and that all else
        is the base's, bit for bit."""
        reader, stage = FolderReader(self.inputs.scratch / "model"), f"quantize ({self.label})"
        layers, masks = read_quantized(reader.folder, self.names), load_file(self.inputs.scratch / "masks.safetensors")
        residuals = load_file(self.inputs.scratch / "compensated.safetensors") if self.residuals else {}
        if different := sorted(layers.keys() ^ self.codes.keys()):
            raise ArtifactError(f"{stage}: {different[0]} was quantized and is not stored, or the other way round")
        for name, layer in layers.items():
            value = dequantize(layer)
            if not value.isfinite().all():
                raise ArtifactError(f"{stage}: {name} as stored holds values that are not finite")
            if _digest(layer) != self.codes[name]:
                raise ArtifactError(f"{stage}: codes or grid of {name} as stored are not the quantizer's")
            if name not in masks or sha256(masks[name]) != self.masks[name]:
                raise ArtifactError(f"{stage}: the mask of {name} as stored is not the base's")
            if lost := int((value[~unpack_mask(masks[name], (value.shape[0], value.shape[1]))] != 0).sum()):
                raise ArtifactError(f"{stage}: {lost} zeros of the base are not zero in {name} as stored")
            if self.residuals and (name not in residuals or sha256(residuals[name]) != self.residuals[name]):
                raise ArtifactError(f"{stage}: the compensated floats of {name} as stored are not the quantizer's")
        if missing := sorted(self.others.keys() - set(reader.names())):
            raise ArtifactError(f"{stage}: {missing[0]} of the base is not stored")
        for name, tensor in reader.tensors():
            owner, _, part = name.rpartition(".")
            coded = part in GPTQ_PARTS and self.names.layer(owner) in layers
            if not coded and sha256(tensor) != self.others.get(name):
                raise ArtifactError(f"{stage}: {name} as stored is not the base's")

    def _dense(self) -> dict[str, Tensor]:
        """Return the weight of each layer from before pruning, if the quantizer needs it."""
        if not self.quantizer.needs_dense():
            return {}
        model, _ = load_model(self.inputs.plan.model_spec)
        return {name: linear.weight.detach() for name, linear in chosen_layers(model, self.inputs.step).items()}

    def _quantize(self, name: str, linear: nn.Linear, stats: LinearStats) -> tuple[Quantized, Tensor, dict[str, float]]:
        """Quantize one layer in place, and return codes and grid, the base's mask bit-packed, and the errors made."""
        # What is zero in the base stays zero, whether sqft pruned it or the model came sparse.
        mask = linear.weight.detach() != 0
        with guarded(self.label, {name: (linear, stats)}, partial(self.inputs.seed_for, "quantize")) as given:
            weight, seeded = given[0][name], given[1][name]
            result = self.quantizer.quantize(weight, mask, seeded)
        checks.check_unchanged(self.label, name, weight != 0, mask, "the mask")
        checks.check_quantized(self.label, name, result, weight, mask, self.quantizer.gives_compensated)
        value = dequantize(result)
        assign_weight(self.label, name, linear, value)
        return result, pack_mask(mask).cpu(), _errors(weight, value, stats)


def _check_storable(label: str, name: str, result: Quantized, first: Quantized) -> None:
    """Check that all layers have one number of bits and one group size, full words, and scales that float16 holds."""
    grid, (out, inputs) = result.grid, result.codes.shape
    if grid.bits not in GPTQ_BITS or not (fills_words(inputs, grid.bits) and fills_words(out, grid.bits)):
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
    """Return the SHA-256 over codes, scales, zero points and the group of each input."""
    grid, index = layer.grid, group_index(layer.grid, layer.codes.shape[1])
    return sha256(layer.codes.to(torch.uint8), grid.scale.half(), grid.zero.to(torch.uint8), index.to(torch.int32))


def _errors(weight: Tensor, value: Tensor, stats: LinearStats) -> dict[str, float]:
    """Return relative errors: ‖W − Ŵ‖² / ‖W‖², and where calibration saw the inputs ‖(W − Ŵ) X‖² / ‖W X‖², of the
    weight and of the one from before pruning, if it is there."""
    errors = {"weight": float((value - weight).square().sum() / weight.square().sum().clamp(min=1e-30))}
    for name, target in (("output", weight), ("dense_output", stats.dense)):
        if stats.hessian is not None and target is not None:
            errors[name] = output_error(target, value, stats.hessian)
    return errors
