"""Write the quickstart's data, with nothing but the standard library.

    python make_data.py OUT_DIR [--seed 0] [--test-problems 204]

The quickstart must run offline on a small CPU, so its data are made here instead of downloaded:

- train.jsonl, validation.jsonl, test.jsonl: {"prompt", "completion"} records. They are one-step addition and
  subtraction word problems whose answer is only the number. The wording is deliberately narrow and the numbers
  are small, so that a small model can learn the task in a short run. train.jsonl also has some paragraphs of the
  calibration text, as {"text"} records: without them the model forgets prose.
- calibration.jsonl, {"text"} records, and heldout.txt: Python's own language reference, as it ships in
  `pydoc_data.topics`. It is real English prose on every machine that has Python. The first file is used to
  calibrate pruning and quantization, the second to measure perplexity.

How the splits are kept apart:

- Every (operation, unordered pair of numbers) belongs to exactly one split, by a seeded shuffle. So no sum or
  difference of the test split was ever trained on, not even with its numbers swapped. The names of the people
  come from a separate list for each split. No prompt is written twice.
- A topic is either for calibration or held out, by a seeded shuffle. Topics quote each other, so a paragraph that has
  eight words in a row in common with the held-out text is removed from calibration.

The same seed gives the same bytes. The word problems do not depend on the version of Python. The language
reference does, and so does the prose among the problems, because each version ships its own. With more test problems,
all else stays the same.
"""

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from itertools import combinations, combinations_with_replacement, cycle
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeVar

SIZES = {"train": 2400, "validation": 128, "test": 204}
# The shares of the number pairs that are kept out of training. Training takes the others.
PAIR_SHARES = {"validation": 0.15, "test": 0.2}
NAMES = {
    "train": ["Tom", "Anna", "Ben", "Mary", "Jack", "Lucy", "Sam", "Emma", "Max", "Kate", "Paul", "Rose"],
    "validation": ["Dan", "Amy", "Peter", "Ella", "Oscar", "Ruth"],
    "test": ["John", "Alice", "Leo", "Nina", "David", "Helen", "Eric", "Julia"],
}
ITEMS = ["apples", "books", "cards", "coins", "marbles", "pencils", "shells", "stamps"]
# Widen this for a harder task: there are then more pairs to learn, and each is seen less often.
NUMBERS = range(2, 21)

# Sums always ask for the "Total" and differences for what is "Left", so the wording makes the operation clear.
# Every word costs training time on a small CPU, so there are few of them.
TEMPLATES = {
    "+": (
        "{name} has {a} {items} and buys {b} more. Total:",
        "{name} finds {a} {items}, then {b} more. Total:",
        "A box has {a} {items}. {name} adds {b}. Total:",
    ),
    "-": (
        "{name} has {a} {items} and loses {b}. Left:",
        "{name} has {a} {items} and sells {b}. Left:",
        "A box has {a} {items}. {name} takes {b}. Left:",
    ),
}

# Enough text for perplexity on 8k tokens, from short topics only, so that no topic makes up most of the text.
HELDOUT_CHARS = 45_000
HELDOUT_TOPIC_CHARS = 10_000
# How much prose is mixed into the problems, in complete paragraphs of at least PROSE_PARAGRAPH_CHARS characters. In
# training it comes in pieces as long as the longest problem: about one example in eight.
PROSE_CHARS = 35_000
PROSE_PARAGRAPH_CHARS = 300
# A paragraph that has this many words in a row in common with the held-out text is not calibrated or trained on.
# Shorter runs ("See also:", grammar) recur everywhere and leak nothing.
SHARED_WORDS = 8

T = TypeVar("T")
Record = dict[str, str]
Pair = tuple[int, int]


def shuffled(items: Iterable[T], rng: random.Random) -> list[T]:
    # Of random's methods only random() is promised to give the same numbers on every version of Python.
    return sorted(items, key=lambda _: rng.random())


def pick(items: list[T], rng: random.Random) -> T:
    return items[int(rng.random() * len(items))]


def split_pairs(rng: random.Random) -> dict[str, dict[str, list[Pair]]]:
    """Return the pairs of numbers of each split and operation, smaller number first."""
    splits: dict[str, dict[str, list[Pair]]] = {split: {} for split in SIZES}
    all_pairs = {"+": combinations_with_replacement(NUMBERS, 2), "-": combinations(NUMBERS, 2)}
    for operation, pairs in all_pairs.items():
        left = shuffled(pairs, rng)
        total = len(left)
        for split, share in PAIR_SHARES.items():
            count = int(share * total)
            splits[split][operation], left = left[:count], left[count:]
        splits["train"][operation] = left
    return splits


