"""A model trained through few numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eckart.errors import InputError, NotFiniteError
from eckart.landscape import SubspaceModel
from eckart.landscape.projections import PROJECTIONS

KINDS = list(PROJECTIONS)


def small(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scales", [False, True])
def test_starts_as_the_model_and_trains_only_the_budget(kind, scales: bool) -> None:
    model, x = small(), torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = model(x).detach()
    inside = SubspaceModel(model, 9, kind=kind, layer_scales=scales, seed=2)
    torch.testing.assert_close(inside(x), before)
    trained = {name: p.numel() for name, p in inside.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == inside.dimension == 9
    assert trained == ({"theta": 7, "scales": 2} if scales else {"theta": 9})
    torch.autograd.backward(inside(x).square().sum())
    assert float(inside.theta.grad.abs().min()) > 0  # every coordinate is reached
    with torch.no_grad():
        inside.theta += 0.1
    torch.autograd.backward(inside(x).square().sum())
    if scales:
        assert float(inside.scales.grad.abs().min()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_equals_theta_zero_plus_p_theta_by_hand(kind) -> None:
    model = small()
    origin = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
    inside = SubspaceModel(model, 6, kind=kind, layer_scales=True)
    with torch.no_grad():
        inside.theta.copy_(torch.arange(4.0))
        inside.scales.copy_(torch.tensor([2.0, -3.0]))
    step = inside.projection.dense() @ inside.theta
    step[:48] *= 2.0  # weight and bias of the first layer share a scale
    step[48:] *= -3.0
    now = torch.cat([p.flatten() for p in inside.parameters_now().values()])
    torch.testing.assert_close(now, origin + step)
    x = torch.ones(2, 5, dtype=torch.float64)
    out = inside(x).detach()
    merged = inside.merged()
    torch.testing.assert_close(merged(x).detach(), out)
    assert all(p.requires_grad for p in merged.parameters())


def test_full_dimension_reaches_every_model() -> None:
    """d = D is a change of coordinates: the subspace holds any target."""
    model, target = small(), torch.cat([p.detach().flatten() for p in small().parameters()]) + 1.0
    inside = SubspaceModel(model, 75, kind="fastfood")
    origin = torch.cat([p.flatten() for p in model.parameters()])
    theta = torch.linalg.solve(inside.projection.dense(), target - origin)
    with torch.no_grad():
        inside.theta.copy_(theta)
    torch.testing.assert_close(torch.cat([p.flatten() for p in inside.parameters_now().values()]), target)


def test_frozen_parameters_stay_and_tied_ones_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    inside = SubspaceModel(model, 3)
    assert inside.total == 16
    with torch.no_grad():
        inside.theta += 1
    W = inside.parameters_now()["0.weight"]
    x = torch.randn(2, 4)
    torch.testing.assert_close(inside(x), x @ W.T @ W.T @ model[2].weight.T)


def test_half_precision_models_move_in_float32() -> None:
    model = small(torch.bfloat16)
    inside = SubspaceModel(model, 5)
    assert inside.theta.dtype == torch.float32
    assert all(value.dtype == torch.bfloat16 for value in inside.parameters_now().values())
    torch.autograd.backward(inside(torch.ones(1, 5, dtype=torch.bfloat16)).float().sum())
    assert torch.isfinite(inside.theta.grad).all()


def test_state_of_a_trained_one_moves_to_a_fresh_one() -> None:
    inside, again = SubspaceModel(small(), 5, seed=8), SubspaceModel(small(), 5, seed=8)
    with torch.no_grad():
        inside.theta += 0.3
    again.load_state_dict(inside.state_dict())
    x = torch.ones(1, 5, dtype=torch.float64)
    torch.testing.assert_close(inside(x), again(x))
    assert set(inside.state_dict()) == {"theta", *(f"model.{name}" for name in small().state_dict())}


def test_refuses() -> None:
    with pytest.raises(InputError, match="no parameter"):
        SubspaceModel(nn.ReLU(), 2)
    with pytest.raises(InputError, match="at most the number of parameters, 75"):
        SubspaceModel(small(), 76)
    with pytest.raises(InputError, match="2 layers take one scale each"):
        SubspaceModel(small(), 2, layer_scales=True)
    with pytest.raises(InputError, match="dimension is an int"):
        SubspaceModel(small(), 2.5)  # type: ignore[arg-type]
    broken = small()
    with torch.no_grad():
        broken[0].bias[0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"0\.bias"):
        SubspaceModel(broken, 2)
