"""What single methods promise beyond the contract of all."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from eckart.compression import METHODS, afm, asvd, fwsvd, get_method, kfac, lord, options_for, svd, whitened
from eckart.compression.trial import uniform_rank
from eckart.errors import InputError
from eckart.moments import SiteMoments
from eckart.records import Site


def gaussian(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens: int, n: int) -> Tensor:
    return gaussian(tokens, n) @ gaussian(n, n, seed=1) + 2


def moments_of(X: Tensor, g: Tensor | None = None) -> SiteMoments:
    n = X.shape[0]
    return SiteMoments(
        count=n,
        mean=X.mean(0),
        second=X.T @ X / n,
        gradient=None if g is None else g.T @ g / n,
        gradient_scale=None if g is None else float(g.square().sum(1).mean()),
    )


# ---- table


def test_the_default_comes_first_and_names_are_the_seven() -> None:
    assert list(METHODS) == ["kfac", "whitened", "afm", "lord", "asvd", "fwsvd", "svd"]


def test_unknown_method_suggests() -> None:
    with pytest.raises(InputError, match=r"unknown method 'witened'.*'whitened'"):
        get_method("witened")


def test_unknown_option_suggests() -> None:
    with pytest.raises(InputError, match="'gradient_shrinkage'"):
        options_for(kfac.METHOD, {"gradient_shrinkag": 0.5})


def test_all_unknown_options_are_reported_at_once() -> None:
    with pytest.raises(InputError, match="2 problems"):
        options_for(kfac.METHOD, {"one": 1, "two": 2})


@pytest.mark.parametrize(
    ("method", "given"),
    [
        (kfac.METHOD, {"gradient_shrinkage": 1.5}),
        (kfac.METHOD, {"gradient_shrinkage": "0.5"}),
        (kfac.METHOD, {"input_shrinkage": float("nan")}),
        (kfac.METHOD, {"input_shrinkage": True}),
        (kfac.METHOD, {"correct_bias": "yes"}),
        (afm.METHOD, {"correct_bias": 1}),
        (asvd.METHOD, {"alpha": -0.1}),
        (fwsvd.METHOD, {"side": "diagonal"}),
    ],
)
def test_options_out_of_range(method, given) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=f"method '{method.name}': the option {next(iter(given))}"):
        options_for(method, given)


def test_only_kfac_is_in_units_of_the_loss() -> None:
    assert [name for name, method in METHODS.items() if method.loss_units] == ["kfac"]


# ---- equalities between methods


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)], ids=str)
def test_lord_is_the_naive_output_pca_and_so_is_whitened(shape: tuple[int, int]) -> None:
    W, X = gaussian(*shape, seed=2), inputs(200, shape[1])
    Y = X @ W.T
    U = torch.linalg.eigh(Y.T @ Y).eigenvectors.flip(1)[:, :3]
    for method in (lord, whitened):
        prepared = method.prepare({"weight": W}, moments_of(X), method.Options())
        torch.testing.assert_close(method.METHOD.cut(prepared, 3, "lowrank").dense(), U @ U.T @ W)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)], ids=str)
def test_whitened_is_cholesky_svd_inverse(shape: tuple[int, int]) -> None:
    """The paper's own procedure, where the moment is regular."""
    W, X = gaussian(*shape, seed=2), inputs(200, shape[1])
    S = torch.linalg.cholesky(X.T @ X / 200)
    U, s, Vh = torch.linalg.svd(W @ S, full_matrices=False)
    naive = (U[:, :3] * s[:3]) @ torch.linalg.solve_triangular(S.T, Vh[:3].T, upper=True).T
    prepared = whitened.prepare({"weight": W}, moments_of(X), whitened.Options())
    torch.testing.assert_close(whitened.METHOD.cut(prepared, 3, "lowrank").dense(), naive)
    torch.testing.assert_close(prepared.errors[3], s[3:].square().sum())


def test_fwsvd_is_scale_svd_unscale_on_either_side() -> None:
    W = gaussian(7, 12)
    rows, columns = gaussian(7, seed=1).square(), gaussian(12, seed=2).square()
    moments = SiteMoments(count=1, fisher_rows=rows, fisher_columns=columns)

    def truncated(A: Tensor) -> Tensor:
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        return (U[:, :3] * s[:3]) @ Vh[:3]

    by_rows = fwsvd.prepare({"weight": W}, moments, fwsvd.Options(side="rows"))
    by_columns = fwsvd.prepare({"weight": W}, moments, fwsvd.Options(side="columns"))
    expected = truncated(rows.sqrt()[:, None] * W) / rows.sqrt()[:, None]
    torch.testing.assert_close(fwsvd.METHOD.cut(by_rows, 3, "lowrank").dense(), expected)
    expected = truncated(W * columns.sqrt()) / columns.sqrt()
    torch.testing.assert_close(fwsvd.METHOD.cut(by_columns, 3, "lowrank").dense(), expected)


def test_asvd_without_exponent_is_svd() -> None:
    weights, moments = {"weight": gaussian(7, 12)}, moments_of(inputs(200, 12))
    scaled = asvd.prepare(weights, moments, asvd.Options(alpha=0.0))
    torch.testing.assert_close(scaled.errors, svd.prepare(weights, None, svd.Options()).errors)


def test_afm_of_centred_inputs_is_whitened() -> None:
    X = inputs(200, 12)
    X = X - X.mean(0)
    weights = {"weight": gaussian(7, 12), "bias": gaussian(7, seed=5)}
    centred = afm.prepare(weights, moments_of(X), afm.Options())
    plain = whitened.prepare(weights, moments_of(X), whitened.Options())
    torch.testing.assert_close(centred.errors, plain.errors)


