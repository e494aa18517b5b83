"""Target-based surrogates, against the formula written out."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.training import TargetSurrogate


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = gaussian(12, 5), torch.arange(12) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def closure_of(model: nn.Module) -> Callable[[], tuple[Tensor, Tensor]]:
    def closure() -> tuple[Tensor, Tensor]:
        z = model(X)
        return cross_entropy(z, Y), z

    return closure


def naive(model: nn.Module, eta: float, m: int, length: float) -> None:
    z = model(X).detach().requires_grad_()
    (J,) = torch.autograd.grad(cross_entropy(z, Y), z)
    weights = list(model.parameters())

    def g() -> Tensor:
        moved = model(X) - z.detach()
        return (J * moved).sum() + moved.square().sum() / (2 * 12 * eta)

    first = length
    for _ in range(m):
        before = g()
        grads = torch.autograd.grad(before, weights)
        starts = [w.detach().clone() for w in weights]
        square = sum(float(d.square().sum()) for d in grads)
        with torch.no_grad():
            while True:
                for w, s, d in zip(weights, starts, grads, strict=True):
                    w.copy_(s - length * d)
                if g() <= before - 0.1 * length * square:
                    break
                length /= 2
        length = min(2 * length, first)


@pytest.mark.parametrize("schedule", ["constant", "sqrt", "exponential"])
def test_steps_are_those_of_the_formula(schedule: str) -> None:
    model = network()
    twin = copy.deepcopy(model)
    total = 4 if schedule == "exponential" else None
    optimizer = TargetSurrogate(model.parameters(), eta=3.0, inner_steps=3, schedule=schedule, total_steps=total)  # type: ignore[arg-type]
    for t in range(1, 5):
        eta = 3.0 * {"constant": 1.0, "sqrt": t**-0.5, "exponential": 4 ** (-t / 4)}[schedule]
        before = float(cross_entropy(model(X), Y).detach())
        assert float(optimizer.step(closure_of(model))) == before
        naive(twin, eta, 3, 10.0)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_many_inner_steps_reach_the_step_in_the_outputs() -> None:
    """A linear map that can reach any outputs: rows move by −η ∂ℓ_i."""
    model = nn.Linear(12, 1, bias=False).double()
    A = torch.linalg.qr(gaussian(12, 12)).Q
    y = gaussian(12, 1, seed=1)
    before = (A @ model.weight.T).detach()
    optimizer = TargetSurrogate(model.parameters(), eta=0.3, inner_steps=200)

    def closure() -> tuple[Tensor, Tensor]:
        z = model(A)
        return (z - y).square().mean() / 2, z

    optimizer.step(closure)
    torch.testing.assert_close((A @ model.weight.T).detach(), before - 0.3 * (before - y), atol=1e-5, rtol=1e-5)


def test_loss_falls_with_any_inner_optimizer() -> None:
    model = network()
    inner = torch.optim.Adam(model.parameters(), lr=0.02)
    optimizer = TargetSurrogate(model.parameters(), eta=2.0, inner_steps=4, inner=inner)
    losses = [float(optimizer.step(closure_of(model))) for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]
    assert int(inner.state[model[0].weight]["step"]) == 40


@pytest.mark.parametrize("with_inner", [False, True])
def test_resume_is_exact(with_inner: bool) -> None:
    def made() -> tuple[nn.Module, TargetSurrogate]:
        model = network()
        inner = torch.optim.Adam(model.parameters(), lr=0.02) if with_inner else None
        return model, TargetSurrogate(model.parameters(), schedule="sqrt", inner_steps=2, inner=inner)

    model, optimizer = made()
    for _ in range(3):
        optimizer.step(closure_of(model))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    other, second = made()
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    second.load_state_dict(state)
    for one, two in ((model, optimizer), (other, second)):
        for _ in range(2):
            two.step(closure_of(one))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(MismatchError, match="inner"):
        second.load_state_dict(
            {**state, "inner": {}} if not with_inner else {k: state[k] for k in state if k != "inner"}
        )


def test_a_step_without_a_better_point_moves_nothing() -> None:
    """At the minimum of the loss J is 0, and so is the gradient of the surrogate."""
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def closure() -> tuple[Tensor, Tensor]:
        z = w * 2
        return (z - 2).square().mean(), z

    assert float(TargetSurrogate([w]).step(closure)) == 0
    assert torch.equal(w.detach(), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("closure", "words"),
    [
        (None, "needs a closure"),
        (lambda m: cross_entropy(m(X), Y), "two tensors; got Tensor"),
        (lambda m: (cross_entropy(m(X), Y), None), "two tensors"),
        (lambda m: (m(X), m(X)), "scalar loss"),
        (lambda m: (cross_entropy(m(X), Y), Y), "int64"),
        (lambda m: (cross_entropy(m(X), Y), m(X)), "not a copy"),
        (lambda m: (cross_entropy(m(X), Y).detach(), m(X)), "no gradient"),
    ],
)
def test_closure_without_logits_is_refused(closure: Callable[[nn.Module], object] | None, words: str) -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = TargetSurrogate(model.parameters())
    with pytest.raises(InputError, match=words):
        optimizer.step(None if closure is None else lambda: closure(model))  # type: ignore[arg-type,return-value]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_bad_numbers_are_named() -> None:
    model = network()
    optimizer = TargetSurrogate(model.parameters())

    def closure() -> tuple[Tensor, Tensor]:
        z = model(X)
        return z.sum() * torch.nan, z

    with pytest.raises(NotFiniteError):
        optimizer.step(closure)


def test_wrong_options_are_named_all_at_once() -> None:
    weights = list(network().parameters())
    with pytest.raises(InputError, match=r"(?s)eta.*length.*inner_steps.*schedule"):
        TargetSurrogate(weights, eta=0, length=-1, inner_steps=0, schedule="cosine")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="total_steps goes with"):
        TargetSurrogate(weights, schedule="exponential")
    with pytest.raises(InputError, match="total_steps goes with"):
        TargetSurrogate(weights, total_steps=3)
    with pytest.raises(InputError, match="same parameters"):
        TargetSurrogate(weights, inner=torch.optim.SGD(weights[:1], lr=0.1))
    with pytest.raises(InputError, match="one parameter group"):
        TargetSurrogate([{"params": weights[:1]}, {"params": weights[1:]}])
