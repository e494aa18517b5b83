"""What every diagnostic promises, over the tables: a new one is tested by being in one of them."""

from __future__ import annotations

import doctest
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import eckart.geometry
import eckart.landscape
import eckart.spectra
from eckart.errors import InputError
from eckart.geometry import GEOMETRY
from eckart.landscape import LANDSCAPE
from eckart.records import Claim, Diagnostic, Finding, Verdict
from eckart.spectra import SPECTRA

TABLES: tuple[tuple[Mapping[str, Diagnostic], ModuleType], ...] = (
    (SPECTRA, eckart.spectra),
    (LANDSCAPE, eckart.landscape),
    (GEOMETRY, eckart.geometry),
)
"""Tables with their rooms."""
HEADINGS = (
    "What it does",
    "Formula",
    "Cost",
    "When it does not help",
    "Departs from the paper in",
    "Reference",
    "Example",
)
DIAGNOSTICS = [(diagnostic, room) for table, room in TABLES for diagnostic in table.values()]
NOT_HELD = {"learning-rates", "pruning-ratios", "interaction-basis", "top-afa"}
"""Claims of papers that fail here; each docstring gives the figures. One that comes to hold has to leave this set."""
WITHOUT_TENSORS = {"learning-rates", "pruning-ratios"}
"""Those whose entry takes figures of other diagnostics, tested beside them."""

every = pytest.mark.parametrize(("diagnostic", "room"), DIAGNOSTICS, ids=[d.name for d, _ in DIAGNOSTICS])
OF_WEIGHTS = [d for d in SPECTRA.values() if d.name not in WITHOUT_TENSORS]
on_tensors = pytest.mark.parametrize("diagnostic", OF_WEIGHTS, ids=[d.name for d in OF_WEIGHTS])


def module_of(diagnostic: Diagnostic) -> ModuleType:
    return importlib.import_module(diagnostic.entry.__module__)


def run(diagnostic: Diagnostic, W: Any) -> list[Finding]:
    entry: Callable[..., Any] = diagnostic.entry
    found = entry(W, W) if diagnostic.name == "difference" else entry(W)
    return list(found.values()) if isinstance(found, Mapping) else [found]


@pytest.mark.parametrize(("table", "room"), TABLES, ids=[room.__name__ for _, room in TABLES])
def test_no_name_is_lost_in_the_table(table: Mapping[str, Diagnostic], room: ModuleType) -> None:
    """Two of one name would leave one entry: every METHOD of the room is in its table."""
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{room.__name__}.")]
    assert {id(m.METHOD) for m in modules if hasattr(m, "METHOD")} == {id(d) for d in table.values()}


def test_no_two_diagnostics_share_a_name() -> None:
    assert len({d.name for d, _ in DIAGNOSTICS}) == len(DIAGNOSTICS)


@every
def test_lies_under_its_own_name_with_paper_and_claim(diagnostic: Diagnostic, room: ModuleType) -> None:
    table = next(table for table, other in TABLES if other is room)
    assert table[diagnostic.name] is diagnostic
    assert module_of(diagnostic).METHOD is diagnostic
    assert diagnostic.name == diagnostic.name.lower().strip()
    assert diagnostic.summary
    assert diagnostic.summary == diagnostic.summary.strip()
    assert diagnostic.paper.authors
    assert diagnostic.paper.title
    assert diagnostic.paper.year > 1900
    assert isinstance(diagnostic.claim, Claim)
    assert diagnostic.claim.statement
    assert diagnostic.claim.source


@every
def test_entry_is_public_and_explained(diagnostic: Diagnostic, room: ModuleType) -> None:
    name = diagnostic.entry.__name__
    assert name in room.__all__
    assert getattr(room, name) is diagnostic.entry
    assert len(inspect.getdoc(diagnostic.entry) or "") > 100


@every
def test_module_explains_itself_under_the_fixed_headings(diagnostic: Diagnostic, room: ModuleType) -> None:
    text = module_of(diagnostic).__doc__ or ""
    places = [text.find(f"*{heading}.*") for heading in HEADINGS]
    assert -1 not in places, [h for h, p in zip(HEADINGS, places, strict=True) if p == -1]
    assert places == sorted(places)