def test_without_a_bias_afm_and_kfac_do_not_centre() -> None:
    X, weights = inputs(200, 12), {"weight": gaussian(7, 12)}
    moments = moments_of(X, gaussian(200, 7, seed=9))
    plain = whitened.prepare(weights, moments, whitened.Options())
    found = afm.prepare(weights, moments, afm.Options())
    assert found.mean is None
    torch.testing.assert_close(found.errors, plain.errors)
    assert kfac.prepare(weights, moments, kfac.Options()).mean is None


def test_afm_embedding_prefers_frequent_entries() -> None:
    table = gaussian(8, 50)
    frequencies = torch.full((50,), 1e-6, dtype=torch.float64)
    frequencies[:3] = 1.0
    prepared = afm.prepare({"weight": table}, SiteMoments(count=1, second=frequencies), afm.Options())
    error = table - afm.METHOD.cut(prepared, 3, "lowrank").dense()
    assert error[:, :3].norm() < 1e-3 * table[:, :3].norm()
    assert error[:, 3:].norm() > 0.5 * table[:, 3:].norm()


# ---- kfac


def test_kfac_with_white_gradients_is_afm_up_to_scale() -> None:
    weights = {"weight": gaussian(7, 12), "bias": gaussian(7, seed=5)}
    moments = dataclasses.replace(moments_of(inputs(200, 12)), gradient=4.0 * torch.eye(7).double())
    found = kfac.prepare(weights, moments, kfac.Options())
    torch.testing.assert_close(found.errors, 4.0 * afm.prepare(weights, moments, afm.Options()).errors)


def test_kfac_cheap_mode_keeps_the_trace() -> None:
    """E‖g‖² alone: the same factors as afm, errors scaled by the mean square of one gradient entry."""
    weights = {"weight": gaussian(7, 12), "bias": gaussian(7, seed=5)}
    moments = dataclasses.replace(moments_of(inputs(200, 12)), gradient_scale=21.0)
    found = kfac.prepare(weights, moments, kfac.Options())
    torch.testing.assert_close(found.errors, 3.0 * afm.prepare(weights, moments, afm.Options()).errors)


def test_kfac_without_any_gradient_says_how() -> None:
    with pytest.raises(InputError, match=r"'gradient'.*gradients='full'"):
        kfac.prepare({"weight": gaussian(7, 12)}, moments_of(inputs(20, 12)), kfac.Options())


@pytest.mark.parametrize(("tokens", "rho"), [(6, 0.16), (12, 0.12), (30, 0.0), (100, 0.0)])
def test_kfac_shrinks_inputs_when_tokens_are_few(tokens: int, rho: float) -> None:
    weights = {"weight": gaussian(7, 12)}
    moments = moments_of(inputs(tokens, 12), gaussian(tokens, 7, seed=9))
    automatic = kfac.prepare(weights, moments, kfac.Options())
    explicit = kfac.prepare(weights, moments, kfac.Options(input_shrinkage=rho))
    torch.testing.assert_close(automatic.errors, explicit.errors)
    if rho:
        assert not torch.allclose(
            automatic.errors, kfac.prepare(weights, moments, kfac.Options(input_shrinkage=0.0)).errors
        )


def test_kfac_gives_unseen_embedding_entries_some_weight() -> None:
    table = gaussian(8, 50)
    frequencies = torch.zeros(50, dtype=torch.float64)
    frequencies[:3] = 1 / 3
    moments = SiteMoments(count=60, second=frequencies, gradient=torch.eye(8).double())
    prepared = kfac.prepare({"weight": table}, moments, kfac.Options())
    weighted = 0.896 * frequencies + 0.104 / 50  # ρ = 0.2 (1 − 60 / 125)
    error = table - kfac.METHOD.cut(prepared, 5, "lowrank").dense()
    torch.testing.assert_close((error.square() @ weighted).sum(), prepared.errors[5])


def test_kfac_errors_predict_the_loss_of_a_quadratic() -> None:
    """½ E(gᵀ ΔW x)² for independent g and x is ½ tr(G ΔW Σ ΔWᵀ), to the sampling error of 40 000 draws."""
    W = gaussian(6, 9)
    X, g = inputs(40_000, 9), gaussian(40_000, 6, seed=7) @ gaussian(6, 6, seed=8)
    moments = moments_of(X, g)
    options = kfac.Options(gradient_shrinkage=0.0, input_shrinkage=0.0)
    prepared = kfac.prepare({"weight": W}, moments, options)
    delta = W - kfac.METHOD.cut(prepared, 3, "lowrank").dense()
    measured = 0.5 * ((X @ delta.T) * g).sum(1).square().mean()
    torch.testing.assert_close(measured, prepared.errors[3] * moments.loss_scale, rtol=0.05, atol=0.0)


@pytest.mark.parametrize("method", [asvd, lord])
def test_methods_for_linear_maps_decline_embeddings(method) -> None:  # type: ignore[no-untyped-def]
    reason = method.METHOD.fits(Site(name="e", kind="embedding", out_features=8, in_features=50))
    assert "afm or kfac" in reason


def test_uniform_rank_meets_the_share_from_below() -> None:
    W = torch.empty(30, 70)
    for keep in (0.05, 0.4, 0.6, 0.8):
        rank = uniform_rank(W, keep)
        assert rank * 100 <= keep * 2100 < (rank + 1) * 100
    assert uniform_rank(torch.empty(1, 2), 0.1) == 1
