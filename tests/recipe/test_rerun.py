"""Runs gone on with from the store alone: the merge, and measurements."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sqft import Orchestrator, Recipe, Registry
from sqft.cli import main
from sqft.errors import HubError, SqftError
from sqft.recipe.rerun import evaluation_overrides, paths, recipe_of_model, with_absolute_paths
from tests.support.hub import cached


def sqft(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def artifacts(store: Path) -> set[str]:
    return {path.name for path in (store / "artifacts").iterdir() if not path.name.startswith(".")}


@pytest.fixture
def project(raw: dict[str, Any], model_folder: Path, data: Path, tmp_path: Path) -> Path:
    """A folder with a recipe whose paths are relative to it, without a merge and without measurements."""
    folder = tmp_path / "project"
    folder.mkdir()
    raw["search"] = {}
    raw.pop("merge"), raw.pop("evaluate")

    def relative(section: dict[str, Any]) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                relative(value)
            elif key in ("path", "data"):
                section[key] = os.path.relpath(value, folder)

    relative(raw)
    (folder / "recipe.json").write_text(json.dumps(raw))
    return folder


def test_merge_and_eval_without_the_recipe_at_hand(
    project: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, elsewhere = tmp_path / "store", tmp_path / "else" / "where"
    assert sqft("run", project / "recipe.json", "--store", store).exit_code == 0
    shutil.rmtree(project)
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    made = artifacts(store)

    (folder,) = (store / "runs").iterdir()
    repeated = sqft("run", folder / "recipe.json", "--store", store)
    assert repeated.exit_code == 0 and repeated.output.count("reused") == 3, repeated.output
    assert len(list((store / "runs").iterdir())) == 1

    nothing = sqft("eval", "tiny", "--store", store)
    assert nothing.exit_code == 2 and "say what to measure" in nothing.stderr
    text = os.path.relpath(data / "heldout.txt")
    measured = sqft("eval", folder, "--perplexity", text)  # the store is the folder's own
    assert measured.exit_code == 0, measured.output
    assert "| sparsify | " in measured.output and "| search (heuristic) | " in measured.output
    assert {name.partition("-")[0] for name in artifacts(store) - made} == {"evaluate"}

    merged = sqft("merge", "tiny", "--store", store, "--output", "model")
    assert merged.exit_code == 0, merged.output
    assert merged.output.count("reused") == 3 and Path("model/model.safetensors").is_file()
    assert sqft("merge", "tiny", "--store", store).output.count("reused") == 4
    records = data / "test.jsonl"
    more = ["--of", "merge", "--of", "finetune:maximal", "--exact-match", records]
    measured = sqft("eval", "tiny", "--store", store, *more, "--set", "evaluate.exact_match.max_new_tokens=2")
    assert measured.exit_code == 0 and "| merge | " in measured.output and "| finetune:maximal | " in measured.output
    whole = sqft("eval", "model", "--store", store, "--perplexity", text)
    assert whole.exit_code == 0 and "\n| model | " in whole.output, whole.output


def test_an_adapter_that_does_not_merge(project: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    unmerged = ["--set", "finetune.merger=unmerged", "--store", store]
    assert sqft("run", project / "recipe.json", *unmerged).exit_code == 0
    done = sqft("merge", "tiny", "--store", store)
    assert done.exit_code == 2 and "so there is nothing to merge" in done.stderr


def test_a_quantized_models_folder(quantized_folder: Path, data: Path, tmp_path: Path) -> None:
    done = sqft("eval", quantized_folder, "--perplexity", data / "heldout.txt", "--store", tmp_path)
    assert done.exit_code == 0 and "| configuration | perplexity | " in done.output, done.output


def test_the_precision_of_a_model_is_its_own(tmp_path: Path) -> None:
    model = tmp_path / "merge-0" / "model"
    model.mkdir(parents=True)
    (model.parent / "manifest.json").write_text("{}")
    raw = recipe_of_model(model.parent)  # an artifact's folder
    assert raw["model"] == {"path": str(model), "dtype": "auto"}


@pytest.fixture
def adapter(model_folder: Path, tmp_path: Path) -> Path:
    """A LoRA adapter, as peft saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = LoraConfig(
        r=4, lora_alpha=64, target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), settings).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def nll_of_stock_peft(base: Path, adapter: Path, windows: torch.Tensor) -> float:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.no_grad():
        return float(stock(windows, labels=windows).loss)


