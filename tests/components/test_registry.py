"""Discovery isolates failures, keeps them, and says them where they matter."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from sqft_wanda import Wanda

from sqft import Registry
from sqft.api import Scorer, hookimpl
from sqft.errors import PluginError


def install(site: Path, name: str, version: str, code: str, entry: str, requires: str = "sqft") -> None:
    """A distribution as pip would leave it: a module and its metadata."""
    module = name.replace("-", "_")
    (site / f"{module}.py").write_text(code)
    info = site / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: {requires}\n"
    )
    (info / "entry_points.txt").write_text(f"[sqft]\n{entry} = {module}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path  # type: ignore[misc]
    for name in set(sys.modules) - before:
        del sys.modules[name]


SCORER = """
from sqft.api import Scorer, hookimpl
class Mine(Scorer):
    '''Mine.'''
    name = "{name}"
    def score(self, weight, stats): return weight.abs()
@hookimpl
def sqft_scorers(): return [Mine]
"""


def test_a_plugin_is_found_and_can_be_disabled(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "sqft-mine", "1.2", SCORER.format(name="mine"), "mine")
    assert str(Registry.discover().get("scorer", "mine")) == "scorer 'mine' (sqft-mine 1.2)"
    with pytest.raises(PluginError):
        Registry.discover(disable=["mine"]).get("scorer", "mine")
    monkeypatch.setenv("SQFT_DISABLE", "mine,other")
    with pytest.raises(PluginError):
        Registry.discover().get("scorer", "mine")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import gpt4none", "could not be loaded: ModuleNotFoundError: No module named 'gpt4none'"),
        ("raise SystemExit(3)", "could not be loaded: SystemExit: 3"),
        ("def f(:", "could not be loaded: SyntaxError"),
        (
            "from sqft.api import hookimpl\n@hookimpl\ndef sqft_scorer(): return []",
            "there is no hook 'sqft_scorer'. Did you mean 'sqft_scorers'?",
        ),
        (
            "from sqft.api import hookimpl\n@hookimpl\ndef sqft_scorers(model): return []",
            "does not fit sqft's hooks",
        ),
        (
            "from sqft.api import hookimpl\n@hookimpl\ndef sqft_scorers(): raise ValueError('no')",
            "failed in sqft_scorers: ValueError: no",
        ),
        (
            "from sqft.api import hookimpl\n@hookimpl\ndef sqft_scorers(): return [int]",
            "offers 'int' through sqft_scorers, which takes classes derived from Scorer",
        ),
        (
            "from sqft.api import *\n@hookimpl\ndef sqft_scorers():\n  class A(Scorer): name = 'a'\n  return [A]",
            "offers scorer 'a', which does not define score()",
        ),
        (
            "from sqft.api import *\n@hookimpl\ndef sqft_scorers():\n"
            "  class A(Scorer):\n    name = 'Bad Name'\n    def score(self, weight, stats): ...\n  return [A]",
            "whose name is 'Bad Name'; a name is lower-case",
        ),
        (
            "from sqft.api import *\n@hookimpl\ndef sqft_mergers():\n"
            "  class A(Merger):\n    name = 'a'\n    def combine(self, base, delta): ...\n  return [A]",
            "does not say which `bases` it works on",
        ),
        (
            "from sqft.api import *\n@hookimpl\ndef sqft_mergers():\n"
            "  class A(Merger):\n    name = 'a'\n    bases = 'sparse'\n    def combine(self, base, delta): ...\n"
            "  return [A]",
            "whose `bases` is 'sparse', expected a frozenset of BaseKind",
        ),
        (
            "from sqft.api import *\n@hookimpl\ndef sqft_scorers():\n"
            "  class A(Scorer):\n    name: str = 'a'\n    def score(self, weight, stats): ...\n  return [A]",
            "whose name is a field; write name = ",
        ),
        (
            "from collections.abc import Callable\nfrom sqft.api import *\n@hookimpl\ndef sqft_scorers():\n"
            "  class A(Scorer):\n    name = 'a'\n    f: Callable[[], int] = int\n"
            "    def score(self, weight, stats): ...\n  return [A]",
            "with an option that JSON cannot hold",
        ),
        (
            "from sqft.api import hookimpl\n@hookimpl\ndef sqft_scorers(): raise SystemExit('needs a GPU')",
            "failed in sqft_scorers: SystemExit: needs a GPU",
        ),
        ("def sqft_scorers(): return []", "sqft_scorers is not marked; write @hookimpl (from sqft.api) above it"),
        ("x = 1", "it implements none of sqft_scorers"),
    ],
)
def test_a_broken_plugin_is_kept_and_said(site: Path, code: str, reason: str) -> None:
    install(site, "sqft-bad", "9.1", code, "bad")
    registry = Registry.discover()
    (broken,) = registry.broken()
    assert (broken.plugin, broken.source) == ("bad", "sqft-bad 9.1")
    assert reason in str(broken)
    assert registry.get("scorer", "wanda").component is Wanda  # an unrelated run goes on
    with pytest.raises(PluginError, match=r"(?s)no scorer named 'a'.*plugin 'bad' \(sqft-bad 9\.1\)"):
        registry.get("scorer", "a")


def test_a_version_mismatch_is_seen_before_the_import(site: Path) -> None:
    install(site, "sqft-old", "9.0", "raise AssertionError('imported')", "old", "sqft>=0.9")
    (broken,) = Registry.discover().broken()
    assert broken.reason == "needs sqft>=0.9, this is sqft 0.1.0"


def test_a_clash_is_an_error_only_for_who_names_it(site: Path) -> None:
    for number in (1, 2):
        install(site, f"sqft-dup{number}", "1.0", SCORER.format(name="ours"), f"mine{number}")
    registry = Registry.discover()
    assert registry.broken() == []
    assert registry.get("scorer", "magnitude")
    message = r"offered more than once: mine1/ours \(sqft-dup1 1\.0\), mine2/ours \(sqft-dup2 1\.0\). Write the one"
    with pytest.raises(PluginError, match=message):
        registry.get("scorer", "ours")
    assert registry.get("scorer", "mine2/ours").provider.source == "sqft-dup2 1.0"


def test_no_other_package_takes_a_name_of_ours(site: Path) -> None:
    install(site, "sqft-dup", "1.0", SCORER.format(name="wanda"), "mine")
    registry = Registry.discover()
    assert registry.get("scorer", "wanda").component is Wanda
    assert registry.get("scorer", "mine/wanda").provider.source == "sqft-dup 1.0"


def test_what_a_process_adds_is_not_passed_over() -> None:
    class Mine(Wanda):
        """Mine."""

    registry = Registry.discover()
    registry.add(Mine, name="mine")
    with pytest.raises(PluginError, match=r"mine/wanda \(added by this process\), wanda/wanda"):
        registry.get("scorer", "wanda")


def test_what_a_plugin_prints_is_no_output(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "sqft-loud", "1.0", "print('hello')\n" + SCORER.format(name="loud"), "loud")
    assert Registry.discover().get("scorer", "loud")
    assert capsys.readouterr() == ("", "hello\n")


def test_two_plugins_of_one_name(site: Path) -> None:
    install(site, "sqft-a", "1.0", SCORER.format(name="mine"), "same")
    install(site, "sqft-b", "1.0", SCORER.format(name="yours"), "same")
    (broken,) = Registry.discover().broken()
    assert "is a second plugin of that name" in str(broken)


def test_adding_without_installing() -> None:
    class Mine(Wanda):
        name = "mine"

    module = ModuleType("mine")

    @hookimpl
    def sqft_scorers() -> Any:
        yield Mine

    module.sqft_scorers = sqft_scorers  # type: ignore[attr-defined]
    registry = Registry()
    registry.add(module)
    assert registry.get("scorer", "mine").component is Mine
    with pytest.raises(PluginError, match="second plugin"):
        registry.add(module)


def test_adding_a_class_by_itself() -> None:
    class Mine(Wanda):
        name = "mine"

    registry = Registry()
    registry.add(Mine)
    assert registry.get("scorer", "mine").component is Mine


def test_a_cell_that_is_run_again_replaces_its_class() -> None:
    def cell(option: int, word: str = "mine") -> type[Wanda]:
        """Run a cell of a notebook, where the class is no function's."""
        names: dict[str, Any] = {"Wanda": Wanda, "__name__": "__main__"}
        exec(f"class Mine(Wanda):\n    name = {word!r}\n    depth: int = {option}\n", names)
        made: type[Wanda] = names["Mine"]
        return made

    registry = Registry.discover()
    first, second = cell(1), cell(2)
    registry.add(first)
    registry.add(second)
    assert registry.get("scorer", "mine").component is second
    with pytest.raises(PluginError, match="Bad Name"):
        registry.add(cell(3, "Bad Name"))
    assert registry.get("scorer", "mine").component is second  # a mistake in the cell takes nothing away
    registry.add(cell(4, "other"))
    assert registry.get("scorer", "other") and not any(e.component.name == "mine" for e in registry.entries())
    with pytest.raises(PluginError) as caught:
        registry.get("scorer", "mine")
    assert "mine" not in str(caught.value).partition(";")[2]

    class Mine(Wanda):
        name = "mine"

    with pytest.raises(PluginError, match="second plugin"):
        registry.add(Mine)


