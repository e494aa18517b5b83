"""The gradient-norm penalty, against the exact gradient by double differentiation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.training import GradientNormPenalty


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def h_of(model: nn.Module, dtype: torch.dtype = torch.float64) -> Callable[[], Tensor]:
    return lambda: model(gaussian(9, 5, dtype=dtype)).square().mean()


def test_small_steps_give_the_gradient_of_the_norm() -> None:
    model = network()
    weights = list(model.parameters())
    grads = torch.autograd.grad(h_of(model)(), weights, create_graph=True)
    norm = torch.sqrt(sum((g.square().sum() for g in grads), torch.zeros((), dtype=torch.float64)))
    exact = torch.autograd.grad(0.7 * 0.2 * norm, weights)
    penalty = GradientNormPenalty(weights, weight=0.7, radius=0.2, step=1e-6)
    assert penalty.add(h_of(model)) == pytest.approx(float(norm.detach()))
    for p, wanted in zip(weights, exact, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_adds_the_difference_and_leaves_the_weights_alone(dtype: torch.dtype) -> None:
    model = network(dtype)
    before = copy.deepcopy(model.state_dict())
    weights = list(model.parameters())
    h = h_of(model, dtype)
    old = torch.autograd.grad(h(), weights)
    norm = float(torch.cat([g.double().flatten() for g in old]).norm())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p, g in zip(twin.parameters(), old, strict=True):
            p.add_(g, alpha=0.3 / norm)
    new = torch.autograd.grad(h_of(twin, dtype)(), list(twin.parameters()))
    for p in weights:
        p.grad = torch.ones_like(p)
    GradientNormPenalty(weights, weight=2.0, radius=0.3).add(h)
    for p, a, b in zip(weights, old, new, strict=True):
        torch.testing.assert_close(p.grad, 1 + 2.0 * (b - a))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weight_follows_the_bound() -> None:
    x = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    penalty = GradientNormPenalty([x], weight=0.5, radius=0.1, adaptive=True, bound=0.2, rate=2.0)
    assert penalty.add(lambda: x.square().sum() / 2) == pytest.approx(5.0)
    assert penalty.weight == pytest.approx(0.5 + 2.0 * (0.5 - 0.2))
    other = GradientNormPenalty([x])
    other.load_state_dict(penalty.state_dict())
    assert other.weight == penalty.weight
    with torch.no_grad():
        x.zero_()
    for _ in range(5):
        assert penalty.add(lambda: x.square().sum() / 2) == 0.0  # nothing to divide by
    assert penalty.weight == 0.0  # never below
    with pytest.raises(MismatchError, match="weight"):
        other.load_state_dict({})


def test_dropout_is_the_same_in_both_passes_and_after_it_the_stream_goes_on() -> None:
    """Of a linear model with one mask the gradient does not depend on the weights: the difference is 0."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 1)).double()
    x = gaussian(4, 50)
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    GradientNormPenalty(model.parameters(), weight=1.0).add(lambda: model(x).mean())
    assert torch.equal(torch.rand(2), wanted)
    assert all(float(p.grad.abs().max()) < 1e-12 for p in model.parameters())


def test_frozen_and_unused_parameters_are_left_out() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    GradientNormPenalty([*model.parameters(), unused], weight=1.0).add(h_of(model))
    assert model[0].bias.grad is None
    assert unused.grad is None
    assert model[0].weight.grad is not None


def test_weights_come_back_after_an_error() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def h() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("broken")
        return h_of(model)()

    with pytest.raises(KeyError):
        GradientNormPenalty(model.parameters()).add(h)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("h", "error", "words"),
    [
        (lambda m: m(gaussian(3, 5)), InputError, r"shape \(3, 1\)"),
        (lambda m: 1.0, InputError, "float"),
        (lambda m: m(gaussian(3, 5)).mean().detach(), InputError, "depends on none"),
        (lambda m: gaussian(1).requires_grad_().sum(), InputError, "depends on none"),
        (lambda m: m(gaussian(3, 5)).mean() * torch.nan, NotFiniteError, "NaN"),
    ],
)
def test_bad_h(h: Callable[[nn.Module], Tensor], error: type[Exception], words: str) -> None:
    model = network()
    with pytest.raises(error, match=words):
        GradientNormPenalty(model.parameters()).add(lambda: h(model))
    assert all(p.grad is None for p in model.parameters())


def test_wrong_options_are_named_all_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)weight.*bound.*radius.*step.*rate.*no parameter"):
        GradientNormPenalty([torch.ones(2)], weight=-1, bound=-1, radius=0, step=0, rate=0)
    with pytest.raises(InputError, match=r"model\.parameters"):
        GradientNormPenalty([1])  # type: ignore[list-item]
