"""A model in parts: its decoder blocks, and what lies outside them. It is there as a whole, or one part at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import ArtifactError, ModelError
from sqft.kernels.finite import all_finite
from sqft.modeling.architecture.blocks import decoder_blocks
from sqft.modeling.architecture.frozen import freeze
from sqft.modeling.architecture.linears import as_linears, from_stored, put_tensor, tie
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.compat import generation_settings, load_converted
from sqft.modeling.loading import load_model, load_tokenizer
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.transformers_io import (
    check_vocabulary,
    first_sentence,
    quiet_transformers,
    silent_transformers,
    stock_class,
)
from sqft.modeling.loading.values_of_codes import reader_of_floats
from sqft.utils.resources import return_freed_memory

OUTSIDE = ""
"""The part that is no decoder block: embeddings, norms, the head, towers."""


class WholeModel:
    """A model that is in memory as a whole.

    Args:
        model: on the CPU, after `as_linears`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.blocks = list(decoder_blocks(model))
        self._known = frozenset(self.blocks)
        self._depth = self.blocks[0].count(".") + 1
        self.parts = [OUTSIDE, *self.blocks]
        """Every part: a decoder block, by its full name, or `OUTSIDE`."""

    @contextmanager
    def held(self, part: str) -> Iterator[None]:
        """Have a part in memory as long as the block runs."""
        yield

    def part_of(self, tensor: str) -> str:
        """Return the part that a tensor of the modules belongs to."""
        block = ".".join(tensor.split(".")[: self._depth])
        return block if block in self._known else OUTSIDE

    @cached_property
    def names(self) -> CheckpointNames:
        """The names of its tensors in checkpoints."""
        return CheckpointNames(self.model)

    def state(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of a part by name; those that are tied, under each of their names."""
        return {name: one for name, one in self.model.state_dict().items() if self.part_of(name) == part}

    def parameters(self, part: str) -> dict[str, nn.Parameter]:
        """Return the parameters of a part by name; those that are tied, once."""
        return {name: one for name, one in self.model.named_parameters() if self.part_of(name) == part}

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Return what a checkpoint holds of a part by name: its parameters, and the buffers that are stored."""
        buffers = {name for name, _ in self.model.named_buffers()}
        return {**self.parameters(part), **{name: one for name, one in self.state(part).items() if name in buffers}}


class PartedModel(WholeModel):
    """A folder of floats, or of GPTQ codes without experts, whose parts are in memory only while they are held.

    What is not held is on the meta device. Held, a part's tensors are those of `load_model`, bit for bit; a layer of
    codes is the value of its codes.

    Args:
        spec: the folder.

    Raises:
        ModelError: when transformers cannot make the model.
        ArtifactError: when a file is damaged.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.reader = reader_of_floats(spec)
        self._plain = _empty(spec, self.reader)
        super().__init__(freeze(as_linears(copy.deepcopy(self._plain)).eval()))
        self.stored: dict[str, list[str]] = {part: [] for part in self.parts}
        """The tensors of the folder that each part is made of."""
        for name in self.reader.names():
            self.stored[self.part_of(self.names.module_tensor(name))].append(name)
        self._ties = self._tied()
        self._tie()

    @cached_property
    def names(self) -> CheckpointNames:
        return CheckpointNames(self.model, self.reader.names())

    @contextmanager
    def held(self, part: str) -> Iterator[None]:
        """Have a part in memory as long as the block runs.

        Raises:
            ArtifactError: naming a tensor that is missing or mis-shaped.
            ModelError: naming a tensor that is not finite.
        """
        self.load(part)
        try:
            yield
        finally:
            self.release(part)

    def load(self, part: str, reader: FolderReader | None = None) -> None:
        """Read a part: of the folder, or of a file that holds all of it under the same names.

        Raises:
            ArtifactError: naming a tensor that is missing or mis-shaped.
            ModelError: naming a tensor that is not finite.
        """
        self.release(part)
        names = self.stored[part] if reader is None else reader.names()
        reader = reader or self.reader
        given = {name: reader.tensor(name) for name in names if name not in reader.coded}
        with quiet_transformers():
            unlike = load_converted(self._plain, given)
        state = {name: tensor for name, tensor in self._plain.state_dict().items() if not tensor.is_meta}
        own = {name: tensor for name, tensor in state.items() if self.part_of(name) == part}
        _forget(self._plain, own)
        from_stored(self.model, own)
        for name in reader.coded.intersection(names):
            own[f"{self.names.layer(name.removesuffix('.weight'))}.weight"] = reader.tensor(name)
        for name, tensor in own.items():
            put_tensor(self.model, name, tensor)
        self._tie()
        if unlike:
            raise ArtifactError(f"{reader.folder}: {unlike[0]} has another shape than by config.json; copy it again")
        if missing := [name for name, parameter in self.parameters(part).items() if parameter.is_meta]:
            kind = type(self.model).__name__
            raise ArtifactError(f"{reader.folder} lacks {missing[0]}, which {kind} has by config.json; copy it again")
        for name, tensor in self.parameters(part).items():
            if not all_finite(tensor):
                raise ModelError(
                    f"{reader.folder}: tensor {name} holds values that are not finite; the model cannot be used"
                )

    def release(self, part: str) -> None:
        """Let go of a part's parameters."""
        named = self.model.named_parameters(remove_duplicate=False)
        _forget(self.model, [name for name, _ in named if self.part_of(name) == part])
        self._tie()
        return_freed_memory()

    def _tied(self) -> dict[str, str]:
        """Return the parameters that are one with another, each with that one. As in transformers, such as the folder
        holds with values of their own are not."""
        stored = {self.names.module_tensor(name): name for name in self.reader.names()}

        def alike(one: str, other: str) -> bool:
            names, dtype = (stored[one], stored[other]), self.model.get_parameter(one).dtype
            if len({self.reader.precisions.get(name) for name in names}) > 1:  # a piece has other rows of each
                first, second = (self.reader.tensor(name).to(dtype) for name in names)
                return first.equal(second)
            pairs = zip(*map(self.reader.pieces, names), strict=True)
            return len({*map(self.reader.shape, names)}) == 1 and all(a.to(dtype).equal(b.to(dtype)) for a, b in pairs)

        pairs = self.model.all_tied_weights_keys.items()
        return {one: other for one, other in pairs if not {one, other} <= stored.keys() or alike(one, other)}

    def _tie(self) -> None:
        tie(self.model, self._ties)


def open_in_parts(spec: ModelSpec, streamed: bool) -> tuple[WholeModel, PreTrainedTokenizerBase]:
    """Open a model with its tokenizer: as a whole, or one part at a time.

    Raises:
        ModelError: when it cannot be loaded, see `load_floats`.
        ArtifactError: when a file is damaged, or a part of a GPTQ checkpoint does not fit the others.
    """
    if not streamed:
        model, tokenizer = load_model(spec)
        return WholeModel(model), tokenizer
    parted, tokenizer = PartedModel(spec), load_tokenizer(spec)
    check_vocabulary(parted.model, tokenizer, spec.path)
    return parted, tokenizer


def _empty(spec: ModelSpec, reader: FolderReader) -> PreTrainedModel:
    """Return a model in transformers' own form, its parameters on the meta device in the precision that they will have.

    Raises:
        ModelError: when transformers cannot make it.
    """
    try:
        with silent_transformers():
            config = AutoConfig.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
            if getattr(config, "quantization_config", None) is not None:  # the reader gives floats
                del config.quantization_config
            kind, how = stock_class(config), {"trust_remote_code": spec.trust_remote_code}
            with torch.device("meta"):  # a config is changed by what is made of it, so each gets a copy
                made = type(kind.from_config(copy.deepcopy(config), **how))
            headers = {
                name: torch.empty(reader.shape(name), dtype=dtype, device="meta")
                for name, dtype in reader.precisions.items()
            }
            typed = made.from_pretrained(
                None,
                config=copy.deepcopy(config),
                state_dict=headers,
                dtype=getattr(torch, spec.dtype) if spec.dtype else "auto",
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
            )
            with init_empty_weights(include_buffers=False):  # buffers are computed, in the model's precision
                model: PreTrainedModel = kind.from_config(copy.deepcopy(config), dtype=typed.dtype, **how)
            if model.can_generate():
                model.generation_config = generation_settings(spec.path)
    except Exception as error:  # a file or config that transformers cannot read
        raise ModelError(f"transformers cannot load {spec.path}: {first_sentence(error)}") from error
    precisions = {name: parameter.dtype for name, parameter in typed.named_parameters(remove_duplicate=False)}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        put_tensor(model, name, torch.empty(parameter.shape, dtype=precisions[name], device="meta"))
    for name, buffer in typed.named_buffers():
        put_tensor(model, name, model.get_buffer(name).to(buffer.dtype))
    model.config = typed.config
    return model


def _forget(model: nn.Module, names: Iterable[str]) -> None:
    """Put parameters back on the meta device."""
    for name in names:
        owner, _, part = name.rpartition(".")
        module = model.get_submodule(owner)
        if part in module._parameters:
            setattr(module, part, nn.Parameter(module.get_parameter(part).to("meta"), requires_grad=False))
