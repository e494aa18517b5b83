"""What every training-time method promises, over the table: a new method is tested by being in it."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

import eckart.training
from eckart.records import Claim, Verdict
from eckart.training import TRAINING, TrainingMethod

HEADINGS = (
    "What it does",
    "Formula",
    "Cost",
    "When it does not help",
    "Departs from the paper in",
    "Reference",
    "Example",
)
if lacking := [name for name, m in TRAINING.items() if not isinstance(getattr(m, "claim", None), Claim)]:
    raise RuntimeError(f"methods without a claim: {lacking}")

NOT_HELD = {"lr2vq", "gqsa"}
"""Claims of papers that fail here; each docstring gives the figures. One that comes to hold has to leave this set."""

every_method = pytest.mark.parametrize("method", TRAINING.values(), ids=list(TRAINING))


def module_of(method: TrainingMethod):  # type: ignore[no-untyped-def]
    return importlib.import_module(method.entry.__module__)


def test_no_name_is_lost_in_the_table() -> None:
    """Two methods of one name would leave one entry: every METHOD of the room is in the table."""
    modules = {module_of(method) for method in TRAINING.values()}
    assert {id(module.METHOD) for module in modules} == {id(method) for method in TRAINING.values()}


@every_method
def test_lies_under_its_own_name_with_paper_and_claim(method: TrainingMethod) -> None:
    assert TRAINING[method.name] is method
    assert method.name == method.name.lower().strip()
    assert method.paper.authors
    assert method.paper.title
    assert method.paper.year > 1900
    assert method.claim.statement
    assert method.claim.source
    assert callable(method.claim.run)
    assert method.summary == method.summary.strip()


@every_method
def test_entry_is_public_and_explained(method: TrainingMethod) -> None:
    name = method.entry.__name__
    assert name in eckart.training.__all__
    assert getattr(eckart.training, name) is method.entry
    assert len(inspect.getdoc(method.entry) or "") > 100


@every_method
def test_module_explains_itself_under_the_fixed_headings(method: TrainingMethod) -> None:
    text = module_of(method).__doc__
    places = [text.find(f"*{heading}.*") for heading in HEADINGS]
    assert -1 not in places, [h for h, p in zip(HEADINGS, places, strict=True) if p == -1]
    assert places == sorted(places)


@every_method
def test_example_runs(method: TrainingMethod) -> None:
    result = doctest.testmod(module_of(method))
    assert result.attempted > 0
    assert result.failed == 0
    example = module_of(method).__doc__.split("*Example.*")[1]
    assert any(line and not line.startswith((">>>", "...")) for line in example.splitlines())  # it shows a result


@every_method
def test_claim_ran_and_reports_figures(method: TrainingMethod) -> None:
    verdict = method.claim.run()
    assert isinstance(verdict, Verdict)
    assert verdict.figures
    assert all(isinstance(value, float) for value in verdict.figures.values())
    assert verdict.held is (method.name not in NOT_HELD), verdict
