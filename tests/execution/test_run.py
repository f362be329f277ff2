"""What a run leaves: outcomes by step, the folder of the result, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sqft.errors import ArtifactError
from sqft.execution.run import Outcome, Run, loading_instructions


def outcome(name: str, folder: Path, *made: str) -> Outcome:
    """An outcome whose artifact holds these folders."""
    for part in made:
        (folder / name / part).mkdir(parents=True)
    step = SimpleNamespace(name=name, stage=name.partition(":")[0])
    return Outcome(step, SimpleNamespace(folder=folder / name, report={"of": name}))  # type: ignore[arg-type]


def run_of(folder: Path, *outcomes: Outcome, plan: Any = None) -> Run:
    return Run(plan, folder, {outcome.step.name: outcome for outcome in outcomes}, {})


def test_outcomes_by_step(tmp_path: Path) -> None:
    one, two = outcome("sparsify", tmp_path), outcome("merge", tmp_path)
    run = run_of(tmp_path, one, two)
    assert list(run) == ["sparsify", "merge"] and len(run) == 2 and run["merge"] is two
    assert run["merge"].report == {"of": "merge"} and run["merge"].folder == tmp_path / "merge"


@pytest.mark.parametrize(
    ("steps", "result"),
    [
        ([("sparsify", "model"), ("finetune",), ("search", "adapter"), ("merge", "model")], "merge/model"),
        ([("sparsify", "model"), ("finetune",), ("search", "adapter")], "search/adapter"),
        ([("sparsify", "model"), ("finetune",)], None),
        ([("sparsify", "model"), ("evaluate:sparsify",)], "sparsify/model"),
        ([("merge", "model"), ("export:gptq", "model"), ("evaluate:merge",)], "export:gptq/model"),
        ([("evaluate:model",)], None),
        ([], None),
    ],
)
def test_the_result_is_what_the_last_step_made(
    tmp_path: Path, steps: list[tuple[str, ...]], result: str | None
) -> None:
    run = run_of(tmp_path, *(outcome(name, tmp_path, *made) for name, *made in steps))
    assert run.result() == (tmp_path / result if result else None)


def test_a_model_is_loaded_and_an_adapter_is_not(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(ArtifactError, match="step 'search' wrote no model; sparsify, quantize, merge and export do"):
        outcome("search", tmp_path, "adapter").load_model()
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge" / "model").symlink_to(model_folder)
    loaded = outcome("merge", tmp_path).load_model().state_dict()
    direct = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    assert loaded.keys() == direct.keys() and all(torch.equal(loaded[name], direct[name]) for name in direct)


def test_folders_of_inputs_by_role(tmp_path: Path) -> None:
    step = SimpleNamespace(inputs={"base": "sparsify", "finetune": "finetune"})
    run = run_of(
        tmp_path,
        outcome("sparsify", tmp_path),
        outcome("finetune", tmp_path),
        plan=SimpleNamespace(step=lambda _: step),
    )
    assert run.inputs("search") == {"base": tmp_path / "sparsify", "finetune": tmp_path / "finetune"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, ["AutoModelForCausalLM", 'dtype="auto"']),
        ({}, ["AutoModelForCausalLM", 'dtype="auto"']),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            ["a GPTQ checkpoint; with gptqmodel and optimum installed"],
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            ["a compressed-tensors checkpoint; with compressed-tensors installed"],
        ),
    ],
)
def test_how_to_load_a_model(tmp_path: Path, config: dict[str, Any] | None, words: list[str]) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    text = loading_instructions(tmp_path, run_of(tmp_path))
    assert all(word in text for word in [*words, f'from_pretrained("{tmp_path}"'])


def test_how_to_use_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    text = loading_instructions(tmp_path, run_of(tmp_path))
    assert text.endswith(f'llama-cli -m "{tmp_path / "model.gguf"}"') and "AutoModel" not in text


@pytest.mark.parametrize(
    ("base", "where"), [("models/base", '"{}/models/base"'), ("models/b.gguf", '"{}/models", gguf_file="b.gguf"')]
)
@pytest.mark.parametrize("trusted", [False, True])
def test_how_to_load_an_adapter(tmp_path: Path, base: str, where: str, trusted: bool) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    plan = SimpleNamespace(
        adapter_base=SimpleNamespace(model=lambda folders: tmp_path / base),
        step=lambda _: SimpleNamespace(inputs={}),
        recipe=SimpleNamespace(model=SimpleNamespace(trust_remote_code=trusted)),
    )
    text = loading_instructions(tmp_path, run_of(tmp_path, plan=plan))
    assert f"from_pretrained({where.format(tmp_path)}, dtype" in text and f'model, "{tmp_path}")' not in text
    assert ("trust_remote_code=True" in text) is trusted
    assert text.endswith(f', "{tmp_path}")') and text.startswith("from peft import PeftModel")


def test_an_adapter_that_acts_through_its_mask_has_to_be_merged(tmp_path: Path) -> None:
    (tmp_path / "sqft_adapter.json").write_text("{}")
    assert 'add "merge": {} to the recipe' in loading_instructions(tmp_path, run_of(tmp_path))


REPORT = {
    "recipe": "tiny",
    "seed": 3,
    "steps": [],
    "rows": [
        {
            "configuration": name,
            "accuracy": 0.5,
            "stderr": 0.1,
            "perplexity": 12.0,
            "texts": {"held<out>.txt": {"perplexity": 12.0}},
            "tasks": {"piqa": {"acc": 0.7, "acc_stderr": 0.01}} if name == "merge" else {},
            "lm_eval": None,
            "answers": ["evaluate-0/predictions.jsonl"],
            "sparsity": 0.5,
            "trainable": None,
            "storage": None,
            "seconds": None,
            "peak_memory": None,
            "evaluation_seconds": 1.0,
        }
        for name in ("sparsify", "merge")
    ],
}


def test_rows_are_flat_and_have_equal_keys(tmp_path: Path) -> None:
    rows = Run(None, tmp_path, {}, REPORT).rows()  # type: ignore[arg-type]
    assert [row["configuration"] for row in rows] == ["sparsify", "merge"] and rows[0].keys() == rows[1].keys()
    assert rows[0]["piqa acc"] is None and rows[1]["piqa acc"] == 0.7 and rows[0]["perplexity held<out>.txt"] == 12.0
    assert all(isinstance(value, str | int | float | None) for row in rows for value in row.values())
    assert (rows[0]["recipe"], rows[0]["seed"]) == ("tiny", 3)


def test_a_notebook_shows_the_table_and_a_shell_one_line(tmp_path: Path) -> None:
    run = Run(None, tmp_path / "tiny-0", {"merge": outcome("merge", tmp_path)}, REPORT)  # type: ignore[arg-type]
    html = run._repr_html_()
    assert html.count("<tr>") == 3 and "50.0% ± 10.0%" in html and "held<out>" not in html
    assert repr(run) == f"<Run {tmp_path / 'tiny-0'}: merge>"
    assert repr(run["merge"]) == f"<Outcome merge: {tmp_path / 'merge'}>"
