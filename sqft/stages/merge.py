"""Fold the chosen sub-adapter into the base: the weight stored is the weight trained through."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sqft.components.kinds import Merger
from sqft.data.encoding import Example, Tokenization
from sqft.errors import ArtifactError
from sqft.kernels import grids
from sqft.kernels.checksums import sha256
from sqft.kernels.finite import all_finite
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.adapters.saving import read_ranks
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.loading import load_model
from sqft.modeling.loading.quantized import read_quantized, save_quantized
from sqft.modeling.loading.transformers_io import save_model
from sqft.recipe.sections import Finetune, Search
from sqft.stages.adapted import load_adapted_model
from sqft.stages.inputs import Report, StageInputs, section_of
from sqft.stages.logits import logits_difference, logits_of
from sqft.stages.merge_in_parts import MergeInParts
from sqft.stages.merge_layer import kept_by_base, merge_layer, report_of, warn_of_zero_points
from sqft.types import COMPARED_EXAMPLES, Quantized
from sqft.utils.digests import Digests


class MergeStage:
    """The stage `merge`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs, self.folder = inputs, inputs.scratch / "model"
        finetune = inputs.plan.step("finetune")
        self.merger, self.label = finetune.component(Merger), finetune.label(Merger)
        self.base_path = inputs.plan.adapter_base.model(inputs.folders)
        # What is to be read back: the digest of every tensor, and the codes of every layer that has some.
        self.digests: dict[str, str] = {}
        self.quantized: dict[str, Quantized] = {}
        self.files = ""  # digest of the folder that `stored` was opened from

    @cached_property
    def adapted(self) -> AdaptedModel:
        """The model that was trained, at the chosen ranks, on the CPU: opened once."""
        inputs = self.inputs
        adapted = load_adapted_model(inputs.plan, inputs.folders, inputs.folders["finetune"], "cpu")
        adapted.set_ranks(read_ranks(inputs.folders["search"]))
        return adapted

    @cached_property
    def in_parts(self) -> MergeInParts:
        """The merge of a model that is in memory one part at a time; then nothing else here is used."""
        return MergeInParts(self.inputs, self.inputs.plan.spec(self.base_path))

    @cached_property
    def stored(self) -> PreTrainedModel:
        """The merged model as read back from disk: opened once, to compare logits and to verify."""
        self.files = Digests().path(self.folder)
        return load_model(self.inputs.plan.spec(self.folder))[0]

    def run(self) -> Report:
        """Write `model/`, a Hugging Face folder in the base's precision: floats, or codes as GPTQ stores them."""
        if self.inputs.step.streamed:
            return self.in_parts.run(self._examples(self.in_parts.tokenizer))
        report = self._write()
        batches = (torch.tensor([example.input_ids]) for example in self._examples(self.adapted.tokenizer))
        pairs = ((logits_of(self.stored, ids), logits_of(self.adapted.model, ids)) for ids in batches)
        return {**report, "logits_difference": logits_difference(pairs)}

    def verify(self) -> None:
        """Check that every tensor as stored is the one trained through, or the base's, bit for bit, and that the zeros
        that the merger promises to keep are zero."""
        if self.inputs.step.streamed:
            self.in_parts.verify()
            return
        stored_tensors = _tensors(self.stored)
        if Digests().path(self.folder) != self.files:
            raise ArtifactError(f"merge ({self.label}): {self.folder} has changed since it was read back")
        if self.quantized:
            stored = read_quantized(self.folder, CheckpointNames(self.stored))
            for name in stored.keys() | self.quantized.keys():
                both = name in stored and name in self.quantized
                if not (both and grids.same(stored[name], self.quantized[name])):
                    raise ArtifactError(
                        f"merge ({self.label}): codes or grid of {name} as stored are not those that training used"
                    )
        for name, tensor in stored_tensors.items():
            if not all_finite(tensor):
                raise ArtifactError(f"merge ({self.label}): {name} as stored holds values that are not finite")
            if sha256(tensor) != self.digests[name]:
                raise ArtifactError(f"merge ({self.label}): {name} as stored is not the weight that training used")
            layer = self.adapted.layers.get(name.removesuffix(".weight"))
            if layer is None or not self.merger.keeps_mask:
                continue
            if lost := int(((tensor != 0) & ~kept_by_base(layer.base)).sum()):
                raise ArtifactError(f"merge ({self.label}): {lost} zeros of the base are not zero in {name}")

    def _write(self) -> Report:
        """Write the merged model, remember what is to be read back, and count what changed."""
        source = self.inputs.plan.spec(self.base_path)
        model, tokenizer = load_model(source)
        on_codes = self.inputs.plan.adapter_base.quantized
        base = read_quantized(self.base_path, CheckpointNames(model)) if on_codes else {}
        self.quantized = dict(base)
        self.digests = {name: sha256(tensor) for name, tensor in _tensors(model).items()}
        counts = []
        for name, layer in self.adapted.mergeable.items():
            merged = merge_layer(layer, base.get(name), self.inputs.device)
            counts.append(merged.counts)
            if merged.codes:
                self.quantized[name] = merged.codes
            parameter = model.get_parameter(f"{name}.weight")
            self.digests[f"{name}.weight"] = sha256(merged.weight.to(parameter.dtype))
            parameter.data.copy_(merged.weight)
        if not on_codes:
            save_model(model, tokenizer, self.folder, source)
            return report_of(counts)
        if any(bool((layer.grid.zero == 0).any()) for layer in base.values()):
            warn_of_zero_points()
        save_quantized(model, tokenizer, self.quantized, self.folder, source)
        return report_of(counts, next(iter(base.values())).grid.bits)

    def _examples(self, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Return a few examples to compare logits on: of validation data where there is some, else of training data."""
        plan, data = self.inputs.plan, self.inputs.data
        finetune = section_of(plan.step("finetune"), Finetune)
        validation = section_of(plan.step("search"), Search).data
        if validation:
            records = data.of("search").records("data", validation)
        else:
            training, held_out = data.training_records()
            records = held_out or training
        tokenization = Tokenization(tokenizer, finetune.max_length, finetune.loss_on)
        return tokenization.encode(records[:COMPARED_EXAMPLES]).examples[:COMPARED_EXAMPLES]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
