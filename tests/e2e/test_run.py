"""A whole recipe on a tiny model: artifacts, reuse, invariants, and what stock libraries make of the result."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from sqft import Orchestrator, Recipe, Registry, Run
from sqft.errors import ArtifactError, RecipeError, SqftError, StageError
from sqft.recipe.rerun import recipe_of_model

NO_SQFT = "import sys; sys.modules['sqft'] = None\n"


def run(raw: dict[str, Any], registry: Registry, store: Path, **how: Any) -> Run:
    orchestrator = Orchestrator(registry, store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)), **how)


def without_sqft(code: str, *arguments: object) -> str:
    """Run code where sqft cannot be imported."""
    command = [sys.executable, "-c", NO_SQFT + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_whole_pipeline(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    finished = run(raw, registry, tmp_path)
    base = load_file(finished["sparsify"].folder / "model" / "model.safetensors")
    merged = load_file(finished["merge"].folder / "model" / "model.safetensors")
    changed = 0
    for name, before in base.items():
        after = merged[name]
        assert not ((before == 0) & (after != 0)).any()
        changed += not torch.equal(before, after)
    assert changed == 2 * 5
    assert finished["sparsify"].report["sparsity"] == pytest.approx(0.5, abs=0.01)
    rows = {row["configuration"]: row for row in finished.report["rows"]}
    assert rows["search (hill-climbing)"]["accuracy"] == rows["merge"]["accuracy"]
    assert rows["search (hill-climbing)"]["perplexity"] == rows["merge"]["perplexity"]
    assert rows["merge"]["sparsity"] >= rows["sparsify"]["sparsity"]
    assert (finished.folder / "report.md").read_text().count("|") > 50
    assert (finished["merge"].folder / "model" / "chat_template.jinja").is_file()
    assert (finished["merge"].folder / "model" / "generation_config.json").is_file()
    assert finished.result() == finished["merge"].folder / "model"


def test_the_merged_model_in_stock_transformers(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    """Logits of the reloaded model against W x + scale ((BA) ⊙ M) x written out here."""
    raw.pop("evaluate")
    finished = run(raw, registry, tmp_path)
    out = tmp_path / "logits.pt"
    without_sqft(
        "import torch; from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')\n"
        "with torch.no_grad(): torch.save(m(torch.arange(2, 40)[None]).logits, sys.argv[2])",
        finished["merge"].folder / "model",
        out,
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished["sparsify"].folder / "model")
    adapter = load_file(finished["search"].folder / "adapter" / "adapter.safetensors")
    scale = json.loads((finished["search"].folder / "adapter" / "sqft_adapter.json").read_text())["scales"]
    hooks = 0
    for name, linear in model.named_modules():
        if f"{name}.lora_A" in adapter:
            low = scale[name] * (adapter[f"{name}.lora_B"] @ adapter[f"{name}.lora_A"]) * (linear.weight != 0)
            linear.register_forward_hook(lambda _, args, y, low=low: y + args[0] @ low.T)
            hooks += 1
    assert hooks == 10
    with torch.no_grad():
        torch.testing.assert_close(torch.load(out), model(torch.arange(2, 40)[None]).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("searcher", "scaling"), [("minimal", "rank"), ("heuristic", "root")])
def test_an_unmerged_adapter_in_stock_peft(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, searcher: str, scaling: str
) -> None:
    """At whatever scale: alpha_pattern carries it."""
    raw["finetune"]["merger"] = "unmerged"
    raw["finetune"]["adapter"]["options"]["scaling"] = scaling
    raw["search"] = {"searcher": searcher}
    raw.pop("merge")
    raw["evaluate"] = {"of": ["search"], "perplexity": raw["evaluate"]["perplexity"]}
    finished = run(raw, registry, tmp_path)
    assert finished.result() == finished["search"].folder / "adapter"
    out = tmp_path / "logits.pt"
    without_sqft(
        "import torch; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "m = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "with torch.no_grad(): torch.save(m(torch.arange(2, 40)[None]).logits, sys.argv[3])",
        finished["sparsify"].folder / "model",
        finished["search"].folder / "adapter",
        out,
    )
    from sqft.ranks import RankConfig
    from sqft.stages.adapted import load_adapted_model

    orchestrator = Orchestrator(registry, tmp_path)
    plan = orchestrator.plan(Recipe.parse(raw))
    adapted = load_adapted_model(plan, {"base": finished["sparsify"].folder}, finished["finetune"].folder, "cpu")
    adapted.set_ranks(RankConfig(tuple(json.loads((finished["search"].folder / "choice.json").read_text())["ranks"])))
    with torch.no_grad():
        expected = adapted.model(torch.arange(2, 40)[None]).logits
    torch.testing.assert_close(torch.load(out), expected, atol=1e-5, rtol=1e-5)

    folder = finished["search"].folder / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == adapted.tokenizer.get_vocab()
    assert tokenizer.chat_template == adapted.tokenizer.chat_template
    alone = recipe_of_model(finished["search"].folder)  # `sqft eval`: on the base that the adapter names
    alone["evaluate"]["perplexity"] = raw["evaluate"]["perplexity"]
    measured = run(alone, registry, tmp_path)
    assert measured.rows()[0]["configuration"] == "model + adapter"
    for figure in ("perplexity", "sparsity", "trainable"):
        assert measured.rows()[0][figure] == pytest.approx(finished.rows()[0][figure], rel=1e-5), figure


def test_reuse_and_sharing(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    first = run(raw, registry, tmp_path)
    times = {name: (o.folder / "manifest.json").stat().st_mtime_ns for name, o in first.items()}
    again = run(raw, registry, tmp_path)
    assert {name: (o.folder / "manifest.json").stat().st_mtime_ns for name, o in again.items()} == times
    changed = copy.deepcopy(raw)
    changed["search"]["searcher"] = "minimal"
    changed["search"].pop("data")
    plan = Orchestrator(registry, tmp_path).plan(Recipe.parse(changed))
    assert plan.reused == {"sparsify", "finetune", "evaluate:model", "evaluate:sparsify", "evaluate:finetune:maximal"}
    other = run(changed, registry, tmp_path)
    assert other.folder != first.folder and first.folder.is_dir()
    changed["name"] = "another-name"
    assert len(Orchestrator(registry, tmp_path).plan(Recipe.parse(changed)).reused) == len(plan.steps)


def test_fresh_and_until(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    first = run(raw, registry, tmp_path, until="finetune")
    assert list(first) == ["sparsify", "finetune"]
    sparse, tuned = (first[n].artifact.manifest["seconds"] for n in ("sparsify", "finetune"))
    again = run(raw, registry, tmp_path, until="finetune", fresh="finetune")
    assert again["sparsify"].artifact.manifest["seconds"] == sparse
    assert again["finetune"].artifact.manifest["seconds"] != tuned
    with pytest.raises(StageError, match="no stage 'mergee'"):
        run(raw, registry, tmp_path, until="mergee")


def test_training_is_deterministic(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    one = run(raw, registry, tmp_path / "a", until="finetune")
    other = run(raw, registry, tmp_path / "b", until="finetune")
    left, right = (load_file(r["finetune"].folder / "deltas.safetensors") for r in (one, other))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_checkpointed_training_samples_the_same_ranks(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    plain = run(raw, registry, tmp_path, until="finetune")
    raw["finetune"]["gradient_checkpointing"] = True
    checkpointed = run(raw, registry, tmp_path, until="finetune")
    left, right = (load_file(r["finetune"].folder / "deltas.safetensors") for r in (plain, checkpointed))
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-4)


def test_accumulated_batches_are_one_batch(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    whole = run(raw, registry, tmp_path, until="finetune")
    raw["finetune"] |= {"batch_size": 2, "gradient_accumulation": 2}
    halves = run(raw, registry, tmp_path, until="finetune")
    left, right = (load_file(r["finetune"].folder / "deltas.safetensors") for r in (whole, halves))
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-4)


def test_bfloat16_dropout_and_no_sparsity(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    """The merge proves itself in another precision, with dropout, and on a dense base."""
    raw["model"]["dtype"] = "bfloat16"
    raw["finetune"]["adapter"] = {"name": "lora", "options": {"rank": 4, "dropout": 0.1}}
    raw["search"] = {}
    raw["evaluate"]["of"] = ["search", "merge"]
    sparse = run(raw, registry, tmp_path)
    assert sparse["merge"].load_model().dtype == torch.bfloat16
    raw.pop("sparsify")
    dense = run(raw, registry, tmp_path)
    for finished in (sparse, dense):
        searched, merged = finished.report["rows"]
        assert searched["perplexity"] == merged["perplexity"]


def test_a_damaged_artifact_is_named(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    finished = run(raw, registry, tmp_path, until="sparsify")
    file = finished["sparsify"].folder / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors has changed.*--fresh sparsify"):
        run(raw, registry, tmp_path, until="sparsify")
    file.write_bytes(content[:-8])
    with pytest.raises(ArtifactError, match="not the file that was stored"):
        run(raw, registry, tmp_path, until="sparsify")
    mended = run(raw, registry, tmp_path, until="sparsify", fresh="sparsify")
    assert mended["sparsify"].load_model().num_parameters() > 0


def test_a_model_that_came_sparse_keeps_its_zeros(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    """No sparsify section: the zeros are the model's own, and the merger has promised to keep them."""
    sparse = run(raw, registry, tmp_path / "one", until="sparsify")
    raw["model"]["path"] = str(sparse["sparsify"].folder / "model")
    raw.pop("sparsify"), raw.pop("evaluate")
    finished = run(raw, registry, tmp_path / "two")
    before, after = (
        load_file(f / "model" / "model.safetensors") for f in (sparse["sparsify"].folder, finished["merge"].folder)
    )
    assert not any(((before[name] == 0) & (after[name] != 0)).any() for name in before)
    assert sum(not torch.equal(before[name], after[name]) for name in before) == 10


