"""The learned problem: it has learned, it repeats, and its moments are what they say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.evidence import Problem, learned_problem
from eckart.evidence.network import CONTEXT, forward, train
from eckart.evidence.problem import SITES
from eckart.forms import Dense


@pytest.fixture(scope="module")
def problem() -> Problem:
    return learned_problem()


def test_it_has_learned(problem: Problem) -> None:
    """Far below the entropy of single bytes, on modules that it has not seen."""
    counts = problem.held_out[:, CONTEXT].long().bincount(minlength=256).double()
    p = counts[counts > 0] / counts.sum()
    assert problem.loss < 0.7 * float(-(p * p.log()).sum())


def test_training_repeats_and_leaves_the_global_generator_alone(problem: Problem) -> None:
    before = torch.random.get_rng_state()
    first = train(problem.calibration[:2000], steps=3, batch=16, seed=5)
    second = train(problem.calibration[:2000], steps=3, batch=16, seed=5)
    other = train(problem.calibration[:2000], steps=3, batch=16, seed=6)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["up.weight"], other["up.weight"])
    problem.moments(tokens=16)
    assert torch.equal(before, torch.random.get_rng_state())


def test_one_problem_per_process(problem: Problem) -> None:
    assert learned_problem() is problem


def _rows(windows: Tensor) -> Iterator[bytes]:
    raw = windows.numpy().tobytes()
    return (raw[i : i + CONTEXT + 1] for i in range(0, len(raw), CONTEXT + 1))


def test_parts_are_different_text(problem: Problem) -> None:
    held_out = set(_rows(problem.held_out))
    shared = held_out.intersection(_rows(problem.calibration))
    # Nine bytes of Python often recur (indentation, keywords), whole modules would give a share of 1.
    assert 0 < len(shared) < 0.8 * len(held_out)


def test_sites_describe_the_weights(problem: Problem) -> None:
    for site in SITES:
        weights = problem.weights(site.name)
        assert weights["weight"].shape == (site.out_features, site.in_features)
        assert ("bias" in weights) == site.bias


def test_replacing_nothing_or_the_same_does_not_raise_the_loss(problem: Problem) -> None:
    assert problem.rise({}) == 0.0
    same = {}
    for site in SITES:
        weights = problem.weights(site.name)
        same[site.name] = Dense(weights["weight"], weights.get("bias"))
    assert problem.rise(same) == 0.0


@pytest.mark.parametrize("name", [site.name for site in SITES])
def test_every_map_matters(problem: Problem, name: str) -> None:
    assert problem.rise({name: Dense(torch.zeros_like(problem.weights(name)["weight"]))}) > 0.05


def test_unknown_maps_and_wrong_shapes(problem: Problem) -> None:
    with pytest.raises(InputError, match="'down'"):
        problem.weights("dwon")
    with pytest.raises(InputError, match="unknown map"):
        problem.rise({"nowhere": Dense(torch.zeros(2, 2))})
    with pytest.raises(InputError, match="'up' is"):
        problem.rise({"up": Dense(torch.zeros(2, 2))})


@pytest.mark.parametrize("name", ["mix", "up", "down", "head"])
def test_moments_are_those_of_the_inputs(problem: Problem, name: str) -> None:
    moments, x = problem.moments(tokens=64, seed=3)[name], problem.inputs(tokens=64, seed=3)[name]
    assert moments.count == 64
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.second, torch.einsum("ti,tj->ij", x, x) / 64)


def test_embedding_moments_are_frequencies(problem: Problem) -> None:
    moments = problem.moments(tokens=64, seed=3)["embed"]
    assert moments.count == 64 * CONTEXT
    assert moments.tokens_per_unit == CONTEXT
    torch.testing.assert_close(moments.second, problem.frequencies(tokens=64, seed=3))
    torch.testing.assert_close(moments.second.sum(), torch.tensor(1.0).double())


@pytest.mark.parametrize("name", ["mix", "up", "down", "head", "embed"])
def test_fisher_and_gradient_agree(problem: Problem, name: str) -> None:
    """Three ways to the same number: Σ_i Î_i = Σ_j Î_j, and E‖g‖² is the trace of E[g gᵀ]."""
    moments = problem.moments(tokens=64)[name]
    torch.testing.assert_close(moments.fisher_rows.sum(), moments.fisher_columns.sum())
    assert float(moments.gradient.trace()) == pytest.approx(moments.gradient_scale)


def test_gradient_of_the_head_is_the_fisher_of_the_softmax(problem: Problem) -> None:
    """There G = E[diag(p) − p pᵀ] exactly, in expectation over the sampled targets."""
    tokens = 16_384
    parameters = {k: v.double() for k, v in problem.parameters.items()}
    p = forward(parameters, problem.contexts(tokens)).softmax(-1)
    exact: Tensor = torch.diag(p.mean(0)) - p.T @ p / tokens
    found = problem.moments(tokens)["head"].gradient
    assert (found - exact).norm() < 0.1 * exact.norm()
