"""The quickstart's data: right answers, splits that share nothing, the same bytes for the same seed."""

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "make_data.py"
SPLITS = ("train", "validation", "test")
FILES = {"train.jsonl", "validation.jsonl", "test.jsonl", "calibration.jsonl", "heldout.txt"}
NOT_NAMES = {"Total", "Left"}


def make(out_dir: Path, *options: str) -> str:
    command = [sys.executable, str(SCRIPT), str(out_dir), *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def records(directory: Path, name: str) -> list[dict[str, str]]:
    lines = (directory / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def problems(directory: Path, name: str) -> list[dict[str, str]]:
    return [record for record in records(directory, name) if "prompt" in record]


def numbers(prompt: str) -> tuple[int, int]:
    a, b = map(int, re.findall(r"\d+", prompt))
    return a, b


def operation(prompt: str) -> str:
    """What the wording asks for, which must be exactly one of the two."""
    adds = bool(re.search(r"\b(buys|finds|adds)\b", prompt)) and prompt.endswith(" Total:")
    subtracts = bool(re.search(r"\b(loses|sells|takes)\b", prompt)) and prompt.endswith(" Left:")
    assert adds != subtracts, prompt
    return "+" if adds else "-"


def names(prompt: str) -> set[str]:
    return set(re.findall(r"\b[A-Z][a-z]+\b", prompt)) - NOT_NAMES


def sums(prompts: list[str]) -> set[tuple[str, frozenset[int]]]:
    return {(operation(prompt), frozenset(numbers(prompt))) for prompt in prompts}


def test_more_test_problems_change_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "few")
    make(tmp_path / "many", "--test-problems", "300")
    few, many = contents(tmp_path / "few"), contents(tmp_path / "many")
    assert many["test.jsonl"].startswith(few["test.jsonl"]) and len(records(tmp_path / "many", "test")) == 300
    assert {**many, "test.jsonl": b""} == {**few, "test.jsonl": b""}


# Another seed too: the splits must be disjoint by construction, not by the luck of seed 0.
@pytest.fixture(scope="module", params=["0", "1"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("data")
    make(out_dir, "--seed", request.param)
    return out_dir


def test_seed_decides_every_byte(tmp_path: Path) -> None:
    printed = make(tmp_path / "default")
    make(tmp_path / "same", "--seed", "0")
    make(tmp_path / "other", "--seed", "1")
    default, same, other = (contents(tmp_path / name) for name in ("default", "same", "other"))
    assert set(default) == FILES  # and no temporary file
    assert default == same
    assert all(default[name] != other[name] for name in FILES)
    assert len(printed.splitlines()) == len(FILES)
    assert {line.split(":")[0] for line in printed.splitlines()} == FILES


def test_sizes(data: Path) -> None:
    assert len(problems(data, "train")) == 2400
    assert len(problems(data, "validation")) == len(records(data, "validation")) == 128
    assert 200 <= len(records(data, "test")) <= 220
    assert 40_000 <= len((data / "heldout.txt").read_text(encoding="utf-8")) <= 60_000
    assert sum(len(record["text"]) for record in records(data, "calibration")) >= 200_000


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right_and_prompts_short(data: Path, split: str) -> None:
    for record in problems(data, split):
        assert set(record) == {"prompt", "completion"}
        prompt = record["prompt"]
        assert len(prompt.split()) <= 30
        assert len(names(prompt)) == 1, prompt
        a, b = numbers(prompt)
        answer = a + b if operation(prompt) == "+" else a - b
        assert record["completion"] == f" {answer}"
        assert min(a, b) >= 2 and max(a, b) <= 99 and 0 <= answer <= 198


@pytest.mark.parametrize("split", SPLITS)
def test_every_template_is_used_and_no_prompt_repeated(data: Path, split: str) -> None:
    prompts = [record["prompt"] for record in problems(data, split)]
    assert len(set(prompts)) == len(prompts)
    verbs = re.findall(r"buys|finds|adds|loses|sells|takes", "\n".join(prompts))
    counts = [verbs.count(verb) for verb in set(verbs)]
    assert len(counts) == 6 and min(counts) >= len(prompts) // 8


def test_names_and_number_pairs_are_disjoint(data: Path) -> None:
    prompts = {split: [record["prompt"] for record in problems(data, split)] for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert names("\n".join(prompts[one])).isdisjoint(names("\n".join(prompts[other])))
        assert sums(prompts[one]).isdisjoint(sums(prompts[other]))


def test_no_eight_words_of_the_heldout_text_in_calibration(data: Path) -> None:
    """Nor under another indentation or wrapping."""
    heldout = f" {' '.join((data / 'heldout.txt').read_text(encoding='utf-8').split())} "
    checked = 0
    for record in records(data, "calibration"):
        words = record["text"].split()
        checked += len(words)
        assert not any(f" {' '.join(words[start : start + 8])} " in heldout for start in range(len(words) - 7))
    assert checked > 30_000


def test_the_prose_among_the_problems_is_calibration_text(data: Path) -> None:
    prose = [record["text"] for record in records(data, "train") if "text" in record]
    calibration = " ".join(" ".join(record["text"].split()) for record in records(data, "calibration"))
    heldout = " ".join((data / "heldout.txt").read_text(encoding="utf-8").split())
    assert 35_000 <= sum(map(len, prose)) <= 40_000
    assert all(piece in calibration for piece in prose)
    assert not any(piece in heldout for piece in prose)
