"""Every family of causal language models: sparsify, tune, merge, and reload in stock transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from sqft import Orchestrator, Recipe, Registry, Run
from sqft.errors import ArtifactError, StageError
from sqft.modeling.loading.finished_model import FinishedModel
from sqft.modeling.loading.quantized import read_quantized
from sqft.utils.globs import selected

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXTURE = {"num_experts_per_tok": 2, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SIZES | {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "Mistral": SIZES | {"num_key_value_heads": 2, "sliding_window": 16},
    "Qwen2": SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen3": SIZES | {"num_key_value_heads": 2, "head_dim": 16},
    "Phi3": SIZES | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "Gemma2": SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    "Gemma3Text": SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    "OPT": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoX": SIZES,
    "Falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False},
    "Mixtral": SIZES | MIXTURE | {"num_local_experts": 4},
    "Qwen3Moe": SIZES | MIXTURE | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8},
    "Olmoe": SIZES | MIXTURE | {"num_experts": 4},
    "Qwen2Moe": SIZES
    | MIXTURE
    | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "GraniteMoe": SIZES | MIXTURE | {"num_local_experts": 4},
    "GptOss": SIZES | MIXTURE | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 16},
    "Llama4Text": SIZES
    | {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1}
    | {"intermediate_size_mlp": 64, "interleave_moe_layer_step": 2},
    "NemotronH": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    | {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "intermediate_size": 64, "n_routed_experts": 4}
    | {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "num_experts_per_tok": 2}
    | {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8},
    "RecurrentGemma": SIZES
    | {"num_hidden_layers": 2, "lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    "Lfm2": SIZES | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
}
MIXTURES = {"Mixtral", "Qwen3Moe", "Olmoe", "Qwen2Moe", "GraniteMoe", "GptOss", "Llama4Text", "NemotronH"}


SCAN = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
STATE = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
SHARED = "*.shared_transformer.*"
HYBRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "Mamba": (STATE, "dt_proj"),
    "Mamba2": (STATE | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}, ""),
    "Jamba": (
        SIZES
        | {"num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1, "num_key_value_heads": 2}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
        "dt_proj",
    ),
    "Bamba": (SIZES | SCAN | {"num_key_value_heads": 2, "attn_layer_indices": [1]}, ""),
    "Zamba2": (
        SIZES
        | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8}
        | {"mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1},
        SHARED,
    ),
    "xLSTM": ({"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "num_blocks": 2, "chunk_size": 8}, ""),
}
"""Families with blocks that are no attention, and the layers of each that cannot be pruned by calibration."""


def config_of(family: str, tokenizer: Any) -> PretrainedConfig:
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 1}
    kind = getattr(transformers, f"{family}Config")
    config: PretrainedConfig = kind(**common, pad_token_id=1, **(FAMILIES.get(family) or HYBRIDS[family][0]))
    return config


def save(config: PretrainedConfig, tokenizer: Any, folder: Path, **how: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, **how)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_of(folder: Path, data: Path, targets: list[str]) -> dict[str, Any]:
    return {
        "name": "family",
        "model": {"path": str(folder)},
        "calibration": {"data": str(data / "calibration.jsonl"), "samples": 4, "length": 32},
        "sparsify": {"scorer": "wanda"},
        "finetune": {
            "adapter": {"name": "nls", "options": {"ranks": [4, 2], "alpha": 16}},
            "merger": "sparsepeft",
            "targets": targets,
            "data": str(data / "train.jsonl"),
            "steps": 3,
            "batch_size": 4,
            "learning_rate": 0.05,
        },
        "merge": {},
    }


def run(raw: dict[str, Any], registry: Registry, store: Path, until: str | None = None) -> Run:
    orchestrator = Orchestrator(registry, store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)), until=until)


def weights(folder: Path) -> dict[str, Tensor]:
    """A folder in stock transformers: the weight [out, in] of each linear layer of its blocks, experts one by one."""
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(folder)
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(part.isdecimal() for part in name.split(".")):
            found[name] = module.weight.detach()
        elif isinstance(module, Conv1D):
            found[name] = module.weight.detach().T
        elif isinstance(getattr(module, "down_proj", None), torch.nn.Parameter):
            for index in range(len(module.down_proj)):
                found |= {f"{name}.{index}.{layer}": weight for layer, weight in expert(module, index).items()}
    routers = ("shared_expert_gate", "router")
    return {name: weight for name, weight in found.items() if not name.endswith(routers)}


def expert(mixture: Any, index: int) -> dict[str, Tensor]:
    """The weights [out, in] of one expert of a stock mixture."""
    down = mixture.down_proj[index].detach()
    if not hasattr(mixture, "gate_up_proj"):  # Nemotron-H
        return {"up_proj": mixture.up_proj[index].detach(), "down_proj": down}
    both = mixture.gate_up_proj[index].detach()
    if both.shape[1] == 2 * down.shape[0]:  # Llama 4 and gpt-oss: [in, out]
        both, down = both.T, down.T
    gate, up = (both[::2], both[1::2]) if "GptOss" in type(mixture).__name__ else both.chunk(2)
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(2, 40)[None]).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str, registry: Registry, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    folder = save(config_of(family, tokenizer), tokenizer, tmp_path / "model", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    finished = run(recipe_of(folder, data, ["*"]), registry, tmp_path / "store")
    dense, sparse = weights(folder), weights(finished["sparsify"].folder / "model")
    merged = weights(finished["merge"].folder / "model")
    adapter = load_file(finished["search"].folder / "adapter" / "adapter.safetensors")
    scales = json.loads((finished["search"].folder / "adapter" / "sqft_adapter.json").read_text())["scales"]
    assert dense.keys() == sparse.keys() == merged.keys() == scales.keys()
    for name, weight in sparse.items():
        kept = weight != 0
        assert ((~kept).sum(1) == weight.shape[1] // 2).all(), name  # half of every row
        torch.testing.assert_close(weight, dense[name] * kept, rtol=0, atol=0)
        low = scales[name] * (adapter[f"{name}.lora_B"] @ adapter[f"{name}.lora_A"])
        torch.testing.assert_close(merged[name], weight + low * kept, rtol=1e-5, atol=1e-6)
    # An expert that no example is routed to does not train.
    moved = {name for name in merged if not torch.equal(merged[name], sparse[name])}
    assert all(".experts." in name for name in merged.keys() - moved)
    assert family in MIXTURES or moved == merged.keys()
    assert finished["merge"].report["logits_difference"] < 1e-4
    assert not torch.equal(logits(finished["merge"].folder / "model"), logits(folder))


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid(family: str, registry: Registry, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    """What calibration cannot see is refused before a weight is read; without it all is as in other families."""
    folder = save(config_of(family, tokenizer), tokenizer, tmp_path / "model")
    model, exclude = AutoModelForCausalLM.from_pretrained(folder), HYBRIDS[family][1]
    with torch.no_grad():  # gates that start at zero would have no weight to keep
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    raw = recipe_of(folder, data, ["*"])
    if exclude:
        with pytest.raises(StageError, match=f"sparsify.include: .*{exclude.strip('*.')}"):
            run(raw, registry, tmp_path / "store")
        assert not list((tmp_path / "store").glob("artifacts/*"))
        raw["sparsify"]["exclude"] = [exclude]
        if exclude == SHARED:
            raw["finetune"]["targets"] = ["*.mamba.*", "*.linear"]
    finished = run(raw, registry, tmp_path / "store")
    dense, sparse = weights(folder), weights(finished["sparsify"].folder / "model")
    merged = weights(finished["merge"].folder / "model")
    adapter = load_file(finished["search"].folder / "adapter" / "adapter.safetensors")
    scales = json.loads((finished["search"].folder / "adapter" / "sqft_adapter.json").read_text())["scales"]
    assert dense.keys() == sparse.keys() == merged.keys()
    for name, weight in sparse.items():
        kept, left = weight != 0, exclude and selected(name, [exclude], [])
        assert left or ((~kept).sum(1) == weight.shape[1] // 2).all(), name
        assert torch.equal(weight, dense[name] * kept)
        assert (name in scales) != (left and exclude == SHARED), name
        low = 0
        if name in scales:
            low = scales[name] * (adapter[f"{name}.lora_B"] @ adapter[f"{name}.lora_A"]) * kept
            assert ".experts." in name or low.any(), name
        torch.testing.assert_close(merged[name], weight + low, rtol=1e-5, atol=1e-6)
    assert finished["merge"].report["logits_difference"] < 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["GPT2", "Mixtral"])
def test_in_half_precision(
    family: str, dtype: str, registry: Registry, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    folder = save(config_of(family, tokenizer), tokenizer, tmp_path / "model")
    raw = recipe_of(folder, data, ["*"])
    raw["model"]["dtype"] = dtype
    finished = run(raw, registry, tmp_path / "store")
    merged = AutoModelForCausalLM.from_pretrained(finished["merge"].folder / "model", dtype="auto")
    assert merged.dtype == getattr(torch, dtype)
    assert finished["merge"].report["sparsity"] >= finished["sparsify"].report["sparsity"] == pytest.approx(0.5)


def test_codes_under_conv1d(registry: Registry, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    """GPT-2 quantized but for one kind of layer, trained on its codes, merged, and its zeros kept."""
    folder = save(config_of("GPT2", tokenizer), tokenizer, tmp_path / "model")
    raw = recipe_of(folder, data, ["c_attn", "c_fc"])
    raw["quantize"] = {"quantizer": {"name": "gptq", "options": {"group_size": 32}}, "exclude": ["*.mlp.c_proj"]}
    raw["finetune"]["merger"] = "qa-sparsepeft"
    finished = run(raw, registry, tmp_path / "store")
    assert finished["merge"].report["codes_changed"] > 0
    merged, sparse = finished["merge"].load_model(), weights(finished["sparsify"].folder / "model")
    for name, weight in sparse.items():
        kept = merged.get_parameter(f"{name}.weight").detach()
        assert not kept[weight == 0].any()
        assert torch.equal(kept, weight) == name.endswith("mlp.c_proj")
    stored = load_file(finished["merge"].folder / "model" / "model.safetensors")
    assert stored["transformer.h.0.mlp.c_proj.weight"].shape == (128, 32)  # as Conv1D has it
    assert stored["transformer.h.0.mlp.c_fc.qweight"].shape == (4, 128)


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("Qwen3Moe", "model.layers.1.mlp.experts.3.gate_proj"),
        ("NemotronH", "backbone.layers.1.mixer.experts.3.up_proj"),  # and not "model.", as transformers has it
    ],
)
def test_codes_under_experts(
    family: str, layer: str, registry: Registry, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    """Under the names that the family's own checkpoints give each expert."""
    folder = save(config_of(family, tokenizer), tokenizer, tmp_path / "model")
    assert f"{layer}.weight" in load_file(folder / "model.safetensors")
    raw = recipe_of(folder, data, ["up_proj"])
    raw["quantize"] = {"quantizer": {"name": "gptq", "options": {"group_size": 32}}}
    raw["finetune"]["merger"] = "qa-sparsepeft"
    finished = run(raw, registry, tmp_path / "store")
    assert finished["merge"].report["codes_changed"] > 0
    assert f"{layer}.qweight" in load_file(finished["merge"].folder / "model" / "model.safetensors")


