"""What only a model's modules can show is found before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig, MambaForCausalLM

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import StageError


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
