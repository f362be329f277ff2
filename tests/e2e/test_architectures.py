"""Every family of causal language models: sparsify, tune, merge, and reload in stock transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, Family, class_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from sqft import Orchestrator, Recipe, Registry, Run
from sqft.errors import ArtifactError, RecipeError
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.architecture.linears import as_linears
from sqft.modeling.loading.finished_model import FinishedModel
from sqft.modeling.loading.quantized import read_quantized
from sqft.utils.globs import selected


def config_of(family: str, tokenizer: Any) -> PretrainedConfig:
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 1}
    kind = getattr(transformers, f"{FAMILIES[family].kind}Config")
    config: PretrainedConfig = kind(**common | {"pad_token_id": 1} | FAMILIES[family].sizes)
    return config


def save(config: PretrainedConfig, tokenizer: Any, folder: Path, **how: Any) -> Path:
    """A random model; parameters that start at zero would hide what is not read back, so none does."""
    torch.manual_seed(0)
    model = getattr(transformers, class_of(config))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    model.save_pretrained(folder, **how)
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


def stock(folder: Path) -> Any:
    """A folder in stock transformers, which has every weight it needs there, and uses every one it finds."""
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def answers(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(2, 34)[None], use_cache=False).logits
    return found


def taken_apart(model: Any) -> tuple[dict[str, Tensor], Tensor]:
    """The weight [out, in] of each linear layer that sqft knows in a stock model, and the model's logits, which are the
    same when it is taken apart."""
    before = answers(model)
    model = as_linears(model)
    torch.testing.assert_close(answers(model), before, rtol=1e-4, atol=1e-5)
    return weights_in(model), before


def weights_in(model: Any) -> dict[str, Tensor]:
    return {name: layer.weight.detach() for name, layer in linears(model).items()}


def weights(folder: Path) -> dict[str, Tensor]:
    return taken_apart(stock(folder))[0]


def unpacked(folder: Path) -> dict[str, Tensor]:
    """The tensors of a GPTQ folder, codes as the floats [out, in] that they stand for, by the format's definition."""
    bits = json.loads((folder / "config.json").read_text())["quantization_config"]["bits"]
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    shifts = torch.arange(0, 32, bits)
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        parts = {part: tensors.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        codes = (parts["qweight"][:, None] >> shifts[:, None] & 2**bits - 1).flatten(0, 1)  # [in, out]
        zeros = (parts["qzeros"][..., None] >> shifts & 2**bits - 1).flatten(1) + 1  # [groups, out]
        group = parts["g_idx"].long()
        tensors[f"{name}.weight"] = ((codes - zeros[group]) * parts["scales"].float()[group]).T.contiguous()
    return tensors


def stock_of_codes(folder: Path, base: Path, place: Path, apart: bool) -> tuple[dict[str, Tensor], Tensor]:
    """What `taken_apart` finds in the stock class that has the values of a GPTQ folder's codes.

    Args:
        folder: the GPTQ folder.
        base: the folder of floats that it was made from.
        place: where a folder of floats is written for the stock class, under the names of the GPTQ folder.
        apart: whether the GPTQ folder has codes under names that the stock class does not know: single experts.
    """
    tensors = unpacked(folder)
    model = stock(base)
    if apart:
        model = as_linears(model)
        for name, layer in linears(model).items():
            layer.weight.data.copy_(tensors[f"{name}.weight"])
        return weights_in(model), answers(model)
    for name, module in model.named_modules():
        if isinstance(module, Conv1D) and f"{name}.g_idx" not in tensors:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].T.contiguous()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return taken_apart(stock(place))