def test_conv1d_in_stock_peft(registry: Registry, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = save(config_of("GPT2", tokenizer), tokenizer, tmp_path / "model")
    raw = recipe_of(folder, data, ["*"])
    raw["finetune"]["merger"] = "unmerged"
    del raw["merge"]
    finished = run(raw, registry, tmp_path / "store")
    base, adapter = finished["sparsify"].folder / "model", finished["search"].folder / "adapter"
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    low = load_file(adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    merged = stock.merge_and_unload()
    for name, weight in weights(base).items():
        scale = settings["alpha_pattern"][name] / settings["rank_pattern"][name]
        a, b = (low[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        found = merged.get_parameter(f"{name}.weight").detach().T
        torch.testing.assert_close(found, weight + scale * (b @ a), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_the_bare_model(registry: Registry, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    """GPT-2's own checkpoint has no "transformer." before its names."""
    folder = save(config_of("GPT2", tokenizer), tokenizer, tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(folder).transformer.save_pretrained(folder)
    assert "h.0.attn.c_attn.weight" in load_file(folder / "model.safetensors")
    finished = run(recipe_of(folder, data, ["c_attn"]), registry, tmp_path / "store", until="sparsify")
    assert finished["sparsify"].report["sparsity"] == pytest.approx(0.5)


def test_an_expert_that_no_token_reaches(
    registry: Registry, tokenizer: Any, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(config_of("Mixtral", tokenizer), tokenizer, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # the first two win by the size of their logits, whichever the sign
        for block in model.model.layers:
            block.mlp.gate.weight[2:] = block.mlp.gate.weight[:2] * 0.01
            block.mlp.gate.weight[1] = -block.mlp.gate.weight[0]
    model.save_pretrained(folder)
    finished = run(recipe_of(folder, data, ["q_proj"]), registry, tmp_path / "store", until="sparsify")
    counts = finished["sparsify"].report["expert_tokens"]
    per_block = [n for name, n in counts.items() if name.startswith("model.layers.0.") and name.endswith("up_proj")]
    assert 0 < sum(per_block) <= 2 * 4 * 32
    alone = {
        name: weight for name, weight in weights(finished["sparsify"].folder / "model").items() if "experts" in name
    }
    assert all(((weight == 0).sum(1) == weight.shape[1] // 2).all() for weight in alone.values())


@pytest.mark.parametrize(("family", "mixture"), [("Qwen3Moe", "mlp"), ("Llama4Text", "feed_forward")])
def test_codes_of_an_expert_that_no_token_reaches(
    family: str,
    mixture: str,
    registry: Registry,
    tokenizer: Any,
    data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is measured on all tokens, a warning names it, and its scales are finite; a damaged one is not exported."""
    config = config_of(family, tokenizer)
    config.num_experts_per_tok = 1
    folder = save(config, tokenizer, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # one of the first two wins, whichever the sign
        for name, parameter in model.named_parameters():
            if name.endswith((".mlp.gate.weight", ".router.weight")):
                parameter[2:] = parameter[:2] * 0.01
                parameter[1] = -parameter[0]
    model.save_pretrained(folder)
    raw = recipe_of(folder, data, ["q_proj"])
    raw["calibration"]["samples"] = 2
    raw["quantize"] = {"quantizer": {"name": "gptq", "options": {"group_size": 32}}}
    raw["export"] = [{"exporter": "compressed-tensors"}]
    del raw["finetune"], raw["merge"], raw["sparsify"]
    finished = run(raw, registry, tmp_path / "store")
    unreached = f"model.layers.1.{mixture}.experts.2.up_proj"
    assert re.search(rf"no token is routed to .*{unreached}.*; measured on every token instead", caplog.text)
    made = finished["quantize"].folder / "model"
    layers = read_quantized(made)
    assert all(layer.grid.scale.isfinite().all() and (layer.grid.scale > 0).all() for layer in layers.values())
    assert len(layers[unreached].codes.unique()) > 8
    tensors = load_file(made / "model.safetensors")
    tensors[f"{unreached}.scales"][0, 0] = torch.nan
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=rf"tensor {unreached}\.scales holds values that are not finite"):
        FinishedModel(made).codes(unreached)


def test_experts_that_cannot_be_taken_apart_stay_and_are_named(
    registry: Registry, tokenizer: Any, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 1}
    attention = {"num_attention_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 8}
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 16}
    sizes = {"hidden_size": 32, "ffn_hidden_size": 64, "num_layers": 2, **attention, **heads, **experts}
    config = transformers.LongcatFlashConfig(**common, **sizes, pad_token_id=1)
    folder = save(config, tokenizer, tmp_path / "model")
    before = load_file(folder / "model.safetensors")
    raw = recipe_of(folder, data, ["o_proj"])
    raw["sparsify"]["exclude"] = ["*.experts.*"]
    finished = run(raw, registry, tmp_path / "store")
    assert f"model.layers.1.mlp.experts is left unchanged: its experts ({(6 * 2 + 4) * 16 * 32} weights)" in caplog.text
    after = load_file(finished["merge"].folder / "model" / "model.safetensors")
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert torch.equal(before[name], after[name])
    assert (after["model.layers.0.self_attn.0.o_proj.weight"] == 0).float().mean() == 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"finetune.merger": "unmerged", "merge": None}, "experts.0.down_proj, and stock PEFT"),
        (
            {
                "quantize": {"quantizer": {"name": "rtn", "options": {"group_size": 32}}},
                "finetune": None,
                "merge": None,
            },
            "checkpoints of MixtralForCausalLM hold their experts under other names",
        ),
    ],
)
def test_what_no_checkpoint_could_hold(
    registry: Registry, tokenizer: Any, data: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = save(config_of("Mixtral", tokenizer), tokenizer, tmp_path / "model")
    raw = recipe_of(folder, data, ["down_proj"])
    for path, value in change.items():
        *parents, last = path.split(".")
        place = raw[parents[0]] if parents else raw
        place[last] = value
    raw = {key: value for key, value in raw.items() if value is not None}
    with pytest.raises(StageError, match=words):
        run(raw, registry, tmp_path / "store")
    assert not list((tmp_path / "store").glob("artifacts/*"))


def test_experts_that_no_example_reaches_stay_as_they_were(
    registry: Registry, tokenizer: Any, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of("Mixtral", tokenizer)
    config.num_local_experts = 32
    folder = save(config, tokenizer, tmp_path / "model")
    finished = run(recipe_of(folder, data, ["*"]), registry, tmp_path / "store")
    assert "layers of experts did not train, such as model.layers.0.mlp.experts." in caplog.text
    counts = finished["sparsify"].report["expert_tokens"]
    assert len(counts) == 2 * 32 * 3 and 0 in counts.values() and "no token is routed to" in caplog.text
    assert finished["merge"].report["logits_difference"] < 1e-4


def test_blocks_of_different_layers_can_be_quantized(
    registry: Registry, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    config = config_of("Qwen3Moe", tokenizer)
    config.mlp_only_layers = [0]
    folder = save(config, tokenizer, tmp_path / "model")
    raw = recipe_of(folder, data, ["*"])
    del raw["finetune"], raw["merge"]
    raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
    finished = run(raw, registry, tmp_path / "store")
    assert finished["quantize"].report["weights"] == finished["sparsify"].report["weights"]
