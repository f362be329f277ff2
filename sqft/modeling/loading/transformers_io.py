"""Models and tokenizers through transformers: loaded from a folder or a GGUF file, written as a folder."""

from __future__ import annotations

import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.safetensors import weight_files
from sqft.errors import ModelError
from sqft.kernels.finite import all_finite
from sqft.modeling.architecture.blocks import towers
from sqft.modeling.architecture.frozen import freeze
from sqft.modeling.architecture.linears import as_linears, as_stored
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.compat import fast_gguf
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.packed_floats import read_packed_floats
from sqft.utils.files import write_json

PROCESSOR_FILES = (
    "*processor*.json",
    "chat_template.*",
    "additional_chat_templates/*",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "*.model",
    "*.tiktoken",
)
"""Files of a folder that transformers' processors and other servers read, and its tokenizer does not write."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off transformers' progress bars, and its messages other than errors: sqft has its own log and display."""
    logger, bars = logging.getLogger("transformers"), transformers_logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def silent_transformers(gguf: bool = False) -> Iterator[None]:
    """Switch off warnings and standard error too: transformers' GGUF reader draws a progress bar of its own. And let it
    read a GGUF file faster, where it is to read one."""
    reading = fast_gguf() if gguf else nullcontext()
    with quiet_transformers(), reading, warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def load_skeleton(spec: ModelSpec) -> PreTrainedModel:
    """Load a model's modules on the meta device: no weight is read.

    Raises:
        ModelError: when transformers has no causal language model for its config.
    """
    try:
        with silent_transformers(spec.is_gguf), torch.device("meta"):
            config = _config(spec)
            if getattr(config, "quantization_config", None) is not None:
                del config.quantization_config
            made = stock_class(config).from_config(config, trust_remote_code=spec.trust_remote_code)
            return as_linears(made)
    except Exception as error:  # transformers' own checks of a config raise anything
        raise ModelError(
            f"transformers cannot make a causal language model of {spec.path}: {first_sentence(error)}"
        ) from error


def stock_class(config: PretrainedConfig) -> Any:
    """Return the auto class of transformers that makes the model which a config's `architectures` name.

    That is the class with its towers for images, video or sound where the folder has such a model, and otherwise the
    causal language model.
    """
    kind, causal = type(config), AutoModelForCausalLM
    if config.is_encoder_decoder or kind not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return causal
    # A folder that names neither class is loaded as it would be without towers, where there is such a class.
    named = MODEL_FOR_MULTIMODAL_LM_MAPPING[kind].__name__ in (config.architectures or ())
    return AutoModelForMultimodalLM if named or kind not in MODEL_FOR_CAUSAL_LM_MAPPING else causal


def skeleton_with_towers(spec: ModelSpec) -> PreTrainedModel | None:
    """Return, on the meta device, the model with towers that a folder could hold, if it is loaded without them as its
    config names no class that sqft knows; otherwise None."""
    with silent_transformers(spec.is_gguf), torch.device("meta"):
        config = _config(spec)
        kind = type(config)
        if stock_class(config) is AutoModelForMultimodalLM:
            return None
        if kind not in MODEL_FOR_MULTIMODAL_LM_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return None
        if MODEL_FOR_CAUSAL_LM_MAPPING[kind].__name__ in (config.architectures or ()):
            return None
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        made = AutoModelForMultimodalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
        return as_linears(made)


def _config(spec: ModelSpec) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(**_where(spec), trust_remote_code=spec.trust_remote_code)
    return config


def _where(spec: ModelSpec) -> dict[str, Any]:
    """Return the arguments by which transformers' `from_pretrained` finds a model."""
    if spec.is_gguf:
        return {"pretrained_model_name_or_path": spec.path.parent, "gguf_file": spec.path.name}
    return {"pretrained_model_name_or_path": spec.path}


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error's message, or its class where the message is empty or a bare key."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines[:2] = [f"{lines[0]} {lines[1]}"]
    return lines[0] if lines and not isinstance(error, KeyError) else f"{type(error).__name__} {error}".strip()


