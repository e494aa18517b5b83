"""Processes that share decompositions have the results of one that works alone, or an error that says why not."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_work import decomposed, finished, start

from eckart.apply.crew import deal, packed, unpacked
from eckart.apply.prepare import PreparedSite
from eckart.compression import Prepared
from eckart.errors import InputError, MismatchError
from eckart.moments.distributed import patience
from eckart.records import Site

pytestmark = pytest.mark.filterwarnings("ignore::eckart.errors.EckartWarning")

SAME = """
import torch.distributed as dist
from shared_work import assert_same, decomposed
from eckart.apply.run import held_out_errors
from eckart.moments.distributed import join
from eckart.planning import Step
from shared_work import SITES, model, moments
todo = [(site, Step(site=site.name, form="lowrank", rank=3, method="kfac")) for site in SITES]
alone, errors = decomposed(), held_out_errors(model(), todo, moments())
assert join() == (dist.get_rank(), 2)
assert_same(decomposed(), alone)
assert held_out_errors(model(), todo, moments()) == errors and all(error > 0 for error in errors.values())
dist.destroy_process_group()
"""

TROUBLE = """
import os, sys, time
from eckart.apply.crew import Group, Job, Parcel
from eckart.errors import BudgetError, EckartError
from eckart.moments.distributed import join
what = sys.argv[1]
rank, _ = join()
done = []

def work(index):
    done.append(index)
    if rank == 1:
        if what == "raise":
            raise BudgetError("there is too little of everything")
        if what == "die":
            os._exit(9)
        if what == "sleep":
            time.sleep(60)
    return Parcel(index)

names = range(4) if what != "differ" else range(rank, rank + 4)
try:
    Group().do("decompose", [Job(str(name)) for name in names], work)
except EckartError as error:
    print(type(error).__name__, len(done), error)
    sys.stdout.flush()
    os._exit(3)
"""


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 9.0), max_size=6), st.integers(1, 3))
def test_a_deal_is_near_the_best(costs, hands):
    owners = deal(costs, hands)
    assert owners == deal(costs, hands)
    assert len(owners) == len(costs)

    def longest(who):
        return max(sum(cost for cost, hand in zip(costs, who, strict=True) if hand == own) for own in range(hands))

    best = min(map(longest, itertools.product(range(hands), repeat=len(costs))))
    assert longest(owners) <= (4 / 3 - 1 / (3 * hands)) * best + 1e-9


def test_results_travel_bit_for_bit():
    weight, bias = torch.randn(4, 6), torch.randn(4)
    weights = {"0/weight": weight, "0/bias": bias}
    part = Prepared(
        weight=weight.clone(),
        bias=bias,
        left=torch.randn(4, 3, dtype=torch.float64),
        right=torch.randn(3, 6).bfloat16(),
        errors=torch.tensor([1.0, 0.5, 0.25, 0.0]),
    )
    site = Site(name="x", kind="linear", out_features=4, in_features=6, tied=("y", "z"))
    whole = PreparedSite(site=site, slices=(part, part), errors=part.errors)
    tensors = {}
    found = unpacked(packed(whole, weights, tensors), weights, tensors)
    assert found.site == site
    assert len(found.slices) == 2
    assert not any(tensor.shape == weight.shape for tensor in tensors.values()), "what all have need not travel"
    for name in ("weight", "bias", "left", "right", "errors"):
        assert torch.equal(getattr(found.slices[1], name), getattr(part, name))
        assert getattr(found.slices[1], name).dtype == getattr(part, name).dtype
    assert found.slices[0].mean is None


def test_what_cannot_travel_is_refused():
    @dataclass
    class Foreign:
        x: int

    for value in (Foreign(1), object(), {"deep": [lambda: 1]}):
        with pytest.raises(InputError, match="cannot send"):
            packed(value, {}, {})
    for record in (["os", "stat_result"], ["eckart.errors", "InputError"], ["eckart.nowhere", "X"]):
        with pytest.raises(MismatchError, match="unknown"):
            unpacked({"record": record, "fields": {}}, {}, {})


def test_two_processes_have_the_results_of_one():
    for code, _, err in finished(start(SAME, processes=2)):
        assert code == 0, err[-3000:]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("raise", "BudgetError"),
        ("die", "ended or said nothing"),
        ("sleep", "ended or said nothing"),
        ("differ", "Mism"),
    ],
)
def test_the_others_fail_soon_and_say_why(what, says):
    started = start(TROUBLE, what, processes=2, ECKART_TIMEOUT=4)
    after = 1.0 if what == "sleep" else 10.0
    (code, out, err), (other, second, _) = finished(started, timeout=40, after=after)
    assert code == 3, err[-3000:]
    assert says in out
    assert "Traceback" not in err
    if what in ("raise", "differ"):  # both raise the same
        assert (other, second.split()[0]) == (3, out.split()[0])
        assert out.partition(" ")[2].partition(" ")[2] == second.partition(" ")[2].partition(" ")[2]
    else:
        assert "to decompose" in out
        assert "ECKART_TIMEOUT" in out
    if what == "raise":
        assert "too little of everything" in out
        assert second.split()[1] == "1", "nothing is done after an error"


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "1e99"])
def test_a_timeout_is_a_number_of_seconds(monkeypatch, text):
    monkeypatch.setenv("ECKART_TIMEOUT", text)
    with pytest.raises(InputError, match="ECKART_TIMEOUT"):
        patience()


def test_alone_nothing_is_joined(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert set(decomposed()) == {"0", "1", "2", "3", "4"}
    assert not torch.distributed.is_initialized()
