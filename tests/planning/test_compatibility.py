"""Choices that do not fit one another: each check by itself, with a case that fits beside each that does not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from sqft.api import Adapter, BaseKind, Exporter, LinearShape, Merger, Quantizer, RankGroup, SearchSpace
from sqft.components.registration import Provider, Registration
from sqft.errors import Problem
from sqft.planning import compatibility as check
from sqft.planning.plan import ResolvedComponent
from sqft.recipe.sections import Finetune, Sparsify
from sqft.utils.globs import selected

LAYERS = (LinearShape("m.layers.0.q", 8, 12), LinearShape("m.layers.1.q", 8, 10))


def resolved(kind: type[Any], name: str, options: dict[str, Any] | None = None, **members: Any) -> Any:
    """A component made on the spot, as a plan holds it."""
    annotations = dict.fromkeys(options or {}, bool)
    cls = type("Made", (kind,), {"__doc__": "Made.", "__annotations__": annotations, "name": name, **members})
    cls.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    return ResolvedComponent(Registration(cls, Provider("made", "made 1.0")), cls(**(options or {})))


def said(problems: Iterable[Problem]) -> list[str]:
    return [str(problem) for problem in problems]


def assert_problem(problems: Iterable[Problem], *words: str) -> None:
    (text,) = said(problems)
    for word in words:
        assert word in text


def fails(*_: Any) -> Any:
    raise ZeroDivisionError("no")


def sparsify(**settings: Any) -> Sparsify:
    return Sparsify.model_validate({"scorer": "wanda", **settings})


def finetune(**settings: Any) -> Finetune:
    return Finetune.model_validate({"adapter": "nls", "merger": "sparsepeft", "data": "a.jsonl", **settings})


def test_a_pattern_divides_the_inputs() -> None:
    for section in (sparsify(), sparsify(pattern="layer"), sparsify(pattern="1:2")):
        assert said(check.check_pattern(section, LAYERS)) == []
    problems = check.check_pattern(sparsify(pattern="2:4"), LAYERS)
    assert_problem(problems, "sparsify.pattern: '2:4' needs", "multiple of 4; m.layers.1.q has 10 (1 such layers)")
    assert_problem(check.check_pattern(sparsify(pattern="1:2", allocator="owl"), LAYERS), "sparsify.allocator: cannot")
    assert said(check.check_pattern(sparsify(allocator="owl"), LAYERS)) == []


def test_a_grid_fits_the_layers() -> None:
    def incompatibility(_: Any, linear: LinearShape) -> str | None:
        return "10 is odd" if linear.in_features == 10 else None

    quantizer = resolved(Quantizer, "mine", incompatibility=incompatibility)
    assert said(check.check_grid(quantizer, LAYERS[:1], ())) == []
    problem = "quantize.quantizer: m.layers.1.q: 10 is odd (1 such layers"
    assert_problem(check.check_grid(quantizer, LAYERS, ()), problem, '"exclude": ["m.layers.1.q"])')
    broken = resolved(Quantizer, "mine", incompatibility=fails)
    assert_problem(check.check_grid(broken, LAYERS, ()), "quantizer 'mine' (made 1.0) raised ZeroDivisionError")


@pytest.mark.parametrize(
    ("bad", "good", "exclude", "proposed"),
    [
        (
            ["m.0.attn.in_proj_a", "m.1.attn.in_proj_a", "m.1.attn.in_proj_b"],
            ["m.0.attn.q"],
            [],
            ["*.in_proj_a", "*.in_proj_b"],
        ),
        (["m.0.attn.b"], ["m.0.attn.q"], ["*.o_proj"], ["*.o_proj", "*.b"]),
        (["m.0.experts.3.up", "m.0.experts.4.up"], ["m.0.mlp.up"], [], ["*.experts.*.up"]),
        (["m.0.mlp.up"], ["m.0.experts.3.up", "m.1.q"], [], ["*.mlp.up"]),
        (["m.1.q"], ["m.0.q"], [], ["m.1.q"]),
    ],
)
def test_the_exclusion_that_mends_it_is_proposed(
    bad: list[str], good: list[str], exclude: list[str], proposed: list[str]
) -> None:
    """Every layer that does not fit is excluded, and no other."""
    quantizer = resolved(
        Quantizer, "mine", incompatibility=lambda _, linear: "it is bad" if linear.name in bad else None
    )
    layers = [LinearShape(name, 32, 32) for name in [*bad, *good]]
    assert_problem(check.check_grid(quantizer, layers, exclude), f'; or set "exclude": {json.dumps(proposed)})')
    kept = [layer for layer in layers if selected(layer.name, ["*"], proposed)]
    assert [layer.name for layer in kept] == good and not said(check.check_grid(quantizer, kept, proposed))
    assert_problem(check.check_grid(quantizer, layers[: len(bad)], exclude), f"({len(bad)} such layers)")


def test_blocks_are_quantized_alike() -> None:
    hybrid = (*LAYERS, LinearShape("m.layers.1.extra", 8, 8))
    for chosen in ((), LAYERS, hybrid, hybrid[2:]):
        assert said(check.check_blocks_alike(hybrid, chosen)) == []
    assert_problem(check.check_blocks_alike(hybrid, LAYERS[:1]), "quantize.include: differs from block to block")


def merger(name: str = "mine", *bases: BaseKind, **members: Any) -> Any:
    return resolved(Merger, name, bases=frozenset(bases or BaseKind), **members)


def test_a_merger_works_on_its_bases() -> None:
    sparse = merger("sparse-only", BaseKind.SPARSE)
    installed = [merger("codes", BaseKind.QUANTIZED).registration.component, sparse.registration.component]
    for kind in (None, BaseKind.SPARSE):
        assert said(check.check_base(sparse, kind, installed)) == []
    problems = check.check_base(sparse, BaseKind.QUANTIZED, installed)
    assert_problem(problems, "finetune.merger: 'sparse-only' works on a sparse base", "is quantized; use codes, or")
    assert_problem(check.check_base(sparse, BaseKind.DENSE, installed), "use another merger, or")


def test_dropout_is_refused_where_the_merged_weight_is_rounded() -> None:
    def input_dropout(self: Any) -> float:
        return 0.1 if getattr(self, "noisy", True) else 0.0

    adapter = resolved(Adapter, "mine", {"noisy": True}, noisy=False, input_dropout=input_dropout)
    side = merger("beside", merges=False)
    for other, kind in ((merger(), BaseKind.SPARSE), (merger(), None), (side, BaseKind.QUANTIZED)):
        assert said(check.check_dropout(adapter, other, kind)) == []
    problems = check.check_dropout(adapter, merger(), BaseKind.QUANTIZED)
    assert_problem(problems, "finetune.adapter.options.noisy: 'mine' rounds the merged weight", "set it to 0")
    quiet = resolved(Adapter, "mine", input_dropout=lambda _: 0.0)
    assert said(check.check_dropout(quiet, merger(), BaseKind.QUANTIZED)) == []
    always = resolved(Adapter, "mine", input_dropout=lambda _: 0.1)
    assert_problem(check.check_dropout(always, merger(), BaseKind.QUANTIZED), "finetune.adapter: 'mine' rounds")
    broken = resolved(Adapter, "mine", input_dropout=fails)
    assert_problem(check.check_dropout(broken, merger(), BaseKind.QUANTIZED), "adapter 'mine' (made 1.0) raised")


@pytest.mark.parametrize(
    ("settings", "kind", "came_quantized", "problem"),
    [
        ({}, BaseKind.SPARSE, False, None),
        ({}, BaseKind.QUANTIZED, True, None),
        ({"base": "codes", "mask": "codes"}, None, False, None),
        ({"base": "codes"}, BaseKind.QUANTIZED, False, None),
        ({"base": "codes"}, BaseKind.SPARSE, False, "finetune.base: there are no codes"),
        ({"base": "packed"}, BaseKind.SPARSE, False, None),
        ({"base": "packed"}, BaseKind.DENSE, False, None),  # it may have come sparse
        ({"base": "packed"}, BaseKind.QUANTIZED, False, "finetune.base: only a base of floats can be packed"),
        ({"base": "packed"}, BaseKind.QUANTIZED, True, "finetune.base: only a base of floats can be packed"),
        ({"mask": "codes"}, BaseKind.QUANTIZED, True, None),
        ({"mask": "codes"}, BaseKind.QUANTIZED, False, "finetune.mask: only a model that is already quantized"),
        ({"base": "floats"}, BaseKind.QUANTIZED, True, "finetune.base: the model has no floats, only codes"),
        ({"base": "floats"}, BaseKind.QUANTIZED, False, None),
        ({"base": "compensated"}, BaseKind.QUANTIZED, False, None),
        ({"base": "compensated"}, BaseKind.SPARSE, False, "finetune.base: there are no codes"),
        (
            {"base": "compensated"},
            BaseKind.QUANTIZED,
            True,
            "finetune.base: the model came as codes, without",
        ),
    ],
)
def test_what_training_starts_from(
    settings: dict[str, Any], kind: BaseKind | None, came_quantized: bool, problem: str | None
) -> None:
    problems = check.check_start(finetune(**settings), merger(), kind, came_quantized)
    assert_problem(problems, problem) if problem else said(problems) == []  # type: ignore[func-returns-value]


def test_what_was_rounded_must_be_known_and_used() -> None:
    section, kind = finetune(base="compensated"), BaseKind.QUANTIZED
    knows, says_not = (resolved(Quantizer, "mine", gives_compensated=gives) for gives in (True, False))
    assert said(check.check_start(section, merger(), kind, False, knows)) == []
    problems = check.check_start(section, merger(), kind, False, says_not)
    assert_problem(problems, "finetune.base: quantizer 'mine' does not give the floats that it rounded; set this to")
    assert said(check.check_start(finetune(), merger(), kind, False, says_not)) == []
    beside = check.check_start(section, merger(merges=False), kind, False, knows)
    assert_problem(beside, "finetune.base: 'mine' leaves the codes as they are")


def test_a_mask_of_codes_needs_a_merger_that_masks() -> None:
    problems = check.check_start(finetune(mask="codes"), merger(merges=False), BaseKind.QUANTIZED, True)
    assert_problem(problems, "finetune.mask: 'mine' does not change the codes and masks nothing")
    assert said(check.check_start(finetune(mask="codes"), None, BaseKind.QUANTIZED, True)) == []


def test_a_search_space_and_its_largest_parameters() -> None:
    groups = (RankGroup("a", (4, 2), ("m.layers.0.q",)), RankGroup("b", (3,), ("m.layers.1.q",)))
    fine = resolved(Adapter, "mine", space=lambda *_: SearchSpace(groups))
    assert check.check_space(fine, LAYERS) == (4 * 20 + 3 * 18, [])
    partly = resolved(Adapter, "mine", space=lambda *_: SearchSpace(groups[:1]))
    count, problems = check.check_space(partly, LAYERS)
    assert count == 0
    assert_problem(problems, "finetune.adapter: adapter 'mine' (made 1.0)", "m.layers.1.q")
    broken = resolved(Adapter, "mine", space=fails)
    assert_problem(check.check_space(broken, LAYERS)[1], "adapter 'mine' (made 1.0) raised ZeroDivisionError")


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"steps": 10, "warmup_steps": 10}, "finetune.warmup_steps"),
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, "finetune.warmup_ratio"),
        ({"schedule": "polynomial", "learning_rate": 1e-7}, "finetune.learning_rate"),
        ({"patience": 2}, "finetune.patience"),
        ({"evaluate_every": 2}, "finetune.evaluate_every"),
        ({"report_to": ["clearml"]}, "finetune.report_to.0"),
    ],
)
def test_settings_of_training(settings: dict[str, Any], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "find_spec", lambda name: None if name == "clearml" else object())
    assert_problem(check.check_training(finetune(**settings)), f"{place}: ")
    better = {"steps": 11, "warmup_ratio": 0.0, "learning_rate": 1e-3, "validation": "v", "report_to": ["wandb"]}
    assert said(check.check_training(finetune(**{**settings, **better}))) == []


def test_a_merge_needs_a_merger_that_merges() -> None:
    side = merger("beside", merges=False)
    assert said(check.check_merge(merger(), [])) == []
    problems = check.check_merge(side, [side.registration.component, merger().registration.component])
    assert_problem(problems, "merge: merger 'beside' leaves the adapter beside the base", "one that merges: mine")
    assert_problem(check.check_merge(side, []), "one that merges: none installed")


def test_an_exporter_of_codes_needs_codes() -> None:
    codes, floats = resolved(Exporter, "packed", needs_codes=True), resolved(Exporter, "plain")
    for exporter, kind in ((codes, BaseKind.QUANTIZED), (codes, None), (floats, BaseKind.DENSE)):
        assert said(check.check_exporter(exporter, kind, [], "export.exporter")) == []
    problems = check.check_exporter(codes, BaseKind.SPARSE, [floats.registration.component], "export.1.exporter")
    assert_problem(problems, "export.1.exporter: 'packed' writes codes", "use plain, or add quantize")


def test_what_makes_up_for_pruning_has_a_step_that_prunes() -> None:
    def needs_dense(self: Any) -> bool:
        return bool(getattr(self, "dense", True))

    assert check.check_dense(resolved(Quantizer, "mine"), None) == (False, [])
    quantizer = resolved(Quantizer, "mine", {"dense": True}, dense=False, needs_dense=needs_dense)
    assert check.check_dense(quantizer, sparsify()) == (True, [])
    needed, problems = check.check_dense(quantizer, None)
    assert needed
    assert_problem(problems, "quantize.quantizer.options.dense: 'mine' would make up", "remove this, or add sparsify")
    _, problems = check.check_dense(resolved(Quantizer, "mine", needs_dense=needs_dense), None)
    assert_problem(problems, "quantize.quantizer: 'mine' would make up")
    _, problems = check.check_dense(resolved(Quantizer, "mine", needs_dense=fails), None)
    assert_problem(problems, "quantizer 'mine' (made 1.0) raised ZeroDivisionError")
