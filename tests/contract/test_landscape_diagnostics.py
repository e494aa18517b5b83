"""What every diagnostic of the landscape promises, over the table."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

import eckart.landscape
from eckart.landscape import LANDSCAPE
from eckart.records import Diagnostic, Verdict

HEADINGS = (
    "What it does",
    "Formula",
    "Cost",
    "When it does not help",
    "Departs from the paper in",
    "Reference",
    "Example",
)
every_method = pytest.mark.parametrize("method", LANDSCAPE.values(), ids=list(LANDSCAPE))


def module_of(method: Diagnostic):  # type: ignore[no-untyped-def]
    return importlib.import_module(method.entry.__module__)


@every_method
def test_lies_under_its_name_and_explains_itself(method: Diagnostic) -> None:
    assert LANDSCAPE[method.name] is method
    assert method.group == "landscape"
    assert getattr(eckart.landscape, method.entry.__name__) is method.entry
    assert len(inspect.getdoc(method.entry) or "") > 100
    text = module_of(method).__doc__
    places = [text.find(f"*{heading}.*") for heading in HEADINGS]
    assert -1 not in places
    assert places == sorted(places)


@every_method
def test_example_runs(method: Diagnostic) -> None:
    result = doctest.testmod(module_of(method))
    assert result.attempted > 0
    assert result.failed == 0


@every_method
def test_claim_holds(method: Diagnostic) -> None:
    verdict = method.claim.run()
    assert isinstance(verdict, Verdict)
    assert verdict.held, verdict
    assert all(isinstance(value, float) for value in verdict.figures.values())


def test_everything_public_is_documented() -> None:
    for name in eckart.landscape.__all__:
        assert inspect.getdoc(getattr(eckart.landscape, name)), name
