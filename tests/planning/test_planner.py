"""A recipe becomes a plan: its steps in order, each after those it reads, or every mistake at once."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import multimodal_models
import pytest
from layouts import LAYOUTS
from packed_checkpoints import pack_folder
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sqft import Recipe, Registry
from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import RecipeError
from sqft.planning.plan import Plan
from sqft.planning.planner import adapter_base, make_plan, plan_steps, with_fingerprints, with_option_paths
from sqft.planning.resolution import Resolver
from sqft.types import BaseKind
from sqft.utils.digests import Digests


def planned(raw: dict[str, Any], registry: Registry, *left_out: str, **more: Any) -> Plan:
    raw = {**{key: value for key, value in copy.deepcopy(raw).items() if key not in left_out}, **more}
    return make_plan(Recipe.parse(raw), registry, Digests(), LAYOUTS)


def refused(raw: dict[str, Any], registry: Registry, *left_out: str, **more: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        planned(raw, registry, *left_out, **more)
    return [str(problem) for problem in caught.value.problems]


RTN = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}


def test_steps_are_in_order_and_read_earlier_ones(raw: dict[str, Any], registry: Registry) -> None:
    plan = planned(raw, registry)
    names = [step.name for step in plan.steps]
    measured = [f"evaluate:{name}" for name in raw["evaluate"]["of"]]
    assert names == ["sparsify", "finetune", "search", "merge", *measured]
    for index, step in enumerate(plan.steps):
        assert set(step.inputs.values()) <= set(names[:index])
        assert len(step.fingerprint) == 64 and step.digests.keys() == step.files.keys()
    assert len({step.fingerprint for step in plan.steps}) == len(names) and not plan.reused


def test_paths_of_options_are_stored_absolute(raw: dict[str, Any], tmp_path: Path) -> None:
    """In an object and in a list; all else is as it was, and what was not written is not written."""
    exporter = {"exporter": {"name": "hf", "options": {"table": "t"}}}
    recipe = Recipe.parse(raw | {"export": [{"exporter": "hf"}, exporter]}, tmp_path, "here.json")
    assert with_option_paths(recipe, {}) is recipe
    places = {"export.1.exporter.options.table": "/t", "finetune.adapter.options.ranks": "/r"}
    found = with_option_paths(recipe, places)
    assert (found.folder, found.source) == (tmp_path, "here.json")
    before, after = (one.model_dump(mode="json", exclude_unset=True) for one in (recipe, found))
    before["export"][1]["exporter"]["options"]["table"] = "/t"
    before["finetune"]["adapter"]["options"]["ranks"] = "/r"
    assert after == before


def test_a_search_comes_of_itself_after_fine_tuning(raw: dict[str, Any], registry: Registry) -> None:
    plan = planned(raw, registry, "search", "merge", "evaluate")
    assert [step.name for step in plan.steps] == ["sparsify", "finetune", "search"]
    assert plan.step("search").components["searcher"].component.name == "heuristic"


@pytest.mark.parametrize(
    ("left_out", "more", "kind", "step", "floats_step"),
    [
        (("sparsify",), {}, BaseKind.DENSE, None, None),
        ((), {}, BaseKind.SPARSE, "sparsify", None),
        (("sparsify",), {"quantize": RTN}, BaseKind.QUANTIZED, "quantize", None),
        ((), {"quantize": RTN}, BaseKind.QUANTIZED, "quantize", "sparsify"),
    ],
)
def test_what_lies_under_the_adapters(
    left_out: tuple[str, ...],
    more: dict[str, Any],
    kind: BaseKind,
    step: str | None,
    floats_step: str | None,
    raw: dict[str, Any],
    registry: Registry,
) -> None:
    raw["finetune"]["merger"] = "unmerged"
    base = planned(raw, registry, "merge", "evaluate", *left_out, **more).adapter_base
    assert (base.kind, base.step, base.floats_step) == (kind, step, floats_step)


def test_what_a_step_reads_is_part_of_its_fingerprint(raw: dict[str, Any], registry: Registry) -> None:
    """A change reaches all steps after it, and no other."""
    before, changed = planned(raw, registry), copy.deepcopy(raw)
    changed["finetune"]["steps"] += 1
    after = planned(changed, registry)
    differ = [
        one.name for one, two in zip(before.steps, after.steps, strict=True) if one.fingerprint != two.fingerprint
    ]
    untouched = {"sparsify", "evaluate:model", "evaluate:sparsify"}
    assert differ == [step.name for step in before.steps if step.name not in untouched]


def test_every_mistake_is_reported_once(raw: dict[str, Any], registry: Registry) -> None:
    raw["model"]["path"], raw["calibration"]["data"] = "nowhere", "no.txt"
    raw["sparsify"]["scorer"], raw["evaluate"]["of"] = "wnda", ["merge", "merge"]
    problems = refused(raw, registry)
    places = [problem.partition(":")[0] for problem in problems]
    # The file is not asked for: whether the unknown scorer needs it is not known.
    assert places == ["model.path", "sparsify.scorer", "evaluate.of.1"] and "Did you mean 'wanda'?" in problems[1]


@pytest.mark.parametrize(
    ("left_out", "more", "problem"),
    [
        (("finetune",), {"evaluate": None}, "search: needs a finetune section; add one or remove this"),
        (("finetune", "search"), {"evaluate": None}, "merge: needs a finetune section; add one or remove this"),
        (("sparsify", "finetune", "search", "merge", "evaluate"), {}, "asks for nothing; add a section such as"),
    ],
)
def test_sections_that_cannot_stand_alone(
    left_out: tuple[str, ...], more: dict[str, Any], problem: str, raw: dict[str, Any], registry: Registry
) -> None:
    assert refused(raw, registry, *left_out, **more)[0].startswith(problem)


def test_a_model_that_is_quantized_already(raw: dict[str, Any], registry: Registry, quantized_folder: Any) -> None:
    raw["model"] = {"path": str(quantized_folder)}
    problems = refused(raw, registry, "finetune", "search", "merge", "evaluate", quantize=RTN)
    expected = "the model is already quantized; remove this section"
    assert [problem.partition(",")[0] for problem in problems[:2]] == [f"sparsify: {expected}", f"quantize: {expected}"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("pattern", "name", "what"),
    [("lm_head", "lm_head", "the head"), ("*.embed_tokens", "model.embed_tokens", "the embedding")],
)
def test_the_head_and_the_embedding_are_refused_by_name(
    raw: dict[str, Any],
    registry: Registry,
    model_folder: Path,
    tmp_path: Path,
    tied: bool,
    pattern: str,
    name: str,
    what: str,
) -> None:
    if not tied:
        config = AutoConfig.from_pretrained(model_folder, tie_word_embeddings=False)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
        raw["model"]["path"] = str(tmp_path)
    if tied and name == "lm_head":
        what += ", whose weight is that of model.embed_tokens"
    raw["finetune"] |= {"targets": ["q_proj", pattern]}
    raw["sparsify"]["include"] = [pattern]
    problems = refused(raw, registry, "evaluate", quantize=RTN | {"include": ["*", pattern]})
    for place in ("sparsify.include.0", "quantize.include.1", "finetune.targets.1"):
        start = f"{place}: '{pattern}' is {name}, {what}; sqft works on linear layers inside decoder blocks"
        assert len([problem for problem in problems if problem.startswith(start)]) == 1
    assert not [problem for problem in problems if "matches no linear layer" in problem]


def test_weights_in_fp8_are_read_when_the_recipe_says_so(
    raw: dict[str, Any], registry: Registry, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(model_folder, folder)
    pack_folder(folder, "fp8", (32, 32))
    raw["model"] = {"path": str(folder)}
    (problem, *_) = refused(raw, registry, "evaluate")
    assert problem.startswith(f"model.path: {folder} holds its weights in FP8; set model.dequantize to true")
    raw["model"]["dequantize"] = True
    plan = planned(raw, registry, "evaluate")
    assert plan.model_spec == ModelSpec(folder, "bfloat16", dequantize=True)
    assert plan.spec(tmp_path) == ModelSpec(tmp_path)  # what a step wrote is floats
    floats = planned(raw | {"model": {"path": str(model_folder), "dtype": "bfloat16"}}, registry, "evaluate")
    assert plan.source.shapes == floats.source.shapes and plan.source.layout == floats.source.layout
    assert [step.estimate for step in plan.steps] == [step.estimate for step in floats.steps]
    raw["model"]["path"] = str(model_folder)
    assert "holds no weights in MXFP4 or FP8; remove model.dequantize" in refused(raw, registry, "evaluate")[0]


def test_a_multimodal_model_keeps_its_towers(
    raw: dict[str, Any], registry: Registry, tokenizer: Any, tmp_path: Path
) -> None:
    """The plan says that they stay as they are, and every layer that a step changes is the text model's."""
    multimodal_models.make("Mistral3").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plan = planned(raw | {"model": {"path": str(tmp_path)}}, registry, "evaluate")
    (note,) = (note for note in plan.notes if note.startswith("model: "))
    assert note.startswith("model: left as it is, outside the text model: model.vision_tower (") and "projector" in note
    layers = {name for step in plan.steps for name in step.layers}
    assert layers and all(name.startswith("model.language_model.layers.") for name in layers)
    only = {"name": "x", "model": {"path": str(tmp_path)}, "evaluate": raw["evaluate"] | {"of": ["model"]}}
    assert not planned(only, registry).notes  # nothing is changed


