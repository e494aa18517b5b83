"""Newton-Schulz and the warm power step against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.linalg import newton_schulz, power_step

MUON = (3.4445, -4.7750, 2.0315)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(m: int, n: int, S: Tensor) -> Tensor:
    k = min(m, n)
    U, V = torch.linalg.qr(gaussian(m, k, seed=1)).Q, torch.linalg.qr(gaussian(n, k, seed=2)).Q
    return (U * S) @ V.T


def twin(X: Tensor, triples: list[tuple[float, float, float]]) -> Tensor:
    """The polynomial on the singular values, through LAPACK."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    S = S / S.square().sum().sqrt()
    for a, b, c in triples:
        S = a * S + b * S**3 + c * S**5
    return (U * S) @ Vh


@pytest.mark.parametrize("gram", ["auto", True, False])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (20, 20), (1, 7), (24, 48)])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8])
def test_is_the_polynomial_of_the_singular_values(shape: tuple[int, int], steps: int, gram: bool) -> None:
    X = gaussian(*shape)
    kept = X.clone()
    found = newton_schulz(X, steps=steps, gram=gram)
    torch.testing.assert_close(found, twin(X, [MUON] * steps))
    assert torch.equal(X, kept)
    assert found.data_ptr() != X.data_ptr()


def test_strips_of_large_sides_and_coefficients_of_each_step() -> None:
    triples = [(4.0, -6.0, 2.5), (3.0, -4.0, 1.8), (1.875, -1.25, 0.375), (1.875, -1.25, 0.375)]
    for shape in ((530, 600), (1100, 517)):
        X = gaussian(*shape)
        torch.testing.assert_close(newton_schulz(X, steps=4, coefficients=triples), twin(X, triples))


def test_stacks_are_orthogonalised_one_by_one() -> None:
    X = gaussian(2, 3, 6, 20)
    X[1, 2] = 0
    found = newton_schulz(X)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(found[i, j], newton_schulz(X[i, j]))
    assert not bool(found[1, 2].any())


@pytest.mark.parametrize("shape", [(64, 256), (256, 64)])
@pytest.mark.parametrize("spectrum", ["flat", "falling", "low rank and noise"])
def test_gram_form_in_short_types_is_as_exact(spectrum: str, shape: tuple[int, int]) -> None:
    """On falling spectra the Gram form without its restart blows up in bfloat16."""
    S = 1 / torch.arange(1, 65, dtype=torch.float64)
    X = {
        "flat": gaussian(*shape),
        "falling": with_spectrum(*shape, S),
        "low rank and noise": gaussian(shape[0], 4) @ gaussian(4, shape[1]) + 0.01 * gaussian(*shape),
    }[spectrum]
    exact = twin(X, [MUON] * 5)

    def error(gram: bool, dtype: torch.dtype) -> float:
        found = newton_schulz(X.to(dtype), gram=gram)
        assert found.dtype == dtype
        return float((found.double() - exact).norm() / exact.norm())

    assert error(True, torch.float32) < 1e-4
    assert error(True, torch.bfloat16) < 2 * error(False, torch.bfloat16) + 0.02


def test_bfloat16_products_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has them, here by plain loops."""
    monkeypatch.setattr("eckart.linalg.orthogonalise.product_dtype", lambda dtype, device: dtype)
    for X, bound in ((gaussian(32, 96), 0.1), (with_spectrum(32, 96, 1 / torch.arange(1, 33).double()), 0.15)):
        exact = twin(X, [MUON] * 5)
        for gram in (True, False):
            found = newton_schulz(X.float(), gram=gram, dtype=torch.bfloat16)
            assert found.dtype == torch.float32
            assert float((found.double() - exact).norm() / exact.norm()) < bound


def test_newton_schulz_keeps_strides_simple_and_bf16_input_unchanged() -> None:
    X = gaussian(30, 8).bfloat16()
    kept = X.clone()
    found = newton_schulz(X)
    assert found.is_contiguous()
    assert found.dtype == torch.bfloat16
    assert torch.equal(X, kept)


@pytest.mark.parametrize(
    ("X", "options"),
    [
        (torch.ones(3), {}),
        (torch.ones(3, 3, dtype=torch.int64), {}),
        (torch.ones(3, 3, dtype=torch.complex64), {}),
        (torch.ones(3, 3), {"steps": -1}),
        (torch.ones(3, 3), {"gram": "yes"}),
        (torch.ones(3, 3), {"coefficients": (1.0, 2.0)}),
        (torch.ones(3, 3), {"coefficients": [MUON] * 4}),
    ],
)
def test_newton_schulz_refuses(X: Tensor, options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="newton_schulz"):
        newton_schulz(X, **options)  # type: ignore[arg-type]


def test_power_steps_find_the_leading_directions_in_order() -> None:
    S = 0.7 ** torch.arange(12, dtype=torch.float64)
    G = with_spectrum(30, 12, S)
    Q = torch.linalg.qr(gaussian(12, 4)).Q
    for _ in range(60):
        Q = power_step(G, Q)
    V = torch.linalg.svd(G).Vh[:4].T
    torch.testing.assert_close((Q.T @ V).abs(), torch.eye(4, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(power_step(G, Q), Q, atol=1e-5, rtol=0)  # signs stay


def test_one_power_step_is_the_span_of_its_formula() -> None:
    G, Q = gaussian(9, 7), torch.linalg.qr(gaussian(7, 3)).Q
    found = power_step(G, Q)
    expected = torch.linalg.qr(G.T @ G @ Q).Q
    torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=1e-4, rtol=0)
    stacked = power_step(torch.stack([G, 2 * G]), torch.stack([Q, Q]))
    torch.testing.assert_close(stacked, torch.stack([found, found]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_power_step_without_a_gradient_keeps_directions(dtype: torch.dtype) -> None:
    Q = torch.linalg.qr(gaussian(7, 3)).Q.to(dtype)
    kept = power_step(torch.zeros(9, 7, dtype=dtype), Q)
    assert kept.dtype == dtype
    torch.testing.assert_close(kept, Q, atol=1e-2 if dtype == torch.bfloat16 else 1e-6, rtol=0)
    rank_one = power_step(gaussian(9, 1).to(dtype) @ gaussian(1, 7).to(dtype), Q).double()
    torch.testing.assert_close(
        rank_one.T @ rank_one, torch.eye(3, dtype=torch.float64), atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0
    )


@pytest.mark.parametrize(("g", "q"), [((3, 4), (3, 2)), ((3, 4), (4, 5)), ((4,), (4, 1)), ((2, 3, 4), (4, 1))])
def test_power_step_refuses(g: tuple[int, ...], q: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="power_step"):
        power_step(torch.ones(g), torch.ones(q))
