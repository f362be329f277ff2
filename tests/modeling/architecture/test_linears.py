"""Conv1D and fused experts as linear layers: the same function, and the same checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, PreTrainedModel

from sqft.modeling.architecture.experts import Experts, route_all_tokens
from sqft.modeling.architecture.linears import Transposed, as_linears, as_stored


def gpt2() -> GPT2Config:
    return GPT2Config(vocab_size=99, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)


def mixtral() -> MixtralConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return MixtralConfig(vocab_size=99, num_hidden_layers=2, num_local_experts=5, num_experts_per_tok=2, **sizes)


def make(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


@pytest.mark.parametrize("config", [gpt2, mixtral])
def test_function_and_state_stay(config: Any) -> None:
    ids = torch.randint(2, 99, (2, 20))
    model = make(config())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = model(ids).logits
        after = as_linears(model)(ids).logits
        with route_all_tokens(model):
            force_all = model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(force_all, before, rtol=1e-5, atol=1e-6)
    stored = as_stored(model)
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())
    kinds = (Transposed, Experts)
    assert any(isinstance(module, kinds) for module in model.modules())


def test_no_weight_is_copied() -> None:
    model = make(mixtral())
    fused = model.model.layers[0].mlp.experts.gate_up_proj
    place = fused.untyped_storage().data_ptr()
    expert: Any = as_linears(model).get_submodule("model.layers.0.mlp.experts.3")
    assert expert.up_proj.weight.untyped_storage().data_ptr() == place
    assert torch.equal(expert.up_proj.weight, fused[3, 24:])


def test_everywhere_each_expert_sees_each_token() -> None:
    model, seen = as_linears(make(mixtral())), []
    layers = [module for name, module in model.named_modules() if name.endswith("up_proj")]
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with torch.no_grad():
        model(torch.randint(2, 99, (1, 20)))
        routed, seen = list(seen), []
        for layer in layers:
            layer._forward_pre_hooks.clear()
            layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        with route_all_tokens(model):
            model(torch.randint(2, 99, (1, 20)))
    assert sum(routed) == 2 * 2 * 20
    assert seen == [20] * 10
