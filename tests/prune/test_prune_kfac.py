"""K-FAC pruning: counts, shares, patterns, and the objective against plain baselines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.prune import CostMap, prune_kfac, refit
from eckart.prune.kfac import loss_shares
from eckart.prune.refit import Metric


def a_map(m: int = 12, n: int = 16, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> CostMap:
    generator = torch.Generator().manual_seed(seed)
    W, X, g = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((m, n), (80, n), (60, m)))
    X = X @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    g = g * torch.linspace(0.1, 2, m, dtype=torch.float64)
    return CostMap(weight=W.to(dtype), second=X.T @ X / 80, gradient=g.T @ g / 60, scale=scale)


def cost(given: CostMap, S: Tensor) -> float:
    E = given.weight.double() - S.double()
    G = torch.eye(len(E), dtype=torch.float64) if given.gradient is None else given.gradient
    return given.scale * float(torch.trace(G @ E @ given.second @ E.T))


MAPS = {"a": a_map(), "b": a_map(8, 24, seed=1), "c": a_map(seed=2, scale=0.01)}
TOTAL = sum(each.weight.numel() for each in MAPS.values())


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_one_budget_over_all_maps(keep: float) -> None:
    found = prune_kfac(MAPS, keep)
    assert sum(int(mask.sum()) for _, mask in found.values()) == int(keep * TOTAL + 1e-9)
    assert all(not S[~mask].any() for S, mask in found.values())
    assert found["c"][1].double().mean() < min(found[n][1].double().mean() for n in "ab")


def test_costs_less_than_one_shot_and_than_a_refit_of_it() -> None:
    staged, once = prune_kfac(MAPS, 0.5), prune_kfac(MAPS, 0.5, stages=1, iterations=200)
    scores = {n: (each.weight.square() * each.second.diagonal()).flatten() for n, each in MAPS.items()}
    wanda = {}
    for name, each in MAPS.items():
        mask = scores[name] >= scores[name].sort().values[each.weight.numel() // 2]
        wanda[name] = refit(each.weight, mask.view_as(each.weight), each.second, gradient=each.gradient, iterations=200)
    totals = [
        sum(cost(MAPS[n], S) for n, S in found.items()) for found in ({n: s for n, (s, _) in staged.items()}, wanda)
    ]
    assert totals[0] < sum(cost(MAPS[n], S) for n, (S, _) in once.items())
    assert totals[0] < totals[1]


def test_the_first_score_is_the_mean_of_both_bounds() -> None:
    """One weight gone: the cost with nothing else moved, and with all others free, bracket the score."""
    from eckart.prune.kfac import _Work

    given = a_map(5, 6)
    score = _Work("a", given).scores()
    W, G = given.weight, given.gradient
    assert G is not None
    alone = W.square() * G.diagonal().unsqueeze(1) * given.second.diagonal()
    inverse_G, inverse_S = torch.linalg.inv(G), torch.linalg.inv(given.second)
    free = W.square() / inverse_G.diagonal().unsqueeze(1) / inverse_S.diagonal()
    assert bool((score <= alone * (1 + 1e-6)).all())
    # δ lifts the smallest eigenvalues, so the score lies a little above the geometric mean
    assert bool((score >= (alone * free).sqrt() * (1 - 1e-6)).all())


def test_metric_is_scaled_to_unit_diagonals() -> None:
    given = a_map()
    metric = Metric(given.second, given.gradient, torch.float64)
    E = given.weight
    scaled = metric.scaled(E)
    assert metric.outputs is not None
    there = torch.trace(metric.outputs @ scaled @ metric.inputs @ scaled.T)
    assert float(there) == pytest.approx(cost(given, torch.zeros_like(E)))
    torch.testing.assert_close(metric.weights(scaled), E)
    torch.testing.assert_close(metric.inputs.diagonal(), torch.ones(16, dtype=torch.float64))


@pytest.mark.parametrize("pattern", ["2:4", "keep 1 of 8", "row", "runs of 4", "inputs"])
def test_patterns(pattern: str) -> None:
    keep = None if "of 8" in pattern or ":" in pattern else 0.5
    for name, (S, mask) in prune_kfac(MAPS, keep, pattern).items():
        assert not S[~mask].any()
        if pattern == "2:4":
            assert bool((mask.view(len(mask), -1, 4).sum(-1) == 2).all())
        elif pattern == "keep 1 of 8":
            assert bool((mask.view(len(mask), -1, 8).sum(-1) == 1).all())
        elif pattern == "row":
            assert bool((mask.sum(1) == mask.shape[1] // 2).all())
        elif pattern == "inputs":
            assert bool((mask == mask[0]).all()), name
        else:
            runs = mask.view(len(mask), -1, 4)
            assert bool((runs == runs[..., :1]).all())


def test_shares_of_each_map() -> None:
    found = prune_kfac(MAPS, shares={"a": 0.25, "b": 0.5, "c": 1.0})
    assert [int(mask.sum()) for _, mask in found.values()] == [48, 96, 192]
    torch.testing.assert_close(found["c"][0], MAPS["c"].weight)


def test_shares_by_loss_meet_the_budget() -> None:
    shares = loss_shares(MAPS, 0.5)
    assert sum(shares[n] * MAPS[n].weight.numel() for n in MAPS) == pytest.approx(0.5 * TOTAL, rel=1e-6)
    assert shares["c"] < min(shares["a"], shares["b"])


@pytest.mark.parametrize("gradient", ["none", "diagonal"])
def test_without_a_full_gradient_rows_fit_alone(gradient: str) -> None:
    given = a_map()
    assert given.gradient is not None
    G = None if gradient == "none" else given.gradient.diagonal()
    S, mask = prune_kfac({"a": CostMap(weight=given.weight, second=given.second, gradient=G)}, 0.5)["a"]
    best = refit(given.weight, mask, given.second)
    assert cost(CostMap(weight=given.weight, second=given.second), S) < 1.05 * cost(
        CostMap(weight=given.weight, second=given.second), best
    )


def test_float32_and_bfloat16() -> None:
    exact = cost(a_map(), prune_kfac({"a": a_map()}, 0.5)["a"][0])
    for dtype, room in ((torch.float32, 0.05), (torch.bfloat16, 0.3)):  # masks differ in a few weights
        S = prune_kfac({"a": a_map(dtype=dtype)}, 0.5)["a"][0]
        assert S.dtype == dtype
        assert cost(a_map(), S) == pytest.approx(exact, rel=room)


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"(?s)no share for b.*either keep or shares"):
        prune_kfac(MAPS, 0.5, shares={"a": 0.5, "c": 0.5})
    with pytest.raises(InputError, match="needs keep"):
        prune_kfac(MAPS)
    with pytest.raises(InputError, match="stages"):
        prune_kfac(MAPS, 0.5, stages=0)
    with pytest.raises(InputError, match="keep"):
        prune_kfac(MAPS, 0)
    with pytest.raises(InputError, match="fit these layers"):
        prune_kfac(MAPS, None, "2:5")
    with pytest.raises(InputError, match="gradient"):
        prune_kfac({"a": CostMap(weight=MAPS["a"].weight, second=MAPS["a"].second, gradient=torch.eye(3))}, 0.5)
    with pytest.raises(NotFiniteError, match="a: second"):
        prune_kfac({"a": CostMap(weight=MAPS["a"].weight, second=MAPS["a"].second * torch.nan)}, 0.5)
