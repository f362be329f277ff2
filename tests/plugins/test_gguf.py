"""`gguf`: codes as GGUF's blocks, read back by the package gguf and by transformers; what it refuses, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sqft_gguf import Gguf, vocabulary, writer
from sqft_gguf.families import (
    FAMILIES,
    LONG,
    SHORT,
    _attention_factor,
    interleave,
    refusal_of_config,
    rope_factors,
)
from sqft_gguf.grids import blocks, refusal_of_grid, type_of
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sqft import Orchestrator, Recipe, Registry
from sqft.api import Grid, Quantized, StageError
from sqft.errors import RecipeError
from sqft.kernels.grids import dequantize
from sqft.modeling.loading.finished_model import FinishedModel
from tests.support.byte_bpe import byte_level_bpe


@st.composite
def layers(draw: st.DrawFn) -> Quantized:
    bits, size = draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([-1, 32, 64]))
    symmetric = draw(st.booleans()) or bits == 8
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    out, inputs = draw(st.integers(1, 5)), draw(st.sampled_from([64, 192]))
    groups = 1 if size == -1 else inputs // size
    zero = torch.randint(0, 2**bits, (out, groups), generator=g)
    zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
    codes = torch.randint(0, 2**bits, (out, inputs), generator=g, dtype=torch.uint8)
    scale = (torch.randn(out, groups, generator=g) * 10.0 ** draw(st.integers(-6, 3))).half()
    return Quantized(codes, Grid(scale, zero.to(torch.uint8), size, bits, None))


@settings(max_examples=60, deadline=None)
@given(layers())
def test_every_weight_keeps_its_value(layer: Quantized) -> None:
    """Bit for bit, by gguf's own reader of blocks; scales have both signs, and some few digits in float16."""
    kind = type_of(layer.grid, layer.codes.shape[1])
    found = gguf.quants.dequantize(blocks(layer), kind)
    assert np.array_equal(found, dequantize(layer).numpy())
    bits, symmetric = layer.grid.bits, bool((layer.grid.zero == 2 ** (layer.grid.bits - 1)).all())
    expected = "Q8_0" if bits == 8 else "Q5_0" if bits == 4 and not symmetric else "Q4_0"
    assert kind.name == expected


@pytest.mark.parametrize(
    ("grid", "why"),
    [
        ({"bits": 4, "act_order": True}, "act-order have no place in GGUF; add static_groups to act_order"),
        ({"bits": 4, "group_size": 16}, "groups of 16 are no multiple of that"),
        ({"bits": 8, "symmetric": False}, "no type for 8 bits with zero points; set symmetric to true"),
        ({"bits": 8, "group_size": 128, "symmetric": True, "act_order": False}, None),
        ({"bits": 3, "group_size": -1, "symmetric": False}, None),
        ({}, None),
    ],
)
def test_grids_that_gguf_has_no_type_for(grid: dict[str, Any], why: str | None) -> None:
    found = refusal_of_grid(grid)
    assert found is None if why is None else why in str(found)


