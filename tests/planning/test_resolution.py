"""What a recipe names, looked up: components, files, records and layers, or problems with their paths."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import pytest
from layouts import LAYOUTS
from safetensors.torch import load_file, save_file
from torch import Tensor

from sqft import Orchestrator, Recipe, Registry
from sqft.api import InputPath, LinearShape, LinearStats, Merger, Scorer
from sqft.checkpoints.layout import ModelLayout
from sqft.checkpoints.narrow import narrow_layers
from sqft.errors import RecipeError
from sqft.planning.plan import Plan
from sqft.planning.resolution import Resolver
from sqft.recipe.data import Data
from sqft.recipe.measures import Perplexity
from sqft.recipe.rerun import with_absolute_paths
from sqft.recipe.sections import Calibration, ComponentRef, Evaluate, Finetune
from sqft.utils.digests import Digests


def planned(raw: dict[str, Any], store: Path) -> Plan:
    return Orchestrator(Registry.discover(), store).plan(Recipe.parse(raw))


def problems(raw: dict[str, Any], store: Path) -> list[tuple[str, str]]:
    with pytest.raises(RecipeError) as caught:
        planned(raw, store)
    return [(problem.place, problem.message) for problem in caught.value.problems]


@pytest.fixture
def resolver(raw: dict[str, Any], registry: Registry, data: Path) -> Resolver:
    return Resolver(Recipe.parse(raw, data), registry, Digests(), LAYOUTS)


def said(resolver: Resolver) -> list[str]:
    return [str(problem) for problem in resolver.problems]


def test_a_component_and_its_options(resolver: Resolver) -> None:
    scorer = resolver.component(Scorer, ComponentRef(name="wanda"), "here")
    assert scorer and scorer.component.name == "wanda" and scorer.label.startswith("scorer 'wanda' (sqft ")
    assert resolver.component(Scorer, ComponentRef(name="sparsepeft"), "here") is None  # a merger
    assert resolver.component(Scorer, ComponentRef(name="wanda", options={"powr": 1}), "there") is None
    first, second = said(resolver)
    assert first.startswith("here: no scorer named 'sparsepeft'") and second.startswith("there.options.powr: unknown")
    assert {merger.name for merger in resolver.installed(Merger)} >= {"sparsepeft", "unmerged", "qa-sparsepeft"}


@pytest.fixture
def half(raw: dict[str, Any], model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The recipe on a bfloat16 checkpoint, whose config says float32."""
    folder = shutil.copytree(model_folder, tmp_path / "half")
    weights = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return raw | {"model": {"path": str(folder)}}


def test_a_checkpoint_that_the_default_widens_is_noted(
    half: dict[str, Any], raw: dict[str, Any], tmp_path: Path
) -> None:
    plan = planned(half, tmp_path)
    (note,) = [note for note in plan.notes if note.startswith("model.dtype: ")]
    assert "the checkpoint is in bfloat16; float32, the default, takes twice" in note and '"auto"' in note
    assert plan.model_spec.dtype == "float32"
    for quiet in (raw, half | {"model": half["model"] | {"dtype": "float32"}}):
        assert not [note for note in planned(quiet, tmp_path).notes if note.startswith("model.dtype: ")]


def test_auto_is_the_precision_of_the_checkpoint(half: dict[str, Any], raw: dict[str, Any], tmp_path: Path) -> None:
    """A plan with "auto" is the plan with that precision: fingerprints, estimates and what is stored to run again."""
    auto, named = (
        planned(half | {"model": half["model"] | {"dtype": dtype}}, tmp_path) for dtype in ("auto", "bfloat16")
    )
    assert auto.model_spec.dtype == "bfloat16" and auto.notes == named.notes
    assert auto.fingerprint == named.fingerprint and str(auto) == str(named)
    assert with_absolute_paths(auto.recipe) == with_absolute_paths(named.recipe)
    assert planned(raw | {"model": raw["model"] | {"dtype": "auto"}}, tmp_path).model_spec.dtype == "float32"
    missing = problems(raw | {"model": {"path": "nowhere", "dtype": "auto"}}, tmp_path)
    assert [place for place, _ in missing] == ["model.path"]


class Files(Scorer):
    name = "files"
    needs = frozenset()
    file: Annotated[Path, InputPath()]
    other: Annotated[str, InputPath()] | None = None
    word: Annotated[str, InputPath(words=("dense",))] = "dense"
    preset: Annotated[str, InputPath()] = "preset.txt"

    def score(self, weight: Tensor, stats: LinearStats) -> Tensor:
        return weight.abs()


