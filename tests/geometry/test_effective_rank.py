"""Effective rank of representations: closed forms, both weightings, moments against activations, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from eckart.errors import InputError, NotFiniteError
from eckart.geometry import effective_rank


def with_singular_values(values: list[float], n: int = 50) -> torch.Tensor:
    """(n, len(values)) centred, with these singular values."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(n, len(values), generator=generator, dtype=torch.float64)
    U = torch.linalg.qr(draw - draw.mean(0))[0]
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return U * torch.tensor(values, dtype=torch.float64) @ Q


@pytest.mark.parametrize("weighting", ["energy", "amplitude"])
def test_equal_singular_values_give_their_number(weighting: str) -> None:
    X = with_singular_values([2.0, 2.0, 2.0, 0.0, 0.0])
    found = effective_rank({"a": X}, weighting=weighting)["a"]
    assert float(found) == pytest.approx(3, abs=1e-6)
    assert found.details["rank"] == 3


@pytest.mark.parametrize(("weighting", "power"), [("energy", 2), ("amplitude", 1)])
def test_against_the_definition(weighting: str, power: int) -> None:
    values = [4.0, 2.0, 1.0]
    p = [v**power / sum(u**power for u in values) for v in values]
    expected = math.exp(-sum(q * math.log(q) for q in p))
    assert float(effective_rank({"a": with_singular_values(values)}, weighting=weighting)["a"]) == pytest.approx(
        expected
    )


def test_moments_of_the_activations_give_the_same() -> None:
    X = with_singular_values([4.0, 2.0, 1.0, 0.5])
    X = X + 3  # a mean, which the covariance does not have
    centred = X - X.mean(0)
    by_samples = effective_rank({"a": X})["a"]
    by_moments = effective_rank({"a": centred.T @ centred / 50}, kind="moments", samples=50)["a"]
    assert by_samples.value == pytest.approx(by_moments.value, rel=1e-9)
    assert by_samples.n == by_moments.n == 50
    assert float(effective_rank({"a": X}, centre=False)["a"]) < float(by_samples)


def test_wide_activations_use_the_gram_matrix_and_say_at_least() -> None:
    X = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = effective_rank({"a": X})["a"]
    S = torch.linalg.svdvals(X - X.mean(0))[:5]
    p = S.square() / S.square().sum()
    assert float(found) == pytest.approx(math.exp(-float((p * p.log()).sum())))
    assert found.at_least
    assert found.details["rank"] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_other_dtypes_are_cast(dtype: torch.dtype) -> None:
    X = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    assert float(effective_rank({"a": X.to(dtype)})["a"]) == pytest.approx(2)


@pytest.mark.parametrize("constant", [0.1, 1e8 / 3])
def test_a_constant_has_no_rank(constant: float) -> None:
    found = effective_rank({"a": torch.full((7, 3), constant)})["a"]
    assert found.value is None
    assert "does not vary" in found.notes[0]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_all_problems_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)weighting.*1-D.*empty"):
        effective_rank({"1-D": torch.ones(3), "empty": torch.ones(0, 3)}, weighting="colour")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one layer"):
        effective_rank({})
    with pytest.raises(InputError, match="symmetric"):
        effective_rank({"a": torch.tensor([[1.0, 2.0], [0.0, 1.0]])}, kind="moments")
    with pytest.raises(InputError, match="real tensor"):
        effective_rank({"a": torch.ones(3, 3, dtype=torch.complex64)})
    with pytest.raises(InputError, match="dense"):
        effective_rank({"a": torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8)})
    with pytest.raises(InputError, match="dense"):
        effective_rank({"a": torch.ones(3, 3).to_sparse()})
    with pytest.raises(NotFiniteError, match="a: 1 of 9"):
        effective_rank({"a": torch.ones(3, 3).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan))})
