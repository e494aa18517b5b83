"""The shared cut: balance, rounding, bias correction and the refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.compression import cut, factorise
from eckart.errors import InputError, NotFiniteError


def gaussian(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_factors_are_balanced() -> None:
    scale = torch.logspace(-6, 6, 9, dtype=torch.float64)
    prepared = factorise({"weight": gaussian(6, 9)}, second=torch.diag(scale))
    form = cut(prepared, 4, "lowrank")
    torch.testing.assert_close(form.b.norm(dim=0), form.a.norm(dim=1))


def test_half_precision_survives_metrics_of_any_scale() -> None:
    """Unbalanced, the factors would be about 1e±8, outside of float16."""
    W = gaussian(9, 6).half()
    prepared = factorise({"weight": W}, second=1e16 * torch.diag(torch.rand(6).double() + 0.5))
    found = cut(prepared, 6, "lowrank")
    assert found.a.abs().max() < 100
    assert found.b.abs().max() < 100
    assert (found.dense() - W).norm() < 2e-3 * W.norm()


def test_overflow_names_the_dtype() -> None:
    # A rank-one matrix of entries 6e4 is inside float16; its balanced factors are too; a metric cannot
    # change that. Only a product row that grows can leave it: the kept row of a pivoted form.
    W = torch.full((2, 40), 6.0e4, dtype=torch.float16)
    W[1] = -W[1]
    assert cut(factorise({"weight": W}), 1, "pivoted").a.isfinite().all()
    prepared = factorise({"weight": W})
    grown = type(prepared)(
        weight=prepared.weight,
        bias=None,
        left=2 * prepared.left,
        right=prepared.right,
        errors=prepared.errors,
    )
    with pytest.raises(NotFiniteError, match=r"leaves the range of torch\.float16"):
        cut(grown, 1, "pivoted")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["lowrank", "pivoted"])
def test_bias_keeps_the_mean_output_of_what_is_stored(form: str, dtype: torch.dtype) -> None:
    """Exact but for the rounding of the bias itself: the error of the rounded factors is taken up too."""
    W, b, mean = gaussian(12, 9).to(dtype), gaussian(12, seed=1).to(dtype), 5 * gaussian(9, seed=2)
    prepared = factorise({"weight": W, "bias": b}, second=torch.eye(9).double(), mean=mean)
    found = cut(prepared, 4, form)
    stored = type(found)(**{k: v.double() if v.is_floating_point() else v for k, v in vars(found).items()})
    gap = (stored.apply(mean) - (W.double() @ mean + b.double())).abs()
    assert (gap <= torch.finfo(dtype).eps * found.bias.double().abs() + 1e-12).all()


def test_centred_optimum_is_a_joint_one() -> None:
    """E‖y − ŷ‖² is the predicted error, and no factors and bias nearby are better."""
    X = gaussian(300, 9) @ gaussian(9, 9, seed=1) + 3
    weights = {"weight": gaussian(6, 9, seed=2), "bias": gaussian(6, seed=3)}
    mean = X.mean(0)
    prepared = factorise(weights, second=X.T @ X / 300 - mean.outer(mean), mean=mean)
    Y = X @ weights["weight"].T + weights["bias"]
    form = cut(prepared, 3, "lowrank")
    best = (Y - form.apply(X)).square().sum(1).mean()
    torch.testing.assert_close(best, prepared.errors[3])
    for seed in range(10):
        near = type(form)(
            a=form.a + 1e-3 * gaussian(*form.a.shape, seed=seed),
            b=form.b + 1e-3 * gaussian(*form.b.shape, seed=seed + 50),
            bias=form.bias + 1e-3 * gaussian(6, seed=seed + 100),
        )
        assert (Y - near.apply(X)).square().sum(1).mean() > best


def test_a_mean_without_a_bias_is_refused() -> None:
    with pytest.raises(InputError, match="no bias"):
        factorise({"weight": gaussian(3, 4)}, mean=torch.zeros(4))


def test_metric_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(InputError, match="second"):
        factorise({"weight": gaussian(3, 4)}, second=torch.eye(3))


def test_not_finite_counts_and_names_what() -> None:
    W = gaussian(3, 4)
    W[0, :2] = float("nan")
    with pytest.raises(NotFiniteError, match="weight holds 2 NaN or Inf among its 12"):
        factorise({"weight": W})
