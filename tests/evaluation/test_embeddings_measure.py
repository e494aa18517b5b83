"""Figures of embeddings: identities, slow twins, and what the data cannot give."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from eckart.errors import InputError, NotFiniteError
from eckart.evaluation import evaluate_embeddings, resample
from eckart.evaluation.embeddings import _correlation, _pair_ranks, neighbour_overlap


def cloud(n: int = 60, d: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_equals_itself(dtype: torch.dtype) -> None:
    E = cloud(dtype=dtype)
    found = evaluate_embeddings(E, E.clone())
    assert found.metrics["cosine"].mean == 1
    assert found.metrics["neighbours@10"].mean == 1
    assert found.metrics["rank_correlation"].mean == pytest.approx(1, abs=1e-12)
    assert found.metrics["cosine"].low == found.metrics["cosine"].high == 1
    assert found.warnings == ()


def test_cosine_is_that_of_torch_and_scale_does_not_matter() -> None:
    A, B = cloud(seed=1), cloud(seed=2)
    found = evaluate_embeddings(3 * A, B).metrics["cosine"]
    assert found.mean == pytest.approx(float(cosine_similarity(A, B).mean()), abs=1e-12)
    assert found.low < found.mean < found.high


def test_a_rotation_keeps_neighbours_and_ranks_but_not_cosines() -> None:
    E = cloud()
    Q, _ = torch.linalg.qr(cloud(12, 12, seed=9))
    found = evaluate_embeddings(E @ Q, E).metrics
    assert found["neighbours@10"].mean == 1
    assert found["rank_correlation"].mean == pytest.approx(1, abs=1e-9)
    assert found["cosine"].mean < 0.6


def test_rank_correlation_is_that_of_scipy() -> None:
    A, B = cloud(seed=1), cloud(seed=1) + 0.5 * cloud(seed=2)
    upper = torch.triu_indices(60, 60, offset=1)
    pairs = [(normalize(E) @ normalize(E).T)[upper[0], upper[1]].numpy() for E in (A, B)]
    found = evaluate_embeddings(A, B).metrics["rank_correlation"]
    assert found.mean == pytest.approx(spearmanr(*pairs).statistic, abs=1e-12)
    assert found.low < found.mean < found.high


def test_resampled_correlation_is_the_one_over_drawn_pairs() -> None:
    """The quadratic forms against a loop over every pair of drawn sentences."""
    R, Q = _pair_ranks(normalize(cloud(9, seed=1))), _pair_ranks(normalize(cloud(9, seed=2)))
    c = resample(9, resamples=1, seed=4)
    ones = torch.ones(9, 9, dtype=torch.float64).fill_diagonal_(0)
    fast = _correlation([((c @ M) * c).sum(1) for M in (ones, R, Q, R * R, Q * Q, R * Q)])
    drawn = [i for i in range(9) for _ in range(int(c[0, i]))]
    pairs = [(i, j) for i in drawn for j in drawn if i != j]
    slow = torch.corrcoef(torch.stack([torch.stack([M[i, j] for i, j in pairs]) for M in (R, Q)]))
    assert float(fast[0]) == pytest.approx(float(slow[0, 1]), abs=1e-12)


def test_neighbour_overlap_is_that_of_a_loop() -> None:
    A, B = normalize(cloud(seed=1)), normalize(cloud(seed=1) + 0.4 * cloud(seed=2))
    slow = []
    for i in range(60):
        near = []
        for E in (A, B):
            order = (E @ E[i]).argsort(descending=True).tolist()
            near.append({j for j in order if j != i} & set([j for j in order if j != i][:7]))
        slow.append(len(near[0] & near[1]) / 7)
    assert torch.allclose(neighbour_overlap(A, B, 7), torch.tensor(slow, dtype=torch.float64))


def test_few_sentences_are_measured_with_a_warning() -> None:
    found = evaluate_embeddings(cloud(5), cloud(5, seed=1))
    assert "neighbours@10" not in found.metrics
    assert any("only 5 sentences" in text for text in found.warnings)
    assert any("neighbours@10 needs" in text for text in found.warnings)


def test_one_sentence_has_a_cosine_only() -> None:
    assert list(evaluate_embeddings(cloud(1), cloud(1)).metrics) == ["cosine"]


def test_equal_sentences_have_no_rank_correlation() -> None:
    E = cloud(1).expand(60, -1)
    assert "rank_correlation" not in evaluate_embeddings(E, E).metrics


def test_wide_intervals_are_named() -> None:
    A = cloud(60)
    B = torch.where(torch.arange(60)[:, None] % 2 == 0, A, -A)
    assert any(text.startswith("cosine is known only to") for text in evaluate_embeddings(A, B).warnings)


def test_another_width_is_an_error() -> None:
    with pytest.raises(InputError, match="of one width"):
        evaluate_embeddings(cloud(60, 12), cloud(60, 10))


def test_nan_names_whose_embeddings() -> None:
    bad = cloud()
    bad[3, 4] = torch.nan
    with pytest.raises(NotFiniteError, match="of the model hold NaN"):
        evaluate_embeddings(bad, cloud())
