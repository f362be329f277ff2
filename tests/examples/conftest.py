"""A throw-away environment for packages that are really installed."""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from collections.abc import Callable

import pytest

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Runs Python with these arguments in an environment that sees the packages of this one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    python = folder / "bin" / "python"
    # A fresh environment may bring a setuptools older than the one it should see.
    subprocess.run([python, "-m", "pip", "uninstall", "-y", "-q", "setuptools"], check=True)
    return lambda *arguments: subprocess.run([python, *arguments], capture_output=True, text=True)
