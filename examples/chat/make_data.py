"""Write small conversations about a queue of people, with nothing but the standard library.

    python make_data.py OUT_DIR [--seed 0]

train.jsonl and test.jsonl hold {"messages"} records of three questions and three answers, each a name. What the third
answer is depends on all that was said before. The names of the two files are different people, and no line is random on
one machine only: the same seed gives the same bytes.
"""

import argparse
import json
import random
from pathlib import Path

NAMES = {
    "train": ["Tom", "Anna", "Ben", "Mary", "Jack", "Lucy", "Sam", "Emma", "Max", "Kate", "Paul", "Rose"],
    "test": ["John", "Alice", "Leo", "Nina", "David", "Helen", "Eric", "Julia"],
}
SIZES = {"train": 400, "test": 64}
SYSTEM = "Answer with one name."


def conversation(names: list[str]) -> dict[str, list[dict[str, str]]]:
    """Return one conversation: a queue, its first is served, somebody joins."""
    *queue, joins = names
    served, first = queue[:2]
    said = [
        ("system", SYSTEM),
        ("user", f"Queue: {', '.join(queue)}. Who is first?"),
        ("assistant", served),
        ("user", f"{served} is served. Who is first?"),
        ("assistant", first),
        ("user", f"{joins} joins and {first} is served. Who is first?"),
        ("assistant", queue[2]),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the chat example's data.")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        rng = random.Random(f"{split} {args.seed}")
        # Of random's methods only random() is promised to give the same numbers on every version of Python.
        drawn = [sorted(NAMES[split], key=lambda _: rng.random())[:5] for _ in range(size)]
        lines = [json.dumps(conversation(names)) + "\n" for names in drawn]
        (args.out_dir / f"{split}.jsonl").write_bytes("".join(lines).encode())
        print(f"{split}.jsonl: {size} conversations")


if __name__ == "__main__":
    main()
