"""Models that cannot be walked are told from others without a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from transformers import AutoModelForCausalLM, LlamaConfig

from sqft.errors import ModelError
from sqft.modeling.calibration.dry_run import how_to_walk
from sqft.modeling.calibration.walk import walk
from sqft.types import Statistic
from sqft.utils.progress import silent


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.one(x) + (0 if before is None else before)
        return y @ self.other.weight.T, y


class Model(nn.Module):
    """Two blocks of which a function makes the next block's arguments."""

    def __init__(self, between: Callable[..., tuple[Any, ...]], times: int = 1) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(9, 4), nn.ModuleList([Block() for _ in range(3)])
        self.between, self.times = between, times

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        given: tuple[Any, ...] = (self.embed(input_ids),)
        for block in [*self.layers] * self.times:
            x, more = block(*given)
            given = self.between(x, more)
        return given[0]


def only_hidden(x: Tensor, _: Tensor) -> tuple[Any, ...]:
    return (x,)


@pytest.mark.parametrize(
    ("between", "times", "words"),
    [
        (lambda x, _: (x * 2,), 1, "do not pass their output on"),
        (lambda x, more: (x, more), 1, "pass on more than their hidden states"),
        (only_hidden, 2, "runs its 3 blocks 6 times"),
    ],
)
def test_blocks_that_cannot_be_walked_one_by_one(between: Any, times: int, words: str) -> None:
    """The dry run says why, calibration would say the same, and the model is walked as a whole."""
    with torch.device("meta"):
        found = how_to_walk(Model(between, times))  # type: ignore[arg-type]
    assert found.way == "model" and words in found.reason
    assert found.unseen == ("layers.0.other", "layers.1.other", "layers.2.other")
    model: Any = Model(between, times)
    windows, seen = torch.arange(8)[None], list[str]()
    with pytest.raises(ModelError, match=words):
        walk(model, windows, set(), frozenset(), lambda *_: None, "cpu", silent)
    ones = {f"layers.{index}.one" for index in range(3)}
    norm = frozenset({Statistic.INPUT_NORM})
    walk(model, windows, ones, norm, lambda name, *_: seen.append(name), "cpu", silent, way=found.way)
    assert seen == sorted(ones)


def test_a_layer_whose_weight_is_read_is_unseen() -> None:
    with torch.device("meta"):
        model: Any = Model(only_hidden)
    found = how_to_walk(model)
    assert found.way == "blocks" and found.unseen == tuple(f"layers.{index}.other" for index in range(3))


def test_what_hangs_on_numbers_is_run_as_a_whole() -> None:
    with torch.device("meta"):
        model: Any = Model(lambda x, _: (x[x > 0][None, :4],))
    found = how_to_walk(model)
    assert found.way == "model" and "without numbers: " in found.reason and not found.unseen


def test_a_model_is_left_as_it_was() -> None:
    with torch.device("meta"):
        model: Any = Model(only_hidden)
    for _ in range(2):
        assert how_to_walk(model).way == "blocks"
    for module in model.modules():
        assert "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


def test_blocks_that_give_more_than_hidden_states_are_walked() -> None:
    torch.manual_seed(0)
    model: Any = Model(only_hidden)
    windows, seen = torch.arange(9)[None], {}
    chosen = {f"layers.{index}.one" for index in range(3)}
    stats = frozenset({Statistic.INPUT_NORM})
    walk(model, windows, chosen, stats, lambda n, _, s: seen.update({n: s.input_sq_sum}), "cpu", silent)
    found: list[Tensor] = []
    model.layers[2].one.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(windows, use_cache=False)
    torch.testing.assert_close(seen["layers.2.one"], found[0].reshape(-1, 4).square().sum(0))


def test_the_depth_of_a_model_costs_nothing() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=9, num_hidden_layers=20, **sizes)).eval()
    ran: list[bool] = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda _, __, output: ran.append(is_fake(output)))
    how_to_walk(model)
    assert ran == [True] * 3
