"""Bad input of every kind: one message with place, expectation and remedy, status 2, and a store of whole artifacts."""

# ruff: noqa: E501
from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from sqft_baselines import Magnitude
from sqft_gptq import Rtn
from sqft_hf import HuggingFace
from sqft_nls.adapter import Lora
from sqft_nls.searchers import Heuristic
from sqft_sparsepeft import SparsePEFT
from sqft_uniform import Uniform

from sqft import Registry
from sqft.api import Quantized, RankConfig, SearchSpace
from sqft.cli import main
from sqft.components.kinds import Component
from sqft.store.artifacts import Store


@dataclass
class Case:
    """What a case may change before the command runs."""

    raw: dict[str, Any]
    folder: Path
    options: list[str] = field(default_factory=list)
    text: bytes | None = None
    command: str = "run"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.json"

    def model(self) -> Path:
        """A copy of the model's folder, to spoil."""
        place = self.folder / "model"
        if not place.exists():
            shutil.copytree(self.raw["model"]["path"], place)
            self.raw["model"]["path"] = str(place)
        return place

    def words(self) -> list[str]:
        if self.text is not None:
            self.recipe.write_bytes(self.text)
        elif not self.recipe.is_symlink() and not self.recipe.exists():
            self.recipe.write_text(json.dumps(self.raw))
        return [self.command, str(self.recipe), "--store", str(self.store), *self.options]


Change = Callable[[Case], object]
DELETE = object()


def put(path: str, value: Any = DELETE) -> Change:
    """Set, or take out, one place of the recipe."""

    def change(case: Case) -> None:
        *parents, last = path.split(".")
        here: Any = case.raw
        for part in parents:
            here = here[part]
        here.pop(last) if value is DELETE else here.update({last: value})

    return change


def all_of(*changes: Change) -> Change:
    return lambda case: [change(case) for change in changes]


def only(*sections: str) -> Change:
    """Leave out all sections but these."""
    keep = {"schema", "name", "model", *sections}
    return lambda case: [case.raw.pop(name) for name in [*case.raw] if name not in keep]


def text(content: bytes | str) -> Change:
    return lambda case: setattr(case, "text", content.encode() if isinstance(content, str) else content)


def options(*words: str) -> Change:
    return lambda case: case.options.extend(words)


def data(place: str, content: bytes | str, name: str = "bad.jsonl") -> Change:
    def change(case: Case) -> None:
        file = case.folder / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        put(place, str(file))(case)

    return change


def model_file(name: str, content: bytes | str | Callable[[bytes], bytes] | None) -> Change:
    """Give a file of the model other content; None takes it away."""

    def change(case: Case) -> None:
        file = case.model() / name
        if content is None:
            file.unlink()
        else:
            new = content(file.read_bytes()) if callable(content) else content
            file.write_bytes(new.encode() if isinstance(new, str) else new)

    return change


def settings(name: str, **values: Any) -> Change:
    """Change entries of a JSON file of the model; DELETE takes one out."""

    def change(whole: bytes) -> bytes:
        content = json.loads(whole) | values
        return json.dumps({key: value for key, value in content.items() if value is not DELETE}).encode()

    return model_file(name, change)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def whole(case: Case) -> None:
        file = case.model() / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return whole


def header(content: bytes, length: int | None = None) -> Change:
    return model_file("model.safetensors", struct.pack("<Q", len(content) if length is None else length) + content)


def spoil(value: float, name: str = "model.layers.0.mlp.up_proj.weight") -> Change:
    return weights(lambda tensors: tensors[name].view(-1).__setitem__(3, value))


JUST_SPARSE = only("sparsify", "calibration")
FAST = all_of(only("sparsify"), put("sparsify.scorer", "magnitude"))
"""Sparse without calibration."""
MEASURED = only("evaluate")
GOOD = '{"prompt": "1+1=", "completion": "2"}\n'

THE_FILE: list[tuple[str, Change, str]] = [
    ("no file", lambda c: c.recipe.symlink_to(c.folder / "none.json"), "recipe.json: 1 problem|cannot be read: No such file"),
    ("a folder", lambda c: c.recipe.mkdir(), "recipe.json' is a directory"),
    ("empty", text(""), "line 1, column 1: not valid JSON"),
    ("truncated", text('{"name": "x", "model": {'), "line 1, column 25: not valid JSON"),
    ("a list", text("[]"), "expected a JSON object, found list"),
    ("a number", text("7"), "expected a JSON object, found int"),
    ("null", text("null"), "expected a JSON object, found"),
    ("a key twice", text('{"name": "a", "name": "b"}'), "the key 'name' appears twice in one object; keep one"),
    ("NaN", text('{"name": "x", "seed": NaN}'), "NaN is not a valid JSON number; write a finite number"),
    ("infinity", text('{"name": "x", "seed": -Infinity}'), "-Infinity is not a valid JSON number"),
    ("beyond a float", text('{"name": "x", "model": {"path": "x"}, "sparsify": {"scorer": "wanda", "sparsity": 1e999}}'), "sparsify.sparsity: input should be"),
    ("Latin-1", text('{"name": "\xe9"}'.encode("latin-1")), "is not UTF-8 text; save it as UTF-8"),
    ("UTF-16", text('{"name": "x"}'.encode("utf-16")), "is not UTF-8 text; save it as UTF-8"),
    ("too deep", text("[" * 100_000), "nested too deeply to be a recipe"),
    ("digits without end", text('{"name": "x", "seed": ' + "9" * 5000 + "}"), "9999999999… is a number of 5000 digits; write one of at most 1000"),
    ("a comment", text('{"name": "x" // mine\n}'), "line 1, column 14: not valid JSON"),
    ("a trailing comma", text('{"name": "x",}'), "not valid JSON"),
    ("half a surrogate pair", text('{"name": "x", "model": {"path": "\\ud800"}, "sparsify": {"scorer": "magnitude"}}'), "model.path: "),
    ("binary", text(bytes(range(256))), "is not UTF-8 text"),
]  # fmt: skip

