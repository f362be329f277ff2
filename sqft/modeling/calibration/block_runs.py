"""Two ways to run one decoder block on windows of text, all blocks before it being as they are now.

`replayed` captures how each block is called, and runs it by itself: a block's call is captured complete, (args,
kwargs), and no argument is named. `in_model` runs the model from its start and stops after the block. So it needs to
know nothing of what passes between blocks: keys and values that several blocks share, inputs of each layer, more than
one stream of hidden states. What a block's layers are given is the same, to the bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sqft.errors import StageError
from sqft.kernels.finite import all_finite
from sqft.modeling.calibration.capture import Residence, capture, forward, run_block

NOT_FINITE = "calibration met activations that are not finite; use float32 or other calibration text"


@dataclass(frozen=True)
class BlockRun:
    """A block in its place in the walk; `windows` is how many windows of text it can be run on."""

    block: nn.Module
    windows: int
    run: Callable[[int], Tensor | None]

    @torch.no_grad()
    def __call__(self, index: int) -> Tensor | None:
        """Run the block on one window; return its hidden states, or None when the model does not run it.

        Raises:
            StageError: when they are not finite.
        """
        result = self.run(index)
        if result is not None and not all_finite(result):
            raise StageError(NOT_FINITE)
        return result


def replayed(
    model: PreTrainedModel, blocks: Mapping[str, nn.Module], windows: Tensor, device: str, residence: Residence
) -> Iterator[tuple[str, BlockRun]]:
    """Yield each block's name and its run by itself, in order.

    On an accelerator one block at a time lives there, with one window's activations; the hidden states of all windows
    stay on the CPU, in the model's precision.

    Args:
        model: the model.
        blocks: its blocks by name.
        windows: token ids [samples, length].
        device: where a block is run.
        residence: where the blocks and the hidden states are.

    Raises:
        ModelError: when the blocks cannot be replayed.
    """
    with residence.hold(""):
        calls, hidden, slot = capture(model, blocks, windows, residence)
    for name, block in blocks.items():
        own = calls.pop(name)
        with residence.around(name):
            block.to(device)

            def run(index: int, block: nn.Module = block, own: Any = own) -> Tensor:
                return run_block(block, own[index], slot, hidden[index], device).to("cpu")

            yield name, (block_run := BlockRun(block, len(windows), run))
            for index in range(len(windows)):  # one window at a time, what comes out enters the next block
                after = block_run(index)
                assert after is not None
                hidden[index] = after
            block.to("cpu")


def in_model(
    model: PreTrainedModel, blocks: Mapping[str, nn.Module], windows: Tensor, device: str, residence: Residence
) -> Iterator[tuple[str, BlockRun]]:
    """Yield each block's name and its run inside the model, in the order in which the model first runs them.

    A block that the model runs several times is run as often; one that it does not run comes last. The whole model must
    be in memory, and on an accelerator it lives there. See `replayed` for the arguments.
    """
    model.to(device)
    times = _times(model, blocks, windows[:1].to(device))
    for name in [*times, *(name for name in blocks if name not in times)]:

        def run(index: int, block: nn.Module = blocks[name], times: int = times[name]) -> Tensor | None:
            return _until(model, block, times, windows[index : index + 1].to(device))

        with residence.around(name):
            yield name, BlockRun(blocks[name], len(windows), run)
    model.to("cpu")


RUNS = {"blocks": replayed, "model": in_model}
"""The ways to walk."""


class _Reached(Exception):
    """The block of interest has run."""


def _until(model: PreTrainedModel, block: nn.Module, times: int, window: Tensor) -> Tensor | None:
    """Run a model on a window [1, tokens] until a block has run that many times; return what came out last."""
    outputs: list[Any] = []

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output)
        if len(outputs) == times:
            raise _Reached

    handle = block.register_forward_hook(stop)
    try:
        forward(model, window)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not outputs:
        return None
    result: Tensor = outputs[-1][0] if isinstance(outputs[-1], tuple) else outputs[-1]
    return result


def _times(model: PreTrainedModel, blocks: Mapping[str, nn.Module], window: Tensor) -> Counter[str]:
    """Return how often a model runs each of its blocks on a window [1, tokens], in the order of their first runs."""
    times = Counter[str]()
    hooks = [
        block.register_forward_pre_hook(lambda *_, name=name: times.update([name])) for name, block in blocks.items()
    ]
    try:
        forward(model, window)
    finally:
        for hook in hooks:
            hook.remove()
    return times
