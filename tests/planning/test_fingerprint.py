"""What a step's fingerprint depends on: what can change its result, all of it, and nothing else."""

from __future__ import annotations

import ast
import copy
import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import pytest

from sqft import Recipe, Registry
from sqft.components.registration import Provider, Registration
from sqft.planning import fingerprint
from sqft.planning.estimates import Estimate
from sqft.planning.fingerprint import STAGE_CODE, WITHOUT_EFFECT, code_files, core_digest, fingerprint_of, settings_of
from sqft.planning.plan import ResolvedComponent, Step
from sqft.recipe.fields import NoEffect, OutputPath
from sqft.recipe.sections import Evaluate, Finetune
from sqft.recipe.stages import STAGES
from sqft.types import InputPath

ROOT = Path(fingerprint.__file__).parents[1]
FINETUNE: dict[str, Any] = {"adapter": "lora", "merger": "unmerged", "data": ["a.jsonl", {"path": "b.jsonl"}]}
ESTIMATE = Estimate(0, 0, 0)


# -- the code of a stage ------------------------------------------------------------------------


@cache
def imported(file: Path) -> frozenset[Path]:
    """The files of the core that one of them imports, wherever in it, with those of the packages they are in."""
    return frozenset(_imported(file))


def _imported(file: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "sqft" and len(parts) > 1:  # `sqft` itself imports its names only when they are asked for
                path = ROOT.joinpath(*parts[1:])
                module = path.with_suffix(".py")
                packages = [package for package in (path, *path.parents) if package.is_relative_to(ROOT)]
                yield from (package / "__init__.py" for package in packages if package != ROOT)
                yield from [module] if module.is_file() else []


def closure(stage: str) -> set[Path]:
    """The files that can run while a stage does: what it imports, and what a component may."""
    seen: set[Path] = set()
    ahead = {ROOT / "stages" / f"{stage}.py", ROOT / "api.py", *code_files(ROOT / "kernels")}
    while ahead:
        file = ahead.pop()
        seen.add(file)
        ahead |= {other for other in imported(file) if other.is_file()} - seen
    return {file for file in seen if len(ast.parse(file.read_text()).body) > 1}  # but for a docstring alone


def files_of(names: tuple[str, ...]) -> set[Path]:
    return {file for name in names for file in code_files(ROOT / name) if len(ast.parse(file.read_text()).body) > 1}


@pytest.mark.parametrize("stage", STAGE_CODE)
def test_the_code_of_a_stage_is_what_it_imports(stage: str) -> None:
    """A module that can change a result is listed, and one that cannot be reached is not."""
    listed, excused, reached = files_of(STAGE_CODE[stage]), files_of(tuple(WITHOUT_EFFECT)), closure(stage)
    shown = {str(file.relative_to(ROOT)) for file in reached - listed - excused}
    assert not shown, f"{stage} imports these: add them to STAGE_CODE, or say in WITHOUT_EFFECT why they cannot matter"
    shown = {str(file.relative_to(ROOT)) for file in listed - reached}
    assert not shown, f"{stage} does not import these: remove them from STAGE_CODE"


def test_every_stage_is_listed_and_no_module_is_excused_in_vain() -> None:
    assert list(STAGE_CODE) == [stage.name for stage in STAGES]
    reached = set.union(*map(closure, STAGE_CODE))
    for name, reason in WITHOUT_EFFECT.items():
        assert reason and files_of((name,)) & reached, name
    listed = {name for names in STAGE_CODE.values() for name in names}
    assert not listed & WITHOUT_EFFECT.keys()
    assert all(files_of((name,)) or name.endswith("__init__") for name in listed)


def test_an_edit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fingerprint, "__file__", str(tmp_path / "planning" / "fingerprint.py"))
    monkeypatch.setattr(fingerprint, "STAGE_CODE", {"sparsify": ("types", "kernels")})
    files = [tmp_path / name for name in ("types.py", "kernels/masks.py", "kernels/grids.py", "errors.py")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("a = 1")

    def digest_after(file: Path) -> str:
        file.write_text(f"{file.read_text()}\n")
        return core_digest.__wrapped__("sparsify")

    digests = [digest_after(file) for file in files]
    assert len(set(digests[:3])) == 3 and digests[3] == digests[2]


# -- settings -----------------------------------------------------------------------------------


def settings(**changes: Any) -> dict[str, Any]:
    return settings_of(Finetune.model_validate({**FINETUNE, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"save_every": 7},
        {"report_to": ["tensorboard"]},
        {"logging_dir": "logs"},
        {"data": ["elsewhere.jsonl", "b.jsonl"]},  # its content enters by a digest
        {"adapter": {"name": "nls", "options": {"ranks": [4]}}},  # enters by the component's identity
        {"epochs": 3.0},  # the default, written out
    ],
    ids=str,
)
def test_settings_without_effect(changes: dict[str, Any]) -> None:
    assert settings(**changes) == settings()


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 4},
        {"seed": 1},
        {"holdout": 0.5},
        {"data": "a.jsonl"},
        {"data": ["a.jsonl", {"path": "b.jsonl", "limit": 3}]},
        {"data": ["a.jsonl", {"path": "b.jsonl", "prompt": {"prompt": "{{a}}", "completion": "{{b}}"}}]},
        {"validation": "c.jsonl"},
        {"targets": ["q_proj"]},
    ],
    ids=str,
)
def test_settings_with_effect(changes: dict[str, Any]) -> None:
    assert settings(**changes) != settings()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_fewshot": 3},
        {"apply_chat_template": True},
        {"apply_chat_template": "tool_use"},
        {"fewshot_as_multiturn": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"system_instruction": "Answer."},
        {"gen_kwargs": {"max_gen_toks": 9}},
        {"add_bos_token": False},
        {"batch_size": "auto"},
        {"limit": 9},
        {"log_samples": True},  # no number changes, but what the artifact holds
    ],
    ids=str,
)
def test_how_tasks_are_asked_counts(changes: dict[str, Any]) -> None:
    assert settings_of(Evaluate.model_validate(changes)) != settings_of(Evaluate())