THE_RECIPE: list[tuple[str, Change, str]] = [
    ("an unknown key", put("sparsfy", {}), "sparsfy: unknown key; known here: |Did you mean 'sparsify'?"),
    ("an unknown key inside", put("finetune.learning_rte", 1), "finetune.learning_rte: unknown key|Did you mean 'learning_rate'?"),
    ("nothing asked for", only(), "asks for nothing; add a section"),
    ("no name", put("name"), "name: is missing"),
    ("a name with a slash", put("name", "a/b"), "name: string should match pattern"),
    ("a name of dots", put("name", ".."), "name: string should match pattern"),
    ("a schema to come", put("schema", 2), "schema: input should be 1, found 2"),
    ("a seed below 0", put("seed", -1), "seed: input should be greater than or equal to 0, found -1"),
    ("a seed too large", put("seed", 2**32), "seed: input should be less than 4294967296"),
    ("a section that is text", put("sparsify", "wanda"), "sparsify: input should be a valid dictionary"),
    ("all of it sparse", put("sparsify.sparsity", 1), "sparsify.sparsity: input should be less than 1, found 1"),
    ("less than nothing", put("sparsify.sparsity", -0.1), "sparsify.sparsity: input should be greater than or equal to 0"),
    ("sparsity in words", put("sparsify.sparsity", "half"), 'sparsify.sparsity: input should be a valid number|found "half"'),
    ("an N:M that does not divide", all_of(put("sparsify.pattern", "2:48"), put("sparsify.sparsity", 1 - 2 / 48)), "sparsify.pattern: '2:48' needs layers whose inputs are a multiple of 48|has 32 (14 such layers)"),
    ("an N:M of zero", put("sparsify.pattern", "0:4"), "sparsify.pattern: pattern '0:4' must be 'row', 'layer' or 'N:M'"),
    ("layers with nothing left", all_of(only("finetune", "sparsify"), put("sparsify.scorer", "magnitude"), put("sparsify.sparsity", 0.99)), "finetune.targets: model.layers.0.self_attn.q_proj keeps none of its weights|prune less"),
    ("an N:M against its sparsity", all_of(put("sparsify.sparsity", 0.5), put("sparsify.pattern", "1:4")), "sparsify.pattern: '1:4' is a sparsity of 0.75, not 0.5; set"),
    ("an unknown scorer", put("sparsify.scorer", "wnda"), "sparsify.scorer: no scorer named 'wnda'; installed: |Did you mean 'wanda'?"),
    ("a scorer of no plugin", put("sparsify.scorer", "mine/wanda"), "sparsify.scorer: no scorer named 'mine/wanda'"),
    ("an unknown allocator", put("sparsify.allocator", "unifrm"), "Did you mean 'uniform'?"),
    ("an unknown adapter", put("finetune.adapter", "lara"), "finetune.adapter: no adapter named 'lara'|Did you mean 'lora'?"),
    ("an unknown merger", put("finetune.merger", "sparspeft"), "finetune.merger: no merger named|Did you mean 'sparsepeft'?"),
    ("an unknown searcher", put("search.searcher", "hill-climb"), "search.searcher: no searcher named|Did you mean 'hill-climbing'?"),
    ("an unknown exporter", put("export", [{"exporter": "hff"}]), "export.0.exporter: no exporter named|Did you mean 'hf'?"),
    ("an export that is no list", put("export", {"exporter": "hf"}), "export: input should be a list"),
    ("an unknown option", put("finetune.adapter.options.rank", [4]), "finetune.adapter.options.rank: unknown key|Did you mean 'ranks'?"),
    ("an option out of range", put("finetune.adapter.options.alpha", -1), "finetune.adapter.options.alpha: input should be greater than 0"),
    ("ranks that rise", put("finetune.adapter.options.ranks", [2, 4]), "finetune.adapter.options.ranks: ranks must go from large to small"),
    ("no ranks", put("finetune.adapter.options.ranks", []), "finetune.adapter.options.ranks: "),
    ("targets of nothing", put("finetune.targets", ["q_prj"]), "finetune.targets.0: 'q_prj' matches no linear layer; the model has down_proj"),
    ("no targets", put("finetune.targets", []), "finetune.targets: tuple should have at least 1 item"),
    ("epochs without end", put("finetune.epochs", 0), "finetune.epochs: input should be greater than 0"),
    ("a warm-up of all steps", put("finetune.warmup_steps", 6), "finetune.warmup_steps: 6 of 6 steps; warm up in fewer"),
    ("no batch", put("finetune.batch_size", 0), "finetune.batch_size: input should be greater than or equal to 1"),
    ("half a step", put("finetune.steps", 1.5), "finetune.steps: input should be a valid integer"),
    ("a precision there is not", put("finetune.precision", "int8"), "finetune.precision: input should be 'float32', 'bfloat16' or 'float16'"),
    ("longer than the window", put("finetune.max_length", 257), "finetune.max_length: 257 tokens, but the model's window is 256"),
    ("an answer beyond the window", put("evaluate.exact_match.max_new_tokens", 257), "evaluate.exact_match.max_new_tokens: 257 tokens, but the model's window is 256"),
    ("an answer of a search beyond the window", put("search.max_new_tokens", 257), "search.max_new_tokens: 257 tokens, but the model's window is 256"),
    ("calibration beyond the window", put("calibration.length", 257), "calibration.length: 257 tokens, but the model's window is 256"),
    ("no calibration", put("calibration"), "calibration: is missing: scorer 'wanda' needs input-norm; add"),
    ("a search without data", put("search.data"), "search.data: is missing: searcher 'hill-climbing' evaluates on it"),
    ("a merge without finetune", put("finetune"), "merge: needs a finetune section; add one or remove this"),
    ("an evaluation of what is not made", put("evaluate.of", ["quantize"]), "evaluate.of.0: 'quantize' is not made by this recipe; add its section"),
    ("an evaluation of a word", put("evaluate.of", ["everything"]), "evaluate.of.0: 'everything' is not one of model, sparsify"),
    ("an evaluation that measures nothing", all_of(put("evaluate.perplexity"), put("evaluate.exact_match")), "evaluate: measures nothing; add perplexity"),
    ("tasks from nowhere", put("evaluate.include_path", "nowhere"), "evaluate.include_path: there is no folder"),
    ("merger and merge that disagree", put("finetune.merger", "unmerged"), "merge: merger 'unmerged' leaves the adapter beside the base"),
    ("an unmerged export", all_of(put("merge"), put("evaluate"), put("export", [{"exporter": "hf"}])), "export: exports a complete model, but the adapter is not merged"),
    ("codes without quantize", put("export", [{"exporter": "gptq"}]), "export.0.exporter: 'gptq' writes codes, but this recipe's model holds floats; use gguf or hf"),
]  # fmt: skip

