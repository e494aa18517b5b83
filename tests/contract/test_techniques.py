"""What every optimizer, pruning and training method promises, over the tables: a new one is tested by being in one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from types import ModuleType

import pytest

import eckart.optim
import eckart.prune
import eckart.training
from eckart.optim import OPTIMIZERS
from eckart.prune import PRUNING
from eckart.records import Claim, Technique, Verdict
from eckart.training import TRAINING

HEADINGS = (
    "What it does",
    "Formula",
    "Cost",
    "When it does not help",
    "Departs from the paper in",
    "Reference",
    "Example",
)
TABLES = ((OPTIMIZERS, eckart.optim), (PRUNING, eckart.prune), (TRAINING, eckart.training))
"""Tables with their rooms."""
METHODS = [(method, room) for table, room in TABLES for method in table.values()]
if lacking := [m.name for m, _ in METHODS if not isinstance(getattr(m, "claim", None), Claim)]:
    raise RuntimeError(f"methods without a claim: {lacking}")

NOT_HELD = {
    "lr2vq",
    "gqsa",
    "m-fac-optimizer",
    "lanczos-rates",
    "trion",
    "auon",
    "diffgrad",
    "layerwise-scaling",
    "hesso",
    "global-mp",
    "saf",
    "gradient-norm",
}
"""Claims of papers that fail here; each docstring gives the figures. One that comes to hold has to leave this set."""

every = pytest.mark.parametrize(("method", "room"), METHODS, ids=[f"{r.__name__}-{m.name}" for m, r in METHODS])


def module_of(method: Technique) -> ModuleType:
    return importlib.import_module(method.entry.__module__)


@pytest.mark.parametrize(("table", "room"), TABLES, ids=[room.__name__ for _, room in TABLES])
def test_no_name_is_lost_in_the_table(table: dict[str, Technique], room: ModuleType) -> None:
    """Two methods of one name would leave one entry: every METHOD of the room is in the table."""
    modules = {module_of(method) for method in table.values()}
    assert {id(module.METHOD) for module in modules} == {id(method) for method in table.values()}


@every
def test_lies_under_its_own_name_with_paper_and_claim(method: Technique, room: ModuleType) -> None:
    assert next(table for table, other in TABLES if other is room)[method.name] is method
    assert method.name == method.name.lower().strip()
    assert method.paper.authors
    assert method.paper.title
    assert method.paper.year > 1900
    assert method.claim.statement
    assert method.claim.source
    assert callable(method.claim.run)
    assert method.summary == method.summary.strip()


@every
def test_entry_is_public_and_explained(method: Technique, room: ModuleType) -> None:
    name = method.entry.__name__
    assert name in room.__all__
    assert getattr(room, name) is method.entry
    assert len(inspect.getdoc(method.entry) or "") > 100


@every
def test_module_explains_itself_under_the_fixed_headings(method: Technique, room: ModuleType) -> None:
    text = module_of(method).__doc__ or ""
    places = [text.find(f"*{heading}.*") for heading in HEADINGS]
    assert -1 not in places, [h for h, p in zip(HEADINGS, places, strict=True) if p == -1]
    assert places == sorted(places)


@every
def test_example_runs(method: Technique, room: ModuleType) -> None:
    result = doctest.testmod(module_of(method))
    assert result.attempted > 0
    assert result.failed == 0
    example = (module_of(method).__doc__ or "").split("*Example.*")[1]
    assert any(line and not line.startswith((">>>", "...")) for line in example.splitlines())  # it shows a result


@every
def test_claim_ran_and_reports_figures(method: Technique, room: ModuleType) -> None:
    verdict = method.claim.run()
    assert isinstance(verdict, Verdict)
    assert verdict.figures
    assert all(isinstance(value, float) for value in verdict.figures.values())
    assert verdict.held is (method.name not in NOT_HELD), verdict
