"""Models and tokenizers in and out, as published: a folder, a GGUF file, a Hugging Face id."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from sqft.checkpoints.model_source import ModelSource
from sqft.errors import StageError
from sqft.modeling.architecture.linears import as_linears, as_stored
from sqft.utils.files import write_json

transformers_logging.disable_progress_bar()


logging.getLogger("transformers").setLevel(logging.ERROR)


def load_source(
    source: ModelSource, dtype: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pre-trained model and tokenizer a recipe names, on the CPU, in evaluation mode.

    Raises:
        StageError: when transformers cannot make a causal language model of it.
    """
    return _load(_where(source), dtype, trust_remote_code, str(source.path))


def skeleton(source: ModelSource, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's modules on the meta device: no weight is read.

    Raises:
        StageError: when transformers has no causal language model for its config.
    """
    try:
        with warnings.catch_warnings(), _quiet(), torch.device("meta"):
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(**_where(source), trust_remote_code=trust_remote_code)
            if source.quantization:
                del config.quantization_config
            return as_linears(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    except Exception as error:  # transformers' own checks of a config raise anything
        raise StageError(
            f"transformers cannot make a causal language model of {source.path}: {_first(error)}"
        ) from error


def _where(source: ModelSource) -> dict[str, Any]:
    if source.kind == "gguf":
        return {"pretrained_model_name_or_path": source.path.parent, "gguf_file": source.path.name}
    return {"pretrained_model_name_or_path": source.path}


def _first(error: Exception) -> str:
    """The first sentence of what it says, or its name when that is nothing or a bare key."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines[:2] = [f"{lines[0]} {lines[1]}"]
    return lines[0] if lines and not isinstance(error, KeyError) else f"{type(error).__name__} {error}".strip()


def load_folder(
    folder: Path, dtype: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model folder that sqft wrote, in its own precision unless told."""
    return _load({"pretrained_model_name_or_path": folder}, dtype or "auto", trust_remote_code, str(folder))


def _load(
    where: dict[str, Any], dtype: str, trust_remote_code: bool, place: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    wanted = getattr(torch, dtype) if dtype != "auto" else "auto"
    what = f"the tokenizer of {place}"
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            tokenizer = _tokenizer(where, trust_remote_code)
            what = place
            model, found = AutoModelForCausalLM.from_pretrained(
                **where,
                dtype=wanted,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # told below, by name
                output_loading_info=True,
            )
    except Exception as error:  # a file or config that transformers makes nothing of
        raise StageError(f"transformers cannot load {what}: {_first(error)}") from error
    if odd := sorted(found["mismatched_keys"]):
        name, stored, expected = odd[0]
        raise StageError(f"{place}: {name} is {list(stored)}, and config.json makes it {list(expected)}; copy it again")
    if missing := sorted(found["missing_keys"]):  # transformers would make them up
        raise StageError(f"{place} lacks {missing[0]}, which {type(model).__name__} has by config.json; copy it again")
    _forget_quantization(model)
    check_vocabulary(model, tokenizer, place)
    for name, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            raise StageError(f"{place}: tensor {name} holds values that are not finite; the model cannot be used")
    model.requires_grad_(False)
    return as_linears(model).eval(), tokenizer


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """The model has a row for every token that text can become.

    Raises:
        StageError: when the tokenizer knows more.
    """
    # Tokens that were added besides may have no row (Gemma 3's of images): text does not make them.
    ordinary = len(tokenizer) - len(tokenizer.get_added_vocab())
    if ordinary > (rows := len(model.get_input_embeddings().weight)):
        raise StageError(
            f"{place}: the tokenizer knows {ordinary} tokens, and the model {rows}; bring the model's own "
            "tokenizer, or give the model rows for all with resize_token_embeddings"
        )


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder that sqft wrote; padding is the end of sequence where it has none."""
    return _tokenizer({"pretrained_model_name_or_path": folder}, trust_remote_code)


def source_tokenizer(source: ModelSource, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that a recipe names, without the model.

    Raises:
        StageError: when transformers cannot make one of its files.
    """
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            return _tokenizer(_where(source), trust_remote_code)
    except Exception as error:
        raise StageError(f"transformers cannot load the tokenizer of {source.path}: {_first(error)}") from error


def _tokenizer(where: dict[str, Any], trust_remote_code: bool) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**where, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:  # nothing else can stand for it: what pads is left out of generated text
        raise ValueError("it has no end of sequence; name its eos_token in tokenizer_config.json")
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' GGUF reader draws a bar of its own; sqft's log and display say what goes on."""
    with redirect_stderr(io.StringIO()):
        yield


def _forget_quantization(model: PreTrainedModel) -> None:
    """A dequantized GGUF model is an ordinary one; without its traces it can be saved."""
    if getattr(model.config, "quantization_config", None) is None:
        return
    del model.config.quantization_config
    for trace, value in (("hf_quantizer", None), ("is_quantized", False), ("quantization_method", None)):
        if hasattr(model, trace):
            setattr(model, trace, value)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face folder that stock transformers, 4.x included, loads: weights, tokenizer,
    chat template, generation config."""
    model.save_pretrained(folder, state_dict=as_stored(model))
    save_settings(model, tokenizer, folder)


def save_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """All of a model folder but its weights: config, tokenizer, chat template, generation config."""
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    _speak_to_older_transformers(folder)


def _speak_to_older_transformers(folder: Path) -> None:
    """transformers 5 writes `rope_parameters` and `dtype`; 4.x reads `rope_theta` and `torch_dtype`."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    write_json(folder / "config.json", config)
    place = folder / "tokenizer_config.json"
    if place.is_file():
        tokenizer = json.loads(place.read_text())
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
            write_json(place, tokenizer)