THE_COMMAND_LINE: list[tuple[str, Change, str]] = [
    ("until a stage there is not", options("--until", "mrge"), "this recipe has no stage 'mrge'; it has |merge"),
    ("until a stage of another recipe", options("--until", "quantize"), "this recipe has no stage 'quantize'"),
    ("fresh from nowhere", options("--fresh", "everything"), "this recipe has no stage 'everything'"),
    ("a device there is not", options("--device", "tpu"), "device 'tpu' cannot be used"),
    ("a device without numbers", options("--device", "meta"), "device 'meta' holds no values; name cpu or cuda"),
    ("a GPU by name", options("--device", "cuda:first"), "--device cuda:first: write cuda or cuda:N"),
    ("set to nowhere", options("--set", "evaluate.of.0.x=1"), "there is no such path in the recipe, to set evaluate.of.0.x=1"),
    ("set into a list, too far", options("--set", "evaluate.of.9=merge"), "there is no such path in the recipe, to set evaluate.of.9=merge"),
    ("set an unknown key", options("--set", "sparsify.sparsty=0.3"), "sparsify.sparsty: unknown key|Did you mean 'sparsity'?"),
    ("set without a value", options("--set", "seed"), "--set takes path=value, found 'seed'"),
    ("set without a path", options("--set", "=1"), "--set takes path=value, found '=1'"),
    ("set out of range", options("--set", "sparsify.sparsity=2"), "sparsify.sparsity: input should be less than 1, found 2"),
    ("set NaN", options("--set", "sparsify.sparsity=NaN"), "sparsify.sparsity: "),
    ("set nested without end", options("--set", "sparsify.sparsity=" + "[" * 100_000), "sparsify.sparsity"),
    ("set a surrogate", options("--set", "model.path=\udcff"), "model.path: "),
    ("a plugin switched off", options("--disable", "wanda"), "no scorer named 'wanda'"),
    ("an unknown option", options("--untill", "merge"), "No such option|--untill"),
    ("an output with files", lambda c: (c.folder.joinpath("out").mkdir(), c.folder.joinpath("out", "a").touch(), options("--output", str(c.folder / "out"))(c)), "out exists and is not an empty folder; name another or empty it"),
    ("an output that is a file", lambda c: (c.folder.joinpath("out").touch(), options("--output", str(c.folder / "out"))(c)), "exists and is not an empty folder"),
    ("an output that is a dangling link", lambda c: (c.folder.joinpath("out").symlink_to("nowhere"), options("--output", str(c.folder / "out"))(c)), "exists and is not an empty folder"),
    ("a store that is a file", lambda c: c.store.touch(), "store' is a file"),
    ("a store below a file", lambda c: (c.folder.joinpath("f").touch(), options("--store", str(c.folder / "f" / "store"))(c)), "f/store cannot be written: Not a directory|--store"),
    ("artifacts that are a file", lambda c: (c.store.mkdir(), c.store.joinpath("artifacts").touch()), "cannot be written|artifacts|--store"),
    ("runs that are a file", lambda c: (c.store.mkdir(), c.store.joinpath("runs").touch()), "cannot be written|runs|--store"),
    ("a store with too long a name", options("--store", "x" * 300), "the store x|cannot be read: File name too long|--store"),
]  # fmt: skip

