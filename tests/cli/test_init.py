"""sqft init: pipelines are listed, and what cannot be written is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sqft.cli import main
from sqft.cli.init import init
from sqft.tools.presets import PIPELINES


def test_the_command_lists_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(main, ["init"])
    assert listed.exit_code == 0 and all(line.split()[0] in PIPELINES for line in listed.output.splitlines())
    unknown = CliRunner().invoke(main, ["init", "sparsepft"])
    assert unknown.exit_code == 2 and "pipelines: sparsify, quantize" in unknown.stderr
    missing = CliRunner().invoke(main, ["init", "sqft"])
    assert missing.exit_code == 0 and f"not there yet: {tmp_path / 'data' / 'train.jsonl'}" in missing.output
    nowhere = CliRunner().invoke(main, ["init", "sqft", "--output", "no/folder/r.json"])
    assert nowhere.exit_code == 2 and "cannot be written" in nowhere.stderr


def test_a_recipe_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sqft.json").write_text("mine")
    done = CliRunner().invoke(main, ["init", "sqft"])
    assert done.exit_code == 2 and "sqft.json exists, and is not overwritten" in done.stderr
    assert (tmp_path / "sqft.json").read_text() == "mine"


def test_the_papers_own_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, ours in ([], True), (["--paper"], False):
        done = CliRunner().invoke(main, ["init", "sqft", "--output", f"{ours}.json", *words])
        assert done.exit_code == 0, done.output
        raw = json.loads((tmp_path / f"{ours}.json").read_text())
        assert ("refine" in raw["quantize"]["quantizer"]["options"]) == ours
        assert ("`refine` = `3`" in done.output) == ours


def test_a_recipe_with_a_search_for_the_model_at_hand(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it writes, the plan accepts; each choice is explained."""
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(model_folder), "--data", str(data), "--search", "hill-climbing", "--baseline"]
    done = CliRunner().invoke(main, ["init", "hira-int4", *words, "--answer", "last_number"])
    assert done.exit_code == 0 and "- `searcher` = `hill-climbing`" in done.output, done.output
    planned = CliRunner().invoke(main, ["plan", "hira-int4.json"])
    assert planned.exit_code == 0 and "hill-climbing" in planned.output and "evaluate:model" in planned.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hira", "--search", "hillclimbing"], "no searcher named 'hillclimbing'"),
        (["lora", "--search", "racing"], "pipeline 'lora' has no ranks to search"),
        (["hira", "--answer", "lastnumber"], "evaluate.exact_match.answer: input should be 'text'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[-1],
)
def test_choices_that_cannot_be_written(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["init", *words])
    assert done.exit_code == 2 and message in done.stderr and not list(tmp_path.iterdir())


def test_a_model_whose_layers_are_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "none-such"}')
    done = CliRunner().invoke(main, ["init", "hira", "--model", str(tmp_path)])
    assert done.exit_code == 0 and "is not fitted to the model, and its targets are Llama's: " in done.output


CODE = {
    "configuration_mine.py": "from transformers import LlamaConfig\nclass MineConfig(LlamaConfig):\n"
    "    model_type = 'mine'\n",
    "modeling_mine.py": "from transformers import LlamaForCausalLM\nfrom .configuration_mine import MineConfig\n"
    "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n",
}


def test_a_model_with_code_of_its_own(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code runs only when asked for; the recipe then says so, and the plan accepts it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(model_folder, tmp_path / "mine"))
    for name, text in CODE.items():
        (folder / name).write_text(text)
    auto = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))

    words = ["init", "hira", "--model", str(folder), "--data", str(data)]
    done = CliRunner().invoke(main, [*words, "--output", "without.json"])
    assert done.exit_code == 0 and "If you trust it, --trust-remote-code lets it run" in done.output, done.output
    assert not (tmp_path / "modules").exists()
    assert "trust_remote_code" not in (tmp_path / "without.json").read_text()
    done = CliRunner().invoke(main, [*words, "--trust-remote-code"])
    assert done.exit_code == 0 and "- `trust_remote_code` = `true`" in done.output, done.output
    assert "is not fitted" not in done.output
    planned = CliRunner().invoke(main, ["plan", "hira.json"])
    assert planned.exit_code == 0 and "finetune" in planned.output, planned.output + planned.stderr


@pytest.mark.parametrize(
    ("files", "words", "message"),
    [
        ({}, ["--trust-remote-code"], "--trust-remote-code is said of a model; add --model"),
        ({"adapter_config.json": "{}"}, ["--model", "given"], "given is an adapter; name the model that it acts on"),
    ],
)
def test_what_is_refused(
    files: dict[str, str], words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given").mkdir()
    for name, text in files.items():
        (tmp_path / "given" / name).write_text(text)
    done = CliRunner().invoke(main, ["init", "lora", *words])
    assert done.exit_code != 0 and message in done.output + done.stderr, done.output
    assert not (tmp_path / "lora.json").exists()


def test_a_damaged_config_is_no_reason_to_trust_code(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(model_folder, tmp_path / "damaged"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide", "auto_map": {"AutoConfig": "a.B"}}))
    done = CliRunner().invoke(main, ["init", "lora", "--model", str(folder), "--data", str(data)])
    assert "is not fitted to the model" in done.output and "--trust-remote-code" not in done.output, done.output


def test_a_model_that_came_as_codes(
    quantized_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(quantized_folder), "--data", str(data)]
    done = CliRunner().invoke(main, ["init", "hira-int4", *words, "--search", "hill-climbing", "--baseline"])
    assert done.exit_code == 0 and "came as codes: what prunes and quantizes is left out" in done.output, done.output
    assert '"mask"' not in done.output  # hira keeps zeros anyway
    # A pipeline whose merger is not installed is no hindrance for another one.
    done = CliRunner().invoke(main, ["init", "lora", *words, "--disable", "hira"])
    assert done.exit_code == 0 and '"mask"' not in done.output, done.output
    done = CliRunner().invoke(main, ["init", "qa-sparsepeft", *words])
    assert done.exit_code == 0 and 'add "mask": "codes" to finetune' in done.output, done.output
    done = CliRunner().invoke(main, ["init", "sparsepeft", *words, "--disable", "hira"])
    assert done.exit_code != 0 and "these do: " in done.output + done.stderr, done.output
    planned = CliRunner().invoke(main, ["plan", "hira-int4.json"])
    assert planned.exit_code == 0 and "hill-climbing" in planned.output, planned.output + planned.stderr
    done = CliRunner().invoke(main, ["init", "gptq", *words])
    assert done.exit_code == 2 and "does not train on them; these do: lora" in done.stderr
    assert not (tmp_path / "gptq.json").exists()


def test_names_of_pipelines_are_completed() -> None:
    complete = init.params[0].shell_complete
    names = [item.value for item in complete(click.Context(init), "qa")]
    assert names == ["qa-sparsepeft", "qa-sparsepeft-low-memory"]


def test_a_typo_gets_a_suggestion() -> None:
    done = CliRunner().invoke(main, ["init", "sparspeft"])
    assert done.exit_code == 2 and done.stderr.endswith("Did you mean 'sparsepeft'?\n")
