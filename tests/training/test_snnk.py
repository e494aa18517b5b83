"""SNNK layers: features by their formulas, the closed form against the normal equations."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eckart.errors import InputError, NotFiniteError
from eckart.linalg.hashed import gaussians
from eckart.training import SNNKLinear, bundle, fit_features, raw_estimate, snnk


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 5)).to(dtype)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """1 is as good as the mean."""
    return float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


# ---- the features


@pytest.mark.parametrize("kind", ["exp", "relu", "gelu"])
def test_features_are_those_of_the_formula(kind: str) -> None:
    layer = SNNKLinear(6, 3, 50, kind=kind, scale=0.7, seed=4, dtype=torch.float64)  # type: ignore[arg-type]
    x = gaussian(4, 6)
    G = gaussians(4, (50, 6))
    z = 0.7 * x @ G.T
    expected = {
        "exp": torch.exp(z - 0.49 * x.square().sum(1, keepdim=True) / 2),
        "relu": z.clamp_min(0),
        "gelu": z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    }[kind]
    torch.testing.assert_close(layer.lift(x), expected / math.sqrt(50))
    torch.testing.assert_close(layer.lift(x.reshape(2, 2, 6)), layer.lift(x).reshape(2, 2, 50))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_raw_estimate_is_unbiased_for_the_exponential(scale: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 3).double()
    x = 0.4 * gaussian(5, 4)
    estimates = [raw_estimate(linear, features=400, scale=scale, seed=s)(x).detach() for s in range(200)]
    stacked = torch.stack(estimates)
    wanted = linear(x).exp().detach()
    standard_error = stacked.std(0) / math.sqrt(len(estimates))
    assert ((stacked.mean(0) - wanted).abs() < 5 * standard_error).all()
    assert (standard_error < 0.05 * wanted).all()


def test_relu_features_estimate_the_arc_cosine_kernel_and_not_relu() -> None:
    layer = SNNKLinear(6, 1, 200_000, kind="relu", dtype=torch.float64)
    w, x = gaussian(1, 6, seed=1), gaussian(1, 6, seed=2)
    norms = float(w.norm() * x.norm())
    angle = math.acos(float((w * x).sum()) / norms)
    kernel = norms * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
    estimate = float((layer.lift(w) * layer.lift(x)).sum())
    assert estimate == pytest.approx(kernel, rel=0.02)
    assert abs(kernel - max(0.0, float((w * x).sum()))) > 0.2 * kernel


# ---- the closed form


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_fit_solves_the_normal_equations(bias: bool, ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snnk, "CHUNK", 64)
    layer = SNNKLinear(12, 5, 30, scale=0.3, bias=bias, dtype=torch.float64)
    X = gaussian(150, 12)
    Y = mlp()(X).detach()
    error = fit_features(layer, X, Y, ridge=ridge)
    P, T = layer.lift(X), Y
    if bias:
        P, T = P - P.mean(0), T - T.mean(0)
    gram = P.T @ P
    theta = torch.linalg.inv(gram + ridge * gram.diagonal().mean() * torch.eye(30, dtype=torch.float64)) @ P.T @ T
    torch.testing.assert_close(layer.readout.detach(), theta.T, rtol=1e-6, atol=1e-8)
    predicted = P @ theta + (Y - T)
    torch.testing.assert_close(layer(X).detach(), predicted, rtol=1e-6, atol=1e-8)
    assert error == pytest.approx(float((predicted - Y).square().sum() / T.square().sum()), rel=1e-6)


def test_without_ridge_more_features_than_inputs_fit_them_all() -> None:
    X = gaussian(20, 12)
    layer = bundle(mlp(), X, features=60, ridge=0.0)
    torch.testing.assert_close(layer(X), mlp()(X), atol=1e-6, rtol=1e-6)


def test_the_closed_form_is_good_where_the_raw_estimate_is_worse_than_the_mean() -> None:
    """Inputs of the norm that a layer norm gives them, and the function whose raw estimate is unbiased."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 8).double()
    inputs, unseen = (nn.functional.layer_norm(gaussian(2000, 12, seed=s), (12,)) for s in (1, 2))
    wanted = linear(unseen).exp().detach()
    raw = raw_estimate(linear, features=128)(unseen).detach()
    ridge = bundle(lambda x: linear(x).exp(), inputs, features=128)(unseen).detach()
    assert relative_error(raw, wanted) > 1
    assert relative_error(ridge, wanted) < 0.1


