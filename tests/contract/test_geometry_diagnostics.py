"""What every measure of data and representations promises, over the table: a new one is tested by being in it."""

from __future__ import annotations

import doctest
import importlib
import inspect
import sys

import pytest

import eckart.geometry
from eckart.geometry import GEOMETRY
from eckart.records import Claim, Diagnostic, Verdict

HEADINGS = (
    "What it does",
    "Formula",
    "Cost",
    "When it does not help",
    "Departs from the paper in",
    "Reference",
    "Example",
)
if lacking := [name for name, d in GEOMETRY.items() if not isinstance(getattr(d, "claim", None), Claim)]:
    raise RuntimeError(f"diagnostics without a claim: {lacking}")

NOT_HELD = {"interaction-basis", "top-afa"}
"""Claims of papers that fail here; each docstring gives the figures. One that comes to hold has to leave this set."""

every_diagnostic = pytest.mark.parametrize("diagnostic", GEOMETRY.values(), ids=list(GEOMETRY))


def module_of(diagnostic: Diagnostic):  # type: ignore[no-untyped-def]
    return importlib.import_module(diagnostic.entry.__module__)


def test_no_name_is_lost_in_the_table() -> None:
    """Two of one name would leave one entry: every METHOD of the room is in the table."""
    room = [module for name, module in sys.modules.items() if name.startswith("eckart.geometry.")]
    assert {id(m.METHOD) for m in room if hasattr(m, "METHOD")} == {id(d) for d in GEOMETRY.values()}


@every_diagnostic
def test_lies_under_its_own_name_with_paper_and_claim(diagnostic: Diagnostic) -> None:
    assert GEOMETRY[diagnostic.name] is diagnostic
    assert diagnostic.name == diagnostic.name.lower().strip()
    assert diagnostic.paper.authors
    assert diagnostic.paper.title
    assert diagnostic.paper.year > 1900
    assert diagnostic.claim.statement
    assert diagnostic.claim.source
    assert diagnostic.summary == diagnostic.summary.strip()


@every_diagnostic
def test_entry_is_public_and_explained(diagnostic: Diagnostic) -> None:
    name = diagnostic.entry.__name__
    assert name in eckart.geometry.__all__
    assert getattr(eckart.geometry, name) is diagnostic.entry
    assert len(inspect.getdoc(diagnostic.entry) or "") > 100


@every_diagnostic
def test_module_explains_itself_under_the_fixed_headings(diagnostic: Diagnostic) -> None:
    text = module_of(diagnostic).__doc__
    places = [text.find(f"*{heading}.*") for heading in HEADINGS]
    assert -1 not in places, [h for h, p in zip(HEADINGS, places, strict=True) if p == -1]
    assert places == sorted(places)


@every_diagnostic
def test_example_runs(diagnostic: Diagnostic) -> None:
    result = doctest.testmod(module_of(diagnostic))
    assert result.attempted > 0
    assert result.failed == 0
    example = module_of(diagnostic).__doc__.split("*Example.*")[1]
    assert any(line and not line.startswith((">>>", "...")) for line in example.splitlines())  # it shows a result


@every_diagnostic
def test_claim_ran_and_reports_figures(diagnostic: Diagnostic) -> None:
    verdict = diagnostic.claim.run()
    assert isinstance(verdict, Verdict)
    assert verdict.figures
    assert all(isinstance(value, float) for value in verdict.figures.values())
    assert verdict.held is (diagnostic.name not in NOT_HELD), verdict
