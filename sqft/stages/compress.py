"""Shared by sparsify and quantize: which layers, the calibration walk, and what a component is given of a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sqft.components import checks
from sqft.errors import StageError
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.calibration.capture import Hold, Residence
from sqft.modeling.calibration.hidden_states import HiddenStates
from sqft.modeling.calibration.team import Team
from sqft.modeling.calibration.walk import walk
from sqft.modeling.loading.parts import WholeModel
from sqft.planning.plan import Step
from sqft.stages.inputs import StageInputs
from sqft.types import LinearStats, Statistic

Compress = Callable[[str, nn.Linear, LinearStats], None]
"""Called with a layer's name, the layer and its statistics; it edits the weight in place."""
MEASURED_ROWS = 2048
"""Outputs of a layer up to which its output error is exact."""


def chosen_layers(model: PreTrainedModel, step: Step) -> dict[str, nn.Linear]:
    """Return the linear layers that the plan chose for a step, by name."""
    found = linears(model)
    return {name: found[name] for name in step.layers}


@contextmanager
def guarded(
    label: str, layers: Mapping[str, tuple[nn.Linear, LinearStats]], seed_for: Callable[[str], int]
) -> Iterator[tuple[dict[str, Tensor], dict[str, LinearStats]]]:
    """Give a component float32 copies of these layers' weights [out, in] and their statistics, each with its layer's
    name and a generator seeded for it, and check afterwards that it edited none of them.

    Raises:
        ContractError: when it edited one in place.
    """
    weights = {name: linear.weight.detach().to(torch.float32, copy=True) for name, (linear, _) in layers.items()}
    seeded = {
        name: dataclasses.replace(
            stats, name=name, generator=torch.Generator(weights[name].device).manual_seed(seed_for(name))
        )
        for name, (_, stats) in layers.items()
    }
    with checks.statistics_unchanged(label, seeded):
        yield weights, seeded
    for name, (linear, _) in layers.items():
        checks.check_unchanged(label, name, linear.weight.detach().float(), weights[name])


def assign_weight(label: str, name: str, linear: nn.Linear, value: Tensor) -> None:
    """Give a layer the weight that a component computed in float32, in the model's precision.

    Raises:
        StageError: when the weight is too large for it.
    """
    linear.weight.data.copy_(value)
    if lost := int((~linear.weight.isfinite()).sum()):
        dtype = str(linear.weight.dtype).removeprefix("torch.")
        raise StageError(
            f"{label} gave {name} {lost} weights that {dtype}, the model's precision, does not hold: the largest is "
            f"{value.abs().max().item():.3g} and {dtype} ends at {torch.finfo(linear.weight.dtype).max:.3g}; set "
            "model.dtype to bfloat16 or float32, or give more calibration text"
        )


def output_error(weight: Tensor, value: Tensor, hessian: Tensor) -> float:
    """Return ‖(V − W) X‖² / ‖W X‖² of a layer's weight W and of what it became, V, both float32 [out, in], given the
    Hessian X Xᵀ [in, in].

    Of a layer with more than `MEASURED_ROWS` outputs, every so-many-th counts: measuring all of a wide layer would
    take about as long as quantizing it.
    """
    every = -(-len(weight) // MEASURED_ROWS)
    weight, value = weight[::every], value[::every]
    output, difference = float((weight @ hessian * weight).sum()), value - weight
    return float((difference @ hessian * difference).sum()) / max(output, 1e-30)


def do_nothing(*_: object) -> None:
    """Do nothing: the `Compress` of a process that only takes part."""


def run_calibration(
    inputs: StageInputs,
    opened: WholeModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Mapping[str, nn.Linear],
    needs: frozenset[Statistic],
    compress: Compress,
    label: str,
    sequential: bool = False,
    around: Hold | None = None,
    done: Container[str] = (),
) -> int:
    """Call `compress` on each layer with the statistics it needs; return how many calibration tokens that took.

    Of several processes, which must all call this, each runs its share of the calibration text, and the first one alone
    calls `compress`.

    Args:
        inputs: the stage's inputs, for its calibration data, device and display.
        opened: the model, on the CPU.
        tokenizer: its tokenizer.
        layers: the linear layers by name.
        needs: statistics to collect; without any, no text is read.
        compress: compresses one layer.
        label: the word of the display.
        sequential: whether later layers of a block see what the earlier ones became.
        around: see `Residence`; unless given, only has a block in memory.
        done: see `walk`.
    """
    around = around or opened.held
    if not needs:
        if not inputs.processes.is_main:
            return 0
        of_block: dict[str, list[str]] = {block: [] for block in opened.blocks}
        for name in layers:
            of_block[opened.part_of(name)].append(name)
        for block, names in inputs.track(of_block.items(), label, len(of_block)):
            with around(block):
                for name in names if block not in done else ():
                    compress(name, layers[name], LinearStats(tokens=0))
        return 0
    section = inputs.plan.recipe.calibration
    assert section is not None
    windows = inputs.data.calibration(tokenizer)
    residence = Residence(opened.held, around, HiddenStates(section.memory_bytes, inputs.scratch))
    way = inputs.plan.source.layout.walk
    what = (opened.model, windows, set(layers), needs, compress, inputs.device, inputs.track, sequential, way)
    with inputs.processes.process_group("cpu"):
        walk(*what, residence, done, Team(inputs.processes.rank, inputs.processes.count))
        inputs.processes.barrier()  # the first one moves the folder that the others may still read
    return windows.numel()
