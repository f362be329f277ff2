"""Multimodal models: the text model is sparsified, quantized, tuned and merged, and nothing else changes a bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from multimodal_models import FAMILIES, make, with_image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sqft import Orchestrator, Recipe, Registry, Run
from sqft.kernels.grids import dequantize
from sqft.modeling.architecture.blocks import linears, towers
from sqft.modeling.architecture.experts import Experts
from sqft.modeling.architecture.linears import as_linears
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.loading.quantized import read_quantized

WITH_TOWERS = [family for family in FAMILIES if family != "Gemma3n"]
"""The families whose towers need no further package."""
PROCESSOR = {"preprocessor_config.json": {"size": 8}, "processor_config.json": {}, "video_preprocessor_config.json": {}}
FAST = ("Gemma3", "Gemma4", "Qwen3_5Moe", "Llama4")
TEXT = torch.arange(2, 40)[None]


def more(*same: str) -> list[Any]:
    """Cases that are like others, for the slow tests."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in same]


def save(family: str, tokenizer: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A folder as the stock class writes it, with the files of a processor."""
    make(family).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, content in PROCESSOR.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def recipe(folder: Path, data: Path, **more: Any) -> dict[str, Any]:
    raw = {
        "name": "multimodal",
        "model": {"path": str(folder)},
        "calibration": {"data": str(data / "calibration.jsonl"), "samples": 4, "length": 32},
        "sparsify": {"scorer": "wanda"},
        "finetune": {
            "adapter": {"name": "nls", "options": {"ranks": [4, 2], "alpha": 16}},
            "merger": "sparsepeft",
            "targets": ["*"],
            "data": str(data / "train.jsonl"),
            "steps": 3,
            "batch_size": 4,
            "learning_rate": 0.05,
        },
        "merge": {},
    }
    return {key: value for key, value in (raw | more).items() if value is not None}


def run(raw: dict[str, Any], registry: Registry, store: Path) -> Run:
    orchestrator = Orchestrator(registry, store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)))


def stock(family: str, folder: Path) -> PreTrainedModel:
    """The folder in the stock multimodal class, which must miss nothing and find nothing that it does not know."""
    kind = getattr(transformers, f"{family}ForConditionalGeneration")
    model, info = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    loaded: PreTrainedModel = model.eval()
    return loaded


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_only_the_text_model_differs(family: str, before: Path, after: Path) -> None:
    """Names, precisions, towers, embeddings and norms are as they were, and so are the files of the processor."""
    old, new = stored(before), stored(after)
    assert new.keys() == old.keys()
    names = CheckpointNames(model := as_linears(stock(family, after)))
    outside, layers = tuple(f"{tower}." for tower in towers(model)), linears(model)
    assert outside and not any(layer.startswith(outside) for layer in layers)
    for name, tensor in old.items():
        assert new[name].dtype == tensor.dtype
        if not new[name].equal(tensor):
            owner = names.module_tensor(name).rpartition(".")[0]
            assert owner in layers or isinstance(model.get_submodule(owner), Experts), name
    for name in PROCESSOR:
        assert (after / name).read_bytes() == (before / name).read_bytes()


@pytest.mark.parametrize("family", [*FAST, *more(*(family for family in WITH_TOWERS if family not in FAST))])
def test_a_family(family: str, registry: Registry, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    folder = save(family, tokenizer, tmp_path / "model")
    finished = run(recipe(folder, data), registry, tmp_path / "store")
    sparse, merged = (finished[step].folder / "model" for step in ("sparsify", "merge"))
    assert finished["sparsify"].report["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert finished["merge"].report["logits_difference"] < 1e-4
    for after in (sparse, merged):
        assert_only_the_text_model_differs(family, folder, after)
    model, own = stock(family, merged), finished["merge"].load_model()
    torch.testing.assert_close(logits(model, {"input_ids": TEXT}), logits(own, {"input_ids": TEXT}))
    # The original with the layers of the text model replaced by hand: what it makes of an image is what is made now.
    reference = as_linears(stock(family, folder))
    changed = dict(as_linears(stock(family, merged)).named_parameters())
    with torch.no_grad():
        for layer in linears(reference):
            reference.get_parameter(f"{layer}.weight").copy_(changed[f"{layer}.weight"])
    found, expected = logits(model, with_image(family)), logits(reference, with_image(family))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, logits(stock(family, folder), with_image(family)), atol=1e-3)


@pytest.mark.parametrize("family", ["Gemma3", "Qwen3_5Moe", *more("Qwen3_5", "Mistral3", "Llama4")])
def test_codes(family: str, registry: Registry, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    """An INT4 folder has the checkpoint's names: with the values of its codes it is a folder of the stock class."""
    folder = save(family, tokenizer, tmp_path / "model", torch.bfloat16)
    quantize: dict[str, Any] = {
        "quantizer": {"name": "gptq", "options": {"group_size": 32}},
        "exclude": ["*.k_proj", "*.in_proj_[ab]"],
    }
    if family == "Llama4":
        quantize["exclude"] += ["*.experts.*"]  # one by one in a folder of codes, and joined in the stock class
    raw = recipe(folder, data, quantize=quantize)
    raw["model"]["dtype"], raw["finetune"]["merger"] = "bfloat16", "qa-sparsepeft"
    finished = run(raw, registry, tmp_path / "store")
    assert finished["merge"].report["codes_changed"] > 0
    for step in ("quantize", "merge"):
        made = finished[step].folder / "model"
        floats = dequantized(made, tmp_path / step)
        assert_only_the_text_model_differs(family, folder, floats)
        own = finished[step].load_model()
        torch.testing.assert_close(logits(stock(family, floats), {"input_ids": TEXT}), logits(own, {"input_ids": TEXT}))
        for name, tensor in stored(floats).items():
            assert tensor.dtype == torch.bfloat16, name
        settings = json.loads((made / "config.json").read_text())["quantization_config"]
        apart = [re.compile(pattern.removeprefix("-:")) for pattern in settings["dynamic"]]
        quantized = read_quantized(made, CheckpointNames(own))
        for name, module in own.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
                assert any(pattern.match(name) for pattern in apart) != (name in quantized), name


def dequantized(made: Path, folder: Path) -> Path:
    """The folder with the values of its codes, by hand."""
    shutil.copytree(made, folder)
    tensors = stored(folder)
    for layer, codes in read_quantized(folder).items():
        tensors[f"{layer}.weight"] = dequantize(codes).bfloat16()
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{layer}.{part}"]
    for file in folder.glob("*.safetensors"):
        file.unlink()
    head = next((name for name in tensors if name.endswith("lm_head.weight")), "")
    config = json.loads((folder / "config.json").read_text())
    if config["tie_word_embeddings"]:
        del tensors[head]
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("exporter", ["gptq", "compressed-tensors", "hf"])
def test_exported_folders_have_the_names_of_the_checkpoint(
    exporter: str, registry: Registry, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    folder = save("Gemma3", tokenizer, tmp_path / "model")
    quantize = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}, "exclude": ["*.k_proj"]}
    raw = recipe(folder, data, sparsify=None, finetune=None, merge=None, calibration=None, quantize=quantize)
    finished = run(raw | {"export": [{"exporter": exporter}]}, registry, tmp_path / "store")
    made, base = (finished[step].folder / "model" for step in ("export", "quantize"))
    assert all((made / name).is_file() for name in PROCESSOR)
    settings = json.loads((made / "config.json").read_text()).get("quantization_config")
    if exporter == "hf":
        assert_only_the_text_model_differs("Gemma3", folder, without_tied_head(made))
    elif exporter == "gptq":
        assert settings == json.loads((base / "config.json").read_text())["quantization_config"]
        assert stored(made).keys() == stored(base).keys()
    else:
        coded = {name.removesuffix(".weight_packed") for name in stored(made) if name.endswith("packed")}
        assert coded == read_quantized(base).keys()
        patterns = [name.removeprefix("re:") for name in settings["ignore"] if name.startswith("re:")]
        for name, module in stock("Gemma3", folder).named_modules():
            if isinstance(module, torch.nn.Linear):
                ignored = name in settings["ignore"] or any(re.match(pattern, name) for pattern in patterns)
                assert ignored == (name == "lm_head" or name.endswith("k_proj") or "vision_tower" in name), name


