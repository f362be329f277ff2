"""Mixtures of every form, taken apart: the same function and gradients as the stock module, and the same tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AriaTextConfig,
    GptOssConfig,
    JetMoeConfig,
    Llama4TextConfig,
    LongcatFlashConfig,
    MixtralConfig,
    NemotronHConfig,
)
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.configuration_openai_privacy_filter import OpenAIPrivacyFilterConfig
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterExperts
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from sqft.modeling.architecture.experts import Experts, SortedExperts, as_experts, route_all_tokens
from sqft.modeling.architecture.linears import as_linears, as_stored, from_stored, unsplittable_mixtures

EXPERTS, WIDTH, INNER, TOKENS = 5, 16, 12, 30

SIZES = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 4}
ROUTED: dict[str, tuple[Any, Any]] = {
    "plain": (MixtralExperts, MixtralConfig(**SIZES, num_local_experts=EXPERTS)),
    "its own activation": (MiniMaxM3VLExperts, MiniMaxM3VLTextConfig(**SIZES, num_local_experts=EXPERTS)),
    "no traits": (
        Step3p7Experts,
        Step3p7TextConfig(hidden_size=WIDTH, moe_intermediate_size=INNER, n_routed_experts=EXPERTS),
    ),
    "no gate": (
        NemotronHExperts,
        NemotronHConfig(hidden_size=WIDTH, moe_intermediate_size=INNER, n_routed_experts=EXPERTS),
    ),
    "transposed": (AriaExperts, AriaTextConfig(**SIZES, moe_num_experts=EXPERTS)),
    "transposed, biases": (OpenAIPrivacyFilterExperts, OpenAIPrivacyFilterConfig(**SIZES, num_local_experts=EXPERTS)),
    "transposed, biases, alternating": (GptOssExperts, GptOssConfig(**SIZES, num_local_experts=EXPERTS)),
    "a norm after": (
        MuseSparkExperts,
        MuseSparkTextConfig(moe_hidden_size=WIDTH, moe_intermediate_size=INNER, num_local_experts=EXPERTS),
    ),
}


class Block(nn.Module):
    """A module that holds a mixture."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.experts = mixture


def filled(mixture: nn.Module) -> Block:
    torch.manual_seed(0)
    for parameter in mixture.parameters():
        nn.init.normal_(parameter)
    if hasattr(mixture, "config"):
        mixture.config._experts_implementation = "eager"  # the others know no float64
    return Block(mixture.double().eval())


def make(form: str) -> Block:
    kind, config = ROUTED[form]
    return filled(kind(config))


def routing() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, and two experts for each with their weights; nothing goes to the last expert."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    index = torch.rand(TOKENS, EXPERTS - 1, generator=generator).topk(2).indices
    return x.requires_grad_(), index, torch.rand(TOKENS, 2, generator=generator, dtype=torch.float64)


def weights(block: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in block.state_dict().items()}


@pytest.mark.parametrize("form", ROUTED)
def test_function_and_gradients_are_those_of_the_stock_module(form: str) -> None:
    block, (x, index, weight) = make(form), routing()
    expected = block.experts(x, index, weight)
    expected.square().sum().backward()
    gradient = {name: parameter.grad for name, parameter in block.named_parameters()}
    of_input, x.grad = x.grad, None
    single = 2e-4 if "biases" in form and "alternating" not in form else 0  # the stock module computes in float32
    close = {"rtol": single or 1e-10, "atol": 100 * single or 1e-10}

    as_linears(block)
    for parameter in block.parameters():
        parameter.requires_grad_()
    found = block.experts(x, index, weight)
    torch.testing.assert_close(found, expected, **close)
    with torch.no_grad(), route_all_tokens(block):
        torch.testing.assert_close(block.experts(x, index, weight), expected, **close)
    found.square().sum().backward()
    torch.testing.assert_close(x.grad, of_input, **close)
    from_stored(block, gradient)  # the stock gradients, as those of the layers
    assert gradient.keys() == dict(block.named_parameters()).keys()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name  # zeros where no token comes
        torch.testing.assert_close(parameter.grad, gradient[name], **close)


@pytest.mark.parametrize("form", ROUTED)
def test_tensors_come_back_bit_for_bit(form: str) -> None:
    block = make(form)
    before = weights(block)
    as_linears(block)
    assert not unsplittable_mixtures(block)
    layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert len(layers) == EXPERTS * (2 if form == "no gate" else 3)
    assert all(layer.weight.is_contiguous() for layer in layers.values())
    assert {tuple(layer.weight.shape) for name, layer in layers.items() if "down" in name} == {(WIDTH, INNER)}
    stored = as_stored(block)
    assert stored.keys() == before.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())
    apart = weights(block)
    from_stored(block, stored)
    assert stored.keys() == apart.keys() and all(torch.equal(stored[name], apart[name]) for name in apart)


