"""Checkpoints whose weights are floats of four or eight bits with scales: MXFP4 and FP8. No torch.

sqft dequantizes them while it loads them. transformers' own loaders are not used: they infer the block of an FP8 scale
from the numbers of rows and scales, which is wrong where the last block is smaller than the others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft.errors import ArtifactError, ModelError

MX_BLOCK = 32
"""Values of MXFP4 that share a scale."""

SCALES = ("{0}_scale_inv", "{0}_scale", "{1}.scale", "{1}.qscale_weight")
"""Names of an FP8 tensor's scales, given the tensor's name and its layer's."""

OF_ACTIVATIONS = ("activation_scale", "input_scale", "qscale_act")
"""Names of scales that are for activations; weights do not need them."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PackedFloats:
    """How a checkpoint stores its weights.

    Args:
        method: "mxfp4" or "fp8".
        block: rows and columns of FP8 that share a scale; None where there is one for each row, or one for all.
    """

    method: str
    block: tuple[int, int] | None = None

    def parts(self, names: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Return the float tensors that stored ones stand for: each with the names of its codes and its scales, or of
        the one tensor that holds it as it is.

        Raises:
            ArtifactError: when codes have no scales, or the other way round.
        """
        known, found = set(names), dict[str, tuple[str, ...]]()
        for name in names:
            if scales := self._scales_of(name, known):
                found[name.removesuffix("_blocks") if self.method == "mxfp4" else name] = name, scales
        taken = {part for parts in found.values() for part in parts}
        rest = [name for name in names if name not in taken and name.rpartition(".")[2] not in OF_ACTIVATIONS]
        if lonely := [name for name in rest if name.endswith(("_blocks", "_scales", "_scale_inv"))]:
            raise ArtifactError(f"{lonely[0]} has no tensor that belongs to it; copy the model again")
        return found | {name: (name,) for name in rest}

    def _scales_of(self, name: str, known: set[str]) -> str | None:
        """Return the name of the scales of a tensor; None when it has none."""
        owner = name.removesuffix(".weight")
        candidates = [pattern.format(name, owner) for pattern in SCALES[: 4 if owner != name else 2]]
        if self.method == "mxfp4":
            candidates = [f"{name.removesuffix('_blocks')}_scales"] if name.endswith("_blocks") else []
        return next((candidate for candidate in candidates if candidate in known), None)

    def float_shapes(self, path: Path, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shapes of the floats that a folder's tensors stand for.

        Raises:
            ArtifactError: when codes and scales do not fit together; the message names them.
        """
        try:
            floats = {}
            for name, parts in self.parts(shapes).items():
                given = [shapes[part] for part in parts]
                floats[name] = given[0] if len(given) == 1 else self._float_shape(name, *given)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
        return floats

    def _float_shape(self, name: str, codes: Shape, scales: Shape) -> Shape:
        """Return the shape of the floats that codes and scales of these shapes stand for."""
        if self.method == "mxfp4":
            if len(codes) < 3 or codes[-1] != MX_BLOCK // 2 or codes[:-1] != scales:
                raise ArtifactError(f"{name} has blocks {list(codes)} and scales {list(scales)}, which do not fit")
            *experts, rows, blocks = scales
            return (*experts, blocks * MX_BLOCK, rows)  # transformers has [experts, in, out]
        if len(codes) < 2 or scales not in self.scale_shapes(codes):
            raise ArtifactError(
                f"{name} is {list(codes)} in FP8 with scales {list(scales)}, expected one of "
                f"{', '.join(str(list(shape)) for shape in self.scale_shapes(codes))}"
            )
        return codes

    def scale_shapes(self, codes: Shape) -> list[Shape]:
        """Return the shapes that the scales of an FP8 tensor may have: by blocks, by rows, or one for all."""
        *experts, rows, columns = codes if len(codes) > 1 else (1, *codes)
        block = [-(-rows // self.block[0]), -(-columns // self.block[1])] if self.block else [rows, 1]
        return [(*experts, *block), (*experts, rows, 1), (*experts, rows), (*experts, 1, 1), (1,), ()]


def packed_floats(config: Mapping[str, Any]) -> PackedFloats | None:
    """Return how the folder of this config packs its floats; None when it does not, or in another format."""
    stated = config.get("quantization_config")
    settings = stated if isinstance(stated, dict) else {}
    method = settings.get("quant_method")
    if method == "mxfp4":
        return PackedFloats("mxfp4")
    if method == "fp8" and settings.get("expert_dtype", "fp8") == "fp8":
        return PackedFloats("fp8", _block(settings.get("weight_block_size")))
    if method == "compressed-tensors" and settings.get("format") == "float-quantized":
        blocks = {_block(weights.get("block_structure")) for weights in _weights_of(settings)}
        return PackedFloats("fp8", blocks.pop()) if len(blocks) == 1 else None
    return None


def check_dequantize(path: Path, config: Mapping[str, Any], dequantize: bool) -> None:
    """Check that a recipe asks for dequantizing where a folder's floats are packed, and only there.

    Raises:
        ModelError: saying what to set.
    """
    packed = packed_floats(config)
    if packed and not dequantize:
        raise ModelError(
            f"{path} holds its weights in {packed.method.upper()}; set model.dequantize to true to load them as floats"
        )
    if dequantize and not packed:
        raise ModelError(f"{path} holds no weights in MXFP4 or FP8; remove model.dequantize")


def _weights_of(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield how each group of layers stores its weights, in the settings of compressed-tensors."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def _block(stated: Any) -> tuple[int, int] | None:
    if isinstance(stated, list) and len(stated) == 2 and all(type(size) is int and size > 0 for size in stated):
        return stated[0], stated[1]
    return None
