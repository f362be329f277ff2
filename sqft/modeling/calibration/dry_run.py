"""A dry run of calibration on fake tensors, which have shapes and no values: it fails before weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sqft.errors import ModelError, StageError
from sqft.modeling.architecture.blocks import decoder_blocks
from sqft.modeling.architecture.linears import Expert, Experts, unsplittable_mixtures
from sqft.modeling.calibration.capture import capture, forward, run_block
from sqft.modeling.compat import fake_tensors

TOKENS = 8
"""Length of the window that is run."""

SHOWN = 5
"""Layers that a message names."""


def check_walk(model: PreTrainedModel, chosen: Mapping[str, str]) -> None:
    """Check that calibration would see every chosen layer of a model on the meta device.

    `chosen` maps names of layers to the path in the recipe that chooses them. A model that runs only with values (an
    operation's shape depends on them) passes, as nothing can be known about it. The model must not be used afterwards:
    hooks stay registered.

    Raises:
        ModelError: saying why the blocks cannot be walked.
        StageError: naming layers that the walk would not see.
    """
    with _fake_values(model) as windows:
        try:
            seen = _seen(model, windows)
        except ModelError:
            raise
        except Exception as error:
            try:
                forward(model, windows)
            except Exception:  # an operation whose result's shape depends on values: the model as such cannot be run
                return
            reason = str(error).partition("\n")[0]
            raise ModelError(f"{type(model).__name__}'s blocks cannot be run one by one: {reason}") from error
    experts = {name for name, module in model.named_modules() if isinstance(module, Expert)}
    unseen = [name for name in chosen if name not in seen and name.rpartition(".")[0] not in experts]
    if unseen:
        head = (
            "calibration measures what a layer is given; these are not called, as their blocks read the weight itself:"
        )
        more = [f"… and {len(unseen) - SHOWN} more"] if len(unseen) > SHOWN else []
        named = [f"{chosen[name]}: {name}; exclude it" for name in unseen[:SHOWN]]
        raise StageError("\n  ".join([head, *named, *more]))


def uncalled(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Return those of a meta model's layers that its forward does not call: it reads their weight, or skips them.

    For a model that runs only with values, return none, as nothing can be known about it.
    """
    ran = set[str]()
    hooks = [model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.add(name)) for name in names]
    try:
        with _fake_values(model) as windows:
            forward(model, windows)
    except Exception:  # an operation whose result's shape depends on values
        return []
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in names if name not in ran]


def _seen(model: PreTrainedModel, windows: Tensor) -> set[str]:
    """Return the names of the layers that run when each block is replayed by itself.

    Blocks of one class with the same parameters are alike: two of them run, one is replayed, and the answer holds for
    all.
    """
    blocks = decoder_blocks(model)
    # 1. Group blocks that are alike; from the third on, a block gives back what the first gave.
    kinds: dict[Any, list[str]] = {}
    for name, block in blocks.items():
        shapes = tuple((inner, tuple(parameter.shape)) for inner, parameter in block.named_parameters())
        kinds.setdefault((type(block), shapes), []).append(name)
    for first, _, *others in (names for names in kinds.values() if len(names) > 2):
        for name in others:
            blocks[name].forward = _ReplayedBlock(blocks[first])
    # 2. Replay the first block of each kind, and note what runs in it.
    calls, (state,), slot = capture(model, blocks, windows)
    seen: set[str] = set()
    for names in kinds.values():
        block, ran = blocks[names[0]], set[nn.Module]()
        for module in block.modules():
            module.register_forward_pre_hook(lambda module, _, ran=ran: ran.add(module))
        run_block(block, calls[names[0]][0], slot, state, "meta")
        inside = [inner for inner, module in block.named_modules() if module in ran]
        seen |= {f"{name}.{inner}" for name in names for inner in inside}
    return seen


class _ReplayedBlock:
    """A block's forward that gives back the output of another block that is alike, as new hidden states."""

    def __init__(self, block: nn.Module) -> None:
        self.output: Any = None
        block.register_forward_hook(lambda _, __, output: setattr(self, "output", output))

    def __call__(self, *_: Any, **__: Any) -> Any:
        if isinstance(self.output, tuple):
            return (torch.empty_like(self.output[0]), *self.output[1:])
        return torch.empty_like(self.output)


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
