"""Each compensation method against its paper's own formula, with roots and inverses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.compensation import get_compensation
from eckart.compression import kfac as compression_kfac
from eckart.errors import InputError
from eckart.moments import SiteMoments

SHAPES = [(7, 12), (12, 7), (9, 9)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def gaussian(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(shape: tuple[int, int]) -> tuple[Tensor, Tensor, SiteMoments]:
    m, n = shape
    X = gaussian(300, n, seed=1) @ gaussian(n, n, seed=2) + 1
    g = gaussian(300, m, seed=4) @ gaussian(m, m, seed=5)
    W = gaussian(m, n)
    return W, W.round(), SiteMoments(count=300, mean=X.mean(0), second=X.T @ X / 300, gradient=g.T @ g / 300)


def repair(name: str, W: Tensor, damaged: Tensor, moments: SiteMoments, rank: int, **options: object) -> Tensor:
    method = get_compensation(name)
    return method.repair(W, damaged, moments, method.options(**options), rank).form.dense()


def truncated(A: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


@every_shape
def test_eora_by_its_eigenspace(shape: tuple[int, int]) -> None:
    W, damaged, moments = case(shape)
    values, Q = torch.linalg.eigh(moments.second)
    projection = Q * values.sqrt()
    naive = truncated((W - damaged) @ projection, 3) @ torch.linalg.inv(projection)
    torch.testing.assert_close(repair("eora", W, damaged, moments, 3), naive)


@every_shape
def test_qera_by_its_root_and_the_same_as_eora(shape: tuple[int, int]) -> None:
    W, damaged, moments = case(shape)
    values, Q = torch.linalg.eigh(moments.second)
    root = (Q * values.sqrt()) @ Q.T
    naive = truncated((W - damaged) @ root, 3) @ torch.linalg.inv(root)
    exact = repair("qera", W, damaged, moments, 3)
    torch.testing.assert_close(exact, naive)
    assert torch.equal(exact, repair("eora", W, damaged, moments, 3))


@every_shape
def test_qera_diagonal_scales_the_columns(shape: tuple[int, int]) -> None:
    W, damaged, moments = case(shape)
    size = moments.second.diagonal().sqrt()
    naive = truncated((W - damaged) * size, 3) / size
    torch.testing.assert_close(repair("qera", W, damaged, moments, 3, diagonal=True), naive)
    with pytest.raises(InputError, match="diagonal is true or false"):
        get_compensation("qera").options(diagonal=1)


@every_shape
def test_kfac_by_two_roots(shape: tuple[int, int]) -> None:
    W, damaged, moments = case(shape)
    G = 0.7 * moments.gradient + 0.3 * torch.diag(moments.gradient.diagonal())
    second = 0.9 * moments.second + 0.1 * torch.diag(moments.second.diagonal())
    left, right = torch.linalg.cholesky(G), torch.linalg.cholesky(second)
    naive = torch.linalg.inv(left.T) @ truncated(left.T @ (W - damaged) @ right, 3) @ torch.linalg.inv(right)
    found = repair("kfac", W, damaged, moments, 3, gradient_shrinkage=0.3, input_shrinkage=0.1)
    torch.testing.assert_close(found, naive)


def test_kfac_of_a_map_of_zeros_is_the_compression_of_that_name() -> None:
    W, _, moments = case((7, 12))
    prepared = compression_kfac.prepare({"weight": W}, moments, compression_kfac.Options(correct_bias=False))
    compressed = compression_kfac.METHOD.cut(prepared, 3, "lowrank").dense()
    torch.testing.assert_close(repair("kfac", W, torch.zeros_like(W), moments, 3), compressed)


def test_kfac_with_one_number_for_the_gradient_is_eora() -> None:
    W, damaged, moments = case((7, 12))
    cheap = SiteMoments(count=300, second=moments.second, gradient_scale=3.0)
    torch.testing.assert_close(repair("kfac", W, damaged, cheap, 3), repair("eora", W, damaged, moments, 3))