@every
def test_example_runs(diagnostic: Diagnostic, room: ModuleType) -> None:
    result = doctest.testmod(module_of(diagnostic))
    assert result.attempted > 0
    assert result.failed == 0
    example = (module_of(diagnostic).__doc__ or "").split("*Example.*")[1]
    assert any(line and not line.startswith((">>>", "...")) for line in example.splitlines())  # it shows a result


@every
def test_claim_ran_and_reports_figures(diagnostic: Diagnostic, room: ModuleType) -> None:
    verdict = diagnostic.claim.run()
    assert isinstance(verdict, Verdict)
    assert verdict.figures
    assert all(isinstance(value, float) for value in verdict.figures.values())
    assert verdict.held is (diagnostic.name not in NOT_HELD), verdict


@pytest.mark.parametrize("room", [room for _, room in TABLES], ids=[room.__name__ for _, room in TABLES])
def test_everything_public_is_documented(room: ModuleType) -> None:
    for name in room.__all__:
        assert inspect.getdoc(getattr(room, name)), name


def test_every_failing_claim_is_named() -> None:
    assert {d.name for d, _ in DIAGNOSTICS} >= NOT_HELD


NO_WEIGHTS: dict[str, Any] = {
    "1-D": torch.ones(5),
    "0-D": torch.tensor(1.0),
    "no entries": torch.empty(0, 3),
    "no entries, stacked": torch.empty(2, 0, 3),
    "integers": torch.ones(3, 4, dtype=torch.int32),
    "bytes": torch.ones(3, 4, dtype=torch.uint8),
    "truth values": torch.ones(3, 4, dtype=torch.bool),
    "complex": torch.ones(3, 4, dtype=torch.complex64),
    "eight bits": torch.ones(3, 4).to(torch.float8_e4m3fn),
    "sparse": torch.eye(4).to_sparse(),
    "meta": torch.empty(3, 4, device="meta"),
    "a list": [[1.0, 2.0]],
}
ODD_WEIGHTS: dict[str, Tensor] = {
    "NaN": torch.full((30, 40), float("nan")),
    "one Inf": torch.eye(30).index_fill(0, torch.tensor([2]), float("inf")),
    "zeros": torch.zeros(30, 40),
    "constant": torch.full((30, 40), 2.0),
    "one entry": torch.ones(1, 1),
    "one row": torch.arange(1.0, 41.0)[None],
    "one column": torch.arange(1.0, 41.0)[:, None],
    "tiny": torch.full((30, 40), 1e-40),
    "rank 1": torch.outer(torch.arange(1.0, 31.0), torch.arange(1.0, 41.0)),
    "orthogonal": torch.eye(30),
    "half": torch.randn(30, 40, generator=torch.Generator().manual_seed(0)).half(),
    "stack with a broken one": torch.stack([torch.eye(30), torch.full((30, 30), float("nan"))]),
    "a kernel": torch.randn(30, 40, 3, 3, generator=torch.Generator().manual_seed(0)),
}


@on_tensors
@pytest.mark.parametrize("what", list(NO_WEIGHTS))
def test_what_is_no_weight_is_refused_with_its_reason(diagnostic: Diagnostic, what: str) -> None:
    with pytest.raises(InputError, match="expected a"):
        run(diagnostic, NO_WEIGHTS[what])


@on_tensors
@pytest.mark.parametrize("what", list(ODD_WEIGHTS))
def test_odd_weights_give_findings_that_are_finite_or_say_why_not(diagnostic: Diagnostic, what: str) -> None:
    for finding in run(diagnostic, ODD_WEIGHTS[what]):
        assert isinstance(finding, Finding)
        if finding.value is None:
            assert finding.notes, finding
        else:
            assert finding.value == finding.value
            assert abs(finding.value) != float("inf")
        assert finding.name in str(finding)
        finding.to_json()
