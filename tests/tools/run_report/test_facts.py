"""What is read of a finished run: losses, trials, ranks, layers, answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from sqft.errors import StoreError
from sqft.execution.run import Run
from sqft.tools.run_report.facts import RunFacts, by_block, by_question, in_block, read_facts, rules_of
from sqft.tools.run_report.trials import in_order


@pytest.fixture(scope="session")
def facts(made: tuple[Run, Run], made_store: Path) -> RunFacts:
    return read_facts(made[0].folder, made_store)


def test_losses_are_those_of_the_log(facts: RunFacts, made: tuple[Run, Run]) -> None:
    log = [json.loads(line) for line in (made[0]["finetune"].folder / "log.jsonl").read_text().splitlines()]
    found = facts.losses()
    assert found.keys() == {"step", "mean"} and found["step"] == [(entry["step"], entry["loss"]) for entry in log]
    assert found["mean"][-1] == (6, pytest.approx(fmean(entry["loss"] for entry in log)))


def test_trials_and_the_best_so_far(facts: RunFacts, made: tuple[Run, Run]) -> None:
    found = in_order(facts.trials())
    values = [value for _, value in found["trial"]]
    assert len(values) == made[0]["search"].report["trials"]
    assert found["best so far"][-1][1] == max(values) == made[0]["search"].report["value"]
    (chosen,) = [trial for trial in facts.trials() if trial.ranks == tuple(facts.chosen())]
    assert chosen.value == max(values)


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
        accuracy, *_ = facts.measures[row["configuration"].partition(" ")[0]]
        answers = accuracy.answers
        assert len(answers) == 10 and fmean(answers.values()) == pytest.approx(row["accuracy"])


def test_the_result_and_how_it_is_loaded(facts: RunFacts, made: tuple[Run, Run]) -> None:
    assert facts.result == made[0]["merge"].folder.resolve() / "model"
    assert facts.loading().endswith(f'from_pretrained("{facts.result}", dtype="auto")')


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


def test_a_moved_store_says_where_the_result_is_now(made: tuple[Run, Run], made_store: Path, tmp_path: Path) -> None:
    shutil.copytree(made_store, tmp_path / "moved")
    facts = read_facts(tmp_path / "moved" / "runs" / made[0].folder.name, tmp_path / "moved")
    assert str(tmp_path / "moved") in facts.loading() and str(made_store) not in facts.loading()


def test_configurations_are_in_the_order_in_which_models_are_made(facts: RunFacts) -> None:
    backwards = dataclasses.replace(facts, artifacts=dict(reversed(facts.artifacts.items())))
    assert [*backwards.configurations()] == ["model", "sparsify", "finetune:maximal", "search", "merge"]


def evaluated(facts: RunFacts, tmp_path: Path, files: dict[str, str], **report: Any) -> RunFacts:
    """The facts with another evaluation of the merged model."""
    artifact = facts.artifacts["evaluate:merge"]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    stored = {name: {"sha256": hashlib.sha256(content.encode()).hexdigest()} for name, content in files.items()}
    manifest = artifact.manifest | {"files": stored, "report": artifact.report | report}
    return dataclasses.replace(
        facts, artifacts={"evaluate:merge": dataclasses.replace(artifact, folder=tmp_path, manifest=manifest)}
    )


def test_of_lm_evals_metrics_those_count_that_are_means_over_answers(facts: RunFacts, tmp_path: Path) -> None:
    """lambada's perplexity is of a log-likelihood in each answer: the mean of these is no perplexity."""
    samples = [{"doc_hash": h, "filter": "none", "acc": a, "perplexity": -2.0} for h, a in (("x", 1.0), ("y", 0.0))]
    text = "".join(json.dumps(one) + "\n" for one in samples)
    other = evaluated(
        facts, tmp_path, {"samples/toy.jsonl": text}, tasks={"toy": {"acc": 0.5, "acc_stderr": 0.5, "perplexity": 7.4}}
    )
    names = [measure.name for measure in other.measures["merge"]]
    assert "toy acc" in names and "toy perplexity" not in names


def test_a_line_ends_at_a_line_feed_only(facts: RunFacts, tmp_path: Path) -> None:
    answer = {"prompt": "one\u2028two\u0085three", "expected": "3", "right": True}
    other = evaluated(facts, tmp_path, {"predictions.jsonl": json.dumps(answer, ensure_ascii=False) + "\n"})
    (accuracy,) = [measure for measure in other.measures["merge"] if measure.name == "accuracy"]
    assert list(accuracy.answers.values()) == [1.0]


def test_a_damaged_file_is_named(facts: RunFacts, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"predictions.jsonl is damaged .*--fresh evaluate:merge"):
        _ = evaluated(facts, tmp_path, {"predictions.jsonl": "{\n"}).measures


def test_a_file_that_has_changed_is_named(facts: RunFacts, tmp_path: Path) -> None:
    answer = {"prompt": "a", "expected": "3", "right": True}
    other = evaluated(facts, tmp_path, {"predictions.jsonl": json.dumps(answer)})
    (tmp_path / "predictions.jsonl").write_text(json.dumps(answer | {"right": False}))
    with pytest.raises(StoreError, match=rf"it has changed since it was stored\); delete {tmp_path}"):
        _ = other.measures


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"answer": "text", "tolerance": 0, "data": "a.jsonl", "batch_size": 2}, {"data": "b.jsonl"}, True),
        ({"answer": "first_number"}, {}, False),
        ({"answer": "last_number", "tolerance": 0.5}, {"answer": "last_number"}, False),
        ({"of another version": 1}, {"of another version": 1, "batch_size": 3}, True),
        ({"of another version": 1}, {}, False),
    ],
)
def test_answers_are_compared_under_equal_rules(one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    assert (rules_of(one) == rules_of(other)) is same


def test_neither_measure_depends_on_the_size_of_a_batch(facts: RunFacts, tmp_path: Path) -> None:
    def rules(batch: int) -> set[str]:
        samples = json.dumps({"doc_hash": "x", "filter": "none", "acc": 1.0}) + "\n"
        asked = {"names": {"toy": ["toy"]}, "tasks": {}, "batch_size": batch, "limit": 4}
        report = {"tasks": {"toy": {"acc": 1.0}}, "lm_eval": asked}
        found = evaluated(facts, tmp_path, {"samples/toy.jsonl": samples}, **report).measures["merge"]
        return {one.rules for one in found if one.name == "toy acc"}

    assert rules(4) == rules(8) != set()


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


def test_each_expert_has_its_own_rank() -> None:
    assert in_block("model.layers.0.mlp.experts.11.w1", 7, experts=True) == (0, "mlp.experts.11.w1")


def test_experts_are_averaged() -> None:
    assert by_block({"m.0.experts.0.w": 0.25, "m.0.experts.1.w": 0.75, "m.1.experts.0.w": 1.0}) == {
        "experts.*.w": [(0, 0.5), (1, 1.0)]
    }


def test_a_question_that_comes_twice_counts_twice() -> None:
    assert list(by_question([("a", True), ("b", 0), ("a", 0.5)]).values()) == [1.0, 0.0, 0.5]
    assert by_question([("a", True), ("b", [1, 2])]) == {}
