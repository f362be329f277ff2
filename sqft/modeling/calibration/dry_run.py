"""A dry run of calibration on fake tensors, which have shapes and no values: it fails before weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sqft.modeling.architecture.blocks import decoder_blocks, linears
from sqft.modeling.architecture.experts import Expert, Experts
from sqft.modeling.architecture.linears import unsplittable_mixtures
from sqft.modeling.calibration.capture import capture, forward, run_block
from sqft.modeling.compat import fake_tensors

TOKENS = 8
"""Length of the window that is run."""

Way = Literal["blocks", "model"]


@dataclass(frozen=True)
class Walk:
    """How calibration runs a model: `way` is "blocks" (each by itself) or "model" (the whole model for each block);
    `reason` says why the second. `unseen` are linear layers of the blocks that it does not see, as they are not
    called."""

    way: Way
    reason: str = ""
    unseen: tuple[str, ...] = ()


def how_to_walk(model: PreTrainedModel) -> Walk:
    """Return how calibration runs a model on the meta device, and what it would not see.

    A model that runs only with values (an operation's shape depends on them) is run as a whole, and all of its layers
    count as seen, as nothing can be known about it.
    """
    names = linears(model)
    experts = {name for name, module in model.named_modules() if isinstance(module, Expert)}
    way: Way = "blocks"
    reason = ""
    with _fake_values(model) as windows:
        try:
            seen = _seen_in_blocks(model, windows)
        except Exception as error:
            way, reason = "model", _first_line(error)
            try:
                seen = _run_in(model, lambda: forward(model, windows))
            except Exception as error:  # an operation whose result's shape depends on values
                return Walk(way, f"it cannot be run without numbers: {_first_line(error)}")
    unseen = (name for name in names if name not in seen and name.rpartition(".")[0] not in experts)
    return Walk(way, reason, tuple(unseen))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _seen_in_blocks(model: PreTrainedModel, windows: Tensor) -> set[str]:
    """Return the names of the layers that run when each block is replayed by itself.

    Blocks of one class with the same parameters are alike: two of them run, one is replayed, and the answer holds for
    all.

    Raises:
        ModelError: when the blocks cannot be replayed.
    """
    blocks = decoder_blocks(model)
    # 1. Group blocks that are alike; from the third on, a block gives back what the first gave.
    kinds: dict[Any, list[str]] = {}
    for name, block in blocks.items():
        shapes = tuple((inner, tuple(parameter.shape)) for inner, parameter in block.named_parameters())
        kinds.setdefault((type(block), shapes), []).append(name)
    seen, hooks = set[str](), []
    try:
        for first, _, *others in (names for names in kinds.values() if len(names) > 2):
            output = _Output()
            hooks.append(blocks[first].register_forward_hook(output.keep))
            for name in others:
                blocks[name].forward = output
        calls, hidden, slot = capture(model, blocks, windows)
    finally:
        for hook in hooks:
            hook.remove()
        for block in blocks.values():
            vars(block).pop("forward", None)
    # 2. Replay the first block of each kind, and note what runs in it.
    for names in kinds.values():
        block, (call, *_) = blocks[names[0]], calls[names[0]]
        inside = _run_in(block, partial(run_block, block, call, slot, hidden[0], "meta"))
        seen |= {f"{name}.{inner}" for name in names for inner in inside}
    return seen


def _run_in(module: nn.Module, run: Callable[[], object]) -> set[str]:
    """Return the names of the modules inside a module that run when `run` is called."""
    ran: set[nn.Module] = set()
    hooks = [inner.register_forward_pre_hook(lambda inner, _: ran.add(inner)) for inner in module.modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, inner in module.named_modules(remove_duplicate=False) if inner in ran}


class _Output:
    """What a block gave, and the forward of blocks that are alike: it gives that again, as new hidden states."""

    kept: Any = None

    def keep(self, _: nn.Module, __: Any, output: Any) -> None:
        self.kept = output

    def __call__(self, *_: Any, **__: Any) -> Any:
        if isinstance(self.kept, tuple):
            return (torch.empty_like(self.kept[0]), *self.kept[1:])
        return torch.empty_like(self.kept)


@contextmanager
def _fake_values(model: nn.Module) -> Iterator[Tensor]:
    """Run a model on the meta device on fake tensors; yields a window [1, tokens] to run it on."""
    window = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    with fake_tensors(), torch.no_grad(), _identity_experts(model):
        yield window


@contextmanager
def _identity_experts(model: nn.Module) -> Iterator[None]:
    """Let experts give back their input, since how many tokens each gets depends on values; and silence logging, since
    torch logs why an operation has no shape."""
    names = {*unsplittable_mixtures(model), *(name for name, m in model.named_modules() if isinstance(m, Experts))}
    mixtures = [model.get_submodule(name) for name in names]
    disabled = logging.root.manager.disable
    logging.disable()
    try:
        for mixture in mixtures:
            mixture.forward = lambda hidden, *_, **__: hidden
        yield
    finally:
        logging.disable(disabled)
        for mixture in mixtures:
            vars(mixture).pop("forward", None)
