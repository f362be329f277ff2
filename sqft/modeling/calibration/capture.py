"""Capture how each decoder block is called, and run one block by itself."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sqft.errors import ModelError
from sqft.modeling.calibration.hidden_states import HiddenStates

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of one call of a block: positional, and by keyword."""
Hold = Callable[[str], AbstractContextManager[None]]
"""Enters what has a part of a model in memory: a block by its name, or what lies outside the blocks, ""."""
Slot = int | str
"""The argument of a block's call that carries the hidden states: its position, or its keyword."""


def in_memory(_: str) -> AbstractContextManager[None]:
    """The `Hold` of a model that is in memory as a whole."""
    return nullcontext()


@dataclass(frozen=True)
class Residence:
    """Where a model and the hidden states are while calibration goes through it; unless given, in memory.

    Args:
        hold: has a part of the model in memory.
        around: the same where a block is compressed, from before its layers are seen until its outputs are known.
        hidden: keeps the hidden states of all windows between blocks.
    """

    hold: Hold = in_memory
    around: Hold = in_memory
    hidden: HiddenStates = field(default_factory=HiddenStates)


def capture(
    model: PreTrainedModel,
    blocks: Mapping[str, nn.Module],
    windows: Tensor,
    residence: Residence | None = None,
) -> tuple[dict[str, list[Call]], HiddenStates, Slot]:
    """Record how each block is called, so that it can be run by itself.

    Two passes: one window is run for real, to learn which argument is the hidden states; then all windows are run
    with blocks that compute nothing and only record.

    Args:
        model: the model, of which the blocks may be elsewhere.
        blocks: its blocks by name.
        windows: token ids [samples, length].
        residence: where these are, and the hidden states are to be.

    Returns:
        The calls of each block, one a window, without the hidden states; the hidden states that enter the first block,
        one tensor a window; and the slot that they belong in.

    Raises:
        ModelError: when the blocks cannot be replayed one by one.
    """
    residence = residence or Residence()
    with held_in_turn(blocks, residence.hold):
        slot, rest = _probe(model, blocks, windows[:1])
    calls: dict[str, list[Call]] = {name: [] for name in blocks}
    hidden, first = residence.hidden, next(iter(blocks))

    def recorder(name: str) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            state, call = _take(args, kwargs, slot)
            calls[name].append(call)
            if name == first:
                hidden.append(state.detach())
            more = rest[name]
            return state if more is None else (state, *more)  # the same hidden states go on to the next block

        return record

    try:
        for name, block in blocks.items():
            block.forward = recorder(name)
        for window in windows:
            forward(model, window[None])
    finally:
        for block in blocks.values():
            vars(block).pop("forward", None)  # the class's own again
    return calls, hidden, slot


@contextmanager
def held_in_turn(blocks: Mapping[str, nn.Module], hold: Hold) -> Iterator[None]:
    """Have each block in memory while it runs, and no longer."""
    replaced = {name: vars(block).get("forward") for name, block in blocks.items()}

    def held(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with hold(name):
                return forward(*args, **kwargs)

        return run

    try:
        for name, block in blocks.items():
            block.forward = held(name, block.forward)
        yield
    finally:
        for name, block in blocks.items():
            if (own := replaced[name]) is None:
                vars(block).pop("forward", None)
            else:
                block.forward = own


def _probe(
    model: PreTrainedModel, blocks: Mapping[str, nn.Module], window: Tensor
) -> tuple[Slot, dict[str, tuple[Any, ...] | None]]:
    """Run one window for real, and see where a block's output enters the next one.

    Returns:
        The slot of the hidden states, and for each block what its output holds besides them; None for a block whose
        output is the hidden states alone, and no tuple.

    Raises:
        ModelError: when the blocks do not run once each, in order, or pass on more than their hidden states.
    """
    outputs: list[Any] = []
    inputs: list[Call] = []
    states: list[list[Tensor]] = []  # the tensors in a call, when it begins
    kind = type(model).__name__

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args, kwargs))
        states.append(tensors_in([args, kwargs]))

    def end(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
        outputs.append(output)
        after = tensors_in(list(inputs[-1]))
        if len(after) != len(states[-1]) or any(map(operator.is_not, after, states[-1])):
            raise ModelError(
                f"{kind}'s blocks leave tensors for later ones in what they are given, so calibration cannot run them "
                "one by one"
            )

    # 1. Record the real arguments and outputs of every block.
    hooks = []
    for block in blocks.values():
        hooks.append(block.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.append(block.register_forward_hook(end, with_kwargs=True))
    try:
        forward(model, window)
    finally:
        for hook in hooks:
            hook.remove()
    # 2. The hidden states are the argument that is the output of the block before, in every block.
    if len(outputs) != len(blocks):
        raise ModelError(
            f"{kind} runs its {len(blocks)} blocks {len(outputs)} times, so calibration cannot run them one by one"
        )
    produced = [output[0] if isinstance(output, tuple) else output for output in outputs]
    rest = [output[1:] if isinstance(output, tuple) else None for output in outputs]
    besides: list[Tensor] = []  # other tensors that blocks before gave: none may enter a block
    slots: set[Slot] = {0 if inputs[0][0] else next(iter(inputs[0][1]))} if len(blocks) == 1 else set()
    for before, more, (args, kwargs) in zip(produced, rest, inputs[1:], strict=False):
        given: list[tuple[Slot, Any]] = [*enumerate(args), *kwargs.items()]
        carrying = {slot for slot, value in given if value is before}
        slots = (slots or carrying) & carrying
        besides += tensors_in(more)
        if not slots:
            raise ModelError(f"{kind}'s blocks do not pass their output on, so calibration cannot run them one by one")
        if any(one is other for one in tensors_in([args, kwargs]) for other in besides if other is not before):
            raise ModelError(
                f"{kind}'s blocks pass on more than their hidden states, so calibration cannot run them one by one"
            )
    return min(slots, key=str), dict(zip(blocks, rest, strict=True))


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for each in inner for tensor in tensors_in(each)]


def _take(args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot) -> tuple[Tensor, Call]:
    """Take the hidden states out of a call."""
    if isinstance(slot, int):
        return args[slot], ((*args[:slot], None, *args[slot + 1 :]), kwargs)
    return kwargs[slot], (args, {**kwargs, slot: None})


def run_block(block: nn.Module, call: Call, slot: Slot, state: Tensor, device: str) -> Tensor:
    """Run a block by itself, and return its output's hidden states.

    Args:
        block: on `device`.
        call: its arguments, without the hidden states.
        slot: where the hidden states belong.
        state: the hidden states, on any device.
        device: where the block is.
    """
    args, kwargs = call
    if isinstance(slot, int):
        args = (*args[:slot], state, *args[slot + 1 :])
    else:
        kwargs = {**kwargs, slot: state}
    output = block(*_on(args, device), **_on(kwargs, device))
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _on(value: Any, device: str) -> Any:
    """Return nested arguments with their tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_on(inner, device) for inner in value)
    if isinstance(value, dict):
        return {key: _on(inner, device) for key, inner in value.items()}
    return value


@torch.no_grad()
def forward(model: PreTrainedModel, window: Tensor) -> None:
    """Run a model on a window [1, tokens], without its head: no logits are needed."""
    model.base_model(input_ids=window, use_cache=False)
