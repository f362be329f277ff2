"""What plans made in tests know of models' modules, remembered while the tests run."""

from __future__ import annotations

import os
from pathlib import Path

from sqft.execution.layouts import Layouts

LAYOUTS = Layouts(Path(os.devnull))
"""Keeps nothing on disk."""