def test_floats_of_experts_that_the_checkpoint_joins(
    registry: Registry, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    folder = save("Llama4", tokenizer, tmp_path / "model")
    quantize = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
    raw = recipe(folder, data, quantize=quantize, export=[{"exporter": "hf"}])
    raw["finetune"]["merger"] = "qa-sparsepeft"
    finished = run(raw, registry, tmp_path / "store")
    made = finished["export"].folder / "model"
    assert_only_the_text_model_differs("Llama4", folder, made)
    found = logits(stock("Llama4", made), {"input_ids": TEXT})
    torch.testing.assert_close(found, logits(finished["merge"].load_model(), {"input_ids": TEXT}))
    assert torch.equal(logits(stock("Llama4", made), {"input_ids": TEXT}), found)


def without_tied_head(folder: Path) -> Path:
    tensors = stored(folder)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", *more("float32", "float16")])
def test_towers_keep_their_precision(
    dtype: str, registry: Registry, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    """Text in bfloat16 and the tower in float32, as some checkpoints are: `dtype` is the text model's."""
    folder = save("Qwen3_5", tokenizer, tmp_path / "model", torch.bfloat16)
    tensors = stored(folder)
    for name, tensor in tensors.items():
        if ".visual." in name:
            tensors[name] = tensor.float() + torch.linspace(0, 1e-3, tensor.numel()).reshape(tensor.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = recipe(folder, data, quantize={"quantizer": {"name": "rtn", "options": {"group_size": 32}}})
    raw["quantize"]["exclude"], raw["finetune"]["merger"] = ["*.in_proj_[ab]"], "qa-sparsepeft"
    raw["model"]["dtype"] = dtype
    finished = run(raw, registry, tmp_path / "store")
    for step in ("sparsify", "quantize", "merge"):
        made = stored(finished[step].folder / "model")
        assert all(made[name].equal(tensor) for name, tensor in tensors.items() if ".visual." in name)
        norms = [tensor for name, tensor in made.items() if "language_model" in name and name.endswith("norm.weight")]
        assert {tensor.dtype for tensor in norms} == {getattr(torch, dtype)}


def test_an_adapter_beside_its_base_in_stock_peft(
    registry: Registry, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    """It adapts the text model alone: the tower has layers of the same last names."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    folder = save("Gemma3", tokenizer, tmp_path / "model")
    raw = recipe(folder, data, merge=None)
    raw["finetune"] |= {"merger": "unmerged", "targets": ["q_proj", "k_proj", "v_proj"]}
    finished = run(raw, registry, tmp_path / "store")
    base, adapter = finished["sparsify"].folder / "model", finished["search"].folder / "adapter"
    model = PeftModel.from_pretrained(stock("Gemma3", base), adapter)
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert len(adapted) == 2 * 3 and all(".language_model." in name for name in adapted)
    expected, low = stock("Gemma3", base), load_file(adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    before = logits(expected, with_image("Gemma3"))
    with torch.no_grad():
        for name in settings["target_modules"]:
            a, b = (low[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
            scale = settings["alpha_pattern"][name] / settings["rank_pattern"][name]
            expected.get_parameter(f"{name}.weight").add_(scale * (b @ a))
    found = logits(model, with_image("Gemma3"))
    torch.testing.assert_close(found, logits(expected, with_image("Gemma3")), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)


@pytest.mark.parametrize("kind", ["Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"])
def test_what_a_class_has_no_place_for_is_said(
    kind: str, registry: Registry, tokenizer: Any, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A head for further tokens is in no class; the tower is lost where config.json names the text model's class."""
    folder = save("Qwen3_5", tokenizer, tmp_path / "model")
    save_file(stored(folder) | {"mtp.fc.weight": torch.ones(32, 64)}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [kind]}))
    finished = run(recipe(folder, data, finetune=None, merge=None), registry, tmp_path / "store")
    made = finished["sparsify"].folder / "model"
    own = finished["sparsify"].load_model()
    assert type(own).__name__ == kind
    with_tower = kind == "Qwen3_5ForConditionalGeneration"
    parts = "mtp (2,048 weights)" if with_tower else "model.visual (11,760 weights), mtp (2,048 weights)"
    assert f"left out, as {kind} has no place for it: {parts}" in caplog.text
    assert any("visual" in name for name in stored(made)) == with_tower
    text = transformers.AutoModelForCausalLM.from_pretrained(made).eval()
    torch.testing.assert_close(logits(text, {"input_ids": TEXT}), logits(own, {"input_ids": TEXT}))


class Vision(PreTrainedModel):  # type: ignore[misc]
    """Takes the place of Gemma 3n's vision tower, which needs the package timm."""

    config_class = transformers.Gemma3nVisionConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(3)])
        self.post_init()


