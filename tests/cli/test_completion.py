"""What shells complete; in bash through the script itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from sqft.cli import main

RECIPE = {
    "name": "tiny",
    "model": {"path": "m"},
    "calibration": {"data": "text.txt"},
    "sparsify": {"scorer": "wanda"},
    "finetune": {
        "adapter": "nls",
        "merger": "sparsepeft",
        "teacher": "dense",
        "data": ["a.jsonl", {"path": "b.jsonl"}],
        "validation": "c.jsonl",
    },
    "evaluate": {"perplexity": {"text": "t.txt"}, "exact_match": {"data": "d.jsonl"}, "include_path": "tasks"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-00000000", "other-00000000"):
        (tmp_path / "s" / "runs" / name).mkdir(parents=True)
        (tmp_path / "s" / "runs" / name / "recipe.json").write_text("{}")
    (tmp_path / "s" / "sweeps" / "figure").mkdir(parents=True)
    (tmp_path / "s" / "sweeps" / "figure" / "results.json").write_text("{}")
    (tmp_path / "r.json").write_text(json.dumps(RECIPE))
    (tmp_path / "broken.json").write_text("{")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "begun", "offered"),
    [
        ("", "doc", ["doctor"]),
        ("show", "se", ["searcher"]),
        ("show searcher", "hill", ["hill-climbing"]),
        ("show scorer", "hill", []),
        ("init", "qa", ["qa-sparsepeft", "qa-sparsepeft-low-memory"]),
        ("merge --store s", "ti", ["tiny-00000000"]),
        ("eval --store s", "", ["other-00000000", "tiny-00000000"]),
        ("report --store s", "", ["figure", "other-00000000", "tiny-00000000"]),
        ("report tiny --store s", "fi", ["figure"]),
        ("run r.json --until", "", ["sparsify", "finetune", "evaluate"]),
        ("run r.json --fresh", "f", ["finetune"]),
        ("run broken.json --until", "m", ["merge"]),
        ("run --until", "q", ["quantize"]),
        ("eval tiny --of", "s", ["sparsify", "search"]),
        ("eval tiny --of", "finetune:h", ["finetune:heuristic"]),
        ("data r.json --section", "f", ["finetune", "finetune.data.0", "finetune.data.1", "finetune.validation"]),
        ("data r.json --section", "evaluate.", ["evaluate.exact_match", "evaluate.perplexity"]),
        ("data broken.json --section", "", []),
        ("run r.json --set", "sparsify.pa", ["sparsify.pattern="]),
        ("plan r.json --set", "search.searcher.options.c", ["search.searcher.options.cautious="]),
        ("plan r.json --set", "finetune.base=c", ["finetune.base=codes", "finetune.base=compensated"]),
        ("sweep s.json --set", "sparsify.scorer=ma", ["sparsify.scorer=magnitude", "sparsify.scorer=mask"]),
        ("run r.json --set", "sparsify.scorer=mask/", ["sparsify.scorer=mask/mask"]),
        ("run r.json --set", "finetune.packing=", ["finetune.packing=true", "finetune.packing=false"]),
        ("run r.json --set", "no.such.place=", []),
    ],
)
def test_a_shell_completes(words: str, begun: str, offered: list[str]) -> None:
    completions = ShellComplete(main, {}, "sqft", "_SQFT_COMPLETE").get_completions(words.split(), begun)
    assert [item.value for item in completions] == offered


def sqft(variables: dict[str, str], code: str = "") -> subprocess.CompletedProcess[str]:
    code = f"from sqft.cli import main\ntry: main(prog_name='sqft')\nfinally:\n    {code or 'pass'}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_own_script(shell: str) -> None:
    done = sqft({"_SQFT_COMPLETE": f"{shell}_source"})
    assert done.returncode == 0 and "_SQFT_COMPLETE" in done.stdout


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("run r.json --set finetune.base = c", ["codes", "compensated"]),
        ("run r.json --set finetune.packing =", ["true", "false"]),
        ("run r.json --set sparsify.pa", ["sparsify.pattern="]),
        ("run r.json --set seed = 1 --set search.metric = l", ["loss"]),
        ("eval tiny --of finetune : h", ["heuristic"]),
        ("show scorer wa", ["wanda"]),
    ],
)
def test_bash_which_splits_words(folder: Path, words: str, offered: list[str]) -> None:
    """Readline splits at = and :, calls the function, and puts a reply in place of the last piece alone."""
    program = folder / "sqft"
    program.write_text(f"#!{sys.executable}\nfrom sqft.cli import main\nmain(prog_name='sqft')\n")
    program.chmod(0o755)
    script = f"""{sqft({"_SQFT_COMPLETE": "bash_source"}).stdout}
        compopt() {{ :; }}  # only valid while readline completes
        COMP_WORDS=(sqft {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _sqft_completion ./sqft; printf '%s\\n' "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True)

    assert done.stdout.split() == offered, done.stderr


def test_no_torch() -> None:
    words = "sqft run r.json --set sparsify.scorer=w"
    code = "sys.stderr.write(' '.join(sorted(sys.modules)))"
    done = sqft({"_SQFT_COMPLETE": "zsh_complete", "COMP_WORDS": words, "COMP_CWORD": "4"}, f"import sys; {code}")
    assert "sparsify.scorer=wanda" in done.stdout
    assert "pydantic" in done.stderr.split() and "torch" not in done.stderr.split()
