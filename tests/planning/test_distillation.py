"""What a plan says of a teacher: what is refused, what it costs, and what training depends on."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from packed_checkpoints import pack_folder

from sqft import Orchestrator, Recipe, Registry
from sqft.checkpoints.model_source import ModelSource
from sqft.errors import RecipeError, StageError
from sqft.planning import training_memory
from sqft.planning.plan import Plan


def planned(raw: dict[str, Any], store: Path, teacher: Any, **section: Any) -> Plan:
    raw = raw | {"finetune": raw["finetune"] | section | {"teacher": teacher}}
    return Orchestrator(Registry.discover(), store).plan(Recipe.parse(raw))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("nowhere", r"finetune\.teacher\.model: no file or folder .*nowhere, and 'nowhere' is not a Hugging Face id"),
        ({"model": "dense", "weight": 0}, r"finetune\.teacher\.weight: input should be greater than 0"),
        ({"model": "dense", "weight": 1.1}, r"finetune\.teacher\.weight: input should be less than or equal to 1"),
        (
            {"model": "dense", "temperature": 0},
            r"finetune\.teacher\.temperature: input should be greater than or equal to 0\.01",
        ),
        ({"model": "dense", "temperature": 101}, r"finetune\.teacher\.temperature: .* less than or equal to 100"),
        ({"model": "dense", "top_k": 0}, r"finetune\.teacher\.top_k: input should be greater than or equal to 1"),
        ({"weight": 1}, r"finetune\.teacher\.model: is missing"),
    ],
    ids=str,
)
def test_what_a_recipe_may_not_say(teacher: Any, message: str, raw: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(raw, tmp_path, teacher)


def test_a_teacher_with_a_shorter_window(raw: dict[str, Any], model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.config.max_position_embeddings = 100
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "short")
    message = r"finetune\.teacher: its window is 100 tokens, and finetune\.max_length is 256; lower it"
    with pytest.raises(RecipeError, match=message):
        planned(raw, tmp_path, str(tmp_path / "short"))
    planned(raw, tmp_path, str(tmp_path / "short"), max_length=100)


def test_a_teacher_of_other_tokens_is_refused_before_the_first_step(
    raw: dict[str, Any], model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"A":', '"zz":', 1))
    plan = planned(raw, tmp_path / "store", str(tmp_path / "other"))
    with pytest.raises(
        StageError, match=r"finetune\.teacher: token \d+ of the model is 'A', and .*other does not have"
    ):
        Orchestrator(Registry.discover(), tmp_path / "store").run(plan)
    assert not (tmp_path / "store" / "artifacts").exists()


def test_what_it_costs(raw: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    def note(teacher: Any, **section: Any) -> str:
        return next(n for n in planned(raw, tmp_path, teacher, **section).notes if n.startswith("finetune.teacher"))

    # Six steps of four, and the batch that is made ahead; or every record that is not held out, once.
    assert "reads about 28 examples once (28 teacher forwards); 516 bytes for each label" in note("dense")
    everything = {"steps": None, "data": {"path": raw["finetune"]["data"], "weight": 2}, "holdout": 0.25}
    assert "48 teacher forwards" in note("dense", **everything)
    assert "a model of 26,848 parameters" in note(str(model_folder))
    for top_k in (None, 258, 1000):
        assert f"{4 * 258:,} bytes for each label" in note({"model": "dense", "top_k": top_k})
    assert "reads at most 64 examples once" in note("dense", packing=True)


def test_a_teacher_with_nothing_to_teach_is_noted(raw: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    assert not any("nothing to add" in note for note in planned(raw, tmp_path, "dense").notes)
    raw = {key: raw[key] for key in ("schema", "name", "model", "finetune")}
    for teacher in ("dense", raw["model"]["path"]):
        assert any("nothing to add" in note for note in planned(raw, tmp_path, teacher).notes)


def test_training_depends_on_the_teacher_s_content(raw: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    def fingerprint(teacher: Any) -> str:
        return planned(raw, tmp_path, teacher).step("finetune").fingerprint

    for name in ("a", "b"):
        shutil.copytree(model_folder, tmp_path / name)
    one = fingerprint(str(tmp_path / "a"))
    assert one == fingerprint(str(tmp_path / "b")) != fingerprint("dense") != fingerprint(None)
    assert fingerprint({"model": "dense", "temperature": 2}) != fingerprint("dense")
    settings = tmp_path / "a" / "config.json"
    settings.write_text(settings.read_text().replace("rms_norm_eps", "rms_norm_epsilon"))
    assert fingerprint(str(tmp_path / "a")) != one


def test_how_the_teacher_is_loaded(raw: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    raw["model"] |= {"dtype": "bfloat16", "trust_remote_code": True}
    shutil.copytree(model_folder, tmp_path / "other")
    own, other = (planned(raw, tmp_path, teacher) for teacher in ("dense", str(tmp_path / "other")))
    assert own.teacher == own.model_spec
    assert other.teacher and (other.teacher.path, other.teacher.dtype, other.teacher.trust_remote_code) == (
        tmp_path / "other",
        "bfloat16",
        True,
    )
    assert planned(raw, tmp_path, None).teacher is None
    pack_folder(tmp_path / "other", "fp8", (32, 32))  # whatever the recipe's own model is
    packed = planned(raw, tmp_path, str(tmp_path / "other")).teacher
    assert packed == dataclasses.replace(other.teacher, dequantize=True)


def test_memory_is_the_larger_of_the_two(raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(teacher: Any) -> int:
        return planned(raw, tmp_path, teacher, loss_chunk=1).step("finetune").estimate.memory

    logits, layer = 4 * 258, 4 * 4 * 256 * (14 * 32 + 4 * 64)
    assert memory("dense") == memory(None) + 3 * logits
    monkeypatch.setattr(ModelSource, "parameters", 10**9)
    reading = 4 * 10**9 + layer + 6 * logits + (1 << 29)
    assert memory("dense") == max(memory(None) + 3 * logits, reading)
    monkeypatch.setattr(training_memory, "activation_bytes", lambda *_: 0)
    assert memory("dense") == reading > memory(None)
