"""Top-AFA: the bound on coherence, the selection against a loop, the trainer, bad input."""

from __future__ import annotations

import pytest
import torch

from eckart.errors import InputError, NotFiniteError
from eckart.geometry import TopAFA, TopAFAOptions, epsilon_lbo, top_afa, train_top_afa
from eckart.geometry.top_afa import planted_codes


@pytest.mark.parametrize("seed", range(3))
def test_no_dictionary_is_more_orthogonal_than_the_score(seed: int) -> None:
    z, codes, D = planted_codes(200, 24, 40, 2, 10, seed)
    found = epsilon_lbo(z, codes)
    gram = D @ D.T
    coherence = float((gram - gram.diag().diag()).abs().max())
    assert 0 < float(found) <= found.details["max"] <= coherence
    assert float(found) < found.details["active"] <= coherence


def test_the_formula() -> None:
    z, f = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0, 1.0]])
    found = epsilon_lbo(z, f)
    assert float(found) == pytest.approx((25 - 5) / (2 * 5))
    assert found.details["active"] == pytest.approx((25 - 5) / (1 * 5))
    assert found.details["ratio"] == pytest.approx((5 / 25) ** 0.5)
    assert found.details["l0"] == 2
    shifted = epsilon_lbo(
        z + 7, 2 * f, decoder=torch.tensor([[0.5, 0.0], [1.0, 1.0], [0.0, 0.5]]), bias=torch.full((2,), 7.0)
    )
    assert float(shifted) == pytest.approx(float(found))


def test_orthonormal_dictionaries_score_zero() -> None:
    Q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    f = torch.rand(20, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert float(epsilon_lbo(f @ Q, f)) == pytest.approx(0, abs=1e-12)


def test_idle_samples_are_left_out() -> None:
    found = epsilon_lbo(torch.ones(3, 2), torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]))
    assert found.n == 2
    assert "1 samples have no active feature" in found.notes[0]
    assert epsilon_lbo(torch.ones(3, 2), torch.zeros(3, 2)).value is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_selection_against_a_loop(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(30, 9, generator=generator, dtype=torch.float64).relu().to(dtype)
    lengths = (0.5 + torch.rand(9, generator=generator, dtype=torch.float64)).to(dtype)
    norms = (2 * torch.rand(30, generator=generator, dtype=torch.float64)).to(dtype)
    kept = top_afa(f, norms, lengths)
    assert kept.dtype == dtype
    for row, result, norm in zip(f, kept, norms, strict=True):
        scaled = row * lengths
        order = scaled.argsort(descending=True)
        gaps = [float((scaled[order[:k]].double().norm() - norm).abs()) for k in range(1, 10)]
        k = int((result > 0).sum())
        assert set(result.nonzero()[:, 0].tolist()) <= set(order[: max(k, 1)].tolist())
        # Ties between equal sums, as where zeros follow, may go either way.
        slack = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
        assert gaps[max(k, 1) - 1] <= min(gaps) + slack
        assert torch.equal(result[result > 0], row[result > 0])


def test_oracle_codes_are_under_counted_by_a_tenth() -> None:
    """The figure of the docstring: the true coefficients lead to a k some 10 % low."""
    z, codes, _ = planted_codes(2000, 64, 128, 2, 14, seed=1)
    true = float((codes > 0).sum(1).double().mean())
    kept = float((top_afa(codes, z.norm(dim=1)) > 0).sum(1).double().mean())
    assert 0.8 * true < kept < true


@pytest.mark.parametrize("standardise", [True, False])
def test_training_lowers_the_error_and_keeps_rows_of_length_one(standardise: bool) -> None:
    x = planted_codes(500, 16, 32, 1, 4, seed=0)[0].float()
    options = TopAFAOptions(features=32, steps=150, batch=128, lr=3e-3, norm_weight=0.01, standardise=standardise)
    start = TopAFA(16, 32, standardise=standardise, seed=0)
    z = start.standardised(x)
    model = train_top_afa(x, options)
    with torch.no_grad():
        before, after = float((start(x) - z).square().mean()), float((model(x) - z).square().mean())
    assert after < 0.5 * before
    torch.testing.assert_close(model.decoder.norm(dim=1).detach(), torch.ones(32))
    again = train_top_afa(x, options)
    assert torch.equal(model.encoder, again.encoder)  # the seed decides everything


@pytest.mark.parametrize("weight", [0.0, 1 / 32])
def test_dead_features_learn_from_the_residual_alone(weight: float) -> None:
    x = planted_codes(200, 8, 12, 1, 2, seed=0)[0].float()
    model = TopAFA(8, 12, standardise=False, seed=0)
    with torch.no_grad():
        model.encoder *= 3  # norms are reached before the last feature
        model.encoder[3] *= 1e-4  # fires, but too weakly to be among the largest
    before = model.decoder[3].detach().clone()
    options = TopAFAOptions(
        features=12, steps=20, batch=64, lr=1e-3, dead_after=1, revive_weight=weight, standardise=False
    )
    after = train_top_afa(x, options, model=model).decoder[3]
    assert torch.allclose(after, before, atol=1e-6) is (weight == 0)


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"(?s)same samples.*h is 2.*decoder.*bias"):
        epsilon_lbo(torch.ones(3, 2), torch.ones(4, 1), decoder=torch.ones(2, 2), bias=torch.ones(3))
    with pytest.raises(InputError, match=r"(?s)steps.*lr"):
        TopAFAOptions(steps=0, lr=0.0)
    with pytest.raises(InputError, match="floating-point"):
        train_top_afa(torch.ones(4, 2, dtype=torch.int64))
    with pytest.raises(InputError, match="samples × d"):
        train_top_afa(torch.ones(4))
    with pytest.raises(NotFiniteError):
        train_top_afa(torch.full((4, 2), torch.nan))