def test_classes_that_a_function_makes_are_not_versions_of_one_another() -> None:
    def made(word: str) -> type[Wanda]:
        class Made(Wanda):
            name = word

        return Made

    registry = Registry()
    registry.add(made("first"))
    with pytest.raises(PluginError, match="second plugin"):
        registry.add(made("second"))
    assert [one.component.name for one in registry.entries()] == ["first"]
    registry.add(again := made("first"))
    assert registry.get("scorer", "first").component is again


@pytest.mark.parametrize("nothing", [None, "wanda", Wanda(), Scorer])
def test_adding_what_is_no_plugin(nothing: Any) -> None:
    with pytest.raises(PluginError):
        Registry().add(nothing)


def test_what_is_added_is_added_whole_or_not_at_all() -> None:
    class Good(Wanda):
        name = "good"

    registry = Registry()
    offer = hookimpl(lambda: [Good, int])
    with pytest.raises(PluginError, match="'int'"):
        registry.add(SimpleNamespace(sqft_scorers=offer), name="half")
    assert registry.entries() == [] and registry.broken() == []
    registry.add(Good, name="half")


def test_an_edited_module_is_another_one(site: Path) -> None:
    install(site, "sqft-mine", "1.0", SCORER.format(name="mine"), "mine")
    entry = Registry.discover().get("scorer", "mine")
    before = entry.code
    file = next(site.glob("*.py"))
    file.write_text(file.read_text() + "# edited\n")
    assert entry.code != before


def test_notifications_never_stop_a_run() -> None:
    class Tracker:
        seen: list[str] = []

        @hookimpl
        def sqft_stage_started(self, step: Any) -> None:
            self.seen.append(step)
            raise ValueError("tracker is down")

    registry = Registry()
    registry.add(Tracker(), name="tracker")
    ((plugin, error),) = registry.notify("sqft_stage_started", step="x")
    assert plugin == "tracker" and str(error) == "tracker is down" and Tracker.seen == ["x"]
    assert issubclass(Wanda, Scorer)
