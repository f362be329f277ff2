"""The chat example's conversations: right answers, two files of different people, the same bytes for the same seed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "chat" / "make_data.py"


def make(folder: Path) -> dict[str, bytes]:
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], check=True, capture_output=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_answers_follow_from_what_was_said(tmp_path: Path) -> None:
    files = make(tmp_path / "a")
    assert files == make(tmp_path / "b")
    people = []
    for content in files.values():
        named = set()
        for line in content.splitlines():
            _, asked, first, then, second, last, third = (
                message["content"] for message in json.loads(line)["messages"]
            )
            queue = re.findall(r"[A-Z][a-z]+", asked.removeprefix("Queue: ").removesuffix(". Who is first?"))
            assert [first, second, third] == queue[:3]
            assert then.startswith(f"{first} is served") and f"and {second} is served" in last
            named |= set(queue)
        people.append(named)
    assert not people[0] & people[1]