def test_options_that_name_files(raw: dict[str, Any], tmp_path: Path) -> None:
    """Each keeps its type and is a file of the step, a default too; a stored recipe finds all of them from anywhere."""
    registry = Registry.discover()
    registry.add(Files)
    for name in ("file.txt", "other.txt", "preset.txt"):
        (tmp_path / name).write_text(name)
    raw = {key: raw[key] for key in ("schema", "name", "model")}
    raw["sparsify"] = {"scorer": {"name": "files", "options": {"file": "file.txt", "other": "other.txt"}}}
    orchestrator = Orchestrator(registry, tmp_path / "store")
    plan = orchestrator.plan(Recipe.parse(raw, tmp_path))
    (step,) = plan.steps
    assert step.files == {f"scorer.{name}": tmp_path / f"{name}.txt" for name in ("file", "other", "preset")}
    scorer = step.component(Scorer)
    assert isinstance(scorer, Files) and scorer.file == tmp_path / "file.txt" and scorer.preset.endswith("preset.txt")
    assert isinstance(scorer.file, Path) and step.components["scorer"].identity["options"] == {"word": "dense"}
    again = orchestrator.plan(Recipe.parse(with_absolute_paths(plan.recipe), tmp_path / "elsewhere"))
    assert again.fingerprint == plan.fingerprint


def test_a_problem_is_collected_once(resolver: Resolver) -> None:
    for _ in range(2):
        resolver.file("none.txt", "here")
    resolver.file("none.txt", "there")
    assert [problem.place for problem in resolver.problems] == ["here", "there"]


