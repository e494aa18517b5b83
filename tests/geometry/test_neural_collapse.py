"""Neural collapse: zero at collapse, known values off it, a naive twin, and the closed form against a minimiser."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.geometry import collapse_norms, minority_collapse, neural_collapse
from eckart.geometry.neural_collapse import free_features_optimum


def simplex(K: int, d: int) -> Tensor:
    """(K, d) vertices of a regular simplex, in a random orientation."""
    Q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    return (torch.eye(K, dtype=torch.float64) - 1 / K) @ Q[:K]


def test_all_zero_at_full_collapse() -> None:
    M = simplex(4, 6)
    y = torch.arange(4).repeat_interleave(10)
    found = neural_collapse(3 * M[y] + 5, y, 0.7 * M, -0.7 * 5 * M.sum(1))
    assert set(found) == {"nc1", "nc2_means", "nc2_weight", "nc3", "nc4"}
    for finding in found.values():
        assert abs(float(finding)) < 1e-12
    assert found["nc2_means"].details["mean_cosine"] == pytest.approx(-1 / 3)


def test_against_a_naive_twin_with_uneven_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 30 + [1] * 8 + [2] * 3)
    H = torch.randn(41, 5, generator=generator, dtype=torch.float64) + 2 * simplex(3, 5)[y]
    W = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    means = torch.stack([H[y == k].mean(0) for k in range(3)])
    mu = means.mean(0)
    within = sum(torch.outer(h - means[k], h - means[k]) for h, k in zip(H, y.tolist(), strict=True)) / 41
    between = sum(torch.outer(m - mu, m - mu) for m in means) / 3
    found = neural_collapse(H, y, W)
    assert float(found["nc1"]) == pytest.approx(float(torch.trace(within @ torch.linalg.pinv(between, rtol=1e-10)) / 3))
    T = (torch.eye(3, dtype=torch.float64) - 1 / 3) / math.sqrt(2)
    product = W @ (means - mu).T
    assert float(found["nc3"]) == pytest.approx(float((product / product.norm() - T).norm()))
    nearest = torch.tensor([min(range(3), key=lambda k: float((h - means[k]).norm())) for h in H])
    assert float(found["nc4"]) == pytest.approx(float(((H @ W.T).argmax(1) != nearest).double().mean()))


def test_scale_shift_and_rotation_of_the_features_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    H = torch.randn(60, 4, generator=generator, dtype=torch.float64) + simplex(3, 4)[y]
    Q = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    a, b = neural_collapse(H, y), neural_collapse(7 * H @ Q + 2, y)
    for name, finding in a.items():
        assert float(finding) == pytest.approx(float(b[name]), rel=1e-9)


def test_orthogonal_weights_are_as_far_from_the_simplex_as_arithmetic_says() -> None:
    # I/√K against (I − 11ᵀ/K)/√(K−1): inner product (K−1)/√(K(K−1)), both of norm 1.
    K = 5
    H = simplex(K, K)[torch.arange(K).repeat(2)]
    found = neural_collapse(H, torch.arange(K).repeat(2), torch.eye(K, dtype=torch.float64))
    assert float(found["nc2_weight"]) == pytest.approx(math.sqrt(2 - 2 * math.sqrt((K - 1) / K)))


def test_what_cannot_be_measured_says_why() -> None:
    one = neural_collapse(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64), torch.eye(3))
    assert all(f.value is None and f.notes[0] == "one class only" for f in one.values())
    same = neural_collapse(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))
    assert all(f.value is None and "coincide" in f.notes[0] for f in same.values())
    gaps = neural_collapse(torch.randn(9, 3), torch.tensor([0, 0, 0, 0, 2, 2, 2, 2, 3]), torch.randn(5, 3))
    assert any("2 classes have no sample" in note for note in gaps["nc3"].notes)
    assert any("1 classes have one sample" in note for note in gaps["nc1"].notes)


def test_bad_input() -> None:
    H, y = torch.randn(6, 3), torch.arange(6) % 2
    with pytest.raises(InputError, match="6 whole numbers"):
        neural_collapse(H, y.double())
    with pytest.raises(InputError, match="6 whole numbers"):
        neural_collapse(H, y[:5])
    with pytest.raises(InputError, match="from 0 to 1; got 0 to 7"):
        neural_collapse(H, torch.tensor([0, 1, 0, 1, 0, 7]), torch.randn(2, 3))
    with pytest.raises(InputError, match=r"(?s)weight has 4 columns.*bias"):
        neural_collapse(H, y, torch.randn(2, 4), torch.randn(3))
    with pytest.raises(NotFiniteError):
        neural_collapse(H * torch.nan, y)


@pytest.mark.parametrize(("decay", "lost"), [(5e-3, []), (0.03, [3]), (0.05, [2, 3])])
def test_the_minimiser_has_the_norms_of_the_closed_form(decay: float, lost: list[int]) -> None:
    counts = (40, 20, 10, 4)
    W = free_features_optimum(counts, decay, dim=6, seed=3)
    theory = collapse_norms(counts, weight_decay=decay, feature_decay=decay)
    assert W.norm(dim=1).tolist() == pytest.approx(theory.tolist(), abs=5e-4)
    assert float((W @ W.T - (W @ W.T).diag().diag()).abs().max()) < 5e-4
    assert minority_collapse(counts, weight_decay=decay, feature_decay=decay).details["lost"] == lost


def test_figures_of_the_issue_and_the_warning() -> None:
    norms = collapse_norms([40, 20, 10, 4], weight_decay=5e-3, feature_decay=5e-3)
    assert [round(v, 3) for v in norms.tolist()] == [2.44, 2.025, 1.671, 1.277]
    healthy = minority_collapse([40, 20, 10, 4], weight_decay=5e-3, feature_decay=5e-3)
    assert float(healthy) == 0
    assert not healthy.notes
    ill = minority_collapse([40, 20, 10, 4], weight_decay=0.03, feature_decay=0.03)
    assert "minority collapse: classes 3 have at most 4.928 samples" in ill.notes[0]


def test_the_product_of_the_decays_decides_and_their_ratio_scales() -> None:
    a = collapse_norms([30, 10], weight_decay=1e-2, feature_decay=1e-3)
    b = collapse_norms([30, 10], weight_decay=1e-3, feature_decay=1e-2)
    assert (b / a).tolist() == pytest.approx([10**0.5] * 2)


def test_bad_counts_and_decays_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)counts.*weight_decay.*feature_decay"):
        collapse_norms([3, 0], weight_decay=0.0, feature_decay=math.nan)
    with pytest.raises(InputError, match="counts"):
        collapse_norms([], weight_decay=0.1, feature_decay=0.1)