@pytest.mark.parametrize("kind", ["exp", "relu", "gelu"])
def test_bundle_gets_better_with_features(kind: str) -> None:
    X, unseen = gaussian(3000, 12, seed=1), gaussian(500, 12, seed=2)
    errors = [
        relative_error(bundle(mlp(), X, features=m, kind=kind)(unseen).detach(), mlp()(unseen).detach())  # type: ignore[arg-type]
        for m in (20, 80, 320)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05


def test_bundle_takes_leading_dimensions_and_the_dtype_of_the_inputs() -> None:
    X = gaussian(10, 30, 12).float()
    layer = bundle(mlp(torch.float32), X, features=40)
    assert layer.readout.dtype == torch.float32
    assert float(layer.scale) == pytest.approx(1 / float(X.square().sum(-1).mean().sqrt()))
    assert layer(X).shape == (10, 30, 5)
    flat = bundle(mlp(torch.float32), X.reshape(300, 12), features=40)
    torch.testing.assert_close(layer(X).reshape(300, 5), flat(X.reshape(300, 12)), atol=1e-5, rtol=1e-5)


# ---- as a module


def test_no_random_stream_is_touched_and_every_call_is_the_same() -> None:
    x = gaussian(3, 12)
    network = mlp()
    before = torch.get_rng_state()
    layer = bundle(network, gaussian(100, 12), features=20)
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(before, torch.get_rng_state())


def test_a_file_needs_no_projection(tmp_path: Path) -> None:
    layer = bundle(mlp(), gaussian(100, 12), features=20, seed=2**35)
    assert set(layer.state_dict()) == {"readout", "bias", "seed", "scale"}
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = SNNKLinear(12, 5, 20, dtype=torch.float64)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = gaussian(3, 12)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
def test_other_precisions(dtype: torch.dtype, tolerance: float) -> None:
    """bfloat16 rounds projection, exponents and readout by up to 0.4 % each; a readout of size 20 adds them up."""
    layer = bundle(mlp(), gaussian(2000, 12), features=40, ridge=1e-2)
    x = gaussian(20, 12, seed=3)
    expected = layer(x)
    layer.to(dtype)
    assert layer(x.to(dtype)).dtype == dtype
    assert relative_error(layer(x.to(dtype)).double().detach(), expected.detach()) < tolerance


def test_gradients_reach_readout_bias_and_input() -> None:
    layer = bundle(mlp(), gaussian(200, 12), features=20)
    x = gaussian(3, 12).requires_grad_()
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert torch.autograd.gradcheck(layer, x)


# ---- what it refuses


def test_wrong_sizes_are_named_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)features.*kind.*scale"):
        SNNKLinear(3, 3, 0, kind="sin", scale=0.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed"):
        SNNKLinear(3, 3, 3, seed=-1)
    with pytest.raises(InputError, match=r"(?s)inputs.*outputs.*ridge"):
        fit_features(SNNKLinear(3, 2, 4), torch.ones(5, 4), torch.ones(4, 2), ridge=-1.0)


def test_features_that_overflow_are_refused() -> None:
    layer = SNNKLinear(3, 2, 4, scale=1.0, dtype=torch.float64)
    with pytest.raises(NotFiniteError, match="smaller scale"):
        fit_features(layer, torch.full((5, 3), float("inf"), dtype=torch.float64), torch.ones(5, 2))
