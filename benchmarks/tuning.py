"""Compare ways to tune one base: the learning rate of each is chosen on validation records, and only it is tested.

    python benchmarks/tuning.py [--recipe examples/recipes/sparsepeft.json] [--ways recipe hira root lora+]
        [--learning-rates 1e-3 2e-3 4e-3] [--widen 4] [--seeds 0 1 2] [--sweep-seeds 0] [--steps 170]
        [--calibration general.jsonl --samples 32] [--texts prose.txt manuals.txt] [--test test.jsonl]
        [--store store-tuning]

A way is the recipe with some changes, joined by commas: names in WAYS, or settings as `--set` takes them, of `finetune`
unless they name a stage ("hira,lora+", "root,adapter.options.alpha=16", "sparsify.scorer=magnitude"). "recipe" changes
nothing. A seed decides everything that is random: calibration windows, initial factors, data order and ranks. Each
learning rate of a way trains with all sweep seeds (unless given, all seeds), and the best mean accuracy on validation
decides; of equals, the smaller rate. As long as the best is the smallest or the largest, one more beyond it is tried.
Then that rate trains with all seeds and is measured on the test records, and so is the base before training. Validation
records are those of --validation, unless given validation.jsonl beside the recipe's test records. Needs the model and
data of `make quickstart`.

The store keeps finished steps, and several of these may run at once on one store. Share out the sweep with --no-test,
which ends after validation. Then run the whole line: it takes what is done from the store, and prints complete tables.

    python benchmarks/tuning.py --ways recipe root --no-test & python benchmarks/tuning.py --ways hira lora+ --no-test
    wait; python benchmarks/tuning.py --ways recipe root hira lora+

The standard error is over records, of their mean over seeds. "against the first" compares the same records and seeds
with the first way: how many answers are right only here and only there, and the p of McNemar's exact test. It counts a
record once a seed, so with several seeds p is somewhat too small. Perplexity is the mean over
seeds, of each text in the order of the recipe.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import SqftError
from sqft.utils.significance import mcnemar

EXAMPLE = Path(__file__).parents[1] / "examples" / "recipes" / "sparsepeft.json"
OF_RECIPE = Recipe.model_fields.keys() - {"seed", "name"}
"""The sections that a change may name; any other change is of `finetune`."""
WAYS: dict[str, list[str]] = {
    "recipe": [],
    "sparsepeft": ["merger=sparsepeft"],
    "qa-sparsepeft": ["merger=qa-sparsepeft"],
    "unmerged": ["merger=unmerged"],
    "hira": ["merger=hira"],
    "root": ["adapter.options.scaling=root"],
    "lora+": ["learning_rate_ratio=16"],
    "floats": ["base=floats"],
    "codes": ["base=codes"],
    "compensated": ["base=compensated"],
    "distilled": ["teacher=dense"],
    "least-squares": ["sparsify.updater=least-squares"],
    "refined": [
        "quantize.quantizer.options.refine=3",
        "quantize.quantizer.options.refine_damp=0.5",
        "quantize.quantizer.options.target=dense",
    ],
}
Answers = dict[tuple[int, int], bool]
"""Whether an answer is right, by seed and record."""


@dataclass(frozen=True)
class Measured:
    """One model: which answers are right, the report's row, and the seconds of a step of its training."""

    right: list[bool]
    row: dict[str, Any]
    step_seconds: float