def word_problems(split: str, size: int, pairs: Mapping[str, list[Pair]], rng: random.Random) -> list[Record]:
    # Templates and pairs take turns instead of being drawn, so all of them are used equally often.
    turns = cycle((operation, template) for operation in TEMPLATES for template in TEMPLATES[operation])
    next_pair = {operation: cycle(pairs[operation]) for operation in TEMPLATES}
    answers: dict[str, int] = {}  # by prompt, so that a repeated prompt counts once
    while len(answers) < size:
        operation, template = next(turns)
        b, a = next(next_pair[operation])
        if operation == "+" and rng.random() < 0.5:
            a, b = b, a
        prompt = template.format(name=pick(NAMES[split], rng), items=pick(ITEMS, rng), a=a, b=b)
        answers[prompt] = a + b if operation == "+" else a - b
    return [{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in answers.items()]


def runs(words: list[T]) -> list[tuple[T, ...]]:
    return [tuple(words[start : start + SHARED_WORDS]) for start in range(len(words) - SHARED_WORDS + 1)]


def without_shared(text: str, heldout: set[tuple[str, ...]]) -> str:
    """Return `text` without the paragraphs that a run of words touches which the held-out text has too.

    Line breaks and indentation do not matter. What is left may have new runs, across what was taken out.
    """
    left = text.split("\n\n")
    while True:
        words = [(word, number) for number, paragraph in enumerate(left) for word in paragraph.split()]
        shared = [run for run in runs(words) if tuple(word for word, _ in run) in heldout]
        if not shared:
            return "\n\n".join(left)
        touched = {number for run in shared for _, number in run}
        left = [paragraph for number, paragraph in enumerate(left) if number not in touched]


def split_topics(rng: random.Random) -> tuple[list[Record], str]:
    """Return the calibration records, one for each topic, and the held-out text."""
    heldout: list[str] = []
    calibration: list[str] = []
    size = 0
    for name in shuffled(sorted(topics), rng):
        text = topics[name]
        if size < HELDOUT_CHARS and len(text) <= HELDOUT_TOPIC_CHARS:
            heldout.append(text)
            size += len(text)
        else:
            calibration.append(text)
    heldout_text = "\n\n".join(heldout)
    shared = set(runs(heldout_text.split()))
    kept = (without_shared(text, shared) for text in calibration)
    return [{"text": text} for text in kept if text.strip()], heldout_text


def prose(texts: Iterable[str], rng: random.Random) -> list[Record]:
    """Return complete paragraphs, PROSE_CHARS characters in total, of words and not of tables."""
    found = [" ".join(paragraph.split()) for text in texts for paragraph in text.split("\n\n")]
    long = (paragraph for paragraph in dict.fromkeys(found) if len(paragraph) >= PROSE_PARAGRAPH_CHARS)
    plain = [text for text in long if sum(c.isalpha() or c == " " for c in text) >= 0.85 * len(text)]
    chosen: list[Record] = []
    size = 0
    for text in shuffled(plain, rng):
        if size < PROSE_CHARS:
            chosen.append({"text": text})
            size += len(text)
    return chosen


def write(path: Path, text: str) -> None:
    # Through a temporary file, so that an interrupted run never leaves a truncated one to train on.
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(text.encode())
    temporary.replace(path)


def write_records(path: Path, records: list[Record]) -> None:
    write(path, "".join(json.dumps(record) + "\n" for record in records))
    print(f"{path.name}: {len(records)} records")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's data.")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-problems", type=int, default=SIZES["test"], help="more take longer and say more")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)

    # One generator for each source: the language reference changes with Python, the word problems must not.
    rng = random.Random(f"word problems {args.seed}")
    sizes = {**SIZES, "test": args.test_problems}
    problems = {split: word_problems(split, sizes[split], pairs, rng) for split, pairs in split_pairs(rng).items()}
    calibration, heldout = split_topics(random.Random(f"topics {args.seed}"))
    mixing = random.Random(f"mix {args.seed}")
    texts = prose((record["text"] for record in calibration), mixing)
    problems["train"] = shuffled([*problems["train"], *texts], mixing)
    for split, records in problems.items():
        write_records(args.out_dir / f"{split}.jsonl", records)
    write_records(args.out_dir / "calibration.jsonl", calibration)
    write(args.out_dir / "heldout.txt", heldout)
    print(f"heldout.txt: {len(heldout)} characters")


if __name__ == "__main__":
    main()
