"""Pruning with the inverse empirical Fisher matrix, against the textbook's surgeon on a dense matrix."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError, NotFiniteError
from eckart.prune import mfac_prune, mfac_scores, sample_gradients


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights = {"a": gaussian(3, 4, dtype=dtype), "b": gaussian(5, seed=1, dtype=dtype)}
    mixing = gaussian(17, 17, seed=2)
    rows = gaussian(40, 17, seed=3) @ mixing
    return weights, {"a": rows[:, :12].view(40, 3, 4).to(dtype), "b": rows[:, 12:].to(dtype)}


def fisher(G: Tensor, damping: float = 1e-5) -> Tensor:
    G = G.flatten(1).double()
    return G.T @ G / G.shape[0] + damping * torch.eye(G.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("block", [None, 4, 128])
def test_scores_are_the_surgeons(block: int | None) -> None:
    weights, gradients = problem()
    scores = mfac_scores(weights, gradients, block=block)
    for name, w in weights.items():
        F = fisher(gradients[name])
        if block is not None:
            number = torch.arange(w.numel()) // block
            F = F * (number[:, None] == number)
        expected = w.flatten().square() / (2 * torch.linalg.inv(F).diagonal())
        torch.testing.assert_close(scores[name].flatten(), expected)
        assert scores[name].shape == w.shape


def test_one_round_removes_the_smallest_scores_and_refits_the_rest() -> None:
    weights, gradients = problem()
    pruned = mfac_prune(weights, gradients, 0.5, block=None, recomputations=1)
    assert pruned.kept == 8  # of 17, rounded down
    scores = mfac_scores(weights, gradients, block=None)
    flat = torch.cat([s.flatten() for s in scores.values()])
    mask = torch.cat([m.flatten() for m in pruned.masks.values()])
    assert flat[mask].min() > flat[~mask].max()
    rise = 0.0
    for name, w in weights.items():
        F, kept = fisher(gradients[name]), pruned.masks[name].flatten()
        w, found = w.flatten(), pruned.weights[name].flatten()
        best = w[kept] + torch.linalg.solve(F[kept][:, kept], F[kept][:, ~kept] @ w[~kept])
        torch.testing.assert_close(found[kept], best)
        assert (found[~kept] == 0).all()
        rise += float((found - w) @ F @ (found - w)) / 2
    assert pruned.predicted == pytest.approx(rise)


def test_removing_one_weight_finds_the_best_one() -> None:
    """Of all ways to remove one weight and refit the others, the least rise of ½δᵀFδ."""
    weights, gradients = problem()
    pruned = mfac_prune({"a": weights["a"]}, gradients, 11 / 12, block=None, recomputations=1)
    F, w = fisher(gradients["a"]), weights["a"].flatten()
    rises = []
    for i in range(12):
        rest = [j for j in range(12) if j != i]
        best = w[rest] + torch.linalg.solve(F[rest][:, rest], F[rest, i] * w[i])
        delta = torch.zeros_like(w)
        delta[rest] = best - w[rest]
        delta[i] = -w[i]
        rises.append(float(delta @ F @ delta) / 2)
    assert pruned.predicted == pytest.approx(min(rises))
    assert (~pruned.masks["a"].flatten()).nonzero().item() == rises.index(min(rises))


def test_rounds_are_geometric_and_leave_pruned_weights_alone() -> None:
    weights, gradients = problem()
    seen = []

    def collect(now: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append({name: w != 0 for name, w in now.items()})
        return gradients

    pruned = mfac_prune(weights, collect, 0.25, recomputations=4)
    counts = [sum(int(m.sum()) for m in masks.values()) for masks in seen]
    assert counts == [17, 12, 8, 6]  # 17 · ¼^(r/4), rounded down
    assert pruned.kept == 4
    for before, after in itertools.pairwise([*seen, pruned.masks]):
        assert all(bool((before[name] | ~after[name]).all()) for name in before)


def test_of_independent_weights_rounds_do_not_matter() -> None:
    """A block of one weight each: nothing makes up for anything, so one round is as good as many."""
    weights, gradients = problem()
    one = mfac_prune(weights, gradients, 0.4, block=1, recomputations=1)
    many = mfac_prune(weights, gradients, 0.4, block=1, recomputations=5)
    torch.testing.assert_close(one.weights, many.weights)
    for name, w in weights.items():
        assert torch.equal(one.weights[name], torch.where(one.masks[name], w, 0))


@pytest.mark.parametrize("update", ["joint", "single", "none"])
def test_updates_of_the_kept(update: str) -> None:
    weights, gradients = problem()
    found = {u: mfac_prune(weights, gradients, 0.6, recomputations=1, update=u) for u in ("joint", update)}
    assert found[update].predicted >= found["joint"].predicted - 1e-12  # the same masks, and joint is the minimum
    assert all(torch.equal(found[update].masks[n], found["joint"].masks[n]) for n in weights)
    if update == "none":
        assert torch.equal(found[update].weights["b"], torch.where(found[update].masks["b"], weights["b"], 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_the_input_stay(dtype: torch.dtype) -> None:
    weights, gradients = problem(dtype)
    before = {name: w.clone() for name, w in weights.items()}
    pruned = mfac_prune(weights, gradients, 0.5, recomputations=3)
    assert all(w.dtype == dtype and bool((w[~pruned.masks[n]] == 0).all()) for n, w in pruned.weights.items())
    assert all(torch.equal(w, before[name]) for name, w in weights.items())


def test_keeping_all_changes_nothing() -> None:
    weights, gradients = problem()
    pruned = mfac_prune(weights, gradients, 1.0)
    assert pruned.kept == 17
    assert pruned.predicted == 0
    torch.testing.assert_close(pruned.weights, weights, rtol=0, atol=0)


def test_gradients_of_single_losses() -> None:
    model = nn.Linear(3, 2).double()
    x = gaussian(4, 3)
    losses = [lambda m, i=i: m(x[i]).square().sum() for i in range(4)]
    found = sample_gradients(model, losses, ["weight", "bias"])
    expected = torch.stack([2 * torch.outer(model(row), row) for row in x])
    torch.testing.assert_close(found["weight"], expected.detach())
    assert found["bias"].shape == (4, 2)
    assert model.weight.grad is None
    with pytest.raises(InputError, match="no such parameters: head"):
        sample_gradients(model, losses, ["head"])
    with pytest.raises(InputError, match="scalar"):
        sample_gradients(model, [lambda m: m(x)], ["weight"])
    with pytest.raises(InputError, match="at least one loss"):
        sample_gradients(model, [], ["weight"])


def test_bad_input_is_named_at_once() -> None:
    weights, gradients = problem()
    with pytest.raises(InputError) as caught:
        mfac_prune(weights, gradients, 0.0, block=0, damping=-1.0, recomputations=0, update="full")
    for word in ("keep", "block", "damping", "recomputations", "update"):
        assert word in str(caught.value)
    with pytest.raises(InputError, match="leaves no weight"):
        mfac_prune(weights, gradients, 0.01)
    with pytest.raises(InputError, match="at least one weight"):
        mfac_prune({}, gradients, 0.5)
    with pytest.raises(InputError) as caught:
        mfac_scores({**weights, "c": torch.ones(2)}, {**gradients, "b": gradients["b"][:, :4]})
    assert "c: no gradients" in str(caught.value)
    assert "b: expected (m, 5)" in str(caught.value)
    bad = {**gradients, "a": gradients["a"].clone()}
    bad["a"][0, 0, 0] = torch.inf
    with pytest.raises(NotFiniteError, match="gradients with NaN or Inf: a"):
        mfac_prune(weights, bad, 0.5)
    with pytest.raises(NotFiniteError, match="weights with NaN or Inf: b"):
        mfac_prune({**weights, "b": torch.full((5,), torch.nan)}, gradients, 0.5)
