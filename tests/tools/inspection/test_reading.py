"""`inspect_model` against weights whose zeros were put there, in every format it reads."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from functools import partialmethod
from pathlib import Path
from typing import Any

import gguf
import multimodal_models
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from packed_checkpoints import pack_folder
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from sqft import Orchestrator, Recipe, Registry
from sqft.checkpoints.model_spec import ModelSpec
from sqft.cli import main
from sqft.errors import SqftError
from sqft.kernels.grids import fit_grid, quantize
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.architecture.linears import as_linears
from sqft.modeling.loading.finished_model import FinishedModel
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.quantized import load_dequantized, save_quantized
from sqft.tools.inspection import reading
from sqft.tools.inspection.reading import inspect_model
from sqft.tools.inspection.result import Inspection
from sqft.types import Grid, Quantized


def pruned(model: LlamaForCausalLM) -> dict[str, int]:
    """Zeros put into each linear layer of the blocks: the first so many entries of the i-th one."""
    put = {}
    for index, (name, layer) in enumerate(linears(model).items()):
        put[name] = 40 * (index + 1)
        layer.weight.data.view(-1)[: put[name]] = 0
    return put


def zeros(found: Inspection) -> dict[str, int | None]:
    return {module.name: module.zeros for module in found.modules if module.linear}


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats(model: LlamaForCausalLM, tmp_path: Path, shards: str, dtype: torch.dtype) -> None:
    put = pruned(model)
    model.to(dtype).save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "20KB")
    found = inspect_model(tmp_path)
    assert found.format == "Hugging Face floats" and zeros(found) == put
    assert found.linears.zeros == sum(put.values()) and found.linears.modules == 14
    assert found.linears.weights == sum(layer.weight.numel() for layer in linears(model).values())
    assert found.all.weights == model.num_parameters()
    assert found.all.zeros == sum(put.values()) + 32  # the embedding of the padding is zeros
    assert found.precision == {str(dtype).removeprefix("torch."): model.num_parameters()}
    assert found.size == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_a_file_that_transformers_does_not_read_is_not_counted(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    save_file({"layers.0.wq.weight": torch.zeros(4, 4)}, tmp_path / "consolidated.safetensors")
    assert inspect_model(tmp_path).all.weights == model.num_parameters()


@pytest.mark.parametrize("family", ["Gemma3", "Llama4"])
def test_towers_hold_no_decoder_blocks(family: str, tmp_path: Path) -> None:
    """Llama 4's experts, which lie in two tensors, count among the layers of blocks."""
    model = multimodal_models.make(family)
    model.save_pretrained(tmp_path)
    expected = sum(layer.weight.numel() for layer in linears(as_linears(model)).values())
    found = inspect_model(tmp_path)
    assert found.linears.weights == expected
    assert not any("vision" in module.name for module in found.modules if module.linear)


def test_fp8_is_counted_without_its_scales(model: LlamaForCausalLM, tmp_path: Path) -> None:
    put = pruned(model)
    model.save_pretrained(tmp_path)
    expected = {name.removesuffix(".weight"): tensor for name, tensor in pack_folder(tmp_path, "fp8", (16, 16)).items()}
    found = inspect_model(tmp_path)
    assert {module.name: module.shape for module in found.modules} == {n: tuple(t.shape) for n, t in expected.items()}
    assert zeros(found) == {name: int((expected[name] == 0).sum()) for name in put}
    assert found.format == "FP8" and any('"dequantize": true' in line for line in found.lines())
    assert found.precision["float8_e4m3fn"] == found.linears.weights == 18432