@pytest.mark.parametrize(
    ("grid", "inputs", "why"),
    [
        (Grid(torch.ones(2, 2).half(), torch.full((2, 2), 3), 32, 8, None), 64, "8 bits with zero points"),
        (Grid(torch.ones(2, 2).half(), torch.full((2, 2), 8), 32, 4, torch.arange(64) % 2), 64, "act-order"),
        (Grid(torch.ones(2, 1).half(), torch.full((2, 1), 8), -1, 4, None), 48, "rows of 48 do not fill them"),
    ],
)
def test_codes_that_gguf_has_no_type_for(grid: Grid, inputs: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        type_of(grid, inputs)


GEMMA = {
    "model_type": "gemma3_text", "head_dim": 64, "num_attention_heads": 32, "num_hidden_layers": 7,
    "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"], "query_pre_attn_scalar": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            {"model_type": "gemma3"},
            "phi3, gemma2, gemma3_text, and this one's model_type is gemma3",
        ),
        (
            {"model_type": "llama", "rope_scaling": {"type": "dynamic"}},
            "positions of llama that are scaled by 'dynamic'",
        ),
        ({"model_type": "qwen2", "hidden_act": "gelu"}, "computes silu in models of qwen2, and this one has gelu"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}, "no text is longer than 8 tokens"),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8}, None),
        ({"model_type": "mistral", "sliding_window": 8, "max_position_embeddings": 16}, "has no sliding window"),
        ({"model_type": "mistral", "sliding_window": 16, "max_position_embeddings": 16}, None),
        ({"model_type": "llama", "hidden_act": "silu", "rope_parameters": {"rope_type": "llama3"}}, None),
        (
            {"model_type": "qwen2", "rope_parameters": {"rope_type": "llama3"}},
            "positions of qwen2 that are scaled by 'llama3'",
        ),
        ({"model_type": "qwen3", "attention_bias": True}, "no biases of attention in models of qwen3"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "beta_fast": 8}},
            "cannot write beta_fast of",
        ),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": None}}, None),
        ({}, None),
        ({"model_type": "phi3", "sliding_window": 2047, "max_position_embeddings": 4096}, "has no sliding window"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [], "long_factor": []}}, None),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_mscale": 1.2}},
            "cannot write short_mscale",
        ),
        (
            {"model_type": "qwen2", "rope_scaling": {"type": "longrope"}},
            "positions of qwen2 that are scaled by 'longrope'",
        ),
        (
            {"model_type": "llama", "head_dim": 64, "partial_rotary_factor": 0.5},
            "cannot write partial_rotary_factor of",
        ),
        ({"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [], "long_factor": []}}, None),
        ({**GEMMA, "attention_bias": True}, "no biases of attention in models of gemma3_text"),
        (GEMMA, None),
        ({**GEMMA, "layer_types": ["full_attention"] * 7}, "but each 6th a sliding window, and layer_types differ"),
        (
            {**GEMMA, "query_pre_attn_scalar": 144},
            "scales attention of gemma3_text by 64, and query_pre_attn_scalar is 144",
        ),
        ({**GEMMA, "query_pre_attn_scalar": 168, "num_hidden_layers": 62, "hidden_size": 5376}, None),
        ({**GEMMA, "use_bidirectional_attention": True}, "attention in both directions"),
        ({**GEMMA, "tie_word_embeddings": False}, "no head in models of gemma3_text besides the embedding"),
        ({**GEMMA, "attn_logit_softcapping": 50.0}, "does not cap the logits of attention"),
        ({**GEMMA, "hidden_activation": "relu"}, "computes gelu_pytorch_tanh in models of gemma3_text"),
        (
            {**GEMMA, "rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "linear"}}},
            "in a sliding window that are scaled by 'linear'",
        ),
        ({"model_type": "gemma2", "attn_logit_softcapping": None}, "caps the logits of gemma2"),
    ],
)
def test_models_that_are_not_written(config: dict[str, Any], why: str | None) -> None:
    found = refusal_of_config(config)
    assert found is None if why is None else why in str(found)


def test_rows_in_turn_turn_alike() -> None:
    """Angles on neighbours, of rows put in turn, give the products of angles on halves: attention is the same."""
    heads, size = 3, 8
    q, k = torch.randn(2, heads * size, 5, dtype=torch.float64)
    angle = torch.rand(size // 2, dtype=torch.float64)

    def turned(one: torch.Tensor, two: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sine, cosine = angle.sin()[:, None], angle.cos()[:, None]
        return one * cosine - two * sine, one * sine + two * cosine

    def halves(x: torch.Tensor) -> torch.Tensor:
        return torch.cat(turned(*x.reshape(heads, 2, size // 2, -1).unbind(1)), 1)

    def neighbours(x: torch.Tensor) -> torch.Tensor:
        x = torch.from_numpy(interleave(x.numpy(), heads))
        return torch.stack(turned(*x.reshape(heads, size // 2, 2, -1).unbind(2)), 2).reshape(heads, size, -1)

    expected = torch.einsum("hsa,hsb->hab", halves(q), halves(k))
    torch.testing.assert_close(torch.einsum("hsa,hsb->hab", neighbours(q), neighbours(k)), expected)
    assert np.array_equal(interleave(np.arange(8), 2), [0, 2, 1, 3, 4, 6, 5, 7])


def test_frequencies_of_llama_3() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    (found,) = rope_factors(config.to_dict()).values()
    torch.testing.assert_close(torch.from_numpy(found), (plain / scaled.double()).float())
    assert rope_factors({"rope_theta": 1e4}) == {}


@pytest.mark.parametrize("given", [{}, {"factor": 32.0}, {"attention_factor": 1.5}])
def test_frequencies_of_phi_3(given: dict[str, float]) -> None:
    """Divisors, and what queries and keys are multiplied by, as transformers has them."""
    factors = {"short_factor": [1.0 + k for k in range(8)], "long_factor": [2.0 + k for k in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096, **factors, **given}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 131072}
    config = Phi3Config(**sizes, rope_parameters=rope)
    for name, length in ((SHORT, 8), (LONG, 10_000)):
        scaled, factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=length)
        plain = 1e4 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
        found = torch.from_numpy(rope_factors(config.to_dict())[name])
        torch.testing.assert_close(found, (plain / scaled.double()).float())
        assert _attention_factor(config.to_dict()) == pytest.approx(factor)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    ("cutting", "name"),
    [
        (BYTES, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}, "smollm"),
        *(
            (
                {"type": "Sequence", "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
                    {**BYTES, "use_regex": False}]},
                name,
            )
            for pattern, name in vocabulary.SPLITS.items()
        ),
        ({**BYTES, "add_prefix_space": True}, None),
        ({"type": "Metaspace"}, None),
        (None, None),
    ],
)  # fmt: skip
def test_how_a_tokenizer_cuts(cutting: Any, name: str | None) -> None:
    stored = {"model": {"type": "BPE", "ignore_merges": name == "llama-bpe"}, "pre_tokenizer": cutting}
    if name:
        assert (
            vocabulary.how_it_cuts(stored) == vocabulary.how_it_cuts({**stored, "normalizer": {"type": "NFC"}}) == name
        )
        with pytest.raises(StageError, match="not known here"):
            vocabulary.how_it_cuts({**stored, "normalizer": {"type": "Lowercase"}})
    else:
        with pytest.raises(StageError, match=r"the tokenizer \(BPE\) cuts texts in a way that is not known here"):
            vocabulary.how_it_cuts(stored)
    with pytest.raises(StageError, match=r"the tokenizer \(Unigram\)"):
        vocabulary.how_it_cuts({**stored, "model": {"type": "Unigram"}})


# -- whole models ---------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model that GGUF can hold, in bfloat16 but for its norms, with rows that no token has."""
    inner = byte_level_bpe(["the then them there"], 262, ["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{{ messages }}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def recipe(tiny: Path, options: dict[str, Any] | None, **exporter: Any) -> Recipe:
    raw: dict[str, Any] = {"name": "g", "model": {"path": str(tiny)}, "sparsify": {"scorer": "magnitude"}}
    if options is not None:
        raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32} | options}}
    return Recipe.parse(raw | {"export": [{"exporter": {"name": "gguf", "options": exporter}}]})


@pytest.mark.parametrize(
    ("options", "kind"),
    [(None, "F32"), ({}, "Q4_0"), ({"symmetric": False}, "Q5_0"), ({"bits": 2}, "Q4_0"), ({"bits": 8}, "Q8_0")],
)
def test_transformers_reads_the_weights_that_the_model_has(
    options: dict[str, Any] | None, kind: str, tiny: Path, registry: Registry, tmp_path: Path
) -> None:
    """A second witness of names, orders of rows and values, bit for bit; zeros included."""
    orchestrator = Orchestrator(registry, tmp_path / "store")
    run = orchestrator.run(orchestrator.plan(recipe(tiny, options)))
    folder = run["export"].folder / "model"
    assert [file.name for file in folder.iterdir()] == ["model.gguf"]
    tensors = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
    assert tensors["blk.1.ffn_down.weight"] == tensors["blk.0.attn_q.weight"] == kind
    assert tensors["output.weight"] == tensors["blk.0.attn_norm.weight"] == "F32"
    found = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    made = FinishedModel(run["sparsify" if options is None else "quantize"].folder / "model")
    assert {*made.names()} == found.keys()
    for name in made.names():
        assert torch.equal(found[name], made.tensor(name).float()), name


def test_the_tokenizer_and_the_settings(tiny: Path, registry: Registry, tmp_path: Path) -> None:
    orchestrator = Orchestrator(registry, tmp_path / "store")
    run = orchestrator.run(orchestrator.plan(recipe(tiny, {}, embeddings="float16", dtype="bfloat16")))
    reader = gguf.GGUFReader(run["export"].folder / "model" / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:2] == ["<s>", "</s>"] and kinds[:3] == [3, 3, 1]
    assert len(tokens) == 264 and tokens[-2:] == ["[PAD262]", "[PAD263]"] and kinds[-2:] == [5, 5]
    assert fields["tokenizer.ggml.bos_token_id"] == 0 and fields["tokenizer.ggml.eos_token_id"] == 1
    assert fields["tokenizer.ggml.add_bos_token"] is False and fields["tokenizer.chat_template"] == "{{ messages }}"
    assert fields["llama.attention.head_count_kv"] == 2 and fields["llama.rope.dimension_count"] == 16
    assert fields["general.architecture"] == "llama" and fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    kinds_of = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds_of["token_embd.weight"] == kinds_of["output.weight"] == "F16"


def test_a_head_with_values_of_its_own_is_kept_though_the_config_ties_it(tiny: Path, tmp_path: Path) -> None:
    config = config_of(tiny)
    (tiny / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    names = {tensor.name for tensor in gguf.GGUFReader(written(FinishedModel(tiny), tmp_path / "own")).tensors}
    assert "output.weight" in names
    state = load_file(tiny / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, tiny / "model.safetensors")
    names = {tensor.name for tensor in gguf.GGUFReader(written(FinishedModel(tiny), tmp_path / "tied")).tensors}
    assert "output.weight" not in names


def test_embeddings_of_8_bits(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    Gguf(embeddings="q8_0").export(FinishedModel(tiny), tmp_path / "out")
    (embedding,) = (
        t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors if t.name == "token_embd.weight"
    )
    values = gguf.quants.dequantize(embedding.data, embedding.tensor_type)
    original = FinishedModel(tiny).tensor("model.embed_tokens.weight").numpy()
    assert embedding.tensor_type.name == "Q8_0" and not np.array_equal(values, original)
    assert np.abs(values - original).max() <= np.abs(original).max() / 127


@pytest.mark.parametrize(
    ("options", "why"),
    [({"bits": 8, "symmetric": False}, "no type for 8 bits with zero points"), (None, "")],
)
def test_the_plan_refuses_what_cannot_be_written(
    options: dict[str, Any] | None, why: str, tiny: Path, registry: Registry, tmp_path: Path
) -> None:
    if options is None:
        config = json.loads((tiny / "config.json").read_text())
        (tiny / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
        why = "computes silu in models of llama, and this one has relu"
    with pytest.raises(RecipeError) as caught:
        Orchestrator(registry, tmp_path).plan(recipe(tiny, options))
    (problem,) = caught.value.problems
    assert problem.place == "export.0.exporter" and why in problem.message


def test_the_plan_refuses_a_tokenizer(tiny: Path, registry: Registry, tmp_path: Path) -> None:
    stored = json.loads((tiny / "tokenizer.json").read_text())
    (tiny / "tokenizer.json").write_text(json.dumps(stored | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(RecipeError, match=r"export\.0\.exporter: .* cuts texts in a way that is not known here"):
        Orchestrator(registry, tmp_path / "store").plan(recipe(tiny, {}))


@pytest.mark.parametrize(("around", "adds"), [("<s> $A", (True, False)), ("$A </s>", (False, True)), ("</s> $A", None)])
def test_what_a_tokenizer_puts_around_a_text(around: str, adds: tuple[bool, bool] | None, tiny: Path) -> None:
    """Padding in its file is none of that; other tokens there are refused."""
    inner = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 0), ("</s>", 1)])
    inner.enable_padding(length=8, pad_id=1, pad_token="</s>")
    inner.save(str(tiny / "tokenizer.json"))
    if adds:
        assert vocabulary._added(tiny, {"bos": 0, "eos": 1}) == dict(zip(("bos", "eos"), adds, strict=True))
    else:
        with pytest.raises(StageError, match="puts tokens around a text that are not its first and its last one"):
            vocabulary._added(tiny, {"bos": 0, "eos": 1})


def test_embeddings_that_no_blocks_of_32_fill(tiny: Path) -> None:
    with pytest.raises(StageError, match="has rows of 48, and q8_0 wants multiples of 32"):
        writer._precision("lm_head.weight", torch.ones(2, 48), "as-is", "q8_0")


def test_what_was_written_is_read_back(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row in another order is found, and a tokenizer that cannot be written, and a family that has no name here."""
    model = FinishedModel(tiny)
    file, entries = written(model, tmp_path / "out"), list(writer._entries(model, config_of(tiny), "as-is", "as-is"))
    writer.check(model, file, entries)
    monkeypatch.setattr(writer, "interleave", lambda rows, heads: rows)
    with pytest.raises(StageError, match=r"blk\.0\.attn_k\.weight as stored has not the values of model\.layers\.0"):
        writer.check(model, file, entries)
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(StageError, match=r"has no tokenizer\.json"):
        written(model, tmp_path / "again")
    assert set(FAMILIES) == {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def written(model: FinishedModel, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    Gguf().export(model, folder)
    return folder / "model.gguf"