def test_a_checkpoint_that_lacks_a_tensor_is_named_with_all_other_mistakes(
    raw: dict[str, Any], registry: Registry, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "less"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    raw["finetune"]["targets"] = ["nothing"]
    said = refused(raw | {"model": {"path": str(folder)}}, registry)
    assert said[0] == (
        f"model.path: {folder}: lacks model.layers.1.mlp.up_proj.weight, which LlamaForCausalLM has by config.json; "
        "copy it again"
    )
    assert said[1].startswith("finetune.targets.0: 'nothing' matches no linear layer")


def test_plugins_that_cannot_be_used_are_named_beside_what_is_missing(raw: dict[str, Any]) -> None:
    class Broken(Registry):
        def get(self, kind: str, name: str) -> Any:
            from sqft.errors import PluginError

            raise PluginError(f"no {kind} named '{name}'\n  plugin 'mine' (mine 1.0) could not be loaded")

    problems = refused(raw, Broken(), "finetune", "search", "merge", "evaluate")
    assert problems == [
        "sparsify.scorer: no scorer named 'wanda'",
        "sparsify.allocator: no allocator named 'uniform'",
        "plugin 'mine' (mine 1.0) could not be loaded",
    ]


def places_of(problems: list[str]) -> list[str]:
    return [problem.partition(":")[0] for problem in problems]


def test_without_a_model_all_other_mistakes_are_reported(raw: dict[str, Any], registry: Registry) -> None:
    """What only a model could tell is not guessed at."""
    raw["sparsify"] = {"scorer": "wnda", "include": ["nothing"]}
    raw["finetune"] |= {"targets": ["nothing"], "merger": "qa-sparsepeft", "data": "none.jsonl", "warmup_steps": 6}
    raw["export"] = [{"exporter": "gptq"}]
    raw["evaluate"]["of"] = ["everything"]
    places = [
        "sparsify.scorer", "sparsify.include", "finetune.merger", "finetune.targets.0", "finetune.data.path",
        "finetune.warmup_steps", "export.0.exporter", "evaluate.of.0",
    ]  # fmt: skip
    assert places_of(refused(raw, registry)) == places
    raw["model"]["path"] = "nowhere"
    of_the_model = {"sparsify.include", "finetune.merger", "finetune.targets.0", "export.0.exporter"}
    assert places_of(refused(raw, registry)) == [
        "model.path",
        *(place for place in places if place not in of_the_model),
    ]


@pytest.mark.parametrize(
    ("sections", "path", "kind"),
    [
        ((), None, BaseKind.DENSE),
        (("sparsify",), None, BaseKind.SPARSE),
        (("quantize",), None, BaseKind.QUANTIZED),
        ((), "nowhere", None),  # it could have come as codes
        (("sparsify",), "nowhere", None),
        (("quantize",), "nowhere", BaseKind.QUANTIZED),
    ],
)
def test_the_kind_of_the_base(
    raw: dict[str, Any], registry: Registry, sections: tuple[str, ...], path: str | None, kind: BaseKind | None
) -> None:
    raw["quantize"] = {"quantizer": "rtn"}
    kept = {key: raw[key] for key in ("schema", "name", "model", *sections)}
    kept["model"] = {"path": path or raw["model"]["path"]}
    assert adapter_base(Resolver(Recipe.parse(kept), registry, Digests(), LAYOUTS)).kind is kind


def test_fingerprints_come_with_digests_of_files(raw: dict[str, Any], registry: Registry, data: Path) -> None:
    recipe, digests = Recipe.parse(raw), Digests()
    resolver = Resolver(recipe, registry, digests, LAYOUTS)
    steps = plan_steps(resolver, adapter_base(resolver))
    assert not any(step.fingerprint or step.digests for step in steps)
    done = with_fingerprints(steps, recipe, "model", digests)
    assert [step.name for step in done] == [step.name for step in steps]
    assert done[0].digests == {"calibration": digests.path(data / "calibration.jsonl")}
    assert done != with_fingerprints(steps, recipe, "another model", digests)