def test_mxfp4_is_listed_as_the_floats_it_stands_for(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GptOssConfig(vocab_size=64, **sizes, num_key_value_heads=1, head_dim=16, num_local_experts=2)
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    expected = {name.removesuffix(".weight"): tensor for name, tensor in pack_folder(tmp_path, "mxfp4").items()}
    found = inspect_model(tmp_path)
    assert {module.name: module.shape for module in found.modules} == {n: tuple(t.shape) for n, t in expected.items()}
    (down,) = (module for module in found.modules if module.name.endswith("experts.down_proj"))
    assert (down.linear, down.precision, down.weights, down.zeros) == (True, "mxfp4", 2 * 32 * 32, None)
    assert found.format == "MXFP4" and any("not counted: 2 tensors" in line for line in found.lines())


def test_gptq_zeros_are_codes_at_the_zero_point(quantized_folder: Path) -> None:
    """Grids that are not symmetric, groups in no order, and one kind of layer left in floats."""
    found = inspect_model(quantized_folder)
    weights = load_dequantized(ModelSpec(quantized_folder)).state_dict()
    expected = {name: int((weights[f"{name}.weight"] == 0).sum()) for name in zeros(found)}
    assert zeros(found) == expected and sum(expected.values()) > 100
    assert found.format == "GPTQ, version 1"
    assert found.details == {"bits": 4, "group_size": 16, "sym": False, "desc_act": True}
    floats = 2 * 32 * 64
    assert found.precision["int4 in groups of 16"] == found.linears.weights - floats
    assert found.all.weights == sum(tensor.numel() for tensor in weights.values())  # the head is stored


def test_compressed_tensors_has_the_zeros_of_what_it_was_made_of(
    quantized_folder: Path, registry: Registry, tmp_path: Path
) -> None:
    registry.get("exporter", "compressed-tensors").component().export(FinishedModel(quantized_folder), tmp_path)  # type: ignore[attr-defined]
    found, source = inspect_model(tmp_path), inspect_model(quantized_folder)
    assert found.format == "compressed-tensors pack-quantized"
    assert zeros(found) == zeros(source) and found.precision == source.precision


def mask_2_4(shape: torch.Size) -> Tensor:
    """2:4 along the last axis: each group of four loses its first two weights in even rows, its last two in others."""
    columns, rows = torch.arange(shape[-1]), torch.arange(shape[-2])
    return (columns // 2 + rows[:, None]) % 2 == 1


def spoil(weight: Tensor) -> None:
    """Put one weight back in the last group of the last row."""
    weight[-1, -4:] = 1.0


def small_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(FolderReader, "pieces", partialmethod(FolderReader.pieces, size=size))


@pytest.mark.parametrize("piece", [1, 1000, 1 << 26])
def test_a_pattern_in_floats(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """In all layers; then in all but one, for one group. Layers that are dense do not count."""
    small_pieces(monkeypatch, piece)
    layers = linears(model)
    dense = [name for name in layers if name.endswith("k_proj")]
    for name, layer in layers.items():
        if name not in dense:
            layer.weight.data *= mask_2_4(layer.weight.shape)
    model.save_pretrained(tmp_path)
    found = inspect_model(tmp_path)
    assert found.patterns == {"2:4": 12} and "pattern: 2:4 in all 12 pruned layers" in found.lines()
    assert {module.name for module in found.modules if module.pattern} == layers.keys() - set(dense)
    spoil(layers["model.layers.1.mlp.up_proj"].weight.data)
    model.save_pretrained(tmp_path)
    found = inspect_model(tmp_path)
    assert "pattern: 2:4 in 11 of 12 pruned layers; none in model.layers.1.mlp.up_proj" in found.lines()
    assert found.as_json()["patterns"] == {
        "pruned_layers": 12,
        "layers": {"2:4": 11},
        "without_pattern": ["model.layers.1.mlp.up_proj"],
    }


@pytest.mark.parametrize("piece", [1, 40_000, 1 << 26])
def test_a_pattern_in_weights_that_are_stored_transposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Its groups lie in the columns of the tensors, across the pieces that are read. A mask along the other axis is
    no pattern. Rows of 48 are no multiple of 32."""
    small_pieces(monkeypatch, piece)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=48, n_layer=1, n_head=2))
    block = model.transformer.h[0]
    for layer in (block.attn.c_attn, block.mlp.c_proj):
        layer.weight.data *= mask_2_4(layer.weight.T.shape).T
    block.mlp.c_fc.weight.data *= mask_2_4(block.mlp.c_fc.weight.shape)[0]  # of whole outputs
    spoil(block.mlp.c_proj.weight.data.T)
    model.save_pretrained(tmp_path)
    found = {module.name: module.pattern for module in inspect_model(tmp_path).modules if module.pruned}
    assert found == {
        "transformer.h.0.attn.c_attn": "2:4",
        "transformer.h.0.mlp.c_proj": None,
        "transformer.h.0.mlp.c_fc": None,
    }


def test_a_pattern_in_codes(model: LlamaForCausalLM, tokenizer: Any, registry: Registry, tmp_path: Path) -> None:
    """Where a zero has another code in every group; in GPTQ and compressed-tensors."""
    codes = {}
    for name, layer in linears(model).items():
        weight = (layer.weight.detach() + 0.05) * mask_2_4(layer.weight.shape)
        if name.endswith("0.self_attn.v_proj"):
            spoil(weight)
        scale, zero = fit_grid(weight.reshape(len(weight), -1, 16), 4, symmetric=False)
        grid = Grid(scale.half(), zero, 16, 4)
        codes[name] = Quantized(quantize(weight, grid).to(torch.uint8), grid)
    assert len({int(zero) for layer in codes.values() for zero in layer.grid.zero.flatten()}) > 2
    save_quantized(model, tokenizer, codes, tmp_path / "gptq")
    (tmp_path / "ct").mkdir()
    exporter = registry.get("exporter", "compressed-tensors").component()
    exporter.export(FinishedModel(tmp_path / "gptq"), tmp_path / "ct")  # type: ignore[attr-defined]
    for folder in ("gptq", "ct"):
        found = inspect_model(tmp_path / folder)
        assert found.patterns == {"2:4": 13}, folder
        assert found.without_pattern == ["model.layers.0.self_attn.v_proj"]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_pattern_in_experts(tmp_path: Path, transposed: bool) -> None:
    """Their weights are in two tensors, [experts, in, out] in some families."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 2}
    model = GptOssForCausalLM(GptOssConfig(**sizes)) if transposed else MixtralForCausalLM(MixtralConfig(**sizes))
    for name, weight in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            inputs_last = weight.data.mT if transposed else weight.data
            inputs_last *= mask_2_4(inputs_last.shape)
    model.save_pretrained(tmp_path)
    found = inspect_model(tmp_path)
    assert found.patterns == {"2:4": 2 if transposed else 6}
    assert {one.name for one in found.types} >= ({"gate_up_proj", "down_proj"} if transposed else {"w1", "w2", "w3"})


def test_every_tensor_is_read_once(model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never as a whole, which would need the memory for it."""
    model.save_pretrained(tmp_path)
    pieces, read = FolderReader.pieces, Counter[str]()

    def counted(reader: FolderReader, name: str) -> Any:
        read[name] += 1
        yield from pieces(reader, name, 100)

    monkeypatch.setattr(FolderReader, "pieces", counted)
    monkeypatch.setattr(FolderReader, "tensor", None)
    found = inspect_model(tmp_path)
    assert read == Counter(f"{module.name}.weight" for module in found.modules)


def test_types_of_layers(model: LlamaForCausalLM, quantized_folder: Path, tmp_path: Path) -> None:
    put = pruned(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    layers = linears(model)
    for one in inspect_model(tmp_path).types:
        mine = [name for name in layers if name.endswith(f".{one.name}")]
        assert one.layers == len(mine) == 2 and one.weights == sum(layers[name].weight.numel() for name in mine)
        assert one.sparsity == sum(put[name] for name in mine) / one.weights
        assert (one.bytes, one.bits) == (2 * one.weights, 16)
    coded = {one.name: one for one in inspect_model(quantized_folder).types}
    stored = load_file(quantized_folder / "model.safetensors")
    size = sum(tensor.nbytes for name, tensor in stored.items() if ".q_proj." in name)
    assert coded["q_proj"].bytes == size and coded["q_proj"].bits == 8 * size / (2 * 32 * 32) > 4
    assert coded["down_proj"].bits == 16 and len(coded) == 7


def test_artifacts_and_adapters(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    raw.pop("evaluate")
    orchestrator = Orchestrator(registry, tmp_path)
    run = orchestrator.run(orchestrator.plan(Recipe.parse(raw)))
    sparse = inspect_model(run["sparsify"].folder)
    assert sparse.path == run["sparsify"].folder / "model"
    assert sparse.linears.zeros == run["sparsify"].report["zeros"]
    adapter = inspect_model(run["search"].folder)
    assert adapter.format == "sqft adapter" and adapter.details["merger"] == "sparsepeft"
    assert adapter.all.weights == run["search"].report["trainable"] and not adapter.linears.modules
    assert [row[0] for row in adapter.table()[1]][-1] == "total, all" and "decoder blocks" not in str(adapter.table())
    raw["finetune"]["merger"], raw["search"] = "unmerged", {"searcher": "minimal"}
    raw.pop("merge")
    run = orchestrator.run(orchestrator.plan(Recipe.parse(raw)))
    adapter = inspect_model(run["search"].folder / "adapter")
    assert not adapter.linears.modules and not adapter.types
    assert adapter.format == "PEFT adapter" and adapter.details["ranks"] == "4" and adapter.details["alpha"] == 8


@pytest.mark.parametrize("piece", [1, 200, 1 << 24])
def test_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """However many weights are read at once."""
    monkeypatch.setattr(reading, "GGUF_PIECE", piece)
    weight = np.ones((64, 32), np.float32)
    weight[:16] = 0
    weight[16:, ::4] = 0
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", weight)
    packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", weight.astype(np.float16))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    for place in (tmp_path, tmp_path / "m.gguf"):
        found = inspect_model(place)
        assert found.format == "GGUF" and zeros(found) == {"blk.0.attn_q": 896, "blk.0.ffn_up": 896}
        assert found.precision == {"F32": 2048, "F16": 2048, "Q8_0": 2048} and found.all.sparsity == 0.4375
        assert found.patterns == {"3:4": 2} and [one.name for one in found.types] == ["attn_q", "ffn_up"]
        assert [one.bits for one in found.types] == [32, 8.5]


def test_what_is_packed_in_an_unknown_way_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq", "bits": 4}}')
    words = torch.zeros(8, 8, dtype=torch.int32)
    save_file({"a.0.q.qweight": words, "a.0.n.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    found = inspect_model(tmp_path)
    assert found.format == "quantized (awq)" and found.all.weights == 8 and found.all.zeros == 0
    assert any("not counted: 1 tensors" in line for line in found.lines())
    assert found.as_json()["modules"][1]["zeros"] is None


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def emptied(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def misread(folder: Path) -> None:
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 5}}')


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncated, "was cut off; copy it again"),
        (pickled, "pytorch_model.bin), which can run code when they are read"),
        (emptied, "has no .safetensors file"),
        (misread, "has bits 5"),
        (shutil.rmtree, "there is no folder"),
    ],
)
def test_one_clear_message(model_folder: Path, tmp_path: Path, harm: Any, message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    harm(folder)
    with pytest.raises(SqftError, match=str(folder)):
        inspect_model(folder)
    done = CliRunner().invoke(main, ["inspect", str(folder)])
    assert done.exit_code == 2 and message in done.output and done.output.count("error:") == 1


def test_a_part_that_does_not_fit_is_named(quantized_folder: Path, registry: Registry, tmp_path: Path) -> None:
    out = tmp_path / "ct"
    out.mkdir()
    registry.get("exporter", "compressed-tensors").component().export(FinishedModel(quantized_folder), out)  # type: ignore[attr-defined]
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight_scale"] = torch.ones(32, 3)
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(SqftError, match=r"parts of model\.layers\.0\.self_attn\.q_proj do not fit"):
        inspect_model(out)


def test_the_command(model_folder: Path) -> None:
    shown = CliRunner().invoke(main, ["inspect", str(model_folder)])
    assert shown.exit_code == 0, shown.output
    assert "format: Hugging Face floats" in shown.output
    assert "| model.layers.1.mlp.down_proj | 32×64 | float32 | 2,048 | 0 | 0.00% |" in shown.output
    assert "| down_proj | 2 | 4,096 | 0.00% | 32.00 | 16 KiB |" in shown.output and "pattern" not in shown.output
    assert "| total, linear layers in decoder blocks | 14 modules |" in shown.output
    content = json.loads(CliRunner().invoke(main, ["inspect", str(model_folder), "--json"]).stdout)
    assert content["totals"]["linears"]["sparsity"] == 0 and content["precision"].keys() == {"float32"}
    assert len(content["modules"]) == 14 + 1 + 5 and content["patterns"]["pruned_layers"] == 0
    assert content["types"][0] == {
        "name": "down_proj",
        "layers": 2,
        "weights": 4096,
        "sparsity": 0.0,
        "bytes": 16384,
        "bits": 32.0,
    }