def test_an_adapter_is_measured_on_its_base(model_folder: Path, adapter: Path, data: Path, tmp_path: Path) -> None:
    store, text = tmp_path / "store", data / "heldout.txt"
    asked = ["--perplexity", text, "--set", "evaluate.perplexity.tokens=64", "--set", "evaluate.perplexity.length=64"]
    assert sqft("eval", model_folder, *asked, "--store", store).exit_code == 0
    done = sqft("eval", adapter, *asked, "--store", store)
    assert done.exit_code == 0 and "| model + adapter | " in done.output, done.output
    found = {
        run.name.partition(".")[0]: json.loads((run / "report.json").read_text()) for run in (store / "runs").iterdir()
    }
    nll = {name: next(iter(report["rows"][0]["texts"].values()))["nll"] for name, report in found.items()}
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    windows = tokenizer(text.read_text(), return_tensors="pt").input_ids[:, :64]
    assert nll["lora"] == pytest.approx(nll_of_stock_peft(model_folder, adapter, windows), rel=1e-6)
    assert nll["lora"] != pytest.approx(nll[model_folder.name], rel=1e-4)

    changed = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in changed.items()}, adapter / "adapter_model.safetensors")
    again = sqft("eval", adapter, *asked, "--store", store)
    assert again.exit_code == 0 and "reused" not in again.output and "measured earlier" not in again.output


