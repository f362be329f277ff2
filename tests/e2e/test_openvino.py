"""OpenVINO GenAI opens what the exporter `gguf` writes: the same codes, and the model's own answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqft_gguf import Gguf

from sqft.checkpoints.model_spec import ModelSpec
from sqft.data.records import read_records
from sqft.modeling.loading import load_model
from sqft.modeling.loading.finished_model import FinishedModel
from tests.support.elsewhere import ROOT, elsewhere
from tests.support.models_for_others import PROBLEMS, real_int4, write_expectations

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CHECK = ROOT / "tests" / "consumers" / "openvino" / "check.py"


def test_the_real_model(tmp_path: Path) -> None:
    """Answers to fifty of the quickstart's problems, in float32."""
    made, folder = real_int4(), tmp_path / "exported"
    folder.mkdir()
    Gguf(embeddings="float16").export(FinishedModel(made), folder)
    _, tokenizer = load_model(ModelSpec(made))
    texts = [tokenizer(record["prompt"]).input_ids for record in read_records(PROBLEMS, 50)]
    values, given = write_expectations(made, tmp_path, texts, 0, 4)
    print(report := elsewhere("openvino", CHECK, folder, values, given))
    assert "210 quantized layers, 0 differ" in report
    assert int(report.split(" of 50 answers")[0].rpartition("\n")[2]) >= 45
