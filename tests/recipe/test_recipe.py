"""Every mistake of a recipe is one message with its place; nothing is loaded before."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import RecipeError, SqftError
from sqft.recipe.fields import Section
from sqft.recipe.sections import ComponentRef


def planned(raw: dict[str, Any], registry: Registry, store: Path) -> str:
    """What the plan says of a recipe; "" when it has no objection."""
    try:
        Orchestrator(registry, store).plan(Recipe.parse(raw))
    except RecipeError as error:
        return str(error)
    return ""


def change(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(raw)
    *parents, last = path.split(".")
    here: Any = changed
    for part in parents:
        here = here[int(part)] if isinstance(here, list) else here[part]
    if value is DELETE:
        del here[last]
    else:
        here[last] = value
    return changed


DELETE = object()
CASES = [
    ("name", DELETE, "name: is missing"),
    ("name", "../x", "name: string should match"),
    ("schema", 2, "schema: input should be 1"),
    ("finetun", {}, "finetun: unknown key.*Did you mean 'finetune'"),
    ("seed", -1, "seed: input should be greater than or equal to 0, found -1"),
    ("model.path", "nowhere", "model.path: no file or folder"),
    ("model.dtype", "int8", "model.dtype: input should be 'float32'"),
    ("calibration", DELETE, "calibration: is missing: scorer 'wanda' needs input-norm"),
    ("calibration.data", "no.jsonl", "calibration.data.path: there is no file"),
    ("calibration.data", 5, "calibration.data: input should be a text or an object, found 5"),
    ("calibration.length", 4096, "calibration.length: 4096 tokens, but the model's window is 256"),
    ("sparsify.sparsity", 1.0, "sparsify.sparsity: input should be less than 1"),
    ("sparsify.pattern", "4:2", "sparsify.pattern: pattern '4:2' must be 'row', 'layer' or 'N:M' with 1 <= N <= M"),
    (
        "sparsify",
        {"scorer": "wanda", "sparsity": 0.5, "pattern": "1:4"},
        "sparsify.pattern: '1:4' is a sparsity of 0.75, not 0.5",
    ),
    ("sparsify.include", ["nope"], "sparsify.include: matches no linear layer of the model; it has down_proj"),
    ("sparsify.scorer", "wnda", "sparsify.scorer: no scorer named 'wnda'; installed: .*wanda.*Did you mean 'wanda'"),
    ("sparsify.scorer", {"name": "wanda", "options": {"power": 1}}, "sparsify.scorer.options.power: unknown key"),
    ("sparsify.allocator", "owls", "sparsify.allocator: no allocator named 'owls'"),
    ("quantize", {"quantizer": "gptg"}, "quantize.quantizer: no quantizer named 'gptg'; installed: .*mean 'gptq'"),
    (
        "quantize",
        {"quantizer": {"name": "gptq", "options": {"group_size": 32}}},
        "finetune.merger: 'sparsepeft' works on a dense or sparse base, but this recipe's is quantized",
    ),
    ("finetune.adapter.options.ranks", [4, 8], "finetune.adapter.options.ranks: ranks must go from large to small"),
    ("finetune.adapter.options.alpha", 0, "finetune.adapter.options.alpha: input should be greater than 0"),
    ("finetune.merger", "sparspeft", "finetune.merger: no merger named 'sparspeft'.*Did you mean 'sparsepeft'"),
    ("finetune.merger", "unmerged", "merge: merger 'unmerged' leaves the adapter beside the base.*sparsepeft"),
    ("finetune.targets", ["q_prj"], "finetune.targets.0: 'q_prj' matches no linear layer"),
    ("finetune.data", "no.jsonl", "finetune.data.path: there is no file"),
    ("finetune.steps", 0, "finetune.steps: input should be greater than or equal to 1"),
    ("search.data", DELETE, "search.data: is missing: searcher 'hill-climbing' evaluates on it"),
    ("search.metric", "bleu", "search.metric: input should be 'exact_match' or 'loss'"),
    ("finetune", DELETE, "search: needs a finetune section"),
    ("export", [{"exporter": "onnx"}], "export.0.exporter: no exporter named 'onnx'"),
    ("evaluate.of", ["merged"], "evaluate.of.0: 'merged' is not one of model, sparsify"),
    ("evaluate.of", ["merge", "merge"], "evaluate.of.1: 'merge' is listed twice"),
    ("evaluate.of", ["finetune:hill-climbing"], "evaluate.of.0: searcher 'hill-climbing' needs evaluations"),
    ("evaluate.of", [], "evaluate.of: tuple should have at least 1 item"),
    ("evaluate.of", ["finetune:Heuristic"], "evaluate.of.0: no searcher named 'Heuristic'; .*Did you mean 'heuristic'"),
    ("evaluate.tasks", ["arc", "arc"], "evaluate.tasks: 'arc' is listed twice"),
    ("evaluate.perplexity.length", 300, "evaluate.perplexity.length: 300 tokens, but the model's window is 256"),
    ("finetune.max_length", 300, "finetune.max_length: 300 tokens, but the model's window is 256"),
    ("finetune.warmup_steps", 6, "finetune.warmup_steps: 6 of 6 steps"),
    ("finetune.warmup_ratio", 1.0, "finetune.warmup_ratio: input should be less than 1"),
    ("finetune.schedule", "cosine_with_min_lr", "finetune.schedule: input should be 'linear', 'cosine'"),
    ("finetune.patience", 3, 'finetune.patience: there is nothing to evaluate on; add "validation"'),
    ("finetune.validation", "no.jsonl", "finetune.validation.path: there is no file"),
    ("finetune.report_to", "tensorbord", "finetune.report_to.0: input should be 'tensorboard'"),
    ("finetune.report_to", "dvclive", "finetune.report_to.0: 'dvclive' is not installed; pip install dvclive"),
    ("finetune.data", "a\0b", "finetune.data.path: .* is not a valid path on this machine"),
    ("finetune.data", "~nosuchuser/x", "finetune.data.path: .* is not a valid path on this machine"),
    ("model.path", "x" * 300, "model.path: .* is not a valid path on this machine: .*too long"),
    ("evaluate.perplexity.text", "no.txt", "evaluate.perplexity.text: there is no file"),
]


@pytest.mark.parametrize(("path", "value", "message"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_mistakes(raw: dict[str, Any], registry: Registry, tmp_path: Path, path: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        Orchestrator(registry, tmp_path).plan(Recipe.parse(change(raw, path, value)))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"prompt": "1+1="}', r"no\.jsonl:2: expected .*'completion' is missing"),
        ("{oops", r"no\.jsonl:2: not valid JSON"),
        ('{"text": "1+1=2"}', r"no\.jsonl:2: there is no completion to compare with"),
        ('{"prompt": "1+1=", "completion": "two"}', None),
    ],
)
def test_records_are_read_in_the_plan(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, record: str, message: str | None
) -> None:
    """Not after an hour of training."""
    (tmp_path / "no.jsonl").write_text('{"prompt": "1+2=", "completion": "3"}\n' + record)
    raw["evaluate"]["exact_match"]["data"] = str(tmp_path / "no.jsonl")
    said = planned(raw, registry, tmp_path / "store")
    assert (re.search(f"evaluate.exact_match.data.path: .*{message}", said) is not None) if message else said == ""
    raw["evaluate"]["exact_match"]["answer"] = "first_number"
    if not message:
        assert "no number in the completion to compare with" in planned(raw, registry, tmp_path / "store")


def test_a_repeating_fraction_and_an_editors_schema(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    raw["sparsify"] = {"scorer": "magnitude", "pattern": "2:4", "sparsity": 0.5}
    raw["$schema"] = "recipe.schema.json"
    assert planned(raw, registry, tmp_path) == ""
    Recipe.parse(
        {"name": "a", "model": {"path": "x"}, "sparsify": {"scorer": "a", "pattern": "2:3", "sparsity": 0.3333}}
    )


def test_all_mistakes_at_once(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    raw["sparsify"]["scorer"] = "wnda"
    raw["finetune"]["data"] = "no.jsonl"
    raw["evaluate"]["of"] = ["nothing"]
    with pytest.raises(RecipeError) as caught:
        Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw))
    assert [p.place for p in caught.value.problems] == ["sparsify.scorer", "finetune.data.path", "evaluate.of.0"]
    assert not list(tmp_path.iterdir())


def test_mistakes_of_shape_hide_no_others(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    """Both passes report together, and what follows only from a mistake is not reported."""
    raw["sparsify"] = {"scorer": "wnda", "sparsity": 2, "pattern": "2:4"}
    raw["finetune"]["steps"] = 0
    raw["finetune"].pop("merger")
    raw["finetune"]["adapter"]["options"]["alpha"] = 0
    raw["evaluate"]["of"] = []
    raw["evaluate"]["perplexity"]["text"] = "no.txt"
    raw["surch"] = raw.pop("search")
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(raw))
    with pytest.raises(RecipeError) as caught:
        Orchestrator(registry, tmp_path / "store").load(file)
    assert [problem.place for problem in caught.value.problems] == [
        "sparsify.sparsity", "finetune.merger", "finetune.steps", "evaluate.of", "surch",
        "sparsify.scorer", "finetune.adapter.options.alpha", "evaluate.perplexity.text",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "others"),
    [
        ("finetune", 3, False),  # without the section, search and merge would seem out of place
        ("model", DELETE, True),
        ("model.path", 5, True),
        ("sparsify.scorer", {"nam": "wanda"}, True),
        ("evaluate.of", ["model", 7, "merge", 8], True),
        ("export", [{}, 5], True),
        ("name", "a b", True),
        ("search.data", [], True),
    ],
)
def test_what_is_left_of_a_faulty_recipe(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, path: str, value: Any, others: bool
) -> None:
    file = tmp_path / "recipe.json"
    raw["evaluate"]["exact_match"]["data"] = "no.jsonl"
    file.write_text(json.dumps(change(raw, path, value)))
    with pytest.raises(RecipeError) as caught:
        Orchestrator(registry, tmp_path / "store").load(file)
    elsewhere = [p.place for p in caught.value.problems if not p.place.startswith(path)]
    assert elsewhere == (["evaluate.exact_match.data.path"] if others else [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1, column 2: not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"name": "a", "name": "b"}', "the key 'name' appears twice"),
        ('{"seed": NaN}', "NaN is not a valid JSON number"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(file)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'{"name": "\xe9"}')
    with pytest.raises(RecipeError, match="not UTF-8"):
        Recipe.load(tmp_path / "latin.json")


def test_set(raw: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(raw))
    changes = ["sparsify.sparsity=0.25", "name=other", "sparsify.scorer.options.x=[1]", "evaluate.of.0=merge"]
    changes.append("finetune.data.limit=8")  # {"data": "train.jsonl"} grows
    recipe = Recipe.load(file, changes)
    assert recipe.sparsify and recipe.evaluate and recipe.finetune
    assert recipe.finetune.data.limit == 8 and recipe.finetune.data.path == raw["finetune"]["data"]
    assert (recipe.sparsify.sparsity, recipe.name, recipe.evaluate.of[0]) == (0.25, "other", "merge")
    assert recipe.sparsify.scorer.model_dump() == {"name": "wanda", "options": {"x": [1]}}
    for wrong in ("sparsify", "=1", "seed.x.y=1", "evaluate.of.9=merge"):
        with pytest.raises(RecipeError, match=r"recipe\.json: 1 problem"):
            Recipe.load(file, [wrong])


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
keys = st.sampled_from([*Recipe.model_fields, "schema"])


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(keys, json_values, max_size=6))
def test_no_data_makes_a_traceback(content: dict[str, Any]) -> None:
    try:
        Recipe.parse(content)
    except SqftError as error:
        assert isinstance(getattr(error, "rest", None), Recipe | None)


def test_every_key_of_a_section_is_described() -> None:
    sections = [section for section in Section.__subclasses__() if section.__module__.startswith("sqft.")]
    assert len(sections) > 10
    for section in sections:
        fields = {} if section in (Recipe, ComponentRef) else section.model_fields
        assert section.__doc__ and all(field.description for field in fields.values()), section


def test_a_change_inside_a_list_of_data(raw: dict[str, Any]) -> None:
    raw["finetune"]["data"] = ["a.jsonl", "b.jsonl"]
    changed = Recipe.changed(raw, ["finetune.data.1.weight=2"])
    assert changed.finetune and isinstance(changed.finetune.data, tuple)
    assert [(data.path, data.weight) for data in changed.finetune.data] == [("a.jsonl", 1.0), ("b.jsonl", 2.0)]


def test_changes_leave_the_callers_data_alone() -> None:
    raw = {"name": "x", "model": {"path": "m"}, "sparsify": {"scorer": "wanda"}}
    before = copy.deepcopy(raw)
    assert Recipe.changed(raw, ["sparsify.sparsity=0.7"]).sparsify.sparsity == 0.7  # type: ignore[union-attr]
    assert raw == before


def test_every_change_that_leads_nowhere_is_named_beside_the_other_mistakes(raw: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.changed(raw, ["seed", "name.x=1", "sparsify.sparsity=2"])
    assert [problem.place for problem in caught.value.problems] == ["", "name.x", "sparsify.sparsity"]
    assert caught.value.rest is not None
    with pytest.raises(RecipeError) as alone:
        Recipe.changed(raw, ["name.x=1"])
    assert alone.value.rest is not None and alone.value.rest.name == raw["name"]
