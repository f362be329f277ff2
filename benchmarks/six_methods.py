"""Measure the paper's pipelines and baselines on one task: accuracy and perplexity of each, from examples/recipes.

    python benchmarks/six_methods.py DATA [--steps 100] [--seeds 0] [--methods sqft …] [--store DIR]
        [--calibration general.jsonl --samples 32] [--texts prose.txt questions.txt] [--of merge]

DATA is a folder with train.jsonl and test.jsonl of {question, answer}, {instruction, output} or {prompt, completion}.
Numbers are compared as numbers. With --choices, LLM-Adapters' multiple-choice questions are asked as lm-eval asks ARC:
the likeliest answer counts, and the letters or numbers of the answers play no part. One sparse base and one quantized
base are made and shared through the store, which keeps finished steps: several of these may run at once, and the last
one prints the complete table.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from sqft import Orchestrator, Recipe, Registry

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
METHODS = ("lora", "shears", "sparsepeft", "gptq-lora", "sqft", "qa-sparsepeft")
OURS = {"hira": 4}
"""Methods that are measured by name only, with how many times the learning rate."""


def prompts(source: Path, target: Path, records: int | None = None) -> Path:
    """Write the records of a file (the first ones) as {prompt, completion} into another file."""
    lines = []
    for line in source.read_text("utf-8").splitlines()[:records]:
        record = json.loads(line)
        if "question" in record:
            answer = record["answer"]
            answer = f"{answer:g}" if isinstance(answer, float) else answer
            record = {"prompt": f"{record['question']}\nAnswer:", "completion": f" {answer}"}
        elif "instruction" in record:
            record = {"prompt": f"{record['instruction']}\n\n", "completion": record["output"]}
        lines.append(json.dumps(record) + "\n")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(lines), "utf-8")
    return target


def choices_of(record: dict[str, Any]) -> dict[str, Any]:
    """One of LLM-Adapters' multiple-choice instructions, taken apart."""
    asked, listed = re.split(r"\n\n", record["instruction"].partition("Answer format:")[0].strip(), maxsplit=1)
    question = asked.partition(": ")[2].strip()
    options = [option.strip() for option in re.split(r"(?:Answer|Solution|Ending|Option)\d: ", listed)[1:]]
    return {"question": question, "choices": options, "answer": int(re.sub(r"\D", "", record["answer"])) - 1}


def choices(folder: Path, target: Path, records: int | None) -> None:
    """train.jsonl and test.jsonl of questions with choices, and an lm-eval task of the latter."""
    target.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", None), ("test", records)):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()[:count]]
        lines = [json.dumps(choices_of(row)) + "\n" for row in rows]
        (target / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    (target / "task").mkdir(exist_ok=True)
    (target / "task" / "choices.yaml").write_text(
        f"task: choices\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {target / 'test.jsonl'}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "Question: {{question}}\\nAnswer:"\n'
        'doc_to_target: answer\ndoc_to_choice: "{{choices}}"\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n'
    )


def recipe(method: str, seed: int, data: Path, arguments: argparse.Namespace) -> Recipe:
    raw = json.loads((RECIPES / f"{method}.json").read_text("utf-8"))
    raw |= {"name": f"{method}-{data.name}-seed-{seed}", "seed": seed}
    raw["finetune"] |= {
        "data": str(data / "train.jsonl"),
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "max_length": arguments.max_length,
        "learning_rate": arguments.learning_rate * OURS.get(method, 1),
    }
    all_models = ["model", *raw["evaluate"]["of"]]
    raw["evaluate"]["of"] = [name for name in all_models if name in (arguments.of or all_models)] or all_models[-1:]
    if arguments.calibration:
        raw["calibration"]["data"] = str(arguments.calibration.absolute())
    if arguments.samples:
        raw["calibration"]["samples"] = arguments.samples
    if arguments.texts:
        texts = [str(text.absolute()) for text in arguments.texts]
        raw["evaluate"]["perplexity"] = [{**raw["evaluate"]["perplexity"], "text": text} for text in texts]
    if arguments.choices:
        raw["finetune"]["data"] = {"path": str(data / "train.jsonl"), "prompt": "multiple-choice"}
        del raw["evaluate"]["exact_match"]
        raw["evaluate"] |= {"tasks": ["choices"], "include_path": str(data / "task"), "log_samples": True}
    else:
        raw["evaluate"]["exact_match"] = {
            "data": str(data / "test.jsonl"),
            "max_new_tokens": arguments.max_new_tokens,
            "answer": arguments.answer,
        }
    return Recipe.parse(raw, folder=RECIPES)


def perplexity_of(rows: list[dict[str, Any]]) -> str:
    """Return the mean perplexity over rows, of each text."""
    texts = zip(*(row["texts"].values() for row in rows), strict=True)
    return ", ".join(f"{statistics.mean(one['perplexity'] for one in same):.2f}" for same in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *OURS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--max-new-tokens", type=int, default=6)
    parser.add_argument("--test-records", type=int, help="the first ones of test.jsonl; unless told, all")
    parser.add_argument(
        "--of", nargs="+", help="models to measure; of a method that makes none of them, its last one; unless told, all"
    )
    parser.add_argument("--answer", choices=["text", "first_number"], default="first_number")
    parser.add_argument("--calibration", type=Path, help="records of text; unless given, the recipes'")
    parser.add_argument("--samples", type=int, help="calibration windows; unless given, the recipes'")
    parser.add_argument("--texts", nargs="+", type=Path, help="texts of perplexity; unless given, the recipes'")
    parser.add_argument("--choices", action="store_true", help="the likeliest of several answers counts")
    parser.add_argument("--store", type=Path, default=Path("store-six"))
    arguments = parser.parse_args()
    data = arguments.store.resolve() / "data" / arguments.data.resolve().name
    if arguments.choices:
        choices(arguments.data, data, arguments.test_records)
    else:
        prompts(arguments.data / "train.jsonl", data / "train.jsonl")
        prompts(arguments.data / "test.jsonl", data / "test.jsonl", arguments.test_records)
    orchestrator = Orchestrator(Registry.discover(), arguments.store)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        for method in arguments.methods:
            plan = orchestrator.plan(recipe(method, seed, data, arguments))
            for row in orchestrator.run(plan).report["rows"]:
                stage = row["configuration"].partition(" ")[0]
                found.setdefault(f"{method}: {stage}" if stage in ("search", "merge") else stage, []).append(row)
    print("| configuration | accuracy by seed | mean | perplexity, mean | sparsity |\n|---|---|---|---|---|")
    for label, rows in found.items():
        rows = list({json.dumps(row, sort_keys=True): row for row in rows}.values())  # a shared base comes once a seed
        accuracies = [
            100 * (row["tasks"]["choices"]["acc_norm"] if arguments.choices else row["accuracy"]) for row in rows
        ]
        print(
            f"| {label} | {', '.join(f'{a:.1f}' for a in accuracies)} | {statistics.mean(accuracies):.1f} "
            f"| {perplexity_of(rows)} | {100 * rows[0]['sparsity']:.2f} % |"
        )


if __name__ == "__main__":
    main()
