"""FedSVD: the same product in orthonormal factors, exact averages, and what the procedure amounts to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from eckart.adaptation.fedsvd import reorthogonalised, server_round
from eckart.errors import InputError, NotFiniteError


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clients(count: int = 3) -> list[dict[str, Tensor]]:
    A = random(1, 4, 20, seed=9)
    return [
        {"m.up.B": random(1, 30, 4, seed=i), "m.up.A": A, "m.head.weight": random(2, 5, seed=50 + i)}
        for i in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_product_with_orthonormal_rows(dtype: torch.dtype) -> None:
    B, A = random(2, 30, 4).to(dtype), random(2, 4, 20, seed=1).to(dtype)
    new_B, new_A = reorthogonalised(B, A)
    assert new_B.dtype == new_A.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close((new_B @ new_A).double(), B.double() @ A.double(), atol=tolerance, rtol=tolerance)
    eye = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    torch.testing.assert_close(new_A.double() @ new_A.double().mT, eye, atol=tolerance, rtol=0)


def test_is_the_dense_decomposition() -> None:
    B, A = random(30, 4), random(4, 20, seed=1)
    new_B, new_A = reorthogonalised(B, A)
    _, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    torch.testing.assert_close(new_B.norm(dim=0), S[:4])
    torch.testing.assert_close((new_A @ Vh[:4].T).abs(), torch.eye(4, dtype=torch.float64), atol=1e-10, rtol=0)


def test_a_round_averages_products_and_everything_else() -> None:
    given, weights = clients(), [1.0, 2.0, 5.0]
    new = server_round(given, weights=weights)
    expected = sum(w / 8 * c["m.up.B"] @ c["m.up.A"] for w, c in zip(weights, given, strict=True))
    torch.testing.assert_close(new["m.up.B"] @ new["m.up.A"], expected)
    torch.testing.assert_close(
        new["m.head.weight"], sum(w / 8 * c["m.head.weight"] for w, c in zip(weights, given, strict=True))
    )
    arrays = [{name: value.numpy() for name, value in c.items()} for c in given]
    assert all(torch.equal(server_round(arrays, weights=weights)[name], value) for name, value in new.items())
    assert isinstance(arrays[0]["m.up.B"], np.ndarray)


def test_names_of_plain_lora_and_an_untrained_start() -> None:
    lora = [{"x.lora_B.weight": torch.zeros(8, 2), "x.lora_A.weight": random(2, 6)} for _ in range(2)]
    new = server_round(lora)
    A = new["x.lora_A.weight"]
    torch.testing.assert_close(A @ A.T, torch.eye(2, dtype=torch.float64))
    assert float(new["x.lora_B.weight"].abs().max()) == 0


def test_row_space_never_changes() -> None:
    """B̄ A has the rows of A, so a round is a rotation of the basis."""
    A = random(4, 20, seed=9)
    P = torch.linalg.pinv(A) @ A
    for seed in range(3):
        A = server_round([{"B": random(30, 4, seed=seed), "A": A}])["A"]
    torch.testing.assert_close(A.T @ A, P, atol=1e-10, rtol=0)


def test_under_sgd_it_is_a_fixed_orthonormal_factor() -> None:
    """Rounds with and without the server's decomposition train the same ΔW, step for step."""
    target = random(30, 20, seed=7)
    A0 = torch.linalg.qr(random(20, 4, seed=9)).Q.T

    def trained(split: bool) -> Tensor:
        B, A = torch.zeros(30, 4, dtype=torch.float64), A0
        for _ in range(4):
            for _ in range(5):
                gradient = (B @ A - target) @ A.T
                B = B - 0.1 * gradient / max(1.0, float(gradient.norm()) / 2)  # clipped by norm
            if split:
                new = server_round([{"B": B, "A": A}])
                B, A = new["B"], new["A"]
        return B @ A

    torch.testing.assert_close(trained(True), trained(False))


def test_refusals_all_at_once() -> None:
    with pytest.raises(InputError, match="at least one"):
        server_round([])
    given = clients()
    given[1]["m.up.A"] = given[1]["m.up.A"] + 1e-3
    given[2]["m.head.weight"] = torch.zeros(3, 5)
    with pytest.raises(InputError, match=r"(?s)3 problems.*not all 0.*clients train B alone.*\(3, 5\)"):
        server_round(given, weights=[0, 0, 0])
    with pytest.raises(InputError, match="other names"):
        server_round([{"B": torch.ones(3, 1), "A": torch.ones(1, 3)}, {"B": torch.ones(3, 1)}])
    with pytest.raises(InputError, match="no pair"):
        server_round([{"head": torch.ones(3)}])
    with pytest.raises(InputError, match="at most out and in"):
        reorthogonalised(torch.ones(3, 4), torch.ones(4, 9))
    with pytest.raises(NotFiniteError):
        reorthogonalised(torch.full((3, 2), torch.nan), torch.ones(2, 9))