@dataclass(frozen=True)
class Tuning:
    """What all trainings share."""

    path: Path
    validation: Path
    steps: int | None
    orchestrator: Orchestrator
    data: tuple[str, ...] = ()
    """Changes of the recipe that name the calibration text and the texts of perplexity."""

    def recipe(self, way: str, rate: float, seed: int, of: str) -> Recipe:
        """Return one recipe: to measure the "base" or the "tuned" model on test records, or on "validation" records."""
        plain = Recipe.load(self.path)
        changes = [change for part in way.split(",") for change in WAYS.get(part, [part])]
        changes += [f"learning_rate={rate}"] + ([f"steps={self.steps}"] if self.steps else [])
        words = [change if _section(change) in OF_RECIPE else f"finetune.{change}" for change in changes]
        words += [*self.data, f"seed={seed}", "finetune.seed=null"]
        last = "merge" if plain.merge and "unmerged" not in way else "search"
        if of == "base":
            changed = Recipe.load(self.path, words)
            last = "quantize" if changed.quantize else "sparsify" if changed.sparsify else "model"
            words = [word for word in words if not word.startswith("finetune.")] + ["finetune=null", "search=null"]
        elif of == "validation":
            last = "search"
            words += ["evaluate.perplexity=null", f"evaluate.exact_match.data={json.dumps(str(self.validation))}"]
        if last != "merge":
            words.append("merge=null")
        return Recipe.load(self.path, [*words, f'evaluate.of=["{last}"]'])

    def measure(self, way: str, rate: float, seeds: list[int], of: str) -> dict[int, Measured]:
        """Train and measure with each seed."""
        found = {}
        for seed in seeds:
            run = self.orchestrator.run(self.orchestrator.plan(self.recipe(way, rate, seed, of)))
            lines = (run[list(run)[-1]].folder / "predictions.jsonl").read_text("utf-8").splitlines()
            right, row = [json.loads(line)["right"] for line in lines], run.report["rows"][0]
            found[seed] = Measured(right, row, 0.0 if of == "base" else run["finetune"].report["step_seconds"])
            print(f"{way}, {rate:g}, seed {seed}: {row['accuracy']:.1%}, {of} {perplexity_of([row])}", flush=True)
        return found


def _section(change: str) -> str:
    return change.partition("=")[0].partition(".")[0]


def answers_of(found: dict[int, Measured]) -> Answers:
    return {(seed, record): right for seed, one in found.items() for record, right in enumerate(one.right)}


def accuracy_of(answers: Answers) -> tuple[float, float]:
    """Return the mean accuracy, and its standard error over records."""
    by_record: dict[int, list[bool]] = {}
    for (_, record), right in answers.items():
        by_record.setdefault(record, []).append(right)
    means = [statistics.mean(rights) for rights in by_record.values()]
    return statistics.mean(means), statistics.stdev(means) / math.sqrt(len(means))


def perplexity_of(rows: list[dict[str, Any]]) -> str:
    """Return the mean perplexity over rows, of each text that the recipe names."""
    texts = [list(row["texts"].values()) for row in rows]
    means = [statistics.mean(one["perplexity"] for one in same) for same in zip(*texts, strict=True)]
    return ", ".join(f"{mean:.2f}" for mean in means) or "–"


def sweep(tuning: Tuning, way: str, rates: list[float], widen: int, seeds: list[int]) -> dict[float, Answers]:
    """Return the answers on validation at each learning rate, and at up to `widen` more beyond an edge that is best."""
    found: dict[float, Answers] = {}
    wanted = sorted(rates)
    while wanted:
        found |= {rate: answers_of(tuning.measure(way, rate, seeds, "validation")) for rate in wanted}
        found, wanted = dict(sorted(found.items())), []
        low, high = min(found), max(found)
        factor = (high / low) ** (1 / (len(found) - 1)) if len(found) > 1 else 1.0
        if len(found) < len(rates) + widen and factor > 1:
            beyond = {low: low / factor, high: high * factor}.get(best_of(found))
            wanted = [float(f"{beyond:.3g}")] if beyond else []
    return found


def best_of(found: dict[float, Answers]) -> float:
    """Return the learning rate of the best mean accuracy; of equals, the smaller."""
    return max(sorted(found), key=lambda rate: accuracy_of(found[rate])[0])


def choose(tuning: Tuning, ways: list[str], rates: list[float], widen: int, seeds: list[int]) -> dict[str, float]:
    """Print the accuracies on validation; return the best learning rate of each way."""
    found = {way: sweep(tuning, way, rates, widen, seeds) for way in ways}
    heads = sorted({rate for answers in found.values() for rate in answers})
    print(f"\n| validation | {' | '.join(f'{rate:g}' for rate in heads)} | best |\n|{'---|' * (len(heads) + 2)}")
    for way, answers in found.items():
        known = {rate: accuracy_of(right) for rate, right in answers.items()}
        cells = ["{:.1%} ± {:.1%}".format(*known[rate]) if rate in known else "" for rate in heads]
        best = best_of(answers)
        edge = ", at the edge" if len(answers) > 1 and best in (min(answers), max(answers)) else ""
        print(f"| {way} | {' | '.join(cells)} | {best:g}{edge} |")
    print(flush=True)
    return {way: best_of(answers) for way, answers in found.items()}


