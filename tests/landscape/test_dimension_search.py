"""The search for the least dimension, and what it says about its certainty."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from eckart.errors import InputError
from eckart.landscape import SubspaceModel, find_dimension, fine_tuning_dimension, intrinsic_dimension
from eckart.landscape.intrinsic_dimension import geometric_grid, toy_score
from eckart.landscape.projections import PROJECTIONS


class Toy(nn.Module):
    """Li's toy: ten blocks of 100 parameters; its output are the ten sums."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1000, dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        return self.theta.view(10, 100).sum(1)


WANTED = torch.arange(1, 11, dtype=torch.float64)


def residual(dimension: int, kind: str, seed: int) -> float:
    """Least loss inside of the subspace, by one Newton step, which ends at the minimum of a quadratic."""
    inside = SubspaceModel(Toy(), dimension, kind=kind, seed=seed)  # type: ignore[arg-type]
    J = torch.autograd.functional.jacobian(
        lambda theta: torch.func.functional_call(inside, {"theta": theta}, ()), inside.theta.detach()
    )
    with torch.no_grad():
        inside.theta += torch.linalg.lstsq(J, (WANTED - inside())[:, None], driver="gelsd").solution[:, 0]
    return float(mse_loss(inside(), WANTED, reduction="sum").detach())


@pytest.mark.parametrize("kind", list(PROJECTIONS))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lis_toy_has_a_residual_at_nine_and_none_at_ten(kind, seed: int) -> None:
    assert residual(9, kind, seed) > 1e-6
    assert residual(10, kind, seed) < 1e-16


@pytest.mark.parametrize("kind", list(PROJECTIONS))
def test_lis_toy_is_exactly_ten(kind) -> None:
    found = find_dimension(lambda d, seed: toy_score(kind, d, seed), 1, 1000, target=1 - 1e-6)
    assert found.value == 10
    assert found.uncertainty == 0
    assert found.details["interval"] == [10, 10]


@pytest.mark.parametrize("truth", [1, 2, 7, 50, 99, 100])
def test_a_step_is_found_to_the_grid(truth: int) -> None:
    found = find_dimension(lambda d, seed: float(d >= truth), 1, 100, target=0.9)
    grid = geometric_grid(1, 100, 0.1)
    assert found.value == min(d for d in grid if d >= truth)
    low, high = found.details["interval"]
    assert low <= truth <= high
    assert found.value - found.uncertainty <= truth <= found.value
    assert found.n == 3


def test_the_grid_has_no_steps_larger_than_asked() -> None:
    grid = geometric_grid(3, 1000, 0.2)
    assert grid[0] == 3
    assert grid[-1] == 1000
    assert all(a < b <= max(a + 1, 1.2 * a) for a, b in itertools.pairwise(grid))
    assert geometric_grid(5, 5, 0.1) == [5]


def test_the_interval_covers_the_truth_under_noise() -> None:
    """Score d/(d + 20) passes 0.7 at 46.7; over 60 searches with noise the stated intervals miss it seldom."""
    inside = 0
    for trial in range(60):
        generator = torch.Generator().manual_seed(trial)

        def score(d: int, seed: int, generator: torch.Generator = generator) -> float:
            return d / (d + 20) + 0.02 * float(torch.randn((), generator=generator))

        found = find_dimension(score, 2, 500, target=0.7, seeds=(0, 1, 2, 3))
        low, high = found.details["interval"]
        inside += low <= 47 <= high
        assert found.uncertainty is None or found.uncertainty > 0
    assert inside >= 51  # 85 %: a search takes the nearest end that looks sure, so that it misses more than 5 %


def test_bounds_that_do_not_hold_are_said() -> None:
    never = find_dimension(lambda d, seed: 0.0, 2, 64, target=0.5)
    assert never.at_least
    assert never.value == 64
    assert "raise upper" in never.notes[0]
    always = find_dimension(lambda d, seed: 1.0, 2, 64, target=0.5)
    assert always.value == 2
    assert "at most that many" in always.notes[0]


def test_scores_that_diverge_or_come_alone_are_said() -> None:
    nan = find_dimension(lambda d, seed: math.nan if d < 8 else 1.0, 1, 64, target=0.5)
    assert nan.value == 8
    assert any("NaN" in note for note in nan.notes)
    one = find_dimension(lambda d, seed: float(d > 5), 1, 64, target=0.5, seeds=(0,))
    assert one.value == 6
    assert one.uncertainty is None
    assert one.notes == ("one seed: no interval",)


def test_scores_that_fall_are_said() -> None:
    """4 and 5 reach the target without being sure of it, the search goes on to 7, and 7 falls short."""

    def score(d: int, seed: int) -> float:
        return (0.6, 0.5, 0.9)[seed] if d in (4, 5) else float(d > 7)

    found = find_dimension(score, 1, 9, target=0.5)
    assert found.value == 4
    assert found.details["interval"] == [4, 9]
    assert "reached at 4, not at 7" in found.notes[0]


def test_intrinsic_dimension_of_a_module() -> None:
    def score(module: nn.Module, seed: int) -> float:
        optimizer = torch.optim.LBFGS([p for p in module.parameters() if p.requires_grad], max_iter=200)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = mse_loss(module(), WANTED)
            torch.autograd.backward(loss)
            return loss

        optimizer.step(closure)
        return math.exp(-float(closure().detach()) * 10)

    found = intrinsic_dimension(lambda seed: Toy(), score, 2, 40, share=0.999, kind="one-hot")
    assert found.value == 10
    assert found.details["parameters"] == 1000
    assert found.unit == "parameters"
    assert found.details["full"] == pytest.approx([1.0, 1.0, 1.0])
    tuned = fine_tuning_dimension(Toy(), score, 2, 40, share=0.999)
    assert tuned.value in (10, 11)  # one layer, so one of the numbers is a scale


@pytest.mark.parametrize(
    "wrong",
    [
        {"lower": 0},
        {"lower": 20},
        {"target": math.nan},
        {"seeds": ()},
        {"seeds": (1, 1)},
        {"resolution": 0.0},
        {"upper": 3.5},
    ],
)
def test_refuses_a_search(wrong) -> None:
    settings = {"lower": 1, "upper": 10, "target": 0.5} | wrong
    lower, upper = settings.pop("lower"), settings.pop("upper")
    with pytest.raises(InputError, match="find_dimension"):
        find_dimension(lambda d, seed: 1.0, lower, upper, **settings)


def test_refuses_scores_and_shares() -> None:
    with pytest.raises(InputError, match="number"):
        find_dimension(lambda d, seed: "good", 1, 4, target=0.5)  # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match="Inf"):
        find_dimension(lambda d, seed: math.inf, 1, 4, target=0.5)
    with pytest.raises(InputError, match="share"):
        intrinsic_dimension(lambda seed: Toy(), lambda m, seed: 1.0, 1, 4, share=90)
    with pytest.raises(InputError, match="above 0"):
        intrinsic_dimension(lambda seed: Toy(), lambda m, seed: -1.0, 1, 4)
    with pytest.raises(InputError, match="Module"):
        fine_tuning_dimension(lambda: 1, lambda m, seed: 1.0, 2, 4)  # type: ignore[arg-type]