def test_gemma_3n(
    registry: Registry, tokenizer: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.gemma3n import modeling_gemma3n as module

    made = module.AutoModel.from_config

    def from_config(config: Any, **how: Any) -> Any:
        return Vision(config) if isinstance(config, transformers.Gemma3nVisionConfig) else made(config, **how)

    monkeypatch.setattr(module.AutoModel, "from_config", from_config)
    folder = save("Gemma3n", tokenizer, tmp_path / "model")
    raw = recipe(folder, data)
    raw["sparsify"]["exclude"] = ["*.altup.*"]
    raw["finetune"]["targets"] = ["q_proj", "up_proj"]
    finished = run(raw, registry, tmp_path / "store")
    merged = finished["merge"].folder / "model"
    assert_only_the_text_model_differs("Gemma3n", folder, merged)
    found = logits(stock("Gemma3n", merged), {"input_ids": TEXT})
    torch.testing.assert_close(found, logits(finished["merge"].load_model(), {"input_ids": TEXT}))


@pytest.mark.parametrize("family", ["Gemma3", *more("Qwen3_5", "Llama4")])
def test_packed_training_and_evaluation(
    family: str, registry: Registry, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    """Perplexity, generated answers and a searcher's loss of a model with towers."""
    folder = save(family, tokenizer, tmp_path / "model")
    raw = recipe(folder, data)
    raw["finetune"]["packing"] = family != "Qwen3_5"  # its state goes on from one example to the next
    raw["search"] = {"searcher": "heuristic", "data": str(data / "validation.jsonl"), "metric": "loss"}
    raw["evaluate"] = {
        "of": ["model", "merge"],
        "perplexity": {"text": str(data / "heldout.txt"), "tokens": 256, "length": 64},
        "exact_match": {"data": str(data / "test.jsonl"), "max_new_tokens": 4},
    }
    finished = run(raw, registry, tmp_path / "store")
    for step in ("evaluate:model", "evaluate:merge"):
        report = json.dumps(finished[step].report)
        assert "perplexity" in report and "accuracy" in report
