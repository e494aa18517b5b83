"""Products with Hessian and Gauss-Newton matrix against the matrices themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from eckart.errors import InputError, NotFiniteError
from eckart.landscape import (
    gauss_newton_operator,
    hessian_operator,
    hessian_spectrum,
    matrix_operator,
    model_hessian,
)
from eckart.landscape.curvature import flatten, unflatten


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 3, (12,), generator=generator)


def exact_hessian(model: nn.Module, loss) -> torch.Tensor:
    """autograd's, row by row of the flat parameters."""
    names = [name for name, _ in model.named_parameters()]
    ps = [p.detach() for p in model.parameters()]

    def of_flat(flat: torch.Tensor) -> torch.Tensor:
        values = dict(zip(names, unflatten(flat, ps), strict=True))
        return loss(lambda x: torch.func.functional_call(model, values, (x,)))

    return torch.autograd.functional.hessian(of_flat, flatten(ps))


def test_hessian_equals_autograds() -> None:
    model, (x, y) = network(), data()

    def loss(m) -> torch.Tensor:
        return cross_entropy(m(x), y)

    H = exact_hessian(model, loss)
    operator = hessian_operator(lambda: loss(model), model.parameters())
    assert operator.size == H.shape[0]
    torch.testing.assert_close(operator.dense(), H)
    again, notes = model_hessian(model, loss)
    torch.testing.assert_close(again.dense(), H)
    assert notes == ()


def test_mean_over_batches_is_the_hessian_of_the_mean() -> None:
    model, (x, y) = network(), data()
    losses = [lambda m, i=i: cross_entropy(m(x[4 * i : 4 * i + 4]), y[4 * i : 4 * i + 4]) for i in range(3)]
    operator, _ = model_hessian(model, losses)
    torch.testing.assert_close(operator.dense(), exact_hessian(model, lambda m: cross_entropy(m(x), y)))


def test_gauss_newton_of_a_linear_softmax_model_is_the_explicit_matrix() -> None:
    """mean_i (diag(p_i) − p_i p_iᵀ) ⊗ x_i x_iᵀ, which is the Hessian too, since the outputs are linear."""
    x, y = data()
    model = nn.Linear(4, 3, bias=False).double()
    p = model(x).softmax(1).detach()
    explicit = torch.zeros(12, 12, dtype=torch.float64)
    for probability, row in zip(p, x, strict=True):
        outer = torch.diag(probability) - probability.outer(probability)
        explicit += torch.kron(outer, row.outer(row)) / 12
    operator = gauss_newton_operator(lambda: model(x), lambda z: cross_entropy(z, y), model.parameters())
    torch.testing.assert_close(operator.dense(), explicit)
    hessian = hessian_operator(lambda: cross_entropy(model(x), y), model.parameters())
    torch.testing.assert_close(hessian.dense(), explicit)


def test_gauss_newton_of_a_network_is_j_h_j_and_positive() -> None:
    model, (x, y) = network(), data()
    names = [name for name, _ in model.named_parameters()]
    ps = [p.detach() for p in model.parameters()]
    J = torch.autograd.functional.jacobian(
        lambda flat: torch.func.functional_call(
            model, dict(zip(names, unflatten(flat, ps), strict=True)), (x,)
        ).flatten(),
        flatten(ps),
    )
    Hz = torch.autograd.functional.hessian(lambda z: cross_entropy(z.view(12, 3), y), model(x).detach().flatten())
    operator = gauss_newton_operator(lambda: model(x), lambda z: cross_entropy(z, y), model.parameters())
    torch.testing.assert_close(operator.dense(), J.T @ Hz @ J)
    assert float(torch.linalg.eigvalsh(operator.dense())[0]) > -1e-12


def test_gauss_newton_equals_the_hessian_where_nothing_is_left_to_fit() -> None:
    model, (x, _) = network(), data()
    target = model(x).detach()
    gauss = gauss_newton_operator(lambda: model(x), lambda z: mse_loss(z, target), model.parameters())
    hessian = hessian_operator(lambda: mse_loss(model(x), target), model.parameters())
    torch.testing.assert_close(gauss.dense(), hessian.dense())


