"""Sums of what layers are given: those of complete runs with a sum for each layer, bit for bit, in less work."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from sqft.errors import StageError
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.calibration import observe as module
from sqft.modeling.calibration import walk as calibrate
from sqft.modeling.calibration.block_runs import BlockRun
from sqft.modeling.calibration.observe import observe
from sqft.types import Statistic
from tests.modeling.calibration.test_walk import halved, mixture, others

BOTH = frozenset({Statistic.INPUT_NORM, Statistic.HESSIAN})


def plainly(run: BlockRun, layers: dict[str, nn.Linear], needs: Any, steady: bool = False) -> Any:
    """The slow obvious version: complete runs, a sum for each layer."""
    sums = {name: module.InputStatistics(needs) for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: sums[name].add(args[0]))
        for name, layer in layers.items()
    ]
    for index in range(run.windows):
        run(index)
    for handle in handles:
        handle.remove()
    return sums


def build(kind: str) -> Any:
    opt, gpt2 = others()
    return {"mixture": mixture(4), "OPT": opt.eval(), "GPT-2": gpt2.eval()}[kind]


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("kind", ["mixture", "OPT", "GPT-2"])
def test_the_sums_of_complete_runs(kind: str, sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = torch.randint(2, 90, (3, 16))
    found = halved(build(kind), windows, sequential)
    monkeypatch.setattr(calibrate, "observe", plainly)
    expected = halved(build(kind), windows, sequential)
    assert list(found) == list(expected)
    for name, stats in found.items():
        assert stats.tokens == expected[name].tokens
        assert torch.equal(stats.hessian, expected[name].hessian)
        assert torch.equal(stats.input_sq_sum, expected[name].input_sq_sum)


def test_queries_keys_and_values_share_a_sum_and_no_block_runs_further_than_it_must(model: LlamaForCausalLM) -> None:
    """Of 3 windows: each set of layers completely on the first, then up to its last layer; once for what comes out."""
    windows = torch.randint(2, 200, (3, 16))
    times = dict.fromkeys(linears(model), 0)
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: times.update({name: times[name] + 1}))
        for name, layer in linears(model).items()
    ]
    stats = halved(model, windows, sequential=True)
    for hook in hooks:
        hook.remove()
    block = "model.layers.1."
    q, k, v = (stats[f"{block}self_attn.{name}_proj"] for name in "qkv")
    assert q.hessian is k.hessian is v.hessian and q.hessian is not stats[f"{block}mlp.up_proj"].hessian
    whole = 1 + 3 + 4  # to find the sets; for what comes out; the first window of each of four sets
    # To learn how the blocks are called, the model runs once.
    assert times[f"{block}mlp.down_proj"] == 1 + whole
    assert times[f"{block}self_attn.v_proj"] == 1 + whole + 2 * 3  # its own set ends before it runs
    assert times[f"{block}mlp.gate_proj"] == 1 + whole + 2 * 2


class Twins(nn.Module):
    """Two layers that are given one tensor, unless `apart` says otherwise for a window."""

    def __init__(self, apart: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.apart, self.window = nn.Linear(4, 4), nn.Linear(4, 4), apart, 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.one(x)
        other = self.apart(x) if self.window else x
        return y + self.two(other)


@pytest.mark.parametrize(
    "apart",
    [lambda x: x * 2, lambda x: x.mul_(2), lambda x: x.clone()],
    ids=["another tensor", "changed in place", "a copy"],
)
def test_layers_that_part_later_have_sums_of_their_own(apart: Callable[[Tensor], Tensor]) -> None:
    inputs = torch.randn(3, 5, 4)

    def sums(how: Callable[..., Any]) -> dict[str, Any]:
        block = Twins(apart)
        run = BlockRun(block, 3, lambda index: _one(block, inputs, index))
        return how(run, {"one": block.one, "two": block.two}, BOTH)

    found, expected = sums(observe), sums(plainly)
    for name in ("one", "two"):
        assert torch.equal(found[name].hessian, expected[name].hessian) and found[name].tokens == 15
    assert not torch.equal(found["one"].hessian, found["two"].hessian) or apart(torch.ones(1)) == 1


def _one(block: Twins, inputs: Tensor, index: int) -> Tensor:
    """The first window is the one where both are given the same."""
    block.window = index
    result: Tensor = block(inputs[index].clone())
    return result


def test_layers_that_are_called_less_often_have_sums_of_their_own() -> None:
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    inputs = torch.randn(3, 5, 4)

    def run(index: int) -> Tensor:
        x = inputs[index]
        y: Tensor = one(x)
        return y + two(x) if index == 0 else y

    found = observe(BlockRun(nn.ModuleList([one, two]), 3, run), {"one": one, "two": two}, BOTH)
    assert found["one"].tokens == 15 and found["two"].tokens == 5
    assert torch.equal(found["two"].hessian, inputs[0].T @ inputs[0])


def test_what_is_not_finite_is_found_where_a_run_ends_early(model: LlamaForCausalLM) -> None:
    """In the last window alone, which is not run to its end."""
    windows = torch.randint(2, 200, (3, 16))
    windows[:2][windows[:2] == 7] = 8
    windows[2, 3] = 7
    model.model.embed_tokens.weight.data[7] = torch.nan
    with pytest.raises(StageError, match="activations that are not finite"):
        halved(model, windows, sequential=True)


def test_inputs_are_not_kept() -> None:
    """Of many layers that are each given a tensor of their own, one after the other, one tensor is alive at a time."""
    layers = {str(index): nn.Linear(4, 4) for index in range(9)}
    alive: list[int] = []
    references: list[weakref.ref[Tensor]] = []

    def run(index: int) -> Tensor:
        for layer in layers.values():
            x = torch.randn(5, 4)
            references.append(weakref.ref(x))
            layer(x)
            alive.append(sum(one() is not None for one in references))
        return torch.zeros(1)

    observe(BlockRun(nn.ModuleList(layers.values()), 3, run), layers, BOTH)
    assert max(alive) == 1
