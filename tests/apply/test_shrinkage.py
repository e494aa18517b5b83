"""ρ chosen on the two halves: the errors against raw rows, the choice, and the way into a plan."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
from shared_work import SITES, model, moments
from torch import Tensor

from eckart.apply import apply_plan, prepare_site
from eckart.apply.decide import decide
from eckart.apply.shrinkage import GRID, chosen, held_out_errors, wants_halves
from eckart.compression import get_method, kfac, options_for, whitened
from eckart.errors import EckartWarning, InputError
from eckart.moments import Moments, SiteMoments, collect
from eckart.planning import Plan
from eckart.records import Budget

AUTO = kfac.Options(input_shrinkage="auto")


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_of(X: Tensor, g: Tensor) -> SiteMoments:
    return SiteMoments(count=len(X), mean=X.mean(0), second=X.T @ X / len(X), gradient=g.T @ g / len(g))


def problem(tokens: int, correlated: bool, features: int = 16) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    mix = rows(1, features, features) if correlated else torch.eye(features, dtype=torch.float64)
    weights = {"weight": rows(2, 12, features), "bias": rows(3, 12)}
    return weights, [(rows(4 + i, tokens, features) @ mix + 1.0, rows(6 + i, tokens, 12)) for i in (0, 1)]


def test_errors_are_those_on_the_rows_of_the_other_half() -> None:
    weights, data = problem(30, correlated=True)
    halves = tuple(half_of(*each) for each in data)
    found = held_out_errors(weights, (halves[0], halves[1]), AUTO)
    assert list(found) == list(GRID)
    for rho in (0.0, 0.2):
        logs = []
        for fitted, (X, g) in ((halves[0], data[1]), (halves[1], data[0])):
            prepared = kfac.prepare(weights, fitted, kfac.Options(input_shrinkage=rho))
            for rank in (1, 3, 6):  # an eighth, a quarter and a half of 12
                lost = weights["weight"] - prepared.left[:, :rank] @ prepared.right[:rank]
                X0 = X - X.mean(0)
                error, whole = ((X0 @ W.T @ g.T).square().mean() for W in (lost, weights["weight"]))
                logs.append(math.log(error / whole))
        assert found[rho] == pytest.approx(math.exp(sum(logs) / len(logs)))


def test_noise_is_shrunk_and_signal_is_not() -> None:
    weights, data = problem(20, correlated=False)
    few = chosen(weights, (half_of(*data[0]), half_of(*data[1])), AUTO)
    weights, data = problem(4000, correlated=True)
    many = chosen(weights, (half_of(*data[0]), half_of(*data[1])), AUTO)
    assert few.input_shrinkage == 1.0
    assert many.input_shrinkage == 0.0
    assert dataclasses.replace(many, input_shrinkage="auto") == AUTO


def test_a_diagonal_of_frequencies_has_a_choice_too() -> None:
    draw = torch.Generator().manual_seed(0)
    frequencies = [torch.rand(9, generator=draw, dtype=torch.float64) for _ in (0, 1)]
    halves = [SiteMoments(count=20, second=f, gradient=torch.eye(4, dtype=torch.float64)) for f in frequencies]
    assert chosen({"weight": rows(1, 4, 9)}, (halves[0], halves[1]), AUTO).input_shrinkage in GRID


@pytest.mark.parametrize("half", [None, "A"])
def test_a_site_is_prepared_with_the_chosen_number(half) -> None:  # type: ignore[no-untyped-def]
    net, known, site = model(), moments(), SITES[0]
    weights = {name: p.detach() for name, p in net[0].named_parameters()}
    number = chosen(weights, (known.site("0", half="A"), known.site("0", half="B")), AUTO)
    assert number.input_shrinkage != "auto"
    found = prepare_site(net, site, known, kfac.METHOD, AUTO, half=half)
    assert torch.equal(found.errors, prepare_site(net, site, known, kfac.METHOD, number, half=half).errors)


def test_a_plan_keeps_the_word_and_is_carried_out() -> None:
    method = get_method("kfac")
    options = options_for(method, {"input_shrinkage": "auto"})
    made = decide(
        model(), SITES, moments(), method=method, options=options, budget=Budget(keep=0.7), forms=("dense", "lowrank")
    )
    plan = Plan.from_json(made.plan.to_json())
    assert plan.options["input_shrinkage"] == "auto"
    one, two = model(), model()
    apply_plan(one, made.plan, SITES, moments(), prepared=made.prepared)
    outcome = apply_plan(two, plan, SITES, moments())
    for mine, theirs in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert any(layer.held_out is not None for layer in outcome.layers)


def test_halves_that_are_missing_are_an_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        one_row: Moments = collect(
            model(),
            [torch.ones(1, 16)],
            SITES,
            loss=lambda outputs, batch, generator: (outputs.sum(), 1.0),
            fingerprint="f",
        )
    with pytest.raises(InputError, match="half B"):
        prepare_site(model(), SITES[0], one_row, kfac.METHOD, AUTO)


def test_the_method_alone_cannot_choose() -> None:
    weights, data = problem(30, correlated=True)
    with pytest.raises(InputError, match="two halves"):
        kfac.prepare(weights, half_of(*data[0]), AUTO)


def test_what_asks_for_the_halves() -> None:
    assert wants_halves(AUTO)
    assert not wants_halves(kfac.Options())
    assert not wants_halves(whitened.Options())


@pytest.mark.parametrize("wrong", ["automatic", "", -0.1, 1.1, True])
def test_other_values_are_refused(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="input_shrinkage"):
        kfac.Options(input_shrinkage=wrong)
