"""Set the least important weights to zero (paper §2.1).

Three questions, three places: the scorer says how much a weight matters, the allocator how much
sparsity a layer gets, and `kernels.masks` which entries are then kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sqft.components import checks
from sqft.components.kinds import Allocator, Scorer
from sqft.errors import ArtifactError, StageError
from sqft.kernels.masks import keep_mask, pack_mask, unpack_mask
from sqft.modeling.architecture.blocks import decoder_blocks, linears, shape_of
from sqft.modeling.loading import load_model
from sqft.modeling.loading.transformers_io import save_model
from sqft.recipe.sections import Sparsify
from sqft.stages.compress import assign_weight, run_calibration
from sqft.stages.inputs import Report, StageInputs
from sqft.types import LinearStats, Pattern
from sqft.utils.files import write_json
from sqft.utils.patterns import selected

DIGESTS = "digests.json"
"""What a scorer that updates weights gave for each layer, to hold against what is read back."""


class SparsifyStage:
    """The stage `sparsify`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs = inputs

    def run(self) -> Report:
        return _run(self.inputs)

    def verify(self) -> None:
        _verify(self.inputs)


def _run(inputs: StageInputs) -> Report:
    """Write `model/` (the sparse model) and `masks.safetensors` (bit-packed, true where kept)."""
    section = inputs.section(Sparsify)
    scorer, label = inputs.component(Scorer), inputs.label(Scorer)
    model, tokenizer = load_model(inputs.plan.model_spec)
    layers = {
        name: linear for name, linear in linears(model).items() if selected(name, section.include, section.exclude)
    }
    if not layers:
        raise StageError("sparsify.include matches no linear layer of the model's decoder blocks")
    shapes = tuple(shape_of(name, linear) for name, linear in layers.items())
    allocator, measured = inputs.component(Allocator), _measured(inputs, model, tokenizer, layers)
    allocation = allocator.allocate(shapes, section.sparsity, measured)
    checks.check_allocation(inputs.label(Allocator), shapes, section.sparsity, allocation)
    pattern = Pattern.parse(section.pattern)
    masks: dict[str, Tensor] = {}
    report: dict[str, float] = {}
    seen: dict[str, int] = {}
    digests: dict[str, str] = {}

    def compress(name: str, linear: nn.Linear, stats: LinearStats) -> None:
        weight = linear.weight.detach().to(torch.float32, copy=True)
        kept = weight.clone()
        generator = torch.Generator(weight.device).manual_seed(inputs.seed_for("sparsify", name))
        tokens_seen = 0 if stats.unreached else stats.tokens
        stats = LinearStats(stats.tokens, stats.input_sq_sum, stats.hessian, generator)
        if scorer.updates:
            select = _Selection(label, name, pattern, allocation[name])
            with checks.statistics_unchanged(label, {name: stats}):
                pruned = scorer.prune(weight, stats, select)
            checks.check_unchanged(label, name, kept, weight)
            select.check()
            checks.check_pruned(label, name, kept, pruned, select.pruned / max(select.seen, 1))
            mask = pruned[1]
            assign_weight(label, name, linear, pruned[0])
            digests[name] = _digest(linear.weight)
        else:
            with checks.statistics_unchanged(label, {name: stats}):
                scores = scorer.score(weight, stats)
            checks.check_unchanged(label, name, kept, weight)
            checks.check_scores(label, name, kept, scores)
            mask = keep_mask(scores, allocation[name], pattern)
            linear.weight.data.masked_fill_(~mask, 0)
        masks[name] = pack_mask(mask).cpu()
        report[name] = 1 - mask.float().mean().item()
        seen[name] = tokens_seen

    tokens = run_calibration(inputs, model, tokenizer, layers, scorer.needs, compress, "scoring")
    save_model(model, tokenizer, inputs.scratch / "model")
    save_file(masks, inputs.scratch / "masks.safetensors")
    if scorer.updates:
        write_json(inputs.scratch / DIGESTS, digests)
    total = sum(linear.weight.numel() for linear in layers.values())
    zeros = sum(int((linear.weight == 0).sum()) for linear in layers.values())
    return {
        "sparsity": zeros / total,
        "zeros": zeros,
        "weights": total,
        "parameters": model.num_parameters(),
        "layers": report,
        "calibration_tokens": tokens,
        "expert_tokens": {name: count for name, count in seen.items() if count != tokens},
    }


