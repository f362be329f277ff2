"""Put the weights on a low-precision grid, one layer after the other, and keep pruned ones zero (paper §2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sqft.checkpoints.gptq import GPTQ_BITS, GPTQ_PARTS, grid_settings
from sqft.components import checks
from sqft.components.kinds import Quantizer
from sqft.errors import ArtifactError, ContractError
from sqft.kernels import grids
from sqft.kernels.checksums import sha256
from sqft.kernels.finite import all_finite
from sqft.kernels.grids import dequantize
from sqft.kernels.masks import pack_mask, unpack_mask
from sqft.kernels.words import fills_words
from sqft.modeling.calibration.capture import Hold
from sqft.modeling.loading import load_model
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.other_model import OtherModel
from sqft.modeling.loading.parts import OUTSIDE, WholeModel
from sqft.modeling.loading.quantized import (
    GptqFolder,
    other_tensors,
    read_layer,
    save_quantized,
    save_settings_of_codes,
    tensors_of_codes,
)
from sqft.recipe.sections import Quantize
from sqft.stages.compress import (
    Compress,
    assign_weight,
    chosen_layers,
    do_nothing,
    guarded,
    output_error,
    run_calibration,
)
from sqft.stages.inputs import Report, StageInputs
from sqft.stages.step_parts import StepParts
from sqft.types import LinearStats, Quantized


class QuantizeStage:
    """The stage `quantize`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs = inputs
        self.quantizer, self.label = inputs.step.component(Quantizer), inputs.step.label(Quantizer)
        section = cast(Quantize, inputs.step.section)
        self.keeps = section.keep_compensated and self.quantizer.gives_compensated
        self.grid: dict[str, Any] = {}  # the settings of the first layer's

    @cached_property
    def parts(self) -> StepParts:
        """The model that is quantized, opened once."""
        return StepParts(self.inputs, self.inputs.plan.spec(self.inputs.model_path()), self._reload)

    def run(self) -> Report:
        """Write `model/`, a GPTQ checkpoint (version 1) with the base's tokenizer and settings; `masks.safetensors`
        (bit-packed, true where the base kept a weight: codes do not say, since a kept one may be rounded to zero); and,
        if they are to be kept and the quantizer gives them, the floats that it rounded, as residuals of a byte, in
        `compensated.safetensors`.

        Of several processes the first one quantizes, and each of them runs its share of the calibration text.
        """
        parts, opened = self.parts, self.parts.opened
        source, folder = self.inputs.plan.spec(self.inputs.model_path()), self.inputs.scratch / "model"
        layers = chosen_layers(opened.model, self.inputs.step)
        if not self.inputs.processes.is_main:
            self._calibrate(layers, do_nothing, parts.seen)
            return {}
        dense = self._dense()
        whole: dict[str, Quantized] = {}  # where the model is not streamed
        quantized: dict[str, Quantized] = {}
        masks: dict[str, Tensor] = {}
        residuals: dict[str, Tensor] = {}
        known: dict[str, dict[str, Any]] = {}
        before: dict[str, dict[str, dict[str, str]]] = {}

        def floats(part: str) -> dict[str, Tensor]:
            return other_tensors(opened.model, opened.names, layers, source, opened.state(part))

        def begin(part: str) -> None:
            """Remember the base's masks, and every tensor that is left as it is."""
            if part not in before:
                of_part = {name: linear for name, linear in layers.items() if opened.part_of(name) == part}
                before[part] = {
                    "masks": {name: sha256(pack_mask(linear.weight != 0)) for name, linear in of_part.items()},
                    "others": {name: sha256(tensor) for name, tensor in floats(part).items()},
                }

        def quantize(name: str, linear: nn.Linear, stats: LinearStats) -> None:
            if dense:
                weight = dense(name).to(linear.weight.dtype).to(linear.weight.device, torch.float32)
                stats = dataclasses.replace(stats, dense=weight)
            masks[name] = pack_mask(linear.weight != 0).cpu()
            result, errors = self._quantize(name, linear, stats)
            _check_storable(self.label, name, result, self.grid)
            self.grid = self.grid or grid_settings(result.grid)
            if self.keeps:
                residuals[name] = grids.residual(result).cpu()
            quantized[name] = _on_cpu(result)
            known[name] = {
                "errors": errors,
                "grid": grid_settings(result.grid),
                "zeros": int((linear.weight == 0).sum()),
                "weights": linear.weight.numel(),
                "codes": grids.digest_of(result),
                "residual": sha256(residuals[name]) if name in residuals else "",
            }

        def end(part: str) -> None:
            record = {"layers": dict(known), **before.pop(part)}
            beside = {"masks": masks, **({"compensated": residuals} if residuals else {})}
            parts.seal(part, record, lambda: tensors_of_codes(opened.names, quantized, floats(part)), beside)
            if not parts.streamed:
                whole.update(quantized)
            for of_part in (quantized, masks, residuals, known):
                of_part.clear()

        for part in () if parts.streamed else opened.parts:
            begin(part)
        around = partial(parts.held, begin=begin, end=end)
        with around(OUTSIDE):
            pass
        self._calibrate(layers, quantize, around)
        of_layers = self._known()
        if parts.streamed:
            parts.writer.write_index()
            settings = {name: of_layer["grid"] for name, of_layer in of_layers.items()}
            save_settings_of_codes(opened.model, parts.tokenizer, opened.names, settings, folder, source)
        else:
            save_quantized(opened.model, parts.tokenizer, {name: whole[name] for name in layers}, folder, source)
        parts.write_beside(["masks", *(["compensated"] if self.keeps else [])])
        weights, zeros = (sum(layer[count] for layer in of_layers.values()) for count in ("weights", "zeros"))
        first = next(iter(of_layers.values()))["grid"]
        return {
            "bits": first["bits"],
            "group_size": first["group_size"],
            "weights": weights,
            "zeros": zeros,
            "sparsity": zeros / weights,
            "layers": {name: of_layer["errors"] for name, of_layer in of_layers.items()},
        }

    def _calibrate(self, layers: Mapping[str, nn.Linear], quantize: Compress, around: Hold) -> None:
        """Call `quantize` on each layer with its statistics."""
        parts, needs, sequential = self.parts, self.quantizer.needs, True
        what = (self.inputs, parts.opened, parts.tokenizer, layers, needs, quantize, "quantizing", sequential)
        run_calibration(*what, around, parts.records)

    def _known(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each layer, in order."""
        found = self.parts.all("layers")
        return {name: found[name] for name in self.inputs.step.layers}

    def _reload(self, opened: WholeModel, part: str, written: FolderReader) -> None:
        """Give the layers of a part the values of the codes that were written of them."""
        for name, layer in self.parts.records[part]["layers"].items():
            linear = cast(nn.Linear, opened.model.get_submodule(name))
            codes = read_layer(written, opened.names.name_of_codes(name), layer["grid"])
            assign_weight(self.label, name, linear, dequantize(codes))
            self.grid = self.grid or layer["grid"]

    def verify(self) -> None:
        """Check that codes and grids as stored are the quantizer's, that zeros of the base are zero, and that all else
        is the base's, bit for bit."""
        scratch, stage = self.inputs.scratch, f"quantize ({self.label})"
        names, known, others = self.parts.opened.names, self._known(), self.parts.all("others")
        bases = self.parts.all("masks")
        stored = GptqFolder(scratch / "model", names)
        masks = FolderReader(scratch, [scratch / "masks.safetensors"])
        residuals = FolderReader(scratch, [scratch / "compensated.safetensors"] if self.keeps else [])
        if different := sorted(stored.layers.keys() ^ known.keys()):
            raise ArtifactError(f"{stage}: {different[0]} was quantized and is not stored, or the other way round")
        for name, expected in known.items():
            layer = stored.layer(name)
            value = dequantize(layer)
            if not all_finite(value):
                raise ArtifactError(f"{stage}: {name} as stored holds values that are not finite")
            if grids.digest_of(layer) != expected["codes"]:
                raise ArtifactError(f"{stage}: codes or grid of {name} as stored are not the quantizer's")
            if name not in masks or sha256(mask := masks.tensor(name)) != bases[name]:
                raise ArtifactError(f"{stage}: the mask of {name} as stored is not the base's")
            if lost := int((value[~unpack_mask(mask, (value.shape[0], value.shape[1]))] != 0).sum()):
                raise ArtifactError(f"{stage}: {lost} zeros of the base are not zero in {name} as stored")
            if self.keeps and (name not in residuals or sha256(residuals.tensor(name)) != expected["residual"]):
                raise ArtifactError(f"{stage}: the compensated floats of {name} as stored are not the quantizer's")
        if missing := sorted(others.keys() - set(stored.reader.names())):
            raise ArtifactError(f"{stage}: {missing[0]} of the base is not stored")
        for name, tensor in stored.reader.tensors():
            owner, _, part = name.rpartition(".")
            coded = part in GPTQ_PARTS and names.layer(owner) in known
            if not coded and sha256(tensor) != others.get(name):
                raise ArtifactError(f"{stage}: {name} as stored is not the base's")

    def _dense(self) -> Callable[[str], Tensor] | None:
        """Return what gives the weight of each layer from before pruning, if the quantizer needs it."""
        if not self.quantizer.needs_dense():
            return None
        spec = self.inputs.plan.model_spec
        if self.inputs.step.streamed:  # then it is a folder of floats
            return OtherModel(spec.path, spec.trust_remote_code).weight
        model, _ = load_model(spec)
        weights = {n: linear.weight.detach() for n, linear in chosen_layers(model, self.inputs.step).items()}
        return weights.pop

    def _quantize(self, name: str, linear: nn.Linear, stats: LinearStats) -> tuple[Quantized, dict[str, float]]:
        """Quantize one layer in place, and return codes and grid, and the errors made."""
        # What is zero in the base stays zero, whether sqft pruned it or the model came sparse.
        mask = linear.weight.detach() != 0
        with guarded(self.label, {name: (linear, stats)}, partial(self.inputs.seed_for, "quantize")) as given:
            weight, seeded = given[0][name], given[1][name]
            result = self.quantizer.quantize(weight, mask, seeded)
        checks.check_unchanged(self.label, name, weight != 0, mask, "the mask")
        checks.check_quantized(self.label, name, result, weight, mask, self.quantizer.gives_compensated)
        value = dequantize(result)
        assign_weight(self.label, name, linear, value)
        return result, _errors(weight, value, stats)


def _check_storable(label: str, name: str, result: Quantized, first: Mapping[str, Any]) -> None:
    """Check that all layers have one number of bits and one group size, full words, and scales that float16 holds."""
    grid, (out, inputs) = result.grid, result.codes.shape
    if grid.bits not in GPTQ_BITS or not (fills_words(inputs, grid.bits) and fills_words(out, grid.bits)):
        raise ContractError(f"{label} gave {name} [{out}, {inputs}] {grid.bits} bits, which fill no words of 32")
    if first and (grid.bits, grid.group_size) != (first["bits"], first["group_size"]):
        raise ContractError(f"{label} gave {name} other bits or another group size than the layers before")
    if not grid.scale.half().to(grid.scale.dtype).equal(grid.scale):
        raise ContractError(f"{label} gave {name} scales that float16 does not hold; round them before taking codes")


def _on_cpu(layer: Quantized) -> Quantized:
    grid = layer.grid
    index = grid.group_index.cpu() if grid.group_index is not None else None
    moved = dataclasses.replace(grid, scale=grid.scale.cpu(), zero=grid.zero.cpu(), group_index=index)
    return Quantized(layer.codes.cpu(), moved)


def _errors(weight: Tensor, value: Tensor, stats: LinearStats) -> dict[str, float]:
    """Return relative errors: ‖W − Ŵ‖² / ‖W‖², and where calibration saw the inputs ‖(W − Ŵ) X‖² / ‖W X‖², of the
    weight and of the one from before pruning, if it is there."""
    errors = {"weight": float((value - weight).square().sum() / weight.square().sum().clamp(min=1e-30))}
    for name, target in (("output", weight), ("dense_output", stats.dense)):
        if stats.hessian is not None and target is not None:
            errors[name] = output_error(target, value, stats.hessian)
    return errors
