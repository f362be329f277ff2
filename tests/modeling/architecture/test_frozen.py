"""A frozen model trains nothing, and its head multiplies the rows of a batch at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from sqft.modeling.architecture.frozen import freeze


class Products(TorchDispatchMode):
    """Remembers the products of a batch that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.batched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.batched += func is torch.ops.aten.bmm.default
        return func(*args, **(kwargs or {}))


def batched_products(head: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), Products() as products:
        head(x)
    return products.batched


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).eval()


LAST: dict[str, Callable[[Tensor], Tensor]] = {
    "of a batch": lambda states: states[:, -1:],
    "of one row": lambda states: states[:1, -1:],
    "several": lambda states: states[:, 2:5],
}


@pytest.mark.parametrize("last", LAST.values(), ids=LAST)
def test_the_head_multiplies_all_rows_at_once(last: Callable[[Tensor], Tensor]) -> None:
    states, frozen = torch.randn(3, 7, 16), freeze(model())
    plain = model().requires_grad_(False).lm_head
    # If torch does so by itself now, then `row_after_row` is no longer needed.
    assert batched_products(plain, last(states)) == 1
    assert batched_products(frozen.lm_head, last(states)) == 0
    torch.testing.assert_close(frozen.lm_head(last(states)), plain(last(states)))
    torch.testing.assert_close(frozen.lm_head(input=last(states)), plain(last(states)))


def test_nothing_trains_and_the_logits_are_the_same() -> None:
    ids, expected = torch.arange(14).reshape(2, 7), model()
    frozen = freeze(freeze(model()))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert len(frozen.lm_head._forward_pre_hooks) == 1
    with torch.no_grad():
        torch.testing.assert_close(frozen(ids, logits_to_keep=1).logits, expected(ids).logits[:, -1:])


def test_a_model_without_a_head_is_frozen_too() -> None:
    body = model().model
    assert not any(parameter.requires_grad for parameter in freeze(body).parameters())
