"""What only a model's modules can show is found before a weight is read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig, MambaForCausalLM

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import StageError
from sqft.stages.preflight import check_fit


def test_an_adapter_that_stock_peft_refuses(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, tokenizer: Any
) -> None:
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=8)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    raw = {key: raw[key] for key in ("schema", "name", "finetune")} | {"model": {"path": str(tmp_path / "mamba")}}
    raw["finetune"] |= {"merger": "unmerged", "targets": ["out_proj"]}
    orchestrator = Orchestrator(registry, tmp_path / "store")
    plan = orchestrator.plan(Recipe.parse(raw))
    with pytest.raises(StageError, match=r"PEFT, for which 'unmerged' writes its adapter, refuses them: .*Mamba"):
        orchestrator.run(plan)


def test_an_adapter_that_stock_peft_takes(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    """Without a warning about names that transformers is to lose, which only peft uses."""
    raw["finetune"]["merger"] = "unmerged"
    raw = {key: raw[key] for key in ("schema", "name", "model", "finetune")}
    plan = Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fit(plan)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"gen_kwargs": {"max_gen_tok": 3}}, r"evaluate.gen_kwargs.max_gen_tok: .* did you mean max_gen_toks"),
        ({"gen_kwargs": {"max_gen_toks": 10**6}}, r"'sums' generates up to 1000000 tokens"),
        ({"num_fewshot": 100}, r"evaluate.num_fewshot: 'sums' has no 100 examples"),
        ({"add_bos_token": True}, r"evaluate.add_bos_token: the model's tokenizer puts no token"),
    ],
    ids=str,
)
def test_a_question_that_cannot_be_asked(
    setting: dict[str, Any], message: str, raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    """It is found before anything is trained."""
    (tmp_path / "tasks").mkdir()
    data = raw["evaluate"]["exact_match"]["data"]
    (tmp_path / "tasks" / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}"
        "\ntest_split: test\nfewshot_split: test\noutput_type: generate_until\n"
        "doc_to_text: '{{prompt}}'\ndoc_to_target: '{{completion}}'\n"
    )
    raw["evaluate"] = {"of": ["merge"], "tasks": ["sums"], "include_path": str(tmp_path / "tasks"), **setting}
    orchestrator = Orchestrator(registry, tmp_path / "store")
    plan = orchestrator.plan(Recipe.parse(raw))
    with pytest.raises(StageError, match=message):
        orchestrator.run(plan)
    assert not list((tmp_path / "store").glob("*/*/manifest.json"))