def test(tuning: Tuning, best: dict[str, float], seeds: list[int]) -> None:
    """Print what each way reaches on the test records at the rate that validation chose."""
    lines: list[str] = []
    first: Answers = {}
    for way, rate in best.items():
        base, found = tuning.measure(way, rate, seeds, "base"), tuning.measure(way, rate, seeds, "tuned")
        answers, before = answers_of(found), answers_of(base)
        first = first or answers
        won = sum(right and not first[key] for key, right in answers.items())
        lost = sum(first[key] and not right for key, right in answers.items())
        cells = [way, f"{rate:g}", f"{accuracy_of(before)[0]:.1%}"]
        cells += [", ".join(f"{one.row['accuracy']:.1%}" for one in found.values())]
        cells += ["{:.1%} ± {:.1%}".format(*accuracy_of(answers))]
        cells += ["" if answers is first else f"+{won} −{lost}, p = {mcnemar(won, lost):.3f}"]
        cells += [perplexity_of([one.row for one in measured.values()]) for measured in (base, found)]
        cells += [f"{statistics.mean(one.step_seconds for one in found.values()):.2f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    heads = ["test", "learning rate", "base", "by seed", "accuracy", "against the first"]
    print(f"\n| {' | '.join([*heads, 'base, perplexity', 'perplexity', 'step'])} |\n{'|---' * 9}|")
    print("\n".join(lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=EXAMPLE)
    parser.add_argument("--ways", nargs="+", default=["recipe", "hira", "root", "lora+"])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--widen", type=int, default=4, help="rates to try beyond those, while the best is at the edge")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sweep-seeds", type=int, nargs="+", help="seeds of the sweep; unless given, all seeds")
    parser.add_argument("--steps", type=int, help="unless given, the recipe's")
    parser.add_argument("--validation", type=Path, help="unless given, validation.jsonl beside the test records")
    parser.add_argument("--calibration", type=Path, help="records of text; unless given, the recipe's")
    parser.add_argument("--samples", type=int, help="calibration windows; unless given, the recipe's")
    parser.add_argument("--texts", nargs="+", type=Path, help="texts of perplexity; unless given, the recipe's")
    parser.add_argument("--test", type=Path, help="test records; unless given, the recipe's")
    parser.add_argument("--no-test", action="store_true", help="end after validation")
    parser.add_argument("--store", type=Path, default=Path("store-tuning"))
    arguments = parser.parse_args()
    try:
        plain = Recipe.load(arguments.recipe)
    except SqftError as error:
        parser.error(str(error))
    if plain.finetune is None or plain.evaluate is None or plain.evaluate.exact_match is None:
        parser.error(f"{arguments.recipe} must train, and measure exact_match")
    records = (arguments.test or plain.resolve(plain.evaluate.exact_match.data.path)).absolute()
    validation = (arguments.validation or records.with_name("validation.jsonl")).absolute()
    if validation.resolve() == records.resolve():
        parser.error("--validation: these are the test records")
    orchestrator = Orchestrator(Registry.discover(), arguments.store)
    data = [f"calibration.data={json.dumps(str(arguments.calibration.absolute()))}"] if arguments.calibration else []
    data += [f"calibration.samples={arguments.samples}"] if arguments.samples else []
    if arguments.test:
        data.append(f"evaluate.exact_match.data={json.dumps(str(records))}")
    if arguments.texts:
        texts = [{"text": str(text.absolute()), "tokens": 8192, "length": 1024} for text in arguments.texts]
        data.append(f"evaluate.perplexity={json.dumps(texts)}")
    tuning = Tuning(arguments.recipe, validation, arguments.steps, orchestrator, tuple(data))
    for way in arguments.ways:  # a mistake shows before anything is made
        for of in ("validation", "base", "tuned"):
            try:
                orchestrator.plan(tuning.recipe(way, min(arguments.learning_rates), arguments.seeds[0], of))
            except SqftError as error:
                parser.error(f"{way}, {of}: {error}")
    sweep_seeds = arguments.sweep_seeds or arguments.seeds
    best = choose(tuning, arguments.ways, arguments.learning_rates, arguments.widen, sweep_seeds)
    if not arguments.no_test:
        test(tuning, best, arguments.seeds)


if __name__ == "__main__":
    main()