def test_files(resolver: Resolver, data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert resolver.file("heldout.txt", "a") == data / "heldout.txt"
    assert resolver.file(str(data), "b", folder=True) == data and not resolver.problems
    for path, folder in (("heldout.txt", True), (str(data), False), (str(tmp_path / "empty.txt"), False)):
        resolver.file(path, path, folder)
    assert all(
        words in problem for words, problem in zip(("no folder", "no file", "empty"), said(resolver), strict=True)
    )


def test_the_files_of_a_section_by_their_places_in_it(resolver: Resolver, data: Path) -> None:
    finetune = {"adapter": "nls", "merger": "sparsepeft", "data": ["train.jsonl", {"path": "test.jsonl", "weight": 2}]}
    section = Finetune.model_validate(finetune | {"validation": "validation.jsonl", "logging_dir": "logs"})
    names = {role: path.name for role, path in resolver.files(section, "finetune").items()}
    assert names == {"data.0": "train.jsonl", "data.1": "test.jsonl", "validation": "validation.jsonl"}
    evaluate = {"perplexity": {"text": "heldout.txt"}, "exact_match": {"data": "test.jsonl"}, "include_path": str(data)}
    files = resolver.files(Evaluate.model_validate(evaluate), "evaluate")
    assert files.keys() == {"perplexity.text", "exact_match.data", "include_path"} and not resolver.problems
    assert dict(resolver.files(Evaluate(tasks=("a",)), "evaluate")) == {}


@pytest.mark.parametrize(
    ("record", "answer", "message"),
    [
        ('{"prompt": "a", "completion": "b"}', "text", None),
        ('{"text": "a"}', None, None),
        ('{"text": "a"}', "text", "here.path: .*:1: there is no completion to compare with"),
        ('{"prompt": "a", "completion": "b"}', "last_number", "there is no number in the completion to compare with"),
        ("{", None, "here.path: .*:1: not valid JSON"),
    ],
)
def test_every_record_is_read(
    resolver: Resolver, tmp_path: Path, record: str, answer: Any, message: str | None
) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(record)
    assert resolver.records(Data(path=str(file)), "here", answer) == file
    assert re.search(message, said(resolver)[0]) if message else not resolver.problems


def test_layers_and_targets(resolver: Resolver) -> None:
    assert len(resolver.layers(["*"], ["down_proj"], "here")) == 12
    assert [layer.name for layer in resolver.targets(["*.1.*.q_proj"], "here")] == ["model.layers.1.self_attn.q_proj"]
    assert not resolver.problems
    assert resolver.layers(["*"], ["*"], "here") == [] and len(resolver.targets(["q_proj", "q_prj"], "there")) == 2
    first, second = said(resolver)
    assert first.startswith("here: matches no linear layer of the model; it has down_proj, gate_proj")
    assert second.startswith("there.1: 'q_prj' matches no linear layer")


@pytest.mark.parametrize(
    ("include", "exclude", "left_out"),
    [
        (["*"], [], ["in_proj_a", "in_proj_b"]),
        (["*.linear_attn.*"], [], ["in_proj_a", "in_proj_b"]),
        (["*", "in_proj_a"], [], ["in_proj_b"]),
        (["*", "*.in_proj_?"], [], []),
        (["in_proj_*"], ["in_proj_b"], ["in_proj_b"]),
        (["*"], ["in_proj_a"], ["in_proj_a", "in_proj_b"]),
    ],
)
def test_narrow_layers_are_taken_by_name(
    resolver: Resolver, include: list[str], exclude: list[str], left_out: list[str]
) -> None:
    wide = {"in_proj_qkv": (4096, 1024), "out_proj": (1024, 2048)}
    shapes = wide | dict.fromkeys(("in_proj_a", "in_proj_b"), (16, 1024))
    linears = tuple(LinearShape(f"m.0.linear_attn.{name}", *shape) for name, shape in shapes.items())
    layout = ModelLayout(linears=linears, narrow=narrow_layers(linears))
    resolver.model = dataclasses.replace(resolver.model, layout=layout)
    chosen = {layer.name.rpartition(".")[2] for layer in resolver.layers(include, exclude, "here")}
    assert {"in_proj_a", "in_proj_b"} - chosen == set(left_out)
    said_so = [name for name in left_out if name not in exclude]
    assert bool(resolver.notes) is bool(said_so)
    for note in resolver.notes:
        assert note.startswith(
            f"here: leaves out {len(said_so)} narrow layers ({', '.join(said_so)}: at most 64 outputs"
        )


def test_a_number_of_tokens_gives_way_unless_it_was_written(resolver: Resolver) -> None:
    """The window is 256."""
    assert resolver.within_window(Perplexity(text="x"), "length", "here").length == 256
    assert resolver.within_window(Perplexity(text="x", length=64), "length", "here").length == 64
    assert not resolver.problems
    resolver.within_window(Perplexity(text="x", length=1024), "length", "here")
    resolver.within_window(Calibration(data="x"), "length", "there", always=True)
    assert [problem.place for problem in resolver.problems] == ["here.length", "there.length"]


def test_without_a_model_nothing_is_said_of_it(raw: dict[str, Any], registry: Registry) -> None:
    raw["model"]["path"] = "nowhere"
    resolver = Resolver(Recipe.parse(raw), registry, Digests(), LAYOUTS)
    assert not resolver.has_model and [problem.place for problem in resolver.problems] == ["model.path"]
    assert resolver.layers(["q_prj"], [], "here") == [] and resolver.targets(["q_prj"], "here") == ()
    assert resolver.within_window(Perplexity(text="x"), "length", "here").length == 1024
    assert len(resolver.problems) == 1


def test_a_slice_is_part_of_the_fingerprint(raw: dict[str, Any], tmp_path: Path) -> None:
    sums = raw["finetune"]["data"]
    found = []
    for split in ("train", "train[:32]", "train[:50%]", "train[50%:]", "train[:32]"):
        raw["finetune"]["data"] = {"path": sums, "split": split}
        plan = planned(raw, tmp_path)
        found.append([plan.step(name).fingerprint for name in ("finetune", "search", "merge")])
    assert found[1] == found[4]
    for name in range(3):
        assert len({prints[name] for prints in found}) == 4


def test_a_wrong_slice_is_one_problem(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["finetune"]["data"] = [raw["finetune"]["data"], {"path": raw["finetune"]["data"], "split": "train[:10"}]
    raw["search"]["data"] = {"path": "owner/never-fetched", "split": "test[a:]"}
    (first, said), (second, _) = problems(raw, tmp_path)
    assert (first, second) == ("finetune.data.1.split", "search.data.split")
    assert said.startswith("Unrecognized instruction format: train[:10; write slices as datasets does: train[:100]")


@pytest.mark.parametrize(
    ("how", "place", "words"),
    [
        ({"split": "test"}, "finetune.data.split", "a single file has only the split 'train', or slices of it"),
        (
            {"split": "train[:5]+test"},
            "finetune.data.split",
            "a single file has only the split 'train', or slices of it",
        ),
        ({"config": "main"}, "finetune.data.path", "is a single file and has no config"),
        ({"split": "train[70:]"}, "finetune.data.path", "split 'train[70:]', has no records"),
    ],
)
def test_what_one_file_does_not_have(
    raw: dict[str, Any], tmp_path: Path, how: dict[str, str], place: str, words: str
) -> None:
    raw["finetune"]["data"] = {"path": raw["finetune"]["data"], **how}
    ((found, said),) = problems(raw, tmp_path)
    assert found == place and words in said


def test_slices_of_one_file_train_and_validate(raw: dict[str, Any], tmp_path: Path) -> None:
    from sqft.tools.data_preview import previews

    path = raw["finetune"]["data"]
    raw["finetune"] |= {
        "data": {"path": path, "split": "train[:75%]"},
        "validation": {"path": path, "split": "train[75%:]"},
    }
    shown = {preview.place: preview.facts["records"] for preview in previews(planned(raw, tmp_path), 1, ["finetune"])}
    assert shown == {"finetune.data": "48", "finetune.validation": "16"}


def test_a_note_is_kept_once_and_is_no_problem(resolver: Resolver) -> None:
    for _ in range(2):
        resolver.note("evaluate.tasks", "are scored without the template")
    resolver.note("", "a tower is left out")
    assert list(resolver.notes) == ["evaluate.tasks: are scored without the template", "a tower is left out"]
    assert not resolver.problems