def test_experts_with_codes_stay_apart() -> None:
    block = as_linears(make("transposed, biases, alternating"))
    stored = as_stored(block, codes={"experts.3.up_proj"})
    assert stored.keys() == block.state_dict().keys()
    assert as_stored(block, codes={"q_proj"}).keys() == {
        f"experts.{name}" for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    }


def test_interleaved_outputs_are_split_by_turns() -> None:
    block = make("transposed, biases, alternating")
    fused, bias = block.experts.gate_up_proj.detach().clone(), block.experts.gate_up_proj_bias.detach().clone()
    as_linears(block)
    up = block.get_submodule("experts.2.up_proj")
    assert torch.equal(up.weight, fused[2, :, 1::2].T) and torch.equal(up.bias, bias[2, 1::2])


def llama4() -> Any:
    config = Llama4TextConfig(**SIZES, num_local_experts=EXPERTS, num_experts_per_tok=2)
    block = filled(Llama4TextMoe(config))
    with torch.no_grad():
        block.experts.router.weight[4] = 0  # lower than two of the others, for the tokens below
    return block


def test_a_mixture_whose_tokens_come_sorted() -> None:
    block, x = llama4(), torch.randn(1, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    before, expected = weights(block), block.experts(x)[0]
    expected.square().sum().backward()
    gradient, of_input = {name: parameter.grad for name, parameter in block.named_parameters()}, x.grad
    x.grad = None
    as_linears(block)
    assert isinstance(block.experts.experts, SortedExperts)
    for parameter in block.parameters():
        parameter.requires_grad_()
        parameter.grad = None
    found = block.experts(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.square().sum().backward()
    torch.testing.assert_close(x.grad, of_input, rtol=1e-12, atol=1e-12)
    from_stored(block, gradient)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, gradient[name], rtol=1e-12, atol=1e-12)
    stored = as_stored(block)
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())


def test_sorted_tokens_are_counted_where_they_are_routed() -> None:
    """Experts are called with zeros for all other tokens, which calibration must not count."""
    block, seen = as_linears(llama4()), dict[int, list[Tensor]]()
    for index in range(EXPERTS):
        layer = block.get_submodule(f"experts.experts.{index}.up_proj")
        layer.register_forward_pre_hook(lambda _, args, index=index: seen.setdefault(index, []).append(args[0]))
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        before = block.experts(x)[0]
        assert sum(len(states) for (states,) in seen.values()) == 2 * TOKENS
        routed = {index: states for index, (states,) in seen.items()}
        seen.clear()
        with route_all_tokens(block):
            torch.testing.assert_close(block.experts(x)[0], before, rtol=1e-12, atol=1e-12)
    for index in range(EXPERTS):
        assert seen[index][0].shape == (TOKENS, WIDTH) and seen[index][0].any(-1).all()
        own = routed.get(index, torch.zeros(0, WIDTH))
        assert all((seen[index][0] == row).all(-1).any() for row in own)


def test_what_cannot_be_taken_apart_is_named_and_stays() -> None:
    """LongCat's mixture has experts without weights; JetMoe's experts are called with sizes."""
    longcat = LongcatFlashExperts(
        LongcatFlashConfig(hidden_size=WIDTH, expert_ffn_hidden_size=INNER, n_routed_experts=EXPERTS, zero_expert_num=2)
    )
    jetmoe = JetMoeMoE(JetMoeConfig(hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=EXPERTS))
    block = as_linears(nn.ModuleDict({"longcat": longcat, "jetmoe": jetmoe}))
    assert unsplittable_mixtures(block) == {
        "longcat": (EXPERTS + 2) * 2 * INNER * WIDTH + EXPERTS * INNER * WIDTH,
        "jetmoe.input_linear": EXPERTS * 2 * INNER * WIDTH,
        "jetmoe.output_linear": EXPERTS * INNER * WIDTH,
    }
    assert not any(isinstance(module, Experts) for module in block.modules())


def test_a_mixture_that_says_nothing_of_its_activation_is_left_alone() -> None:
    class CustomExperts(nn.Module):
        """Experts of a model's own code: what it does between its matrices, only its forward knows."""

        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(EXPERTS, 2 * INNER, WIDTH))
            self.down_proj = nn.Parameter(torch.zeros(EXPERTS, WIDTH, INNER))
            self.act_fn = nn.SiLU()

        def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            raise NotImplementedError

    assert as_experts(CustomExperts()) is None


def test_traits_that_contradict_the_shapes_are_not_believed() -> None:
    mixture = make("transposed").experts
    mixture.is_transposed = False
    assert as_experts(mixture) is None and mixture.gate_up_proj.shape == (EXPERTS, WIDTH, 2 * INNER)


def test_llama4_experts_alone() -> None:
    mixture = as_experts(Llama4TextExperts(Llama4TextConfig(**SIZES, num_local_experts=EXPERTS)))
    assert mixture is not None and mixture.form.transposed and not mixture.form.interleaved