def load_floats(spec: ModelSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file or a folder of floats.

    Raises:
        ModelError: when transformers cannot load it, when a weight is missing, mis-shaped or not finite, or when the
            tokenizer knows more tokens than the model has rows for.
    """
    path, what = spec.path, f"the tokenizer of {spec.path}"
    try:
        with silent_transformers(spec.is_gguf):
            tokenizer = _tokenizer(spec)
            what = str(path)
            model, info = _dequantized(spec) if spec.dequantize else _from_pretrained(spec)
    except Exception as error:  # a file or config that transformers cannot read
        raise ModelError(f"transformers cannot load {what}: {first_sentence(error)}") from error
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise ModelError(f"{path}: {name} is {list(stored)}, and config.json makes it {list(expected)}; copy it again")
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random values
        raise ModelError(f"{path} lacks {missing[0]}, which {type(model).__name__} has by config.json; copy it again")
    _forget_quantization(model)
    check_vocabulary(model, tokenizer, path)
    for name, tensor in model.named_parameters():
        if not all_finite(tensor):
            raise ModelError(f"{path}: tensor {name} holds values that are not finite; the model cannot be used")
    return freeze(as_linears(model)).eval(), tokenizer


def _from_pretrained(spec: ModelSpec) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model through transformers; return it with transformers' account of the tensors."""
    model, info = stock_class(_config(spec)).from_pretrained(
        **_where(spec),
        dtype=getattr(torch, spec.dtype) if spec.dtype else "auto",
        trust_remote_code=spec.trust_remote_code,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported by name, by the caller
        output_loading_info=True,
    )
    return model, info


def _dequantized(spec: ModelSpec) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model of MXFP4 or FP8 from the floats that it stands for; return what `_from_pretrained` returns."""
    dtype, config, settings = getattr(torch, spec.dtype or "bfloat16"), _config(spec), None
    del config.quantization_config
    with torch.device("meta"):  # from values, transformers loads only into a class of its own
        kind = type(stock_class(config).from_config(config, trust_remote_code=spec.trust_remote_code))
    if (spec.path / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(spec.path)
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=read_packed_floats(spec.path, dtype),
        dtype=dtype,
        generation_config=settings,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return model, info


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Check that the model has a row for every token that text can become.

    Raises:
        ModelError: when the tokenizer has more tokens.
    """
    # Tokens that were added later may have no row (those of Gemma 3 for images): text does not become them.
    ordinary = len(tokenizer) - len(tokenizer.get_added_vocab())
    if ordinary > (rows := len(model.get_input_embeddings().weight)):
        raise ModelError(
            f"{path}: the tokenizer has {ordinary} tokens, and the model has rows for {rows}; use the model's own "
            "tokenizer, or add rows to the model with resize_token_embeddings"
        )


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer without the model; padding is the end of sequence where it has no padding token.

    Raises:
        ModelError: when transformers cannot make a tokenizer of its files.
    """
    try:
        with silent_transformers(spec.is_gguf):
            return _tokenizer(spec)
    except Exception as error:
        raise ModelError(f"transformers cannot load the tokenizer of {spec.path}: {first_sentence(error)}") from error


def _tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Load a tokenizer, and give it a padding token; any error is transformers' own."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        **_where(spec), trust_remote_code=spec.trust_remote_code
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:  # no other token will do: padding is left out of generated text
        raise ValueError("it has no end of sequence; name its eos_token in tokenizer_config.json")
    return tokenizer


def _forget_quantization(model: PreTrainedModel) -> None:
    """Remove what marks a dequantized GGUF model as quantized, so that it can be saved as an ordinary one."""
    if getattr(model.config, "quantization_config", None) is None:
        return
    del model.config.quantization_config
    for attribute, value in (("hf_quantizer", None), ("is_quantized", False), ("quantization_method", None)):
        if hasattr(model, attribute):
            setattr(model, attribute, value)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, source: ModelSpec | None = None
) -> None:
    """Write a Hugging Face folder that stock transformers, 4.x included, loads: weights, tokenizer, chat template,
    generation config.

    Args:
        model: after `as_linears`.
        tokenizer: the model's.
        folder: is made.
        source: what the model was loaded from; see `as_in_source`. The files of its processors for images, video and
            sound come along.
    """
    model.save_pretrained(folder, state_dict=as_stored(model))
    if source is not None and not source.is_gguf:
        _restore_precision(model, folder, source)
    save_settings(model, tokenizer, folder, source)


def save_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, source: ModelSpec | None = None
) -> None:
    """Write all of a model folder but its weights: config, tokenizer, chat template, generation config, and the files
    of the processors that `source` has."""
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    _add_names_of_transformers_4(folder)
    if source is not None and not source.is_gguf:
        for file in (file for pattern in PROCESSOR_FILES for file in source.path.glob(pattern)):
            target = folder / file.relative_to(source.path)
            if not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def as_in_source(model: PreTrainedModel, tensors: Mapping[str, Tensor], source: ModelSpec | None) -> dict[str, Tensor]:
    """Return tensors of a model, named as in checkpoints; those that did not change come as the folder it was loaded
    from has them, in their own precision.

    Where a precision was asked for, that is done for towers alone: it is the text model's.
    """
    result = dict(tensors)
    if source is not None and not source.is_gguf:
        stored = _reader(source)
        for name in _in_other_precision(model, {name: t.dtype for name, t in tensors.items()}, source, stored):
            original, tensor = stored.tensor(name), tensors[name]
            result[name] = original if original.to(tensor.dtype).equal(tensor) else tensor
    return result


def _reader(source: ModelSpec) -> FolderReader:
    return FolderReader(source.path, weight_files(source.path))


def _in_other_precision(
    model: PreTrainedModel, precisions: Mapping[str, torch.dtype], source: ModelSpec, stored: FolderReader
) -> list[str]:
    """Return the tensors that the source has in another precision, of those that keep theirs.

    Args:
        model: after `as_linears`.
        precisions: those of its tensors, named as in checkpoints.
        source: what it was loaded from.
        stored: reads that.
    """
    outside = tuple(f"{tower}." for tower in towers(model))
    if source.dtype and not outside:
        return []
    names = CheckpointNames(model)
    differing = (name for name, dtype in precisions.items() if stored.precisions.get(name, dtype) != dtype)
    return [name for name in differing if not source.dtype or f"{names.module_tensor(name)}.".startswith(outside)]


def _restore_precision(model: PreTrainedModel, folder: Path, source: ModelSpec) -> None:
    """Replace tensors of a written folder by those of `as_in_source`, in the files that have some."""
    written = FolderReader(folder).precisions
    differing = set(_in_other_precision(model, written, source, _reader(source)))
    for file in folder.glob("*.safetensors") if differing else ():
        tensors = load_file(file)
        if differing & tensors.keys():
            save_file(as_in_source(model, tensors, source), file, metadata={"format": "pt"})


def _add_names_of_transformers_4(folder: Path) -> None:
    """Add what transformers 4 and mlx_lm read: `rope_theta`, `rope_scaling` and `torch_dtype`, where transformers 5
    writes `rope_parameters` and `dtype`."""
    config = json.loads((folder / "config.json").read_text())
    _name_as_transformers_4(config)
    write_json(folder / "config.json", config)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        tokenizer = json.loads(settings.read_text())
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
            write_json(settings, tokenizer)


def _name_as_transformers_4(config: dict[str, Any]) -> None:
    """Add the older names to a config and to the configs in it: of the text model, of towers."""
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", rope)
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    for inner in config.values():
        if isinstance(inner, dict) and {"model_type", "rope_parameters"} & inner.keys():
            _name_as_transformers_4(inner)
