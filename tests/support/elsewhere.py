"""Other programs, each in an environment of its own without sqft, which `make consumers` makes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIRED = ("gptqmodel", "compressed_tensors", "llama_cpp", "onnxruntime_genai", "openvino", "mlx")
"""Consumers that must be there: without one of them, a test fails."""


def elsewhere(consumer: str, *arguments: object, **environment: str) -> str:
    """What a program prints in a consumer's environment, which must be there."""
    python = ROOT / ".consumers" / consumer / "bin" / "python"
    if not python.exists() and consumer not in REQUIRED:
        pytest.skip(f"`make consumers CONSUMERS={consumer}` makes its environment; not made here")
    assert python.exists(), "run `make consumers` first"
    command = [str(python), "-P", *map(str, arguments)]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # where sqft may be
    done = subprocess.run(command, capture_output=True, text=True, env=own | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
