"""A section becomes a step: its components, inputs, files, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from layouts import LAYOUTS
from sqft_gptq import Rtn

from sqft import Recipe, Registry
from sqft.planning import steps
from sqft.planning.plan import Step
from sqft.planning.planner import adapter_base
from sqft.planning.resolution import Resolver
from sqft.planning.training_memory import gradient_bytes
from sqft.utils.digests import Digests

CODES = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}


def resolver_of(raw: dict[str, Any], registry: Registry) -> Resolver:
    return Resolver(Recipe.parse(raw), registry, Digests(), LAYOUTS)


def problems(resolver: Resolver) -> list[str]:
    return [str(problem) for problem in resolver.problems]


def trained(resolver: Resolver) -> dict[str, Step]:
    """The steps up to `search`."""
    recipe, base, done = resolver.recipe, adapter_base(resolver), dict[str, Step]()
    assert recipe.finetune and recipe.search
    if recipe.sparsify:
        done["sparsify"] = steps.plan_sparsify(recipe.sparsify, resolver)
    if recipe.quantize:
        done["quantize"] = steps.plan_quantize(recipe.quantize, resolver)
    done["finetune"] = steps.plan_finetune(recipe.finetune, resolver, base, done)
    done["search"] = steps.plan_search(recipe.search, resolver, base, done)
    return done


def test_sparsify_reads_calibration_where_a_component_needs_it(raw: dict[str, Any], registry: Registry) -> None:
    for scorer, needs in (("wanda", True), ("magnitude", False)):
        raw["sparsify"] = {"scorer": scorer, "exclude": ["down_proj"]}
        resolver = resolver_of(raw, registry)
        step = steps.plan_sparsify(resolver.recipe.sparsify, resolver)  # type: ignore[arg-type]
        assert (step.name, dict(step.inputs), problems(resolver)) == ("sparsify", {}, [])
        assert {kind: one.component.name for kind, one in step.components.items()} == {
            "scorer": scorer, "allocator": "uniform",
        }  # fmt: skip
        assert step.files == ({"calibration": Path(raw["calibration"]["data"])} if needs else {})


@pytest.mark.parametrize(
    ("sparsify", "label"),
    [
        ({"scorer": "wanda"}, "scorer 'wanda'"),
        ({"scorer": "magnitude", "allocator": "owl"}, "allocator 'owl'"),
        ({"scorer": "magnitude", "updater": "least-squares"}, "updater 'least-squares'"),
    ],
)
def test_a_missing_calibration_names_who_needs_it(
    sparsify: dict[str, Any], label: str, raw: dict[str, Any], registry: Registry
) -> None:
    del raw["calibration"]
    resolver = resolver_of({**raw, "sparsify": sparsify}, registry)
    steps.plan_sparsify(resolver.recipe.sparsify, resolver)  # type: ignore[arg-type]
    (problem,) = problems(resolver)
    assert problem.startswith(f"calibration: is missing: {label} needs ")


def test_a_step_comes_of_a_section_with_mistakes(raw: dict[str, Any], registry: Registry) -> None:
    raw["quantize"] = {"quantizer": "gptqq", "include": ["nothing"]}
    resolver = resolver_of(raw, registry)
    step = steps.plan_quantize(resolver.recipe.quantize, resolver)  # type: ignore[arg-type]
    assert step.components == {} and step.inputs == {"base": "sparsify"}
    assert [problem.partition(":")[0] for problem in problems(resolver)] == ["quantize.quantizer", "quantize.include"]


def test_fine_tuning_and_search(raw: dict[str, Any], registry: Registry, data: Path) -> None:
    resolver = resolver_of(raw, registry)
    made = trained(resolver)
    assert problems(resolver) == []
    assert dict(made["finetune"].inputs) == {"base": "sparsify"}
    assert dict(made["search"].inputs) == {"finetune": "finetune", "base": "sparsify"}
    assert made["finetune"].files == {"data": data / "train.jsonl"}
    assert made["search"].files == {"data": data / "validation.jsonl"}
    # q, k, v, up and down of two layers at rank 8, in float32.
    weights = 2 * 8 * ((32 + 32) + 2 * (32 + 16) + 2 * (32 + 64))
    estimate = made["finetune"].estimate
    assert (estimate.parameters, estimate.storage, made["search"].estimate.storage) == (
        weights,
        4 * weights,
        4 * weights,
    )


def test_examples_are_no_longer_than_the_models_window(raw: dict[str, Any], registry: Registry) -> None:
    step = trained(resolver_of(raw, registry))["finetune"]
    assert step.section.max_length == 256  # type: ignore[attr-defined]  # the default, 512, gives way


def test_a_search_without_data(raw: dict[str, Any], registry: Registry) -> None:
    del raw["search"]["data"]
    resolver = resolver_of(raw, registry)
    trained(resolver)
    (problem,) = problems(resolver)
    assert problem.startswith("search.data: is missing: searcher 'hill-climbing' evaluates on it; or keep records")
    raw["finetune"]["holdout"] = 0.1
    resolver = resolver_of(raw, registry)
    assert trained(resolver)["search"].files == {} and problems(resolver) == []


def test_a_searcher_that_evaluates_nothing_reads_nothing(raw: dict[str, Any], registry: Registry) -> None:
    for name in ("heuristic", "importance"):
        raw["search"]["searcher"] = name
        assert trained(resolver_of(raw, registry))["search"].files == {}


def test_a_searcher_that_needs_gradients_reads_records_and_keeps_activations(
    raw: dict[str, Any], registry: Registry
) -> None:
    raw["search"]["searcher"] = "importance"
    without = trained(resolver_of(raw, registry))["search"].estimate.memory
    raw["search"]["searcher"] = {"name": "importance", "options": {"signal": "gradient"}}
    steps = trained(resolver_of(raw, registry))
    assert steps["search"].files and not steps["search"].streamed
    resolver = resolver_of(raw, registry)
    kept = gradient_bytes(resolver.model, resolver.dtype, steps["finetune"].section)  # type: ignore[arg-type]
    assert steps["search"].estimate.memory == without + kept
    del raw["search"]["data"]
    trained(resolver := resolver_of(raw, registry))
    assert problems(resolver)[0].startswith("search.data: is missing: searcher 'importance' computes gradients on it")


def test_what_was_rounded_is_asked_of_the_quantizer(
    raw: dict[str, Any], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw["quantize"], raw["finetune"]["merger"], raw["finetune"]["base"] = CODES, "qa-sparsepeft", "compensated"
    resolver = resolver_of(raw, registry)
    with_byte = trained(resolver)["quantize"].estimate.storage
    assert problems(resolver) == []
    raw["quantize"] = CODES | {"keep_compensated": False}
    resolver = resolver_of(raw, registry)
    assert with_byte - trained(resolver)["quantize"].estimate.storage == 2 * 9216  # two layers' weights
    assert problems(resolver) == [
        'quantize.keep_compensated: finetune.base "compensated" starts from it; set this to true'
    ]
    raw["quantize"] = CODES
    monkeypatch.setattr(Rtn, "gives_compensated", False)
    resolver = resolver_of(raw, registry)
    assert with_byte - trained(resolver)["quantize"].estimate.storage == 2 * 9216  # two layers' weights
    (problem,) = problems(resolver)
    assert problem.startswith("finetune.base: quantizer 'rtn' does not give the floats that it rounded")


def test_a_merge_reads_all_that_it_is_made_of(raw: dict[str, Any], registry: Registry) -> None:
    raw["quantize"], raw["finetune"]["merger"] = CODES, "qa-sparsepeft"
    resolver = resolver_of(raw, registry)
    step = steps.plan_merge(resolver.recipe.merge, resolver, adapter_base(resolver), trained(resolver))  # type: ignore[arg-type]
    assert step is not None and problems(resolver) == []
    assert dict(step.inputs) == {
        "search": "search", "finetune": "finetune", "base": "quantize", "floats": "sparsify",
    }  # fmt: skip


def test_there_is_nothing_to_merge(raw: dict[str, Any], registry: Registry) -> None:
    raw["finetune"]["merger"] = "unmerged"
    resolver = resolver_of(raw, registry)
    made = trained(resolver)
    assert steps.plan_merge(resolver.recipe.merge, resolver, adapter_base(resolver), made) is None  # type: ignore[arg-type]
    assert problems(resolver)[0].startswith("merge: merger 'unmerged' leaves the adapter beside the base")


@pytest.mark.parametrize(
    ("left_out", "exporters", "names", "inputs", "problem"),
    [
        ((), ["hf"], ["export"], {"merge": "merge"}, None),
        ((), ["hf", "hf"], ["export:hf-0", "export:hf-1"], {"merge": "merge"}, None),
        (("finetune", "search", "merge"), ["hf"], ["export"], {"base": "sparsify"}, None),
        (("merge",), ["hf"], [], {}, "export: exports a complete model, but the adapter is not merged"),
        (("sparsify", "finetune", "search", "merge"), ["hf"], [], {}, "export: has nothing to export"),
        ((), ["gptq"], ["export"], {"merge": "merge"}, "export.0.exporter: 'gptq' writes codes"),
    ],
)
def test_exports(
    left_out: tuple[str, ...],
    exporters: list[str],
    names: list[str],
    inputs: dict[str, str],
    problem: str | None,
    raw: dict[str, Any],
    registry: Registry,
) -> None:
    raw = {key: value for key, value in raw.items() if key not in left_out}
    resolver = resolver_of({**raw, "export": [{"exporter": name} for name in exporters]}, registry)
    made = list(steps.plan_export(resolver.recipe.export, resolver, adapter_base(resolver), {}))
    assert [step.name for step in made] == names and all(dict(step.inputs) == inputs for step in made)
    assert [found.startswith(str(problem)) for found in problems(resolver)] == ([True] if problem else [])


@pytest.mark.parametrize(
    ("of", "inputs", "problem"),
    [
        (["model"], [{}], None),
        (["sparsify"], [{"base": "sparsify"}], None),
        (["search"], [{"search": "search", "finetune": "finetune", "base": "sparsify"}], None),
        (["finetune:maximal"], [{"finetune": "finetune", "base": "sparsify"}], None),
        (["model", "model"], [{}], "evaluate.of.1: 'model' is listed twice"),
        (["quantize"], [], "evaluate.of.0: 'quantize' is not made by this recipe"),
        (["finetune:hill-climbing"], [], "evaluate.of.0: searcher 'hill-climbing' needs evaluations"),
        (["finetune:nothing"], [], "evaluate.of.0: no searcher named 'nothing'"),
        (["finetune"], [], "evaluate.of.0: 'finetune' is not one of model, sparsify"),
        (["xyzzy"], [], "evaluate.of.0: 'xyzzy' is not one of model, sparsify"),
    ],
)
def test_what_is_measured(
    of: list[str], inputs: list[dict[str, str]], problem: str | None, raw: dict[str, Any], registry: Registry
) -> None:
    raw["evaluate"]["of"] = of
    resolver = resolver_of(raw, registry)
    section, base = resolver.recipe.evaluate, adapter_base(resolver)
    made = list(steps.plan_evaluate(section, resolver, base, trained(resolver)))  # type: ignore[arg-type]
    assert [dict(step.inputs) for step in made] == inputs
    assert [found.startswith(str(problem)) for found in problems(resolver)] == ([True] if problem else [])
    assert all(step.section.of == (step.name.partition(":")[2],) for step in made)  # type: ignore[attr-defined]


def test_a_measurement_of_nothing(raw: dict[str, Any], registry: Registry) -> None:
    raw["evaluate"] = {"of": ["model"]}
    resolver = resolver_of(raw, registry)
    list(steps.plan_evaluate(resolver.recipe.evaluate, resolver, adapter_base(resolver), {}))  # type: ignore[arg-type]
    assert problems(resolver) == ["evaluate: measures nothing; add perplexity, exact_match or tasks"]


def test_a_text_listed_twice(raw: dict[str, Any], registry: Registry) -> None:
    text = raw["evaluate"]["perplexity"]
    raw["evaluate"] = {"of": ["model"], "perplexity": [text, text | {"length": 300}]}
    resolver = resolver_of(raw, registry)
    list(steps.plan_evaluate(resolver.recipe.evaluate, resolver, adapter_base(resolver), {}))  # type: ignore[arg-type]
    assert problems(resolver) == [
        "evaluate.perplexity.1.length: 300 tokens, but the model's window is 256",
        "evaluate.perplexity.1.text: is the file of evaluate.perplexity.0.text, too; name it once",
    ]


@pytest.mark.parametrize("same", [True, False])
def test_a_text_that_calibration_sees(raw: dict[str, Any], registry: Registry, tmp_path: Path, same: bool) -> None:
    rows = [json.loads(line) for line in Path(raw["calibration"]["data"]).read_text().splitlines()]
    seen = " ".join(row["text"] for row in rows) if same else "Words of quite another kind. " * 9
    (tmp_path / "text.txt").write_text(seen)
    raw["evaluate"] = {"of": ["sparsify"], "perplexity": {"text": str(tmp_path / "text.txt")}}
    resolver = resolver_of(raw, registry)
    made = {"sparsify": steps.plan_sparsify(resolver.recipe.sparsify, resolver)}  # type: ignore[arg-type]
    list(steps.plan_evaluate(resolver.recipe.evaluate, resolver, adapter_base(resolver), made))  # type: ignore[arg-type]
    notes = [note for note in resolver.notes if note.startswith("evaluate.")]
    assert len(notes) == same
    if same:
        assert notes[0].startswith("evaluate.perplexity.text: ") and "occur in calibration.jsonl, too" in notes[0]


def test_a_text_that_training_sees(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    """It matters where a tuned model is measured."""
    seen = "Some words that are in the training records and nowhere else, as far as anyone can say. " * 3
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": f"Before. {seen}"}) + "\n")
    (tmp_path / "text.txt").write_text(seen)
    raw["finetune"]["data"] = str(tmp_path / "train.jsonl")
    for of, expected in (("sparsify", False), ("search", True)):
        raw["evaluate"] = {"of": [of], "perplexity": {"text": str(tmp_path / "text.txt")}}
        resolver = resolver_of(raw, registry)
        made = trained(resolver)
        list(steps.plan_evaluate(resolver.recipe.evaluate, resolver, adapter_base(resolver), made))  # type: ignore[arg-type]
        notes = [note for note in resolver.notes if "of its runs of 13 words" in note]
        assert len(notes) == expected
        if expected:
            assert notes[0].startswith("evaluate.perplexity.text: 100% of") and "which training sees" in notes[0]


def test_held_out_records_must_have_answers(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    """Where a search compares them; its loss needs none."""
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    raw["finetune"] |= {"data": str(tmp_path / "texts.jsonl"), "holdout": 0.5}
    del raw["search"]["data"]
    for metric, places in (("loss", []), ("exact_match", ["finetune.data.path"])):
        raw["search"]["metric"] = metric
        resolver = resolver_of(raw, registry)
        trained(resolver)
        assert [problem.place for problem in resolver.problems] == places


def test_training_on_a_model_that_came_as_codes(
    raw: dict[str, Any], quantized_folder: Path, registry: Registry
) -> None:
    """It starts from the codes, without being told to."""
    raw["model"] = {"path": str(quantized_folder), "dtype": "bfloat16"}
    raw["finetune"]["merger"] = "unmerged"
    raw.pop("sparsify")
    resolver = resolver_of(raw, registry)
    assert trained(resolver)["finetune"].section.base == "codes"  # type: ignore[attr-defined]
    assert problems(resolver) == []


def test_codes_that_make_up_for_pruning_need_a_step_that_prunes(raw: dict[str, Any], registry: Registry) -> None:
    raw["quantize"] = {"quantizer": {"name": "gptq", "options": {"group_size": 32, "refine": 1, "target": "dense"}}}
    assert problems_of_quantize(raw, registry) == []
    del raw["sparsify"]
    (problem,) = problems_of_quantize(raw, registry)
    assert problem.startswith("quantize.quantizer.options.target: 'gptq' would make up for pruned weights, but this")


def problems_of_quantize(raw: dict[str, Any], registry: Registry) -> list[str]:
    resolver = resolver_of(raw, registry)
    assert resolver.recipe.quantize
    steps.plan_quantize(resolver.recipe.quantize, resolver)
    return problems(resolver)