def test_a_loss_that_is_not_finite_stops_at_once(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    raw["finetune"] |= {"learning_rate": 1e30, "steps": 50, "max_grad_norm": 0}
    with pytest.raises(StageError, match=r"not finite at step [2-5];"):
        run(raw, registry, tmp_path, until="finetune")
    assert len(list(tmp_path.glob("artifacts/.partial-finetune-*/checkpoints/*"))) <= 2


def test_a_merger_that_breaks_its_promise_is_named(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    from sqft_sparsepeft import SparsePEFT

    class Careless(SparsePEFT):
        name = "careless"

        def combine(self, base: Any, delta: Any) -> Any:
            return base.weight + delta

    class Plugin:
        @staticmethod
        def sqft_mergers() -> Any:
            yield Careless

    from sqft.api import hookimpl

    Plugin.sqft_mergers = staticmethod(hookimpl(Plugin.sqft_mergers))  # type: ignore[method-assign]
    registry.add(Plugin(), name="careless")
    raw["finetune"]["merger"] = "careless"
    with pytest.raises(SqftError, match=r"merger 'careless' .* turned \d+ zeros of the base nonzero in model\.layers"):
        run(raw, registry, tmp_path)


@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
@pytest.mark.parametrize("scorer", ["wanda", "magnitude", "random"])
def test_every_scorer_and_pattern(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, scorer: str, pattern: str
) -> None:
    raw["sparsify"] = {"scorer": scorer, "pattern": pattern, "exclude": ["o_proj"]}
    finished = run(raw, registry, tmp_path, until="sparsify")
    report = finished["sparsify"].report
    assert not any("o_proj" in name for name in report["layers"])
    assert all(value == pytest.approx(0.5) for value in report["layers"].values())


def test_the_exporter_writes_another_precision(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    raw.pop("evaluate")
    raw["export"] = [{"exporter": {"name": "hf", "options": {"dtype": "bfloat16"}}}]
    finished = run(raw, registry, tmp_path)
    model = finished["export"].load_model()
    assert model.dtype == torch.bfloat16
    assert finished.result() == finished["export"].folder / "model"


def test_lm_eval_by_name_from_a_local_folder(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "d.jsonl").write_text("".join(json.dumps({"q": f"{n}+1=", "a": str(n + 1)}) + "\n" for n in range(4)))
    (tasks / "toy.yaml").write_text(
        "task: toy_sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tasks / 'd.jsonl'}\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: ['1', '2', '3', '4']\ndoc_to_target: '{{a}}'\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    raw["evaluate"] = {"of": ["model"], "tasks": ["toy_sums"], "include_path": str(tasks)}
    for section in ("finetune", "search", "merge", "sparsify"):
        raw.pop(section)
    finished = run(raw, registry, tmp_path / "store")
    assert 0 <= finished["evaluate:model"].report["tasks"]["toy_sums"]["acc"] <= 1
    assert "acc_stderr" in finished["evaluate:model"].report["tasks"]["toy_sums"]
    raw["evaluate"]["tasks"] = ["nope"]
    with pytest.raises(RecipeError, match=r"evaluate.tasks.0: lm-eval has no task 'nope', nor has .*; give your own"):
        run(raw, registry, tmp_path / "store")


def test_training_data_of_several_files(raw: dict[str, Any], registry: Registry, tmp_path: Path, data: Path) -> None:
    """A template, a weight, another format, and a part kept for the search."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    table = [f"{row['prompt']},{row['completion']}\n" for row in rows[:10]]
    (tmp_path / "more.csv").write_text("question,answer\n" + "".join(table))
    prompt = {"prompt": "{{question}}", "completion": "{{answer}}"}
    raw["finetune"]["data"] = [
        str(data / "train.jsonl"),
        {"path": str(tmp_path / "more.csv"), "prompt": prompt, "weight": 2.5},
    ]
    raw["finetune"] |= {"holdout": 0.25, "packing": True, "max_length": 32}
    del raw["search"]["data"], raw["evaluate"]
    finished = run(raw, registry, tmp_path / "store")
    report = finished["finetune"].report
    # Of 64 and of 10 records about a quarter is held out; what is left of the 10 comes two times, half of it a third.
    assert 64 + 10 - 30 < report["examples"] < 64 + 25
    assert 1 < report["rows"] < report["examples"] / 3
    assert (finished["search"].folder / "trials.jsonl").read_text()


def test_a_search_needs_data_of_its_own_or_a_holdout(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    del raw["search"]["data"]
    with pytest.raises(SqftError, match=r'search\.data: is missing.*"holdout": 0\.1'):
        run(raw, registry, tmp_path)
