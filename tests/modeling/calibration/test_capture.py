"""What is captured of a block's calls is enough to run it by itself."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from sqft.errors import ModelError
from sqft.modeling.architecture.blocks import decoder_blocks
from sqft.modeling.calibration.capture import capture, forward, run_block, tensors_in


class Block(nn.Module):
    """Takes its hidden states by keyword, beside a nested argument that differs from window to window."""

    def forward(self, more: Any, *, states: Tensor) -> Any:
        return (states + more["shift"][0], "besides")


class Model(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block() for _ in range(blocks))

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        states = input_ids[..., None].float()
        for block in self.h:
            states, _ = block({"shift": [input_ids.float().mean()]}, states=states)
        return states


WINDOWS = torch.tensor([[1, 2, 3], [7, 8, 9]])


def test_blocks_replayed_by_themselves_are_the_model() -> None:
    model: Any = Model()
    named = decoder_blocks(model)
    calls, hidden, slot = capture(model, named, WINDOWS)
    assert slot == "states" and [len(found) for found in calls.values()] == [2] * 3
    for index, state in enumerate(hidden):
        for name, block in named.items():
            call = calls[name][index]
            assert call[1]["states"] is None  # the hidden states are kept once, not with every block
            state = run_block(block, call, slot, state, "cpu")
        assert state.equal(model(WINDOWS[index][None]))


def test_a_model_is_left_as_it_was(model: LlamaForCausalLM) -> None:
    before = model(WINDOWS).logits
    calls, hidden, slot = capture(model, decoder_blocks(model), WINDOWS)
    assert slot == 0 and [state.shape for state in hidden] == [(1, 3, 32)] * 2
    assert not any("forward" in vars(block) or block._forward_hooks for block in decoder_blocks(model).values())
    assert model(WINDOWS).logits.equal(before)
    assert all(args[0] is None for args, _ in calls["model.layers.1"])


@pytest.mark.parametrize("runs", [0, 1, 2])
def test_a_model_is_left_as_it_was_when_it_fails(runs: int) -> None:
    """While one window is run for real, and while all are recorded."""
    model: Any = Model()
    run, left = model.forward, [None] * runs

    def fails(**given: Any) -> Any:
        left.pop()  # IndexError once none is left
        return run(**given)

    model.forward = fails
    with pytest.raises(IndexError):
        capture(model, decoder_blocks(model), WINDOWS)
    assert not any("forward" in vars(block) or block._forward_hooks for block in model.h)


def test_a_model_that_runs_a_block_twice() -> None:
    model: Any = Model()
    model.forward = lambda input_ids, **_: [b({"shift": [0]}, states=input_ids) for b in [*model.h, model.h[0]]]
    with pytest.raises(ModelError, match="Model runs its 3 blocks 4 times, so calibration cannot run them one by one"):
        capture(model, decoder_blocks(model), WINDOWS)


def test_tensors_wherever_they_are_nested() -> None:
    one, two, three = torch.ones(3, 1).unbind()
    found = tensors_in({"a": [one, (two, None)], "b": {"c": three}, "d": 4})
    assert [id(tensor) for tensor in found] == [id(one), id(two), id(three)]


def test_forward_runs_the_model_without_its_head(model: LlamaForCausalLM) -> None:
    ran: list[str] = []
    model.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    model.model.register_forward_hook(lambda *_: ran.append("body"))
    forward(model, WINDOWS[:1])
    assert ran == ["body"]


def test_blocks_that_leave_something_in_their_arguments() -> None:
    """As blocks do that share keys and values: replayed one by one, a block would see what another window left."""

    class Leaving(Model):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            states, shared = input_ids[..., None].float(), UserDict(shift=[input_ids.float().mean()])
            for block in self.h:
                states, _ = block(shared, states=states)
            return states

    model: Any = Leaving()
    assert capture(model, decoder_blocks(model), WINDOWS)[2] == "states"  # given to all, changed by none
    run = model.h[1].forward

    def leave(shared: Any, *, states: Tensor) -> Any:
        shared["later"] = states + 1
        return run(shared, states=states)

    model.h[1].forward = leave
    with pytest.raises(ModelError, match="blocks leave tensors for later ones in what they are given"):
        capture(model, decoder_blocks(model), WINDOWS)
