"""The calibration walk: block after block, each seeing the outputs of the already compressed ones.

A block's call is captured complete, (args, kwargs), and replayed; no argument is named. One real
forward shows which of them carries the hidden states: the one that *is* the output of the block before.
On an accelerator one block at a time lives there, with one window's activations; the captured
hidden states of all windows stay on the CPU, in the model's precision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
    """Feed windows of text through the model, and call `compress` for each chosen linear layer.

    After `compress` has changed a block's weights, the block is run again, so that later blocks see its new outputs.

    Args:
        model: on the CPU, and it stays there.
        windows: token ids [samples, length].
        chosen: full names of linear layers.
        needs: the statistics that `compress` gets of each layer's inputs.
        compress: called with a layer's name, the layer, and its statistics; it may change the weight in place.
        device: where one block at a time is run.
        track: shows progress.
        sequential: later layers of the same block see new outputs too: the block is run again for each set of layers
            that share an input. The experts of a mixture count as one layer in this.

    Raises:
        ModelError: when the blocks cannot be replayed.
        StageError: when an activation is not finite.
    """
    blocks = decoder_blocks(model)
    calls, hidden, slot = capture(model, blocks, windows)
    for name, block in track(blocks.items(), "calibrating", len(blocks)):
        block.to(device)
        replay = BlockReplay(block, calls.pop(name), hidden, slot, device)
        layers = {
            f"{name}.{inner}": module
            for inner, module in block.named_modules()
            if isinstance(module, nn.Linear) and f"{name}.{inner}" in chosen
        }
        groups = [layers] if layers else []
        if sequential and layers:
            experts = {f"{name}.{inner}" for inner, module in block.named_modules() if isinstance(module, Expert)}
            groups = list(_within(HESSIAN_BYTES, _by_input(layers, experts, partial(replay.window, 0))))
        for group in groups:
            observed = replay.observe(group, needs)
            if unreached := {layer: linear for layer, linear in group.items() if not observed[layer].tokens}:
                with route_all_tokens(block):
                    observed |= replay.observe(unreached, needs)
                log.warning("no token is routed to %s; measured on every token instead", ", ".join(unreached))
            for layer, linear in group.items():
                compress(layer, linear, replace(observed[layer].result(layer), unreached=layer in unreached))
        replay.advance()
        block.to("cpu")


@dataclass(frozen=True)
class BlockReplay:
    """One block, and how each window of text enters it: its calls, and the hidden states to put into their slot."""

    block: nn.Module
    calls: list[Call]
    hidden: list[Tensor]  # each [1, length, hidden size], on the CPU
    slot: Slot
    device: str

    @torch.no_grad()
    def window(self, index: int) -> Tensor:
        """Run the block on one window; return its output, on the CPU.

        Raises:
            StageError: when the output is not finite.
        """
        result = run_block(self.block, self.calls[index], self.slot, self.hidden[index], self.device).to("cpu")
        if not result.isfinite().all():
            raise StageError("calibration met activations that are not finite; use float32 or other calibration text")
        return result

    def observe(self, layers: Mapping[str, nn.Linear], needs: frozenset[Statistic]) -> dict[str, InputStatistics]:
        """Run the block on all windows; return the statistics of what these layers are given."""
        observed = {name: InputStatistics(needs) for name in layers}

        def hook(name: str) -> Callable[..., None]:
            return lambda _, args: observed[name].add(args[0])

        with _hooked(layers, hook):
            for index in range(len(self.calls)):
                self.window(index)
        return observed

    def advance(self) -> None:
        """Replace the hidden states by the block's outputs, one window at a time: they enter the next block."""
        for index in range(len(self.calls)):
            self.hidden[index] = self.window(index)


def _by_input(
    layers: Mapping[str, nn.Linear], experts: set[str], run: Callable[[], object]
) -> list[dict[str, nn.Linear]]:
    """Return the layers in the order they run, in sets of those that are given the same tensor.

    Layers of one kind of all experts are in one set too: experts run beside one another, and what becomes of one, no
    other sees. A layer that the run does not reach comes with those of its kind, or last: other windows may reach it.

    Args:
        layers: the layers by full name.
        experts: full names of the modules that are one expert each.
        run: runs the block once.
    """
    # 1. Run once: layers that are given the same tensor object are in one set.
    sets: list[dict[str, nn.Linear]] = []
    inputs: list[Tensor] = []  # kept alive, so that no other tensor takes the identity of one

    def hook(name: str) -> Callable[..., None]:
        def collect(linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
            known = next((index for index, given in enumerate(inputs) if given is args[0]), None)
            if known is None:
                inputs.append(args[0])
                sets.append({})
            sets[-1 if known is None else known].setdefault(name, linear)

        return collect

    with _hooked(layers, hook):
        run()

    # 2. Join sets that differ only in which expert their layers belong to.
    def kind(name: str) -> str:
        parent, _, last = name.rpartition(".")
        return f"{parent.rpartition('.')[0]}.*.{last}" if parent in experts else name

    together: dict[frozenset[str], dict[str, nn.Linear]] = {}
    for some in sets:
        together.setdefault(frozenset(map(kind, some)), {}).update(some)
    # 3. Add the layers that did not run.
    for name, layer in layers.items():
        if not any(name in some for some in sets):
            own = next((kinds for kinds in together if kind(name) in kinds), frozenset())
            together.setdefault(own, {})[name] = layer
    return list(together.values())


def _within(limit: int, sets: list[dict[str, nn.Linear]]) -> Iterator[dict[str, nn.Linear]]:
    """Split sets into parts whose Hessians take no more than `limit` bytes: layers of one set do not depend on one
    another. A single layer may take more."""
    for some in sets:
        part: dict[str, nn.Linear] = {}
        for name, layer in some.items():
            if part and sum(4 * one.in_features**2 for one in (*part.values(), layer)) > limit:
                yield part
                part = {}
            part[name] = layer
        yield part


@contextmanager
def _hooked(layers: Mapping[str, nn.Linear], hook: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    """Call `hook(name)` before each of these layers runs, with the layer and its arguments."""
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