THE_DATA: list[tuple[str, Change, str]] = [
    ("no file", put("finetune.data", "none.jsonl"), "finetune.data.path: there is no file|none.jsonl"),
    ("a folder", lambda c: put("finetune.data", str(c.folder))(c), "finetune.data.path: |'text' is missing"),
    ("empty", data("finetune.data", ""), "finetune.data.path: |bad.jsonl is empty"),
    ("blank lines", data("finetune.data", "\n\n \n"), "bad.jsonl has no records; expected"),
    ("a record without its completion", data("finetune.data", GOOD + '{"prompt": "1"}'), "bad.jsonl:2: expected |'completion' is missing"),
    ("a record that is a list", data("finetune.data", GOOD + "[1]"), "bad.jsonl:2: expected a JSON object|found list"),
    ("fields of other names", data("finetune.data", '{"question": "a", "answer": "b"}'), "bad.jsonl:1: expected 'prompt' and 'completion'"),
    ("a number for text", data("finetune.data", '{"prompt": "1", "completion": 2}'), "bad.jsonl:1: |'completion' is not text"),
    ("half a line", data("finetune.data", GOOD + '{"prompt": "1', ), "bad.jsonl:2: not valid JSON"),
    ("Latin-1", data("finetune.data", '{"text": "\xe9"}'.encode("latin-1")), "bad.jsonl:1: not UTF-8 text"),
    ("UTF-16", data("finetune.data", GOOD.encode("utf-16")), "bad.jsonl:1: not UTF-8 text"),
    ("too deep", data("finetune.data", "[" * 100_000), "bad.jsonl:1: not valid JSON"),
    ("a JSON list of records", data("finetune.data", json.dumps([{"prompt": "a", "completion": "b"}])), "bad.jsonl:1: expected a JSON object|found list"),
    ("JSON on many lines", data("finetune.data", '{\n "prompt": "a",\n "completion": "b"\n}'), "bad.jsonl:1: not valid JSON"),
    ("a conversation without an answer", data("finetune.data", '{"messages": [{"role": "user", "content": "a"}]}'), "at least one assistant turn"),
    ("a surrogate", data("finetune.data", '{"text": "\\ud800"}'), "bad.jsonl:1: |'text' is not text"),
    ("many bad lines", data("finetune.data", "x\n" * 40), "bad.jsonl:5: |and 35 more"),
    ("a search on texts", all_of(data("search.data", '{"text": "a"}'), put("search.metric", "exact_match")), "search.data.path: |there is no completion to compare with"),
    ("a test on texts", data("evaluate.exact_match.data", '{"text": "a"}'), "evaluate.exact_match.data.path: |there is no completion to compare with"),
    ("a held-out text that is empty", data("evaluate.perplexity.text", "", "t.txt"), "evaluate.perplexity.text: |t.txt is empty"),
    ("a held-out text of a token", all_of(MEASURED, put("evaluate.of", ["model"]), data("evaluate.perplexity.text", "a", "t.txt")), "t.txt has fewer than 2 tokens"),
    ("a held-out text that is binary", all_of(MEASURED, put("evaluate.of", ["model"]), data("evaluate.perplexity.text", b"\xff\xfe\x00", "t.txt")), "t.txt cannot be read as UTF-8 text"),
    ("calibration too short", all_of(JUST_SPARSE, data("calibration.data", "few words", "c.txt")), "c.txt has 9 tokens, and 4 windows of 32 need 128; shorten calibration.length, or give more text"),
    ("calibration that is binary", all_of(JUST_SPARSE, data("calibration.data", b"\xff\xfe\x00", "c.txt")), "c.txt cannot be read as UTF-8 text"),
    ("calibration of bad records", all_of(JUST_SPARSE, data("calibration.data", "{")), "bad.jsonl:1: not valid JSON"),
    ("a loss that is not finite", all_of(only("finetune"), lambda c: c.raw["finetune"].update(learning_rate=1e30, max_grad_norm=0)), "the loss is not finite at step |lower finetune.learning_rate or use float32"),
    ("completions of nothing", data("finetune.data", '{"prompt": "1", "completion": ""}'), "bad.jsonl:1: there is no token to learn from"),
    ("a fifo", lambda c: (os.mkfifo(c.folder / "pipe"), put("finetune.data", str(c.folder / "pipe"))(c)), "finetune.data.path: there is no file"),
]  # fmt: skip

NO_EOS = all_of(
    settings("tokenizer_config.json", eos_token=DELETE, pad_token=DELETE),
    settings("config.json", eos_token_id=None, pad_token_id=None),
    settings("generation_config.json", eos_token_id=None, pad_token_id=None),
)

