"""What every method of narrower modules promises, over the table: a new method is tested by being in it."""

from __future__ import annotations

import dataclasses
import doctest
import inspect

import pytest

from eckart.compression import METHODS
from eckart.errors import InputError
from eckart.modules import MODULES, ModuleMethod
from eckart.records import Claim, Paper

HEADINGS = (
    "What it does",
    "Formula",
    "Cost",
    "When it does not help",
    "Departs from the paper in",
    "Reference",
    "Example",
)
NOT_HELD = {"modegpt"}
"""Claims that do not hold here; the docstring gives the figures."""
every_method = pytest.mark.parametrize("method", MODULES.values(), ids=list(MODULES))


@every_method
def test_the_docstring_says_everything_and_its_example_runs(method: ModuleMethod) -> None:
    module = inspect.getmodule(method.claim.run)
    assert module is not None
    words = inspect.getdoc(module) or ""
    positions = [words.index(f"*{heading}") for heading in HEADINGS]
    assert positions == sorted(positions)
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0


@every_method
def test_the_record_is_complete(method: ModuleMethod) -> None:
    assert isinstance(method.paper, Paper)
    assert isinstance(method.claim, Claim)
    assert method.summary
    assert dataclasses.is_dataclass(method.options)
    assert method.name not in METHODS, "compress --method takes names of both tables"


@every_method
@pytest.mark.parametrize("parts", [(), ("tails",), "neurons", 3])
def test_parts_that_do_not_exist(method: ModuleMethod, parts: object) -> None:
    with pytest.raises(InputError, match="part"):
        method.options(parts=parts)


@every_method
def test_the_claim_runs_and_holds_as_documented(method: ModuleMethod) -> None:
    verdict = method.claim.run()
    assert verdict.held is (method.name not in NOT_HELD), dict(verdict.figures)
    assert verdict.figures