def _measured(
    inputs: StageInputs, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: Mapping[str, nn.Linear]
) -> dict[str, float]:
    """What the allocator measures of the dense layers, block by block; nothing when it measures nothing."""
    allocator, label = inputs.component(Allocator), inputs.label(Allocator)
    if not allocator.needs:
        return {}
    measured: dict[str, float] = {}
    for_block: dict[str, list[str]] = {}
    for block in decoder_blocks(model):
        names = [name for name in layers if name.startswith(f"{block}.")]
        for_block |= dict.fromkeys(names, names)
    weights: dict[str, Tensor] = {}
    stats: dict[str, LinearStats] = {}

    def collect(name: str, linear: nn.Linear, found: LinearStats) -> None:
        """Measure a block once its last layer has come; what it took is not kept."""
        weights[name], stats[name] = linear.weight.detach().to(torch.float32, copy=True), found
        names = for_block[name]
        if len(weights) < len(names):
            return
        kept = {name: weight.clone() for name, weight in weights.items()}
        with checks.statistics_unchanged(label, stats):
            numbers = allocator.measure(weights, stats)
        for one in names:
            checks.check_unchanged(label, one, kept[one], weights[one])
        checks.check_measured(label, names, numbers)
        measured.update(numbers)
        weights.clear()
        stats.clear()

    run_calibration(inputs, model, tokenizer, layers, allocator.needs, collect, "measuring")
    return measured


class _Selection:
    """`sqft.types.Select` of one layer, which remembers how much of it went."""

    def __init__(self, label: str, place: str, pattern: Pattern, sparsity: float) -> None:
        self.label, self.place, self.pattern, self.sparsity = label, place, pattern, sparsity
        self.pruned = self.seen = 0

    def __call__(self, scores: Tensor) -> Tensor:
        checks.check_some_scores(self.label, self.place, scores)
        if self.pattern.of and scores.shape[1] % self.pattern.of:
            raise StageError(
                f"sparsify.pattern: the scorer chooses among {scores.shape[1]} inputs at a time, no multiple of the M "
                f"of '{self.pattern}'; change its block, or the pattern"
            )
        mask = keep_mask(scores, self.sparsity, self.pattern)
        self.pruned, self.seen = self.pruned + int((~mask).sum()), self.seen + mask.numel()
        return mask

    def check(self) -> None:
        """Whole entries of a few may be far from the sparsity that was asked for."""
        spent = self.pruned / max(self.seen, 1)
        if self.pattern.sparsity is None and abs(spent - self.sparsity) > 0.02:
            raise StageError(
                f"sparsify.scorer: {self.label} chooses among so few inputs of {self.place} at a time that {spent:.3f} "
                f"of them go where {self.sparsity:.3f} was asked for; give it a larger block"
            )


def _digest(weight: Tensor) -> str:
    """SHA-256 over the bits of a weight."""
    return hashlib.sha256(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _verify(inputs: StageInputs) -> None:
    """Read back, every pruned entry is zero, every other one is the original bit for bit, or in the layers of a scorer
    that updates weights what it gave; all are finite."""
    original, _ = load_model(inputs.plan.model_spec)
    stored, _ = load_model(inputs.plan.spec(inputs.scratch / "model"))
    packed, label = load_file(inputs.scratch / "masks.safetensors"), inputs.label(Scorer)
    given = json.loads((inputs.scratch / DIGESTS).read_text("utf-8")) if inputs.component(Scorer).updates else {}
    found = dict(stored.named_parameters())
    for name, parameter in original.named_parameters():
        expected, layer = parameter.detach(), name.removesuffix(".weight")
        if layer in packed:
            mask = unpack_mask(packed[layer], (expected.shape[0], expected.shape[1]))
            expected = (found[name] if layer in given else expected).masked_fill(~mask, 0)
        tensor = found[name]
        if layer in given and _digest(tensor) != given[layer]:
            raise ArtifactError(f"sparsify ({label}): {name} as stored is not what the scorer gave")
        if tensor.dtype != expected.dtype or not torch.equal(tensor, expected):
            wrong = int((tensor != expected).sum())
            raise ArtifactError(
                f"sparsify ({label}): {name} as stored is not the masked original ({wrong} entries differ)"
            )
