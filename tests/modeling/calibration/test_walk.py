"""The walk sees what a plain forward sees, and each block sees the compressed ones before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    OPTForCausalLM,
)

from sqft import Orchestrator, Recipe, Registry
from sqft.data.windows import calibration_windows
from sqft.kernels.masks import unpack_mask
from sqft.modeling.architecture.blocks import decoder_blocks, linears
from sqft.modeling.architecture.linears import as_linears
from sqft.modeling.calibration import block_runs
from sqft.modeling.calibration import walk as calibrate
from sqft.modeling.calibration.walk import walk
from sqft.types import Statistic
from sqft.utils.progress import silent

BOTH = frozenset({Statistic.INPUT_NORM, Statistic.HESSIAN})


def inputs_of(model: nn.Module, name: str, windows: Tensor) -> Tensor:
    """Every input of one layer in plain forwards, float64 [tokens, in]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()


def halved(model: LlamaForCausalLM, windows: Tensor, sequential: bool) -> dict[str, Any]:
    """The statistics of a walk that halves every layer's weight, by name, in the walk's order."""
    stats: dict[str, Any] = {}

    def compress(name: str, linear: nn.Linear, found: Any) -> None:
        stats[name] = found
        linear.weight.data.mul_(0.5)

    walk(model, windows, set(linears(model)), BOTH, compress, "cpu", silent, sequential)
    return stats


def test_statistics_are_those_of_the_compressed_prefix(model: LlamaForCausalLM) -> None:
    windows = torch.randint(2, 200, (3, 16))
    stats = halved(model, windows, sequential=False)
    assert list(stats) == list(linears(model))
    last = "model.layers.1.self_attn.q_proj"  # the first layer of block 1 sees all of block 0 compressed
    x = inputs_of(model, last, windows)
    assert stats[last].tokens == len(x) == 48
    torch.testing.assert_close(stats[last].input_sq_sum.double(), x.square().sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats[last].hessian.double(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_one_after_the_other_each_layer_sees_what_all_before_it_became(model: LlamaForCausalLM) -> None:
    """What a plain forward of the finished model shows at every layer: inputs depend on earlier layers alone."""
    windows = torch.randint(2, 200, (3, 16))
    stats = halved(model, windows, sequential=True)
    assert list(stats)[:4] == [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    for name in linears(model):
        x = inputs_of(model, name, windows)
        torch.testing.assert_close(stats[name].hessian.double(), x.T @ x, rtol=1e-4, atol=1e-5)


def mixture(experts: int) -> Any:
    """Blocks of 4 attention layers and that many experts, of which each token takes 2."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(
        vocab_size=99, num_hidden_layers=2, num_local_experts=experts, num_experts_per_tok=2, **sizes
    )
    return as_linears(AutoModelForCausalLM.from_config(config).eval())


def test_a_mixture_is_run_as_often_whatever_the_number_of_its_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values; output; gate and up; down; and once to see their sets, once for what comes out."""
    run, windows = block_runs.run_block, torch.randint(2, 90, (3, 64))
    runs: list[nn.Module] = []
    monkeypatch.setattr(block_runs, "run_block", lambda block, *given: runs.append(block) or run(block, *given))
    for experts in (3, 8):
        runs.clear()
        halved(mixture(experts), windows, sequential=True)
        assert len(runs) == 2 * (1 + 4 * 3 + 3)


def test_experts_together_see_what_each_would_see_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; and what a plain forward of the finished model shows."""
    windows, model = torch.randint(2, 90, (3, 64)), mixture(4)
    stats = halved(model, windows, sequential=True)
    monkeypatch.setattr(calibrate, "HESSIAN_BYTES", 1)
    alone = halved(mixture(4), windows, sequential=True)
    assert stats.keys() == alone.keys() == set(linears(model))
    for name, found in stats.items():
        assert torch.equal(found.hessian, alone[name].hessian) and found.tokens == alone[name].tokens
        x = inputs_of(model, name, windows)
        torch.testing.assert_close(found.hessian.double(), x.T @ x, rtol=1e-4, atol=1e-5)


def test_an_expert_that_the_first_window_does_not_reach() -> None:
    """Its down projection too sees what became of its gate."""
    model = mixture(16)
    windows = torch.cat([torch.full((1, 8), 5), torch.randint(2, 90, (7, 8))])  # one token: 2 experts of 16
    stats = halved(model, windows, sequential=True)
    for name in linears(model):
        if not stats[name].unreached:
            x = inputs_of(model, name, windows)
            torch.testing.assert_close(stats[name].hessian.double(), x.T @ x, rtol=1e-4, atol=1e-5)
    assert not all(found.unreached for name, found in stats.items() if "experts" in name)


def others() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16}
    yield OPTForCausalLM(OPTConfig(vocab_size=99, num_hidden_layers=2, num_attention_heads=2, **sizes))
    yield GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1))


@pytest.mark.parametrize("other", others(), ids=lambda m: type(m).__name__)
def test_replaying_other_architectures_changes_nothing(other: Any) -> None:
    other.eval()
    windows = torch.randint(2, 90, (2, 8))
    before = other(windows).logits
    seen: list[str] = []
    walk(other, windows, set(linears(other)), BOTH, lambda name, *_: seen.append(name), "cpu", silent)
    assert torch.equal(other(windows).logits, before)
    assert len(decoder_blocks(other)) == 2 and seen == list(linears(other))


def test_wandas_masks_equal_brute_force(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    """Block 0 in float64, one row at a time, from plain forwards of the dense model."""
    orchestrator = Orchestrator(registry, tmp_path)
    run = orchestrator.run(orchestrator.plan(Recipe.parse(raw)), until="sparsify")
    check_wanda(run["sparsify"].folder, Path(raw["model"]["path"]), run)


def check_wanda(folder: Path, source: Path, run: Any, kinds: tuple[str, ...] = ()) -> None:
    """Check the masks of block 0's layers: of all, or of those whose names end so."""
    from sqft.checkpoints.model_spec import ModelSpec
    from sqft.modeling.loading import load_model
    from sqft.stages.inputs import StepData

    plan, step = run.plan, run["sparsify"].step
    model, tokenizer = load_model(ModelSpec(plan.source.path, "float32"))
    model.model.layers = model.model.layers[:1]
    seed = StepData(plan, step).seed_for("calibration")
    calibration = plan.recipe.calibration
    windows = calibration_windows(step.files["calibration"], tokenizer, calibration.samples, calibration.length, seed)
    packed, checked = load_file(folder / "masks.safetensors"), 0
    # q, k and v of block 0 see inputs that no pruning has touched yet; so do all of block 0's layers, where a
    # block's statistics are taken before any of its layers is pruned.
    chosen = [n for n in linears(model) if n.startswith("model.layers.0.") and (not kinds or n.endswith(kinds))]
    for name in chosen:
        weight = model.get_submodule(name).weight.detach()
        norm = inputs_of(model, name, windows).square().sum(0).sqrt()
        mask = unpack_mask(packed[name], (weight.shape[0], weight.shape[1]))
        pruned, norms, rows = round(0.5 * weight.shape[1]), norm.tolist(), weight.double().tolist()
        for row, values in enumerate(rows):
            order = sorted(range(len(values)), key=lambda j: abs(values[j]) * norms[j])
            expected = torch.ones(weight.shape[1], dtype=torch.bool)
            expected[order[:pruned]] = False
            assert torch.equal(mask[row], expected), f"{name} row {row}"
        checked += 1
    assert checked == (len(kinds) or 7)
