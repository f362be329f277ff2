"""A model that transformers reads: loaded, or refused with one message that names it."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import multimodal_models
import pytest
import torch
import transformers
from multimodal_models import FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import ModelError
from sqft.modeling.architecture.linears import Transposed
from sqft.modeling.loading import load_model, load_skeleton, load_tokenizer
from sqft.modeling.loading.transformers_io import quiet_transformers, save_model, silent_transformers, stock_class


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def edit(file: Path, **words: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | words))


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_the_precision_asked_for(model_folder: Path, model: LlamaForCausalLM, dtype: str | None) -> None:
    loaded, tokenizer = load_model(ModelSpec(model_folder, dtype))
    expected = getattr(torch, dtype or "float32")
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(model.get_parameter(name).to(expected)) and parameter.dtype == expected
        assert not parameter.requires_grad
    assert not loaded.training and tokenizer.pad_token_id == 1


def test_a_skeleton_reads_no_weight(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    skeleton = load_skeleton(ModelSpec(copy))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert type(skeleton).__name__ == "LlamaForCausalLM"


def test_a_skeleton_of_codes_is_one_of_floats(quantized_folder: Path, model: LlamaForCausalLM) -> None:
    names = {name for name, _ in load_skeleton(ModelSpec(quantized_folder)).named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}


def test_layers_that_transformers_keeps_otherwise(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Linear layers in memory, and as transformers has them when they are saved again."""
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    model, own = load_model(ModelSpec(tmp_path / "theirs"))
    assert any(isinstance(module, Transposed) for module in model.modules())
    save_model(model, own, tmp_path / "ours")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(after[name].equal(value) for name, value in before.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t["model.norm.weight"].fill_(torch.nan),
            r"tensor model\.norm\.weight holds values that are not fin",
        ),
        (
            lambda t: t.pop("model.norm.weight"),
            r"lacks model\.norm\.weight, which LlamaForCausalLM has by config\.json",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight is \[3\], and config\.json makes it \[32\]; copy it again",
        ),
    ],
    ids=["not finite", "missing", "of another shape"],
)
def test_a_tensor_is_named(copy: Path, change: Callable[[dict[str, Tensor]], object], words: str) -> None:
    changed(copy, change)
    with pytest.raises(ModelError, match=f"{copy}.*{words}"):
        load_model(ModelSpec(copy))


def test_a_folder_that_transformers_cannot_read(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=f"transformers cannot load {copy}: "):
        load_model(ModelSpec(copy))
    edit(copy / "config.json", model_type="lama")
    with pytest.raises(ModelError, match=f"transformers cannot make a causal language model of {copy}: .*lama"):
        load_skeleton(ModelSpec(copy))


def test_a_tokenizer_that_transformers_cannot_read(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    for load in (load_tokenizer, load_model):
        with pytest.raises(ModelError, match=f"transformers cannot load the tokenizer of {copy}: "):
            load(ModelSpec(copy))


def test_padding_is_the_end_of_sequence_where_there_is_none(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(ModelSpec(copy))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    edit(copy / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match="has no end of sequence; name its eos_token in tokenizer_config"):
        load_tokenizer(ModelSpec(copy))


def test_older_transformers_read_what_is_saved(model_folder: Path, tmp_path: Path) -> None:
    save_model(*load_model(ModelSpec(model_folder)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_older_readers_find_how_positions_are_scaled(copy: Path, tmp_path: Path) -> None:
    """Llama 3.1's, which they would otherwise take for plain ones; transformers 5 reads the same from both names."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    edit(copy / "config.json", rope_parameters=rope | {"original_max_position_embeddings": 32})
    model, tokenizer = load_model(ModelSpec(copy))
    save_model(model, tokenizer, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["rope_scaling"] == config["rope_parameters"] == rope | {"original_max_position_embeddings": 32}
    assert AutoConfig.from_pretrained(tmp_path / "saved").rope_parameters == model.config.rope_parameters


def test_older_transformers_read_the_configs_inside_a_config(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = multimodal_models.make("Mistral3")
    made.config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e9}
    made.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    save_model(*load_model(ModelSpec(tmp_path / "theirs")), tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["text_config"]["rope_theta"] == 1e9
    assert config["text_config"]["torch_dtype"] == config["vision_config"]["torch_dtype"] == "float32"
    assert config["vision_config"]["rope_theta"] == config["vision_config"]["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("m/model.gguf", {"pretrained_model_name_or_path": Path("m"), "gguf_file": "model.gguf"}),
        ("m", {"pretrained_model_name_or_path": Path("m")}),
    ],
)
@pytest.mark.parametrize("trusted", [False, True])
def test_what_transformers_is_asked_for(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, path: str, given: dict[str, Any], trusted: bool
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda **words: asked.append(words) or tokenizer)
    assert load_tokenizer(ModelSpec(Path(path), trust_remote_code=trusted)) is tokenizer
    assert asked == [given | {"trust_remote_code": trusted}]


@pytest.mark.parametrize("bars", [False, True])
def test_transformers_is_quiet_inside_only(bars: bool) -> None:
    logger, before = logging.getLogger("transformers"), transformers_logging.is_progress_bar_enabled()
    level = logger.level
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(KeyError), quiet_transformers():
            assert logger.level == logging.ERROR and not transformers_logging.is_progress_bar_enabled()
            raise KeyError
        assert logger.level == logging.INFO and transformers_logging.is_progress_bar_enabled() == bars
    finally:
        logger.setLevel(level)
        (transformers_logging.enable_progress_bar if before else transformers_logging.disable_progress_bar)()


def test_silence_takes_standard_error_too(capsys: pytest.CaptureFixture[str]) -> None:
    with silent_transformers():
        print("a bar", file=sys.stderr)
    print("a message", file=sys.stderr)
    assert capsys.readouterr().err == "a message\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_with_towers_where_the_folder_names_it(family: str) -> None:
    config = FAMILIES[family]()
    config.architectures = [f"{family}ForConditionalGeneration"]
    assert stock_class(config)._model_mapping[type(config)].__name__ == f"{family}ForConditionalGeneration"


def test_the_causal_class_elsewhere() -> None:
    config = FAMILIES["Qwen3_5"]()
    config.architectures = ["Qwen3_5ForCausalLM"]
    assert stock_class(config)._model_mapping[type(config)].__name__ == "Qwen3_5ForCausalLM"
    for causal in (transformers.LlamaConfig(), transformers.Gemma3TextConfig(), transformers.T5Config()):
        assert stock_class(causal) is transformers.AutoModelForCausalLM
    no_causal_class = FAMILIES["Qwen3VL"]()
    assert stock_class(no_causal_class) is transformers.AutoModelForMultimodalLM
