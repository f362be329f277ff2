"""The linear layers of another model's folder, by the names and in the orientation that they have here."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sqft.checkpoints.gptq import gptq_settings
from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.safetensors import read_object, weight_files
from sqft.errors import ArtifactError, SqftError
from sqft.kernels.finite import all_finite
from sqft.modeling.architecture.linears import as_stored, layers_of_stored
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.compat import reverted
from sqft.modeling.loading.folder_reader import PRECISIONS, FolderReader
from sqft.modeling.loading.transformers_io import load_skeleton


class OtherModel:
    """A model folder of floats, of which one linear layer at a time is read.

    Where a layer lies in the folder is transformers' own knowledge: each weight is filled with numbers of its own,
    transformers turns them into what it would store, and the folder's values are taken from where the numbers went.

    Raises:
        SqftError: when the folder is quantized, or no model that transformers knows.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        if gptq_settings(folder, read_object(folder / "config.json")) is not None:
            raise ArtifactError(f"{folder} is quantized; name the folder of a model of floats")
        self.folder = folder
        self._model = load_skeleton(ModelSpec(folder, trust_remote_code=trust_remote_code))
        self._files = FolderReader(folder, weight_files(folder))
        CheckpointNames(self._model, self._files.names())  # the conversions of this folder
        parameters = self._model.named_parameters(remove_duplicate=False)
        self._shapes = {name: tuple(p.shape) for name, p in parameters if p.dim() == 2}
        self._together = {part: parts for parts in layers_of_stored(self._model).values() for part in parts}
        self._last: dict[str, Tensor] = {}

    def weight(self, layer: str) -> Tensor:
        """Return the weight [out, in] of a linear layer, as floats, in the precision it is stored in.

        Raises:
            SqftError: when the folder lacks the layer, holds no finite floats for it, or holds it in a form that cannot
                be read exactly.
        """
        name = f"{layer}.weight"
        if name not in self._shapes:
            raise ArtifactError(f"{self.folder} has no layer {layer}; name a model of the same architecture")
        if name not in self._last:
            self._last = self._read(self._together.get(name, [name]))
        return self._last[name]

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        """Return the weights that transformers keeps in one tensor, by name."""
        shapes = {name: self._shapes[name] for name in names}
        sizes = [out * inputs for out, inputs in shapes.values()]
        numbers = torch.split_with_sizes(torch.arange(sum(sizes)), sizes)
        marked = {name: part.view(shape) for part, (name, shape) in zip(numbers, shapes.items(), strict=True)}
        try:
            places = reverted(self._model, as_stored(self._model, state=marked))
        except Exception as error:  # a conversion that transformers cannot undo, or that needs other tensors too
            raise self._unreadable(names[0], str(error)) from error
        stored = {name: self._values(name, place.shape) for name, place in places.items()}
        order = torch.cat([place.flatten() for place in places.values()])
        if not order.sort().values.equal(torch.arange(sum(sizes))):
            raise self._unreadable(names[0], f"{', '.join(places)} holds other values")
        flat = torch.cat([values.flatten() for values in stored.values()])[order.argsort()]
        weights = zip(torch.split_with_sizes(flat, sizes), shapes.items(), strict=True)
        return {name: part.view(shape) for part, (name, shape) in weights}

    def _values(self, name: str, expected: tuple[int, ...]) -> Tensor:
        """Return a tensor of the folder, which must hold finite floats and have the expected shape.

        The folder of a model that was stored without its head leaves out the prefix of its names.
        """
        short = name.removeprefix(f"{self._model.base_model_prefix}.")
        own = short if name not in self._files and short in self._files else name
        tensor, place = self._files.tensor(own), f"{self.folder}: {own}"
        if tensor.shape != expected:
            raise ArtifactError(f"{place} has the shape {list(tensor.shape)}, expected {list(expected)}; copy it again")
        if tensor.dtype not in PRECISIONS.values():
            raise ArtifactError(f"{place} is {str(tensor.dtype).removeprefix('torch.')}; name a model of floats")
        if not all_finite(tensor):
            raise ArtifactError(f"{place} holds values that are not finite; copy it again")
        return tensor

    def _unreadable(self, name: str, why: str) -> SqftError:
        return ArtifactError(f"{self.folder}: {name} cannot be read by itself ({why}); leave out the layer")
