"""SAID: one vector for all layers, unit columns over the whole model, the exact transpose."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch

from eckart.adaptation import Layout, Source
from eckart.adaptation.said import Options, SaidDelta, share
from eckart.errors import InputError
from eckart.landscape.projections import ProjectionKind

SIZES = {"a": (24, 20), "b": (10, 40), "c": (16, 16)}


def tied(dimension: int = 6, **options: Any) -> list[SaidDelta]:
    deltas = []
    for name, (m, n) in SIZES.items():
        layout = Layout(name=name, kind="linear", out_features=m, in_features=n)
        delta = SaidDelta(layout, dimension, Options(**options))
        delta.start(Source(layout=layout, weight=torch.ones(1, m, n)))
        deltas.append(delta)
    share(deltas)
    return deltas


def whole(deltas: list[SaidDelta], theta: torch.Tensor) -> torch.Tensor:
    deltas[0].fill(theta=theta)
    return torch.cat([delta.delta().detach().flatten() for delta in deltas])


def test_all_layers_hold_the_same_numbers() -> None:
    deltas = tied()
    assert len({id(delta.theta) for delta in deltas}) == 1
    trained = {id(p): p for delta in deltas for p in delta.parameters()}
    assert sum(p.numel() for p in trained.values()) == 6 + 3


@pytest.mark.parametrize("kind", get_args(ProjectionKind))
def test_columns_of_the_whole_map_have_norm_one(kind: ProjectionKind) -> None:
    deltas = tied(projection=kind)
    P = torch.stack([whole(deltas, unit) for unit in torch.eye(6)], dim=1)
    tolerance = 0.35 if kind == "fastfood" else 1e-5  # Fastfood cuts rows off, so its columns are unit on average
    torch.testing.assert_close(torch.linalg.vector_norm(P, dim=0), torch.ones(6), rtol=0, atol=tolerance)
    if kind == "one-hot":
        torch.testing.assert_close(P.T @ P, torch.eye(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", get_args(ProjectionKind))
def test_gradient_is_the_exact_transpose(kind: ProjectionKind) -> None:
    """Circulated code scales it by 1/n per tensor, so that large layers hardly count."""
    deltas = tied(projection=kind, scales=False)
    P = torch.stack([whole(deltas, unit) for unit in torch.eye(6)], dim=1)
    weights = torch.randn(P.shape[0], generator=torch.Generator().manual_seed(1))
    loss = (torch.cat([delta.delta().flatten() for delta in deltas]) * weights).sum()
    (gradient,) = torch.autograd.grad(loss, deltas[0].theta)
    torch.testing.assert_close(gradient, P.T @ weights, rtol=1e-4, atol=1e-5)


def test_layers_draw_by_name_and_the_file_holds_the_seed() -> None:
    deltas = tied()
    assert len({int(delta.seed) for delta in deltas}) == 3
    theta = torch.randn(6)
    before = whole(deltas, theta)
    again = [SaidDelta(delta.layout, 6, Options()) for delta in deltas]
    for delta, old in zip(again, deltas, strict=True):
        delta.load_state_dict(old.state_dict())
    share(again)
    assert torch.equal(torch.cat([delta.delta().detach().flatten() for delta in again]), before)
    assert torch.equal(copy.deepcopy(again[1]).delta(), again[1].delta())


def test_layers_of_different_dimension_are_refused() -> None:
    deltas = tied()
    odd = SaidDelta(Layout(name="odd", kind="linear", out_features=4, in_features=4), 5, Options())
    with pytest.raises(InputError, match="odd has 5"):
        share([*deltas, odd])


def test_options_out_of_range() -> None:
    with pytest.raises(InputError, match="2 problems"):
        Options(projection="sparse", scales=2)  # type: ignore[arg-type]