DENSE = ("Llama", "Phi3", "OPT", "GPT2", "Mamba2", "Lfm3", "Gemma3n", "Zamba2", "xLSTM")
MIXTURES = ("Mixtral", "Qwen2Moe", "Qwen3Next", "GraniteMoe", "GptOss", "Llama4Text", "NemotronH")
HYBRIDS = ("KimiLinear", "Jamba")
FAST = (*DENSE, *MIXTURES, *HYBRIDS)
"""Families that are tried in the fast tests, one of each kind; the others are like them, and come with the slow ones.
"""


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in FAMILIES],
)
def test_a_family(family: str, registry: Registry, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    """Sparsified, tuned and merged, in floats and in INT4, and read back by the stock class."""
    expected = FAMILIES[family]
    folder = save(config_of(family, tokenizer), tokenizer, tmp_path / "model", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    raw = recipe_of(folder, data, [*expected.targets])
    raw["sparsify"]["exclude"] = [*expected.unseen]
    floats = run(raw, registry, tmp_path / "store")
    layout = floats.plan.source.layout
    assert layout.walk == expected.walk and not layout.left_out
    assert any("slower" in note and layout.walk_reason in note for note in floats.plan.notes) == (
        layout.walk == "model"
    )
    assert bool(layout.experts) == expected.experts
    assert tuple(dict.fromkeys(name.rpartition(".")[2] for name in layout.narrow)) == expected.narrow
    sparse = check_sparse(floats, expected, folder)
    check_merged(floats, sparse)
    raw["quantize"] = {
        "quantizer": {"name": "gptq", "options": {"group_size": 32}},
        "exclude": [*expected.unseen, *expected.floats],
    }
    raw["finetune"] |= {"merger": "qa-sparsepeft", "base": "floats"}
    codes = run(raw, registry, tmp_path / "store")
    assert any("stored layer by layer" in note for note in codes.plan.notes) == expected.apart
    check_codes(codes, expected, sparse, tmp_path / "unpacked")


def check_sparse(finished: Run, expected: Family, folder: Path) -> dict[str, Tensor]:
    """Half of every row is zero, the rest is untouched."""
    dense, sparse = weights(folder), weights(finished["sparsify"].folder / "model")
    assert dense.keys() == sparse.keys()
    for name, weight in sparse.items():
        kept = weight != 0
        if expected.is_dense(name):
            assert torch.equal(weight, dense[name]), name
        else:
            assert ((~kept).sum(1) == weight.shape[1] // 2).all(), name
            assert torch.equal(weight, dense[name] * kept), name
    assert finished["sparsify"].report["sparsity"] == pytest.approx(0.5)
    return sparse


def check_merged(finished: Run, sparse: dict[str, Tensor]) -> None:
    """The merged weights are the base's and the adapter's, and the stock class answers as sqft does."""
    merged, found = taken_apart(stock(finished["merge"].folder / "model"))
    adapter = load_file(finished["search"].folder / "adapter" / "adapter.safetensors")
    scales = json.loads((finished["search"].folder / "adapter" / "sqft_adapter.json").read_text())["scales"]
    assert merged.keys() == sparse.keys() >= scales.keys()
    for name, weight in sparse.items():
        low = torch.zeros(())
        if name in scales:
            low = scales[name] * (adapter[f"{name}.lora_B"] @ adapter[f"{name}.lora_A"]) * (weight != 0)
            assert ".experts." in name or low.any(), name  # an expert that no example is routed to does not train
        torch.testing.assert_close(merged[name], weight + low, rtol=1e-5, atol=1e-6)
    assert finished["merge"].report["logits_difference"] < 1e-4
    torch.testing.assert_close(found, answers(finished["merge"].load_model()), rtol=1e-4, atol=1e-5)


def check_codes(finished: Run, expected: Family, sparse: dict[str, Tensor], place: Path) -> None:
    """The merged codes keep the zeros, and the stock class with the values of the codes answers as sqft does."""
    report = finished["merge"].report
    assert report["codes_changed"] > 0 and report["logits_difference"] < 1e-4
    base = finished["sparsify"].folder / "model"
    merged, found = stock_of_codes(finished["merge"].folder / "model", base, place, expected.apart)
    assert merged.keys() == sparse.keys()
    for name, weight in sparse.items():
        assert expected.is_dense(name) or not merged[name][weight == 0].any(), name
        floats = expected.is_dense(name) or selected(name, expected.floats, [])
        assert floats or all(len(group.unique()) <= 16 for group in merged[name].reshape(-1, 32)), name
    torch.testing.assert_close(found, answers(finished["merge"].load_model()), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize(
    ("family", "floats"),
    [
        ("GptOss", ["*.experts.*.up_proj"]),  # a bias beside each weight, and gate and up by turns
        ("GraniteMoe", ["*.experts.2.*"]),  # joined under names of their own
        ("Llama4Text", []),
        ("GPT2", ["*.mlp.c_proj"]),  # [in, out], where codes are [out, in]
        ("NemotronH", ["*.experts.0.*"]),
    ],
)
def test_floats_of_codes_are_a_checkpoint_of_the_family(
    family: str, floats: list[str], registry: Registry, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    """Merged codes exported as floats have the original's tensors, and are the same model in the stock class."""
    folder = save(config_of(family, tokenizer), tokenizer, tmp_path / "model")
    raw = recipe_of(folder, data, ["*"])
    raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}, "exclude": floats}
    raw["finetune"]["merger"], raw["export"] = "qa-sparsepeft", [{"exporter": "hf"}]
    finished = run(raw, registry, tmp_path / "store")
    made = finished["export"].folder / "model"
    before, after = (load_file(one / "model.safetensors") for one in (folder, made))
    assert after.keys() - {"lm_head.weight"} == before.keys() - {"lm_head.weight"}
    assert all(after[name].shape == tensor.shape for name, tensor in before.items())
    found = answers(stock(made))
    torch.testing.assert_close(found, answers(finished["merge"].load_model()), rtol=1e-4, atol=1e-5)
    assert torch.equal(answers(stock(made)), found)


def test_codes_of_joined_experts_are_not_exported_for_readers_that_would_miss_them(
    registry: Registry, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    """Of `quantize`, or of a folder of codes; where experts stay floats, every exporter takes them."""
    folder = save(config_of("GptOss", tokenizer), tokenizer, tmp_path / "model")
    quantize: dict[str, Any] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
    raw = {"name": "codes", "model": {"path": str(folder)}, "quantize": quantize, "export": [{"exporter": "gptq"}]}
    made = run(raw, registry, tmp_path / "store")["export"].folder / "model"
    again = {"name": "again", "model": {"path": str(made)}, "export": [{"exporter": "gptq"}]}
    orchestrator = Orchestrator(registry, tmp_path / "store")
    assert any(note.startswith("export.0.exporter: codes of ") for note in orchestrator.plan(Recipe.parse(again)).notes)
    compressed = {"export": [{"exporter": "compressed-tensors"}]}
    for recipe in (raw, again):
        with pytest.raises(RecipeError, match=r"export\.0\.exporter: GptOssForCausalLM joins .*use the exporter hf"):
            orchestrator.plan(Recipe.parse(recipe | compressed))
    quantize["exclude"] = ["*.experts.*"]
    floats = run(raw | compressed, registry, tmp_path / "store")
    assert not any("stored layer by layer" in note for note in floats.plan.notes)
    again["model"] = {"path": str(floats["quantize"].folder / "model")}
    assert not any(
        "layer by layer" in note for note in run(again | compressed, registry, tmp_path / "store").plan.notes
    )


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
    raw["export"] = [{"exporter": "gptq"}]
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
    notes = [note for note in finished.plan.notes if "experts that cannot be split" in note]
    assert len(notes) == 1 and f"model.layers.1.mlp.experts ({(6 * 2 + 4) * 16 * 32:,} weights)" in notes[0]
    assert notes[0] in caplog.text
    after = load_file(finished["merge"].folder / "model" / "model.safetensors")
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert torch.equal(before[name], after[name])
    assert (after["model.layers.0.self_attn.0.o_proj.weight"] == 0).float().mean() == 0.5


def test_stock_peft_has_no_name_for_a_single_expert(
    registry: Registry, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    folder = save(config_of("Mixtral", tokenizer), tokenizer, tmp_path / "model")
    raw = recipe_of(folder, data, ["down_proj"])
    raw["finetune"]["merger"] = "unmerged"
    del raw["merge"]
    with pytest.raises(RecipeError, match=r"experts\.0\.down_proj, and PEFT, .* cannot adapt a single expert"):
        run(raw, registry, tmp_path / "store")


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
