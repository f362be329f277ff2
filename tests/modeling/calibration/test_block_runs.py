"""A block run by itself and a block run inside its model are given the same, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import multimodal_models
import pytest
import torch
from sqft_gptq import Gptq
from sqft_sparsegpt import SparseGpt
from sqft_wanda import Wanda
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    LlamaConfig,
    MixtralConfig,
)

from sqft.api import LinearStats, Statistic
from sqft.kernels.grids import dequantize
from sqft.kernels.masks import keep_mask
from sqft.modeling.architecture.blocks import decoder_blocks, linears
from sqft.modeling.architecture.linears import as_linears
from sqft.modeling.calibration.block_runs import in_model
from sqft.modeling.calibration.capture import Residence
from sqft.modeling.calibration.dry_run import how_to_walk
from sqft.modeling.calibration.walk import walk
from sqft.utils.progress import silent

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SCAN = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
CONFIGS = {
    "plain": LlamaConfig(**SIZES),
    "mixture": MixtralConfig(**SIZES, num_local_experts=24, num_experts_per_tok=2),
    "hybrid": BambaConfig(**SIZES, **SCAN, attn_layer_indices=[1]),
}
KEYS_AND_VALUES = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 99,
}
WINDOWS = torch.randint(2, 90, (3, 8), generator=torch.Generator().manual_seed(2))


def build(kind: str) -> Any:
    torch.manual_seed(0)
    return as_linears(AutoModelForCausalLM.from_config(CONFIGS[kind]).eval())


def wanda(weight: Tensor, stats: LinearStats) -> Tensor:
    return Wanda().prune(weight, stats, lambda scores: keep_mask(scores, 0.5, "row"))[0]


def sparsegpt(weight: Tensor, stats: LinearStats) -> Tensor:
    return SparseGpt().prune(weight, stats, lambda scores: keep_mask(scores, 0.5, "row"))[0]


def gptq(weight: Tensor, stats: LinearStats) -> Tensor:
    quantized = Gptq(group_size=32).quantize(weight, None, stats)
    return dequantize(quantized)


METHODS = {
    "wanda": (wanda, Statistic.INPUT_NORM),
    "sparsegpt": (sparsegpt, Statistic.HESSIAN),
    "gptq": (gptq, Statistic.HESSIAN),
}


def walked(
    model: Any, way: str, method: Callable[..., Tensor], needs: Statistic, sequential: bool
) -> dict[str, LinearStats]:
    """The statistics of every layer of a model that a method changes as it is walked."""
    found: dict[str, LinearStats] = {}

    def compress(name: str, linear: nn.Linear, stats: LinearStats) -> None:
        found[name] = stats
        linear.weight.data.copy_(method(linear.weight.detach().clone(), stats))

    walk(model, WINDOWS, set(linears(model)), frozenset({needs}), compress, "cpu", silent, sequential, way)
    return found


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_both_ways_give_the_same_statistics_and_the_same_weights(kind: str, method: str, sequential: bool) -> None:
    models = {way: build(kind) for way in ("blocks", "model")}
    stats = {way: walked(model, way, *METHODS[method], sequential) for way, model in models.items()}
    assert list(stats["blocks"]) == list(stats["model"]) and len(stats["model"]) == len(linears(models["model"]))
    for name, one in stats["blocks"].items():
        other = stats["model"][name]
        assert (one.tokens, one.unreached) == (other.tokens, other.unreached)
        for field in ("input_sq_sum", "hessian"):
            a, b = getattr(one, field), getattr(other, field)
            assert a is b is None or torch.equal(a, b), name
        weight = models["blocks"].get_submodule(name).weight
        assert torch.equal(weight, models["model"].get_submodule(name).weight), name
    assert any(one.unreached for one in stats["model"].values()) == (kind == "mixture")


class Odd(nn.Module):
    """Runs its blocks in an order of its own, one of them twice and one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(99, 4), nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x: Tensor = self.embed(input_ids)
        for index in (2, 0, 2, 1):
            x = self.layers[index](x)
        return x


def test_blocks_are_run_in_the_order_and_as_often_as_the_model_does() -> None:
    torch.manual_seed(0)
    model: Any = Odd()
    ran: list[int] = []
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    names, after = [], []
    for name, run in in_model(model, decoder_blocks(model), WINDOWS, "cpu", Residence()):
        ran.clear()
        run(1)
        names.append(name)
        after.append([*ran])
    assert names == ["layers.2", "layers.0", "layers.1", "layers.3"]
    assert after == [[2, 0, 2], [2, 0], [2, 0, 2, 1], [2, 0, 2, 1]]  # no further than to the block of interest
    assert not any(len(layer._forward_hooks) > 1 or layer._forward_pre_hooks for layer in model.layers)


def sharing() -> Gemma4ForCausalLM:
    config = Gemma4TextConfig(**SIZES | KEYS_AND_VALUES, head_dim=8, global_head_dim=8, sliding_window=4)
    return Gemma4ForCausalLM(config)


def sharing_with_towers() -> Gemma4ForConditionalGeneration:
    return Gemma4ForConditionalGeneration(multimodal_models.gemma4(4, **KEYS_AND_VALUES))


@pytest.mark.parametrize("make", [sharing, sharing_with_towers])
def test_each_layer_sees_the_compressed_ones_before_it_where_blocks_share_keys_and_values(make: Any) -> None:
    """What a plain forward of the finished model shows, of the second half of the blocks too, which has none of its
    own."""
    torch.manual_seed(0)
    model: Any = make().eval()
    with torch.device("meta"):
        found = how_to_walk(make())
    assert found.way == "model" and not found.unseen
    stats = walked(model, found.way, lambda weight, _: weight * 0.5, Statistic.HESSIAN, sequential=True)
    assert list(stats) == list(linears(model)) and not any(".layers.3.self_attn.k_proj" in name for name in stats)
    inputs: dict[str, list[Tensor]] = {name: [] for name in stats}
    for name, found in inputs.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, found=found: found.append(args[0][0]))
    with torch.no_grad():
        for window in WINDOWS:
            model(window[None])
    for name, found in inputs.items():
        x = torch.cat(found)
        torch.testing.assert_close(stats[name].hessian, x.T @ x, rtol=1e-4, atol=1e-5)


def test_the_run_stops_with_the_blocks_values(model: Any) -> None:
    blocks = decoder_blocks(model)
    hidden = model(WINDOWS[1:2], output_hidden_states=True).hidden_states
    found = [run(1) for _, run in in_model(model, blocks, WINDOWS, "cpu", Residence())]
    assert found[0] is not None and torch.equal(found[0], hidden[1])
    assert len(found) == 2