THE_MODEL: list[tuple[str, Change, str]] = [
    ("nowhere", put("model.path", "nowhere"), "model.path: no file or folder|nowhere|not a Hugging Face id (owner/name)"),
    ("a file", lambda c: put("model.path", str(c.folder / "x.bin"))(c) or c.folder.joinpath("x.bin").touch(), "neither a folder nor a .gguf file"),
    ("a GGUF that is none", lambda c: (c.folder.joinpath("x.gguf").write_bytes(b"GGUF" + bytes(40)), put("model.path", str(c.folder / "x.gguf"))(c)), "x.gguf is not a complete GGUF file|copy it again"),
    ("an empty folder", lambda c: (c.folder.joinpath("m").mkdir(), put("model.path", str(c.folder / "m"))(c)), "has no config.json; a model folder has config.json and weights"),
    ("no config", model_file("config.json", None), "model.path: |has no config.json"),
    ("a config cut short", model_file("config.json", lambda b: b[:50]), "config.json is not valid JSON|copy the model again"),
    ("a config that is a list", model_file("config.json", "[]"), "config.json is not a JSON object|copy the model again"),
    ("a config too deep", model_file("config.json", "[" * 100_000), "config.json is not valid JSON"),
    ("a config with a BOM", model_file("config.json", lambda b: b"\xef\xbb\xbf" + b), "config.json is not valid JSON|BOM"),
    ("a config in UTF-16", model_file("config.json", lambda b: b.decode().encode("utf-16")), "config.json is not valid JSON"),
    ("an unknown family", settings("config.json", model_type="llamma", architectures=None), "transformers cannot make a causal language model of"),
    ("no family", settings("config.json", model_type=DELETE, architectures=None), "transformers cannot make a causal language model of"),
    ("a family without decoder blocks", all_of(FAST, settings("config.json", model_type="bert", architectures=None)), "model.path: |lacks bert.|more, which BertLMHeadModel has by config.json"),
    ("heads that do not divide", settings("config.json", num_attention_heads=5), "transformers cannot make a causal language model of|attention heads (5)"),
    ("more layers than weights", all_of(FAST, settings("config.json", num_hidden_layers=3)), "lacks model.layers.2.|which LlamaForCausalLM has by config.json; copy it again"),
    ("sizes that disagree", all_of(FAST, settings("config.json", intermediate_size=48)), "model.path: |model.layers.0.mlp.down_proj.weight is [32, 64], and config.json makes it [32, 48]"),
    ("sizes that are no numbers", all_of(FAST, settings("config.json", hidden_size="many")), "transformers cannot make a causal language model of|'hidden_size': |many"),
    ("no weights", model_file("model.safetensors", None), "has no .safetensors file; a model folder has config.json and weights"),
    ("only a pickle", all_of(model_file("model.safetensors", None), model_file("pytorch_model.bin", b"\x80\x04N.")), "pickles (pytorch_model.bin), which can run code when they are read, so sqft does not read them; convert them"),
    ("weights cut short", model_file("model.safetensors", lambda b: b[:-100]), "the file is shorter than its header says; it was cut off; copy it again"),
    ("weights of nothing", model_file("model.safetensors", b""), "is not a complete safetensors file"),
    ("a header of garbage", header(b"\x00garbage\xff" * 5), "is not a complete safetensors file|copy it again"),
    ("a header longer than the file", header(b"{}", 2**60), "the header is longer than the file"),
    ("a header that is a list", header(b"[1, 2]"), "is not a complete safetensors file"),
    ("a header without offsets", header(b'{"a": {"shape": [2]}}'), "is not a complete safetensors file"),
    ("a header of text offsets", header(b'{"a": {"shape": [2], "data_offsets": ["a", "b"]}}'), "is not a complete safetensors file"),
    ("a header with odd shapes", header(b'{"model.layers.0.q.weight": {"dtype": "F32", "shape": ["a", null], "data_offsets": [0, 0]}}'), "is not a complete safetensors file"),
    ("a header with a shape below 0", header(b'{"model.layers.0.q.weight": {"dtype": "F32", "shape": [-2, 4], "data_offsets": [0, 0]}}'), "is not a complete safetensors file"),
    ("a header of a shape that is a number", header(b'{"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 0]}}'), "is not a complete safetensors file"),
    ("a header of an unknown type", all_of(FAST, model_file("model.safetensors", lambda b: b.replace(b'"F32"', b'"Q32"'))), "cannot load"),
    ("an index of nothing", all_of(model_file("model.safetensors", None), model_file("model.safetensors.index.json", "{}")), "index.json has no weight_map of tensors to files; copy the model again"),
    ("an index out of the folder", all_of(model_file("model.safetensors", None), model_file("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}')), "lacks ../x.safetensors, which"),
    ("a tensor that is not there", all_of(FAST, weights(lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))), "lacks model.layers.1.mlp.up_proj.weight, which LlamaForCausalLM has"),
    ("a tensor of another shape", all_of(FAST, weights(lambda t: t.update({"model.norm.weight": torch.ones(7)}))), "model.norm.weight is [7], and config.json makes it [32]; copy it again"),
    ("NaN in a pruned weight", all_of(FAST, spoil(float("nan"))), "tensor model.layers.0.mlp.up_proj.weight holds values that are not finite; the model cannot be used"),
    ("infinity in the embedding", all_of(FAST, spoil(float("inf"), "model.embed_tokens.weight")), "tensor model.embed_tokens.weight holds values that are not finite"),
    ("weights beyond float16", all_of(FAST, spoil(1e20), put("model.dtype", "float16")), "holds values that are not finite"),
    ("activations that overflow", all_of(JUST_SPARSE, weights(lambda t: [t[f"model.layers.0.mlp.{n}_proj.weight"].fill_(1e30) for n in ("up", "gate")])), "calibration met activations that are not finite"),
    ("a perplexity that overflows", all_of(MEASURED, put("evaluate.of", ["model"]), put("evaluate.exact_match"), weights(lambda t: t["model.norm.weight"].fill_(1e38))), "the perplexity is not finite"),
    ("already quantized, otherwise", settings("config.json", quantization_config={"quant_method": "awq"}), "is already quantized (awq)"),
    ("no tokenizer", all_of(FAST, model_file("tokenizer.json", None), model_file("tokenizer_config.json", None)), "transformers cannot load the tokenizer of"),
    ("a tokenizer cut short", all_of(FAST, model_file("tokenizer.json", lambda b: b[: len(b) // 2])), "transformers cannot load the tokenizer of"),
    ("a tokenizer of another kind", all_of(FAST, model_file("tokenizer.json", "{}")), "transformers cannot load the tokenizer of"),
    ("a tokenizer larger than the vocabulary", all_of(FAST, settings("config.json", vocab_size=200), weights(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:200].clone()}))), "the tokenizer has 257 tokens, and the model has rows for 200"),
    ("a tokenizer without an end", all_of(only("sparsify", "calibration", "finetune"), NO_EOS), "transformers cannot load the tokenizer of|it has no end of sequence; name its eos_token in tokenizer_config.json"),
    ("a chat template that is broken", all_of(MEASURED, put("evaluate.of", ["model"]), model_file("chat_template.jinja", "{% for %}"), data("evaluate.exact_match.data", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')), "bad.jsonl:1: the chat template rejects the conversation"),
    ("a chat template that is missing", all_of(MEASURED, put("evaluate.of", ["model"]), model_file("chat_template.jinja", None), data("evaluate.exact_match.data", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')), "bad.jsonl:1: the model's tokenizer has no chat template"),
    ("a chat template that says no", all_of(MEASURED, put("evaluate.of", ["model"]), model_file("chat_template.jinja", "{{ raise_exception('no system') }}"), data("evaluate.exact_match.data", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')), "the chat template rejects the conversation: no system"),
]  # fmt: skip


def run_case(case: Case) -> tuple[int, str]:
    done = CliRunner().invoke(main, case.words())
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stderr


def check(case: Case, status: int, said: str, words: str) -> None:
    assert status == 2, f"{status}: {said}"
    assert len(re.findall("(?mi)^error: ", said)) == 1 and "Traceback" not in said, said
    for word in words.split("|"):
        assert word in said, said
    if not case.store.is_dir() or "a part of the model it was to export" in said:  # which the plugin spoilt
        return
    store = Store(case.store)
    for folder in case.store.glob("artifacts/[!.]*"):
        if folder.is_dir():
            manifest = json.loads((folder / "manifest.json").read_text())
            found = store.find(manifest["stage"], manifest["fingerprint"])
            assert found
            store.verify(found)
    assert not list(case.store.rglob(".*.tmp"))


def bad(base: type[Component], **methods: Any) -> type[Component]:
    """A component that is as another one, but for these methods."""
    words = {"name": "bad", "__doc__": "Bad.", "__module__": __name__}
    return type("Bad", (base,), words | methods)  # type: ignore[return-value]


def fails(*_: Any) -> Any:
    raise ValueError("no such luck")


def leaves(*_: Any) -> Any:
    sys.exit(0)


def edited(tensor: torch.Tensor, result: Any) -> Any:
    tensor.view(-1)[0] += 1
    return result


def emptied(linears: Any, *_: Any) -> Any:
    linears.clear()
    return {}


def rounded(weight: torch.Tensor, mask: torch.Tensor | None, stats: Any) -> Quantized:
    return Rtn(group_size=32).quantize(weight, mask, stats)


def sampled(space: SearchSpace) -> RankConfig:
    return RankConfig(tuple(999 for _ in space.groups))


class Overlapping:
    """A delta whose factors fit nothing."""

    def __new__(cls, shift: float, rows: int | None = None) -> Any:
        from sqft_nls.delta import LowRankDelta

        def delta(self: Any, linear: Any, generator: Any) -> Any:
            made = LowRankDelta(linear, self.rank, 1.0, generator)
            with torch.no_grad():
                made.B.add_(shift)
            if rows is not None:
                made.B = torch.nn.Parameter(made.B[:rows])
            return made

        return delta


def wrote(file: str, content: bytes | None, source: bool = False) -> Any:
    """An exporter's verb that writes, or adds to, one file more."""

    def export(self: Any, model: Any, folder: Path) -> None:
        HuggingFace().export(model, folder)
        place = (model.folder if source else folder) / file
        if content is None:
            place.symlink_to("config.json")
        else:
            place.write_bytes(content)

    return export


def not_finite(self: Any, model: Any, folder: Path) -> None:
    HuggingFace().export(model, folder)
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


SCORED = all_of(FAST, put("sparsify.scorer", "bad"))
SHARED = all_of(FAST, put("sparsify.allocator", "bad"))
ROUNDED = all_of(only("quantize"), lambda c: c.raw.update(quantize={"quantizer": "bad"}))
ROUNDED_SPARSE = all_of(FAST, lambda c: c.raw.update(quantize={"quantizer": "bad"}))
ADAPTED = all_of(only("finetune"), put("finetune.adapter", {"name": "bad", "options": {"rank": 4}}))
MERGED = all_of(only("finetune"), put("finetune.merger", "bad"))
TUNED = all_of(only("finetune", "search"), put("finetune.steps", 2), put("search.searcher", "bad"))
EXPORTED = all_of(FAST, lambda c: c.raw.update(export=[{"exporter": "bad"}]))
RAISED = "raised ValueError: no such luck|test_bad_input.py:|the traceback is in|run.log"
LAYER = "model.layers.0.self_attn.q_proj"

THE_PLUGINS: list[tuple[str, type[Component], Change, str]] = [
    ("a scorer that raises", bad(Magnitude, score=fails), SCORED, f"scorer 'bad' |{RAISED}"),
    ("a scorer that leaves", bad(Magnitude, score=leaves), SCORED, "scorer 'bad' |raised SystemExit"),
    ("a scorer of another shape", bad(Magnitude, score=lambda _, w, s: w[:, :1]), SCORED, f"scorer 'bad' |returned scores of shape [32, 1] for {LAYER}, expected [32, 32]"),
    ("a scorer that edits the weight", bad(Magnitude, score=lambda _, w, s: edited(w, w.abs())), SCORED, f"scorer 'bad' |edited the weight of {LAYER} in place; it must return a new tensor"),
    ("scores that are not finite", bad(Magnitude, score=lambda _, w, s: w / 0), SCORED, "returned scores with values that are not finite"),
    ("scores that are integers", bad(Magnitude, score=lambda _, w, s: w.long()), SCORED, "returned scores of torch.int64|expected a floating type"),
    ("scores that are no tensor", bad(Magnitude, score=lambda *_: None), SCORED, "returned NoneType as scores for"),
    ("an option that raises", bad(Magnitude, __init__=fails), SCORED, "sparsify.scorer.options: no such luck"),
    ("an allocator that raises", bad(Uniform, allocate=fails), SHARED, f"allocator 'bad' |{RAISED}"),
    ("an allocator that gives too much", bad(Uniform, allocate=lambda _, x, s, m: {y.name: 1.5 for y in x}), SHARED, f"gave {LAYER} the sparsity 1.5, expected a number in [0, 1)"),
    ("an allocator that forgets", bad(Uniform, allocate=lambda _, x, s, m: {}), SHARED, f"gave {LAYER} the sparsity None"),
    ("an allocator that edits the list", bad(Uniform, allocate=lambda _, x, s, m: emptied(x)), SHARED, "allocator 'bad' |raised"),
    ("a quantizer that raises", bad(Rtn, incompatibility=lambda *_: None, quantize=fails), ROUNDED, f"quantizer 'bad' |{RAISED}"),
    ("a quantizer that raises in the plan", bad(Rtn, incompatibility=fails), ROUNDED, "quantize.quantizer: quantizer 'bad' |raised ValueError"),
    ("a quantizer of another shape", bad(Rtn, incompatibility=lambda *_: None, quantize=lambda _, w, m, s: rounded(w[:16], None, s)), ROUNDED, f"quantizer 'bad' |returned codes of shape [16, 32] for {LAYER}, expected [32, 32]"),
    ("a quantizer of nothing", bad(Rtn, incompatibility=lambda *_: None, quantize=lambda *_: None), ROUNDED, "returned NoneType for|expected Quantized with a Grid"),
    ("a quantizer that edits the weight", bad(Rtn, incompatibility=lambda *_: None, quantize=lambda _, w, m, s: edited(w, rounded(w, m, s))), ROUNDED, f"edited the weight of {LAYER} in place"),
    ("a quantizer that edits the mask", bad(Rtn, incompatibility=lambda *_: None, quantize=lambda _, w, m, s: (m.fill_(True), rounded(w, m, s))[1]), ROUNDED_SPARSE, f"edited the mask of {LAYER} in place"),
    ("a quantizer that refills zeros", bad(Rtn, incompatibility=lambda *_: None, quantize=lambda _, w, m, s: rounded(w + 1, None, s)), ROUNDED_SPARSE, f"pruned weights of {LAYER}"),
    ("an adapter that raises in the plan", bad(Lora, space=fails), ADAPTED, "finetune.adapter: adapter 'bad' |raised ValueError"),
    ("an adapter that forgets layers", bad(Lora, space=lambda _, x: Lora(rank=4).space(x[:1])), ADAPTED, "finetune.adapter: adapter 'bad' |returned a search space that has |in 0 groups, expected 1"),
    ("an adapter that edits the list", bad(Lora, space=lambda _, x: emptied(x)), ADAPTED, "finetune.adapter: adapter 'bad' |raised"),
    ("an adapter that raises", bad(Lora, delta=fails), ADAPTED, f"adapter 'bad' |{RAISED}"),
    ("an adapter of nothing", bad(Lora, delta=lambda *_: None), ADAPTED, f"returned NoneType for {LAYER}, expected a torch.nn.Module"),
    ("an adapter that does not start at zero", bad(Lora, delta=Overlapping(1.0)), ADAPTED, f"starts {LAYER} with a delta that is not zero"),
    ("an adapter of another shape", bad(Lora, delta=Overlapping(0.0, 3)), ADAPTED, f"returned B of shape [3, 4] for {LAYER}, expected [32, 4]"),
    ("an adapter that samples elsewhere", bad(Lora, sample=lambda _, space, r: sampled(space)), ADAPTED, "which is no configuration of the search space"),
    ("an adapter that fails to sample", bad(Lora, sample=fails), ADAPTED, f"adapter 'bad' |{RAISED}"),
    ("a merger that raises", bad(SparsePEFT, combine=fails), MERGED, f"merger 'bad' |{RAISED}"),
    ("a merger of another shape", bad(SparsePEFT, combine=lambda _, b, d: b.weight[:, :1]), MERGED, f"returned an effective weight of shape [32, 1] for {LAYER}"),
    ("a merger that edits the base", bad(SparsePEFT, combine=lambda _, b, d: edited(b.weight, b.weight + d)), MERGED, f"merger 'bad' |edited the weight of {LAYER} in place"),
    ("a merger that edits the delta", bad(SparsePEFT, combine=lambda _, b, d: b.weight + (d.mul_(2) if d.is_leaf else d)), MERGED, f"merger 'bad' |edited the delta of {LAYER} in place"),
    ("a merger that is not finite", bad(SparsePEFT, combine=lambda _, b, d: (b.weight + d) / 0), MERGED, "returned an effective weight with values that are not finite"),
    ("a derivative of another shape", bad(SparsePEFT, derivative=lambda _, b, d, g: g[0]), MERGED, f"returned a derivative of shape [32] for {LAYER}"),
    ("a merger that refills zeros", bad(SparsePEFT, combine=lambda _, b, d: b.weight + d), all_of(only("finetune", "sparsify"), put("sparsify.scorer", "magnitude"), put("finetune.merger", "bad")), "zeros of the base nonzero in"),
    ("a searcher that raises", bad(Heuristic, search=fails), TUNED, f"searcher 'bad' |{RAISED}"),
    ("a searcher that chooses elsewhere", bad(Heuristic, search=lambda _, space, e, r: sampled(space)), TUNED, "searcher 'bad' |which is no configuration of the search space"),
    ("a searcher of nothing", bad(Heuristic, search=lambda *_: None), TUNED, "searcher 'bad' |returned None, which is no configuration"),
    ("a searcher that asks elsewhere", bad(Heuristic, evaluates=True, search=lambda _, space, e, r: e(sampled(space))), TUNED, "searcher 'bad' |configuration of the search space"),
    ("a searcher that asks for no samples", bad(Heuristic, evaluates=True, search=lambda _, space, e, r: e(RankConfig(tuple(g.ranks[0] for g in space.groups)), 0)), TUNED, "asked for an evaluation on 0 samples, expected 1 or more, or None"),
    ("a searcher that asks in secret", bad(Heuristic, search=lambda _, space, e, r: e(RankConfig(tuple(g.ranks[0] for g in space.groups)))), TUNED, "asked for an evaluation, but search.data is not given"),
    ("an exporter that raises", bad(HuggingFace, export=fails), EXPORTED, f"exporter 'bad' |{RAISED}"),
    ("an exporter that writes nothing", bad(HuggingFace, export=lambda *_: None), EXPORTED, "export (exporter 'bad' |wrote nothing"),
    ("an exporter that links", bad(HuggingFace, export=wrote("more.json", None)), EXPORTED, "more.json is a link; an artifact must hold its files itself"),
    ("an exporter that edits the model", bad(HuggingFace, export=wrote("config.json", b"{}", source=True)), EXPORTED, "exporter 'bad' |config.json|the model it was to export"),
    ("an exporter that adds to the model", bad(HuggingFace, export=wrote("more.json", b"{}", source=True)), EXPORTED, "exporter 'bad' |more.json|the model it was to export"),
    ("an exporter of garbage", bad(HuggingFace, export=wrote("model.safetensors", b"garbage")), EXPORTED, "export (exporter 'bad' |model.safetensors is not a complete safetensors file"),
    ("an exporter that is not finite", bad(HuggingFace, export=not_finite), EXPORTED, "exporter 'bad' |holds values that are not finite"),
]  # fmt: skip


TABLE = {
    f"{group}: {name}": (change, words)
    for group, cases in (
        ("file", THE_FILE),
        ("recipe", THE_RECIPE),
        ("command line", THE_COMMAND_LINE),
        ("data", THE_DATA),
        ("model", THE_MODEL),
    )
    for name, change, words in cases
}
PLUGINS = {name: (component, change, words) for name, component, change, words in THE_PLUGINS}


@pytest.fixture
def case(raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.chdir(tmp_path)
    return Case(raw, tmp_path)


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(case: Case, name: str) -> None:
    change, words = TABLE[name]
    change(case)
    check(case, *run_case(case), words)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a store is kept that is done up to the search."""
    return tmp_path_factory.mktemp("tuned") / "store"


@pytest.mark.parametrize("name", PLUGINS)
def test_a_bad_plugin(case: Case, tuned: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    component, change, words = PLUGINS[name]
    change(case)
    registry = Registry.discover()
    registry.add(component)
    monkeypatch.setattr(Registry, "discover", lambda *_: registry)
    if "search" in case.raw:
        if not tuned.exists():
            status, said = run_case(Case(case.raw | {"search": {}}, case.folder, ["--until", "finetune"]))
            assert status == 0, said
            case.store.rename(tuned)
            case.recipe.unlink()
        shutil.copytree(tuned, case.store)
    check(case, *run_case(case), words)


REAL = [
    "data: a record without its completion", "file: truncated", "file: too deep", "recipe: an unknown key", "recipe: an N:M that does not divide",
    "command line: a store that is a file", "command line: an output that is a file", "command line: set to nowhere",
    "command line: an output with files", "model: only a pickle", "model: a header of garbage", "model: nowhere",
]  # fmt: skip


@pytest.mark.parametrize("name", [REAL[0], *(pytest.param(name, marks=pytest.mark.slow) for name in REAL[1:])])
def test_as_a_command(case: Case, name: str) -> None:
    change, words = TABLE[name]
    change(case)
    command = [sys.executable, "-m", "sqft", *case.words()]
    done = subprocess.run(command, capture_output=True, text=True)
    check(case, done.returncode, done.stderr, words)
