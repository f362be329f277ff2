"""What is read of a finished run: losses, trials, ranks, layers, answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean

import pytest

from sqft.errors import StoreError
from sqft.execution.run import Run
from sqft.tools.run_report.facts import RunFacts, by_block, by_question, in_block, read_facts


@pytest.fixture(scope="session")
def facts(made: tuple[Run, Run], made_store: Path) -> RunFacts:
    return read_facts(made[0].folder, made_store)


def test_losses_are_those_of_the_log(facts: RunFacts, made: tuple[Run, Run]) -> None:
    log = [json.loads(line) for line in (made[0]["finetune"].folder / "log.jsonl").read_text().splitlines()]
    found = facts.losses()
    assert found.keys() == {"step", "mean"} and found["step"] == [(entry["step"], entry["loss"]) for entry in log]
    assert found["mean"][-1] == (6, pytest.approx(fmean(entry["loss"] for entry in log)))


def test_trials_and_the_best_so_far(facts: RunFacts, made: tuple[Run, Run]) -> None:
    found = facts.trials()
    values = [value for _, value in found["trial"]]
    assert len(values) == made[0]["search"].report["trials"]
    assert found["best so far"][-1][1] == max(values) == made[0]["search"].report["value"]


def test_each_group_has_its_chosen_rank(facts: RunFacts, made: tuple[Run, Run]) -> None:
    ranks = facts.ranks()
    assert set(ranks) == {"self_attn.q_proj+k_proj+v_proj", "mlp.up_proj", "mlp.down_proj"}
    assert all(blocks.keys() == {0, 1} for blocks in ranks.values())
    chosen = json.loads((made[0]["search"].folder / "choice.json").read_text())["ranks"]
    assert sorted(rank for blocks in ranks.values() for rank in blocks.values()) == sorted(chosen)


def test_sparsity_and_errors_by_block(facts: RunFacts, made: tuple[Run, Run], made_store: Path) -> None:
    assert facts.sparsity()["mlp.up_proj"] == [(0, 0.5), (1, 0.5)]
    assert read_facts(made[1].folder, made_store).sparsity()["mlp.up_proj"] == [(0, 0.75), (1, 0.75)]
    assert all(value > 0 for errors in facts.errors().values() for line in errors.values() for _, value in line)


def test_answers_are_as_right_as_the_report_says(facts: RunFacts, made: tuple[Run, Run]) -> None:
    for row in made[0].report["rows"]:
        answers = facts.answers[row["configuration"].partition(" ")[0]]["accuracy"]
        assert len(answers) == 10 and fmean(answers.values()) == pytest.approx(row["accuracy"])


def test_the_result_and_how_it_is_loaded(facts: RunFacts, made: tuple[Run, Run]) -> None:
    assert facts.result == made[0]["merge"].folder.resolve() / "model"
    assert facts.loading.endswith(f'from_pretrained("{facts.result}", dtype="auto")')


def test_an_artifact_that_is_gone_is_missing_and_nothing_else(
    made: tuple[Run, Run], made_store: Path, tmp_path: Path
) -> None:
    shutil.copytree(made_store, tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "artifacts" / made[0]["finetune"].folder.name)
    facts = read_facts(tmp_path / "store" / "runs" / made[0].folder.name, tmp_path / "store")
    assert "finetune" not in facts.artifacts and facts.losses() == {} == facts.ranks() and facts.trials()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", None, "has not finished"),
        ("run.json", "{", "cannot be read"),
        ("plan.json", "[1]", "cannot be read"),
    ],
)
def test_a_run_that_cannot_be_read(
    made: tuple[Run, Run], tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    folder = tmp_path / "store" / "runs" / "tiny"
    shutil.copytree(made[0].folder, folder)
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(StoreError, match=f"run tiny {message}"):
        read_facts(folder, tmp_path / "store")


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
        ("model.layers.0.mlp.experts.11.w1", (0, "mlp.experts.*.w1")),
        ("backbone.head", (7, "backbone.head")),
    ],
)
def test_where_a_layer_is(layer: str, found: tuple[int, str]) -> None:
    assert in_block(layer, 7) == found


def test_experts_are_averaged() -> None:
    assert by_block({"m.0.experts.0.w": 0.25, "m.0.experts.1.w": 0.75, "m.1.experts.0.w": 1.0}) == {
        "experts.*.w": [(0, 0.5), (1, 1.0)]
    }


def test_a_question_that_comes_twice_counts_twice() -> None:
    assert list(by_question([("a", True), ("b", 0), ("a", 0.5)]).values()) == [1.0, 0.0, 0.5]
    assert by_question([("a", True), ("b", [1, 2])]) == {}
