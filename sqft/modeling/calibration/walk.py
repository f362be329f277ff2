"""The calibration walk: block after block, each seeing the outputs of the already compressed ones.

A block's call is captured whole, (args, kwargs), and replayed; no argument is named. One real
forward finds which of them carries the hidden states: the one that *is* the block before's output.
On an accelerator one block at a time lives there, with one window's activations; the captured
hidden states of all windows stay on the CPU, in the model's precision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sqft.errors import StageError
from sqft.modeling.architecture.blocks import decoder_blocks
from sqft.modeling.architecture.linears import Expert, route_all_tokens
from sqft.modeling.calibration.capture import Call, Slot, capture, run_block
from sqft.modeling.calibration.statistics import InputStatistics
from sqft.types import HESSIAN_BYTES, LinearStats, Statistic
from sqft.utils.progress import Track

log = logging.getLogger("sqft")


def walk(
    model: PreTrainedModel,
    windows: Tensor,
    chosen: set[str],
    needs: frozenset[Statistic],
    compress: Callable[[str, nn.Linear, LinearStats], None],
    device: str,
    track: Track,
    sequential: bool = False,
) -> None:
    """Feed `windows` [samples, length] through the model and call `compress` for each chosen linear.

    `compress(name, linear, stats)` edits the linear's weight in place; the block is then run again, so
    that later blocks see what it became. With `sequential` later layers of the same block see it too: the block is run
    again for each set of layers that share an input, a mixture's experts being one layer in this. `model` stays on the
    CPU.

    Raises:
        StageError: when the blocks cannot be replayed, or an activation is not finite.
    """
    blocks = decoder_blocks(model)
    calls, hidden, slot = capture(model, blocks, windows)
    for name, block in track(blocks.items(), "calibrating", len(blocks)):
        block.to(device)
        layers = {
            f"{name}.{inner}": module
            for inner, module in block.named_modules()
            if isinstance(module, nn.Linear) and f"{name}.{inner}" in chosen
        }
        together = [layers] if layers else []
        if sequential and layers:
            experts = {f"{name}.{inner}" for inner, module in block.named_modules() if isinstance(module, Expert)}
            run = partial(_replay, block, calls[name][0], slot, hidden[0], device)
            together = list(_within(HESSIAN_BYTES, _by_input(layers, experts, run)))
        for some in together:
            with _observed(some, needs) as observed:
                for call, state in zip(calls[name], hidden, strict=True):
                    _replay(block, call, slot, state, device)
            if unseen := {layer: linear for layer, linear in some.items() if not observed[layer].tokens}:
                with route_all_tokens(block), _observed(unseen, needs) as more:
                    for call, state in zip(calls[name], hidden, strict=True):
                        _replay(block, call, slot, state, device)
                log.warning("no token is routed to %s; measured on every token instead", ", ".join(unseen))
                observed |= more
            for layer, linear in some.items():
                compress(layer, linear, replace(observed[layer].result(layer), unreached=layer in unseen))
        for index, call in enumerate(calls[name]):
            hidden[index] = _replay(block, call, slot, hidden[index], device)
        calls[name] = []
        block.to("cpu")


@torch.no_grad()
def _replay(block: nn.Module, call: Call, slot: Slot, state: Tensor, device: str) -> Tensor:
    result = run_block(block, call, slot, state, device).to("cpu")
    if not result.isfinite().all():
        raise StageError("calibration met activations that are not finite; use float32 or other calibration text")
    return result


def _by_input(
    layers: Mapping[str, nn.Linear], experts: set[str], run: Callable[[], object]
) -> list[dict[str, nn.Linear]]:
    """Layers in the order they run, those that are given the same tensor together.

    So are the layers of one kind of all experts, which stand beside one another: what becomes of one, no other sees. A
    layer that a run leaves out comes with those of its kind, or last: other windows may reach it.
    """
    sets: list[dict[str, nn.Linear]] = []
    inputs: list[Tensor] = []  # kept, so that no other tensor takes the place of one

    def hook(name: str) -> Callable[..., None]:
        def collect(linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
            known = next((index for index, given in enumerate(inputs) if given is args[0]), None)
            if known is None:
                inputs.append(args[0])
                sets.append({})
            sets[-1 if known is None else known].setdefault(name, linear)

        return collect

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()

    def kind(name: str) -> str:
        parent, _, last = name.rpartition(".")
        return f"{parent.rpartition('.')[0]}.*.{last}" if parent in experts else name

    together: dict[frozenset[str], dict[str, nn.Linear]] = {}
    for some in sets:
        together.setdefault(frozenset(map(kind, some)), {}).update(some)
    for name, layer in layers.items():
        if not any(name in some for some in sets):
            own = next((kinds for kinds in together if kind(name) in kinds), frozenset())
            together.setdefault(own, {})[name] = layer
    return list(together.values())


def _within(limit: int, sets: list[dict[str, nn.Linear]]) -> Iterator[dict[str, nn.Linear]]:
    """The sets in parts whose Hessians take no more bytes than that; a layer of a set sees nothing of the others."""
    for some in sets:
        part: dict[str, nn.Linear] = {}
        for name, layer in some.items():
            if part and sum(4 * one.in_features**2 for one in (*part.values(), layer)) > limit:
                yield part
                part = {}
            part[name] = layer
        yield part


@contextmanager
def _observed(layers: Mapping[str, nn.Linear], needs: frozenset[Statistic]) -> Iterator[dict[str, InputStatistics]]:
    """Collect statistics of each layer's input while it runs."""
    observed = {name: InputStatistics(needs) for name in layers}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args: observed[name].add(args[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield observed
    finally:
        for handle in handles:
            handle.remove()
