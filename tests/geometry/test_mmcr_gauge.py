"""The MMCR gauge: its bound, invariances, the loss as its mirror, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from eckart.errors import InputError, NotFiniteError
from eckart.geometry import mmcr_gauge, mmcr_loss


@pytest.mark.parametrize(("objects", "d"), [(4, 9), (9, 9), (12, 5)])
def test_the_bound_is_reached_and_never_passed(objects: int, d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(objects, 4, d, generator=generator, dtype=torch.float64)
    assert 0 < float(mmcr_gauge(Z)) < 100
    if objects <= d:
        tight = torch.eye(d, dtype=torch.float64)[:objects]
    else:  # a tight frame of unit vectors: real harmonics
        t = 2 * math.pi * torch.arange(objects, dtype=torch.float64) / objects
        waves = [torch.ones_like(t) / math.sqrt(2)]
        for k in range(1, (d - 1) // 2 + 1):
            waves += [(k * t).cos(), (k * t).sin()]
        tight = torch.stack(waves, dim=1)
    found = mmcr_gauge(tight[:, None].expand(-1, 3, -1))
    assert float(found) == pytest.approx(100)
    assert found.details["centroid"] == pytest.approx(1)
    assert found.details["within"] == pytest.approx(math.sqrt(3))


def test_a_single_point_scores_one_over_the_root() -> None:
    assert float(mmcr_gauge(torch.ones(16, 2, 20))) == pytest.approx(100 / math.sqrt(16))


def test_scale_and_rotation_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(6, 3, 5, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    lengths = 1 + torch.rand(6, 3, 1, generator=generator, dtype=torch.float64)
    assert float(mmcr_gauge(lengths * Z @ Q)) == pytest.approx(float(mmcr_gauge(Z)))


def test_the_loss_is_the_gauge_and_has_a_gradient() -> None:
    Z = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    loss, found = mmcr_loss(Z), mmcr_gauge(Z)
    assert -100 * float(loss.detach()) / math.sqrt(30) == pytest.approx(float(found))
    weighted = mmcr_loss(Z, within=0.5)
    assert float(weighted.detach() - loss.detach()) == pytest.approx(0.5 * found.details["within"])
    weighted.backward()
    assert Z.grad is not None
    assert Z.grad.isfinite().all()


def test_noise_scores_as_the_details_say() -> None:
    Z = torch.randn(40, 4, 30, generator=torch.Generator().manual_seed(5))
    found = mmcr_gauge(Z)
    assert float(found) == pytest.approx(found.details["noise"], rel=0.05)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="two views"):
        mmcr_gauge(torch.ones(3, 1, 4))
    with pytest.raises(InputError, match="2 views have length 0"):
        mmcr_gauge(torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]))
    with pytest.raises(InputError, match="objects × views × features"):
        mmcr_gauge(torch.ones(3, 4))
    with pytest.raises(NotFiniteError):
        mmcr_gauge(torch.full((2, 2, 2), torch.inf))