def test_a_key_that_is_only_named_like_a_path_counts() -> None:
    class Longer(Finetune):
        path: int = 1
        text: str = ""

    assert settings_of(Longer.model_validate({**FINETUNE, "path": 2})) != settings_of(Longer.model_validate(FINETUNE))


def test_a_marked_field_is_left_out() -> None:
    class Longer(Finetune):
        more: Annotated[str | None, InputPath()] = None
        there: Annotated[str | None, OutputPath()] = None
        often: Annotated[int, NoEffect()] = 1

    section = Longer.model_validate({**FINETUNE, "more": "x", "there": "y", "often": 2})
    assert settings_of(section) == settings()


# -- the whole ----------------------------------------------------------------------------------


def step(recipe: Recipe, registry: Registry, **changes: Any) -> Step:
    assert recipe.sparsify
    registration = registry.get("scorer", "wanda")
    components = {"scorer": ResolvedComponent(registration, registration.component.model_validate({}))}
    made = Step("sparsify", "sparsify", recipe.sparsify, components, {}, ESTIMATE)
    data: dict[str, Any] = {"files": {"calibration": Path("c.jsonl")}, "digests": {"calibration": "c"}}
    return dataclasses.replace(made, **(data | changes))


def other_code(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> dict[str, ResolvedComponent[Any]]:
    registration = registry.get("scorer", "wanda")
    monkeypatch.setattr("sqft.components.registration.package_digest", lambda package: f"{package}, edited")
    return {"scorer": ResolvedComponent(registration, registration.component.model_validate({}))}


def test_what_a_fingerprint_depends_on(
    raw: dict[str, Any], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.parse(raw)
    first = fingerprint_of(step(recipe, registry), recipe, "model", {})
    assert len(first) == 64 and first == fingerprint_of(step(recipe, registry), recipe, "model", {})

    def changed(**changes: Any) -> str:
        other = copy.deepcopy(raw)
        for place, value in changes.items():
            section, _, key = place.rpartition("__")
            (other[section] if section else other)[key] = value
        recipe = Recipe.parse(other)
        return fingerprint_of(step(recipe, registry), recipe, "model", {})

    same = [
        changed(name="other"),
        changed(calibration__data="elsewhere.jsonl"),
        changed(model__path="elsewhere"),  # its content enters by a digest
        changed(merge=None),
        changed(sparsify__updater=None),
        fingerprint_of(step(recipe, registry, files={"calibration": Path("d.jsonl")}), recipe, "model", {}),
        fingerprint_of(step(recipe, registry, estimate=Estimate(1, 2, 3)), recipe, "model", {}),
    ]
    assert set(same) == {first}
    source = Registration(registry.get("scorer", "wanda").component, Provider("mine", "mine 2"))
    options = {
        "scorer": ResolvedComponent(
            registry.get("scorer", "magnitude"), registry.get("scorer", "magnitude").component()
        )
    }
    updater = registry.get("updater", "least-squares")
    updated = {**step(recipe, registry).components, "updater": ResolvedComponent(updater, updater.component())}
    others = [
        changed(seed=1),
        changed(calibration__samples=3),
        changed(model__dtype="bfloat16"),
        changed(model__trust_remote_code=True),
        changed(model__dtype="bfloat16", model__dequantize=True),
        changed(sparsify__sparsity=0.25),
        changed(sparsify__exclude=["q_proj"]),
        fingerprint_of(step(recipe, registry), recipe, "another model", {}),
        fingerprint_of(step(recipe, registry, digests={"calibration": "d"}), recipe, "model", {}),
        fingerprint_of(step(recipe, registry, layers=("model.layers.0.mlp.up_proj",)), recipe, "model", {}),
        fingerprint_of(step(recipe, registry, stage="quantize"), recipe, "model", {}),
        fingerprint_of(step(recipe, registry, components=options), recipe, "model", {}),
        fingerprint_of(step(recipe, registry, components=updated), recipe, "model", {}),
        fingerprint_of(
            step(recipe, registry, components={"scorer": ResolvedComponent(source, source.component())}),
            recipe,
            "model",
            {},
        ),
        fingerprint_of(step(recipe, registry, components=other_code(registry, monkeypatch)), recipe, "model", {}),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_inputs_and_the_adapter_s_code(
    raw: dict[str, Any], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.parse(raw)
    before = {"finetune": dataclasses.replace(step(recipe, registry), fingerprint="a")}
    after = step(recipe, registry, inputs={"finetune": "finetune"})
    first = fingerprint_of(after, recipe, "model", before)
    again = {"finetune": dataclasses.replace(before["finetune"], fingerprint="b")}
    assert fingerprint_of(after, recipe, "model", again) != first
    assert fingerprint_of(step(recipe, registry), recipe, "model", before) != first
    edited = {"finetune": dataclasses.replace(before["finetune"], components=other_code(registry, monkeypatch))}
    bare = dataclasses.replace(after, components={})  # whose own code is the same
    monkeypatch.undo()
    known = fingerprint_of(bare, recipe, "model", before)
    other_code(registry, monkeypatch)
    assert fingerprint_of(bare, recipe, "model", edited) != known


@pytest.mark.parametrize(
    ("measured", "counts"),
    [
        ({"perplexity": {"text": "t.txt"}}, False),
        ({"tasks": ["arc_easy"]}, False),
        ({"tasks": ["arc_easy"], "apply_chat_template": True}, True),
        ({"exact_match": {"data": "a.jsonl"}}, True),
    ],
    ids=str,
)
def test_arguments_of_a_template_count_where_an_evaluation_renders_it(
    measured: dict[str, Any], counts: bool, raw: dict[str, Any]
) -> None:
    done = set()
    for arguments in ({}, {"enable_thinking": False}):
        raw["model"]["chat_template_kwargs"] = arguments
        asks = Step(
            name="evaluate:model",
            stage="evaluate",
            section=Evaluate.model_validate(measured),
            components={},
            inputs={},
            estimate=ESTIMATE,
            files={"x": Path("x")},
        )
        done.add(fingerprint_of(asks, Recipe.parse(raw), "m", {}))
    assert len(done) == 1 + counts
