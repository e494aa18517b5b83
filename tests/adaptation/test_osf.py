"""OSF: nothing leaks under any optimiser, and the shares of layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from eckart.adaptation import Layout, Source
from eckart.adaptation.osf import Options, OsfDelta, _Projected, energy_shares, importance_shares, leak
from eckart.errors import InputError

LAYOUT = Layout(name="up", kind="linear", out_features=40, in_features=30)
WEIGHT = torch.randn(1, 40, 30, generator=torch.Generator().manual_seed(0))
Optimiser = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMISERS: dict[str, Optimiser] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
}


def fitted(delta: OsfDelta | _Projected, optimiser: Optimiser, steps: int = 20) -> float:
    """Leak after some steps towards a random matrix."""
    delta.start(Source(layout=LAYOUT, weight=WEIGHT))
    target = torch.randn(1, 40, 30, generator=torch.Generator().manual_seed(5))
    steps_of = optimiser(list(delta.parameters()))
    for _ in range(steps):
        steps_of.zero_grad()
        torch.autograd.backward((delta.delta() - target).square().sum())
        steps_of.step()
    assert float(delta.delta().detach().norm()) > 1e-2
    return leak(delta.delta(), delta.U, delta.Vh)


@pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=list(OPTIMISERS))
def test_nothing_leaks_by_construction(optimiser: Optimiser) -> None:
    assert fitted(OsfDelta(LAYOUT, 6, Options(protect=0.5)), optimiser) < 1e-6


def test_projected_gradients_leak_under_adam() -> None:
    """The other way, gradients without their protected part, holds for SGD alone."""
    assert fitted(_Projected(LAYOUT, 6, Options(protect=0.5)), OPTIMISERS["adamw"]) > 0.05
    assert fitted(_Projected(LAYOUT, 6, Options(protect=0.5)), OPTIMISERS["sgd"]) < 1e-3


def test_leak_is_the_share_outside_of_both_complements() -> None:
    U, _, Vh = torch.linalg.svd(torch.randn(9, 7, dtype=torch.float64), full_matrices=False)
    U, Vh = U[:, :3], Vh[:3]
    change = torch.randn(9, 7, dtype=torch.float64)
    left, right = torch.eye(9, dtype=torch.float64) - U @ U.T, torch.eye(7, dtype=torch.float64) - Vh.T @ Vh
    inside = change - left @ change @ right
    assert leak(change, U, Vh) == pytest.approx(float(inside.norm() / change.norm()))
    assert leak(left @ change @ right, U, Vh) < 1e-12
    assert leak(torch.zeros(9, 7), U, Vh) == 0


def test_share_of_single_layers_and_nothing_protected() -> None:
    options = Options(protect=0.5, layers={"up": 0.2})
    assert OsfDelta(LAYOUT, 2, options).U.shape[-1] == 6
    assert OsfDelta.most(LAYOUT, options) == 24
    free = OsfDelta(LAYOUT, 2, Options(protect=0.0))
    free.start(Source(layout=LAYOUT, weight=WEIGHT))
    assert torch.equal(free.factors()[1], free.A)
    assert OsfDelta.fits(LAYOUT, Options(protect=0.99)) is not None


def test_shares_by_energy() -> None:
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0]))
    assert energy_shares({"a": W}, 0.6) == {"a": 0.25}  # 9 of 15
    assert energy_shares({"a": W}, 0.61) == {"a": 0.5}
    assert energy_shares({"a": W}, 0.999) == {"a": 0.75}  # one direction stays free
    with pytest.raises(InputError, match="energy"):
        energy_shares({"a": W}, 1.0)


def test_shares_by_importance() -> None:
    found = importance_shares({"a": 0.5, "b": 1.0, "c": 1.5})
    assert found == pytest.approx({"a": 0.45, "b": 0.8, "c": 0.95})  # .1 + I .7, held below .95
    with pytest.raises(InputError, match="mean above 0"):
        importance_shares({"a": -1.0, "b": 0.5})
    with pytest.raises(InputError, match="target"):
        importance_shares({"a": 1.0}, least=0.9, target=0.5)


def test_options_out_of_range() -> None:
    with pytest.raises(InputError, match=r"2 problems[\s\S]*layers\['q'\]"):
        Options(protect=1.0, layers={"q": -0.1})
