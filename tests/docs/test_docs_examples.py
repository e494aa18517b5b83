"""Examples in pages and docstrings run, pages link to what is there, every room has a page."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import eckart

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
OPTIONAL = {"transformers", "accelerate", "datasets", "peft"}
"""What the extra ``hf`` installs; modules that need it are skipped without it."""
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks() -> Iterator[tuple[str, str]]:
    """(place, text) of every Python block of every page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            yield f"{page_name(page)}:{text[: match.start()].count(chr(10)) + 1}", match.group(1)


def modules() -> list[str]:
    found = pkgutil.walk_packages(eckart.__path__, "eckart.")
    return sorted(module.name for module in found if not module.name.endswith("__main__"))


def run_examples(name: str, text: str, names: dict[str, object]) -> int:
    """How many examples ``text`` has; fails with their report where one does not hold."""
    report: list[str] = []
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    runner.run(test, out=report.append, clear_globs=False)
    assert runner.failures == 0, "".join(report)
    return len(test.examples)


@pytest.mark.parametrize(("place", "text"), [pytest.param(*block, id=block[0]) for block in blocks()])
def test_python_in_pages(place: str, text: str) -> None:
    if ">>>" in text:
        assert run_examples(place, text, {}) > 0
    else:
        ast.parse(text, filename=place)


def test_a_wrong_example_fails() -> None:
    with pytest.raises(AssertionError, match=re.escape("Expected:")):
        run_examples("wrong", ">>> 1 + 1\n3\n", {})


@pytest.mark.parametrize("name", modules())
def test_doctests(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}, which the extra hf installs")
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        report: list[str] = []
        runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
        runner.run(test, out=report.append)
        assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_navigation_and_the_other_way_round() -> None:
    def listed(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from listed(part)

    nav = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(listed(nav)) == pages


def test_every_room_has_a_reference_page() -> None:
    rooms = {module.name for module in pkgutil.iter_modules(eckart.__path__) if module.ispkg}
    pages = {path.stem for path in (ROOT / "docs" / "api").glob("*.md")}
    assert rooms - {"verbs", "cli"} <= pages, "verbs are on the page of eckart, cli on the page of commands"