def test_unused_and_linear_parameters_have_no_curvature() -> None:
    a, b = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    operator = hessian_operator(lambda: (a**3).sum(), [a, b])
    torch.testing.assert_close(operator.dense(), torch.diag(torch.tensor([6.0, 6.0, 0.0, 0.0], dtype=torch.float64)))
    assert not hessian_operator(lambda: (a + b).sum(), [a, b]).dense().any()
    mixed = hessian_operator(lambda: (a**2).sum() + b.sum(), [a, b]).dense()
    torch.testing.assert_close(mixed, torch.diag(torch.tensor([2.0, 2.0, 0.0, 0.0], dtype=torch.float64)))
    assert not gauss_newton_operator(lambda: a * b, lambda z: z.sum(), [a, b]).dense().any()


def test_half_precision_is_computed_on_a_float32_copy() -> None:
    model, (x, y) = network(torch.bfloat16), data(torch.float32)
    operator, notes = model_hessian(model, lambda m: cross_entropy(m(x), y))
    assert operator.dtype == torch.float32
    assert "float32 copy" in notes[0]
    assert model[0].weight.dtype == torch.bfloat16
    twin = network(torch.bfloat16).double()
    exact = exact_hessian(twin, lambda m: cross_entropy(m(x.double()), y))
    # float32 has 7 digits; sums of 12 samples keep 5 of them.
    torch.testing.assert_close(operator.dense().double(), exact, rtol=1e-3, atol=1e-5)
    half = x.bfloat16()
    with pytest.raises(InputError, match="float32 inputs"):
        model_hessian(model, lambda m: cross_entropy(m(half), y))


def test_the_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = data()
    found = hessian_spectrum(model, lambda m: cross_entropy(m(x), y), steps=3, probes=1)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert any("training mode" in note for note in found.notes)


def test_attention_kernels_without_second_derivative_are_named() -> None:
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with pytest.raises(InputError, match="eager"):
        hessian_operator(lambda: flash(q, q, q)[0].square().sum(), [q])


def test_refuses_losses() -> None:
    model, (x, y) = network(), data()
    ps = list(model.parameters())
    with pytest.raises(InputError, match=r"scalar loss; got \(12, 3\)"):
        hessian_operator(lambda: model(x), ps)
    with pytest.raises(InputError, match="scalar loss; got float"):
        hessian_operator(lambda: 1.0, ps)  # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match="differentiable"):
        hessian_operator(lambda: model(x).argmax(1).double().mean(), ps)
    with pytest.raises(InputError, match="does not depend"):
        hessian_operator(lambda: torch.ones(1, requires_grad=True).sum(), ps)
    with pytest.raises(InputError, match="is given"):
        model_hessian(model, lambda m: cross_entropy(model(x), y))
    with pytest.raises(NotFiniteError, match="loss is nan"):
        hessian_operator(lambda: cross_entropy(model(x), y) * float("nan"), ps)
    with pytest.raises(NotFiniteError, match="gradient"):
        hessian_operator(lambda: sum((p - p.detach()).abs().sqrt().sum() for p in ps), ps)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one loss"):
        hessian_operator([], ps)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(InputError, match="changed"):
        hessian_operator([lambda: cross_entropy(model(x), y) * torch.rand((), generator=generator)], ps)


def test_refuses_parameters_and_models() -> None:
    model, (x, y) = network(), data()
    with pytest.raises(InputError, match="no parameters were given"):
        hessian_operator(lambda: cross_entropy(model(x), y), [])
    with pytest.raises(InputError, match="requires_grad"):
        hessian_operator(lambda: cross_entropy(model(x), y), [torch.ones(2)])
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(InputError, match="half precision"):
        hessian_operator(lambda: half.sum(), [half])
    with pytest.raises(InputError, match="no parameter"):
        model_hessian(nn.ReLU(), lambda m: m(x).sum())
    with pytest.raises(InputError, match="Module"):
        model_hessian(lambda x: x, lambda m: m(x).sum())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="outputs do not depend"):
        gauss_newton_operator(lambda: x, lambda z: z.square().sum(), model.parameters())


@pytest.mark.parametrize(
    "A", [torch.ones(2, 3), torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.tensor([[0.0, 1.0], [0.0, 0.0]])]
)
def test_refuses_matrices(A: torch.Tensor) -> None:
    with pytest.raises(InputError, match="matrix_operator"):
        matrix_operator(A)
    with pytest.raises(NotFiniteError):
        matrix_operator(torch.full((2, 2), float("nan")))
