"""The chat template and the special tokens of a model, read from its files without transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft.checkpoints.gguf import open_gguf
from sqft.checkpoints.safetensors import read_object
from sqft.errors import SqftError

FILE = "chat_template.jinja"
CONFIG, TOKENS, MAP = "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
GGUF_CONTROL = 3
"""The type of a control token in `tokenizer.ggml.token_type`."""


@dataclass(frozen=True)
class StoredTemplate:
    """The chat templates of a model, by name ("default", "tool_use"), none for a model that has none; its named special
    tokens, such as "eos_token"; and all its special tokens."""

    sources: dict[str, str]
    tokens: dict[str, str]
    specials: tuple[str, ...]


def stored_template(path: Path) -> StoredTemplate | None:
    """Read the chat template of a model's folder or GGUF file; None when only its tokenizer knows what it is.

    That is so for a tokenizer with code of its own, or without the files that transformers writes.
    """
    try:
        return _of_folder(path) if path.is_dir() else _of_gguf(path)
    except (SqftError, OSError, UnicodeDecodeError, KeyError, IndexError, TypeError, AttributeError):
        return None  # opening the model says what is wrong with a file


def _of_folder(folder: Path) -> StoredTemplate | None:
    if not (folder / TOKENS).is_file() or not (folder / CONFIG).is_file():
        return None
    config = read_object(folder / CONFIG)
    if "auto_map" in config:
        return None
    named = (read_object(folder / MAP) if (folder / MAP).is_file() else {}) | config
    tokens = {name: text for name in NAMED if (text := _text(named.get(name))) is not None}
    added = [*read_object(folder / TOKENS).get("added_tokens", ()), *config.get("added_tokens_decoder", {}).values()]
    specials = {str(token["content"]) for token in added if token.get("special")} | set(tokens.values())
    return StoredTemplate(dict(_sources(folder, config)), tokens, tuple(sorted(specials)))


def _sources(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the templates of a folder by name; a file of its own comes before tokenizer_config.json."""
    if (folder / FILE).is_file():
        yield "default", (folder / FILE).read_text("utf-8")
        for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
            yield file.stem, file.read_text("utf-8")
    elif isinstance(found := config.get("chat_template"), str):
        yield "default", found
    else:
        yield from ((entry["name"], entry["template"]) for entry in found or ())


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _of_gguf(path: Path) -> StoredTemplate:
    def value(key: str) -> Any:
        field = reader.get_field(f"tokenizer.{key}")
        return field.contents() if field is not None else None

    reader = open_gguf(path)
    words, kinds, source = value("ggml.tokens") or [], value("ggml.token_type") or [], value("chat_template")
    named = {name: value(f"ggml.{id_}_token_id") for name, id_ in (("bos_token", "bos"), ("eos_token", "eos"))}
    tokens = {name: str(words[index]) for name, index in named.items() if index is not None}
    specials = {str(word) for word, kind in zip(words, kinds, strict=False) if kind == GGUF_CONTROL}
    return StoredTemplate(
        {"default": str(source)} if source else {}, tokens, tuple(sorted(specials | set(tokens.values())))
    )
