"""The chat template and special tokens of a folder, as transformers finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sqft.checkpoints.chat_template import stored_template
from tests.support.chats import chat_tokenizer


@pytest.mark.parametrize("name", ["qwen3", "gemma_like"])
def test_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    chat_tokenizer(name).save_pretrained(tmp_path)
    read, stored = AutoTokenizer.from_pretrained(tmp_path), stored_template(tmp_path)
    assert stored is not None
    assert stored.sources == {"default": read.chat_template}
    assert stored.tokens == dict(read.special_tokens_map)
    added = {str(token) for token in read.added_tokens_decoder.values() if token.special}
    assert set(stored.specials) == added | set(read.all_special_tokens)


def edit(folder: Path, name: str, **fields: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_templates_of_older_folders(tmp_path: Path) -> None:
    chat_tokenizer("gemma_like").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    stored = stored_template(tmp_path)
    assert stored is not None and stored.sources == {}
    edit(tmp_path, "tokenizer_config.json", chat_template="a", bos_token={"content": "<bos>", "special": True})
    stored = stored_template(tmp_path)
    assert stored is not None and stored.sources == {"default": "a"} and stored.tokens["bos_token"] == "<bos>"
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    edit(tmp_path, "tokenizer_config.json", chat_template=named)
    stored = stored_template(tmp_path)
    assert stored is not None and stored.sources == {"default": "a", "tool_use": "b"}


def test_what_only_a_tokenizer_knows(tmp_path: Path) -> None:
    assert stored_template(tmp_path) is None
    chat_tokenizer("gemma_like").save_pretrained(tmp_path)
    edit(tmp_path, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    assert stored_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert stored_template(tmp_path) is None
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert stored_template(tmp_path / "model.gguf") is None


def test_a_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "<|end|>", "a"])
    writer.add_token_types([3, 3, 3, 1])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    stored = stored_template(tmp_path / "m.gguf")
    assert stored is not None and stored.sources == {"default": "{{ messages }}"}
    assert stored.tokens == {"bos_token": "<s>", "eos_token": "</s>"} and stored.specials == ("</s>", "<s>", "<|end|>")