def test_models_and_adapters_of_the_hub(
    model_folder: Path, adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their ids; an adapter is measured on the base that its config names, at the revision that it names."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "owner/base-1.5", "revision": "0" * 40}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    cached(tmp_path / "cache", model_folder, "owner/base-1.5")
    cached(tmp_path / "cache", adapter, "someone/lora")
    raw = recipe_of_model("someone/lora")
    assert raw["model"] == {"path": "owner/base-1.5", "dtype": "auto", "revision": "0" * 40}
    assert (raw["name"], recipe_of_model("owner/base-1.5")["name"]) == ("lora", "base-1.5")

    asked = ["--perplexity", data / "heldout.txt", "--set", "evaluate.perplexity.tokens=64"]
    asked += ["--set", "evaluate.perplexity.length=64", "--store", tmp_path / "store"]
    done = sqft("eval", "someone/lora", *asked)
    assert done.exit_code == 0 and "| model + adapter | " in done.output and "names 'owner" not in done.output, (
        done.output
    )
    (run,) = (tmp_path / "store" / "runs").glob("lora*")
    assert json.loads((run / "recipe.json").read_text())["evaluate"]["adapter"] == "someone/lora"
    (row,) = json.loads((run / "report.json").read_text())["rows"]
    windows = AutoTokenizer.from_pretrained(model_folder)((data / "heldout.txt").read_text(), return_tensors="pt")
    stock = nll_of_stock_peft(model_folder, adapter, windows.input_ids[:, :64])
    assert next(iter(row["texts"].values()))["nll"] == pytest.approx(stock, rel=1e-6)
    done = sqft("eval", "owner/base-1.5", *asked)
    assert done.exit_code == 0 and "| model | " in done.output, done.output
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = sqft("eval", "someone/nothing", *asked)
    assert done.exit_code == 2 and "the Hugging Face model 'someone/nothing' is not in the hub's cache" in done.stderr
    assert f"there is no run 'someone/nothing' in {tmp_path / 'store'}" in done.stderr and "runs there: " in done.stderr


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def names(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with an adapter's config alone, which names this base and revision."""

    def names(base: object, revision: object = None) -> Path:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        content = {"peft_type": "LORA", "base_model_name_or_path": base, "revision": revision}
        (folder / "adapter_config.json").write_text(json.dumps(content))
        return folder

    return names


def test_a_revision_pins_the_adapter(hub: Path, names: Callable[..., Path]) -> None:
    """And so the base that it names; that base's own revision is another thing."""
    cached(hub, names("owner/first", "r1"), "some/two")
    cached(hub, names("owner/second", "r2"), "some/two", "v2")
    second = {"path": "owner/second", "dtype": "auto", "revision": "r2"}
    assert recipe_of_model("some/two")["model"] == second | {"path": "owner/first", "revision": "r1"}
    assert recipe_of_model("some/two", ["evaluate.adapter_revision=v2"])["model"] == second
    assert recipe_of_model("some/two", ['evaluate={"adapter_revision": "v2"}'])["model"] == second
    for of_base in ("model.revision=v2", "model.revision=r9"):  # the first is a branch of the adapter too
        assert recipe_of_model("some/two", [of_base])["model"]["path"] == "owner/first"
        both = recipe_of_model("some/two", ["evaluate.adapter_revision=v2", of_base])
        assert both["model"]["path"] == "owner/second"
    base = recipe_of_model("some/two", ["evaluate.adapter_revision=v2", "model.path=owner/third"])
    assert base["evaluate"]["adapter"] == "some/two" and "revision" not in base["model"]


def test_only_a_revision_is_there(hub: Path, names: Callable[..., Path], model_folder: Path) -> None:
    cached(hub, names("owner/second"), "some/two", "v2")
    assert recipe_of_model("some/two", ["evaluate.adapter_revision=v2"])["model"]["path"] == "owner/second"
    cached(hub, model_folder, "owner/base", "v2")
    assert recipe_of_model("owner/base", ["model.revision=v2"])["model"]["path"] == "owner/base"
    for name in ("some/two", "owner/base"):
        with pytest.raises(HubError, match=f"'{name}' is not in the hub's cache"):
            recipe_of_model(name)
    with pytest.raises(HubError, match="'owner/base' is not in the hub's cache"):  # it pins another adapter
        recipe_of_model("owner/base", ["evaluate.adapter=some/two", "evaluate.adapter_revision=v2"])


def test_a_pinned_adapter_is_measured_on_the_base_that_it_names(
    hub: Path, adapter: Path, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    for revision, base in (("main", "owner/gone"), ("v2", "owner/base")):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        cached(hub, adapter, "some/two", revision)
    cached(hub, model_folder, "owner/base")
    asked = "--perplexity", data / "heldout.txt", "--store", tmp_path / "store"
    done = sqft("eval", "some/two", *asked, "--set", "evaluate.adapter_revision=v2")
    assert done.exit_code == 0 and "| model + adapter | " in done.output, done.output
    (run,) = (tmp_path / "store" / "runs").iterdir()
    assert json.loads((run / "recipe.json").read_text())["model"]["path"] == "owner/base"
    done = sqft("eval", "some/two", *asked)
    assert done.exit_code == 2 and "'owner/gone' is not in the hub's cache" in done.stderr


def test_an_adapter_beside_a_model_on_the_hub(
    hub: Path, adapter: Path, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    """It is measured as the message says."""
    shutil.copy(model_folder / "config.json", adapter)
    cached(hub, adapter, "some/both")
    asked = "--perplexity", data / "heldout.txt", "--store", tmp_path / "store"
    done = sqft("eval", "some/both", *asked)
    advice = "--set model.path={} --set evaluate.adapter=some/both"
    assert done.exit_code == 2 and advice.format("BASE") in done.stderr
    done = sqft("eval", "some/both", *asked, *advice.format(model_folder).split())
    assert done.exit_code == 0 and "| model + adapter | " in done.output, done.output


def test_a_config_whose_base_is_no_text(hub: Path, names: Callable[..., Path]) -> None:
    for base, revision, words in ((5, None, "base_model_name_or_path is 5"), ("owner/base", 7, "revision is 7")):
        folder = names(base, revision)
        cached(hub, folder, f"some/{revision}")
        for name, called in ((str(folder), str(folder)), (f"some/{revision}", f"the hub's some/{revision}")):
            with pytest.raises(SqftError, match=f"^adapter_config.json of {called}: {words}, and must be a text"):
                recipe_of_model(name)


def test_a_misspelt_path_or_run_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "lora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, why in (("runs/lor", " (and the hub is not asked for 'runs/lor', since runs is a folder here)"),
                      ("out/model.gguf", "")):  # fmt: skip
        done = sqft("eval", name, "--perplexity", tmp_path, "--store", "store")
        assert done.exit_code == 2 and f"there is no run '{name}' in store" in done.stderr
        assert done.stderr.rstrip().endswith(f"runs there: none{why}")


def test_the_base_of_an_adapter(
    model_folder: Path, adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the folder, from the current one, by id, by the user; or it is asked for."""
    config = json.loads((adapter / "adapter_config.json").read_text())

    def named(base: object) -> dict[str, Any]:
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        return recipe_of_model(adapter)

    expected = {"model": {"path": str(model_folder), "dtype": "auto"}}
    expected["evaluate"] = {"of": ["model"], "adapter": str(adapter)}
    assert expected.items() <= named(str(model_folder)).items()
    monkeypatch.chdir(model_folder.parent)
    assert expected.items() <= named(model_folder.name).items()
    assert named("someone/model")["model"]["path"] == "someone/model"
    for base, words in (("/not/there", "'/not/there', which is not there"), (None, "no base model")):
        with pytest.raises(SqftError, match=f"names {words}; add --set model.path=BASE"):
            named(base)
    asked = "--perplexity", data / "heldout.txt", "--store", tmp_path / "store"
    done = sqft("eval", adapter, *asked, "--set", f"model.path={model_folder}")
    assert done.exit_code == 0 and "| model + adapter | " in done.output, done.output
    named("someone/model")
    done = sqft("eval", adapter, *asked, "--set", f"model.path={model_folder}")
    assert f"names 'someone/model' as its base, and is measured on {model_folder}" in done.output + done.stderr


def test_an_adapter_that_cannot_be_measured(adapter: Path, model_folder: Path, data: Path, tmp_path: Path) -> None:
    asked = "--perplexity", data / "heldout.txt", "--store", tmp_path / "store"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "PROMPT_TUNING"}))
    done = sqft("eval", adapter, *asked)
    assert done.exit_code == 2 and "holds PROMPT_TUNING, and sqft measures LoRA" in done.stderr
    (adapter / "adapter_model.safetensors").unlink()
    done = sqft("eval", adapter, *asked)
    assert done.exit_code == 2 and "has no adapter_model.safetensors" in done.stderr
    (adapter / "adapter_config.json").rename(adapter / "sqft_adapter.json")
    done = sqft("eval", adapter, *asked)
    assert done.exit_code == 2 and "acts only through its merger; measure the run" in done.stderr


def test_what_is_not_there(model_folder: Path, tmp_path: Path) -> None:
    for command in ("merge", "eval"):
        done = sqft(command, "tiny", "--store", tmp_path)
        assert done.exit_code == 2 and "there is no run 'tiny'" in done.stderr and "runs there: none" in done.stderr
    empty = sqft("eval", tmp_path, "--tasks", "x", "--store", tmp_path)
    assert empty.exit_code == 2 and "has no config.json" in empty.stderr
    odd = sqft("eval", model_folder, "--tasks", "arc_easy", "--of", "merge", "--store", tmp_path)
    assert odd.exit_code == 2 and "needs a finetune section" in odd.stderr


def test_anchored(raw: dict[str, Any], tmp_path: Path) -> None:
    """Every path counts from the recipe's folder, and a Hugging Face id is none."""
    raw["model"]["path"] = "someone/model"
    raw["calibration"]["data"] = "c.jsonl"
    raw["evaluate"] |= {"tasks": ["mine"], "include_path": "../tasks"}
    stored = with_absolute_paths(Recipe.parse(raw, tmp_path / "here"))
    assert stored["model"]["path"] == "someone/model"
    assert stored["calibration"]["data"]["path"] == str(tmp_path / "here" / "c.jsonl")
    assert stored["evaluate"]["include_path"] == str(tmp_path / "tasks")
    again = Recipe.parse(stored, tmp_path)
    assert with_absolute_paths(again) == stored and paths(again).keys() == {
        "calibration.data.path", "finetune.data.path", "search.data.path",
        "evaluate.perplexity.text", "evaluate.exact_match.data.path", "evaluate.include_path",
    }  # fmt: skip


def test_only_what_is_measured_is_kept(raw: dict[str, Any]) -> None:
    def kept(*of: str, **measures: Any) -> Recipe:
        return Recipe.changed(json.loads(json.dumps(raw)), evaluation_overrides(raw, of, measures))

    sparse = kept("sparsify", perplexity={"text": "other.txt"})
    assert sparse.sparsify and not (sparse.finetune or sparse.search or sparse.merge)
    assert sparse.evaluate and sparse.evaluate.perplexity and not sparse.evaluate.exact_match
    assert (sparse.evaluate.perplexity.text, sparse.evaluate.perplexity.length) == ("other.txt", 64)
    several = kept("sparsify", perplexity=[{"text": "a.txt"}, {"text": "b.txt"}]).evaluate
    assert several and [(text.text, text.length) for text in several.texts.values()] == [("a.txt", 64), ("b.txt", 64)]
    tuned = kept("search")
    assert tuned.sparsify and tuned.finetune and tuned.search and not tuned.merge
    assert tuned.evaluate and tuned.evaluate.exact_match and tuned.evaluate.of == ("search",)
    merged = kept("merge", tasks=["a", "b"])
    assert merged.merge and merged.evaluate and merged.evaluate.tasks == ("a", "b") and merged.name == "tiny.eval"


def test_a_list_of_data_and_validation_are_found_again(
    raw: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stored recipe, its paths made absolute, is the same run: nothing is made again."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        (here / name).write_bytes((data / name).read_bytes())
    raw["finetune"] |= {"data": ["train.jsonl", {"path": "validation.jsonl", "weight": 2}]}
    raw["finetune"] |= {"validation": "validation.jsonl", "evaluate_every": 3}
    orchestrator = Orchestrator(Registry.discover(), tmp_path / "store")
    recipe = Recipe.parse(raw, here)
    stored = Recipe.parse(json.loads(json.dumps(with_absolute_paths(recipe))), tmp_path)
    assert [step.fingerprint for step in orchestrator.plan(stored).steps] == [
        step.fingerprint for step in orchestrator.plan(recipe).steps
    ]
    assert stored.finetune and stored.finetune.validation
    assert stored.finetune.validation.path == str(here / "validation.jsonl")
