"""IBP tightness: the gamma-function formula, a naive twin, exact networks, every layer it knows, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError, NotFiniteError
from eckart.geometry import gaussian_tightness, ibp_tightness


@pytest.mark.parametrize(
    ("width", "figure"), [(16, 0.309), (64, 0.156), (256, 0.0783), (1024, 0.0392)], ids=["16", "64", "256", "1024"]
)
def test_the_closed_form_and_gaussian_layers(width: int, figure: float) -> None:
    assert gaussian_tightness(width) == pytest.approx(figure, rel=2e-3)
    assert gaussian_tightness(width) == pytest.approx(
        math.sqrt(math.pi) * math.gamma((width + 1) / 2) / (width * math.gamma(width / 2))
        if width < 300
        else math.sqrt(math.pi / (2 * width)),
        rel=1e-3,
    )
    generator = torch.Generator().manual_seed(width)
    model = nn.Sequential(nn.Linear(400, width, bias=False), nn.Linear(width, 20, bias=False))
    for layer in model:
        nn.init.normal_(layer.weight, generator=generator)
    assert float(ibp_tightness(model, torch.zeros(1, 400))) == pytest.approx(gaussian_tightness(width), rel=0.05)


def test_width_one_is_exact() -> None:
    assert gaussian_tightness(1) == pytest.approx(1)


def naive(weights: list[Tensor], biases: list[Tensor], x: Tensor, box: Tensor) -> float:
    """Products of matrices, sample by sample."""
    means = []
    for one in x:
        product = torch.eye(len(one), dtype=x.dtype)
        loose = torch.eye(len(one), dtype=x.dtype)
        h = one
        for i, (W, b) in enumerate(zip(weights, biases, strict=True)):
            h, product, loose = W @ h + b, W @ product, W.abs() @ loose
            if i < len(weights) - 1:
                on = torch.diag((h > 0).to(x.dtype))
                h, product, loose = on @ h, on @ product, on @ loose
        means.append(float((product.abs() @ box / (loose @ box)).mean()))
    return sum(means) / len(means)


def test_against_matrix_products_with_unequal_boxes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Sequential(nn.Linear(7, 6), nn.ReLU()), nn.Linear(6, 3))
    model.double()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    x = torch.randn(5, 4, dtype=torch.float64)
    box = torch.tensor([0.1, 0.0, 2.0, 1.0], dtype=torch.float64)
    found = ibp_tightness(model, x, half_width=box)
    expected = naive([m.weight.detach() for m in linear], [m.bias.detach() for m in linear], x, box)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert float(ibp_tightness(model, x, half_width=3 * box)) == pytest.approx(expected, rel=1e-12)


def test_labels_take_the_differences_into_the_last_layer() -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(4, 6), nn.Linear(6, 3)
    x, y = torch.randn(4, 4), torch.tensor([0, 1, 2, 1])
    values = []
    for one, label in zip(x, y.tolist(), strict=True):
        others = [c for c in range(3) if c != label]
        margin = nn.Linear(6, 2)
        margin.weight.data, margin.bias.data = head.weight[label] - head.weight[others], torch.zeros(2)
        values.append(float(ibp_tightness(nn.Sequential(body, nn.ReLU(), margin), one[None])))
    found = ibp_tightness(nn.Sequential(body, nn.ReLU(), head), x, labels=y)
    assert found.details["per_sample"] == pytest.approx(values)


def test_one_layer_and_positive_weights_are_exact() -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 5)
    assert float(ibp_tightness(nn.Sequential(nn.Linear(5, 4)), x)) == pytest.approx(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    for layer in (model[0], model[2]):
        layer.weight.data.abs_()
    assert float(ibp_tightness(model, x)) == pytest.approx(1)


def test_convolutions_are_the_matrices_they_stand_for() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(-1, 1)
    tail = nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(12, 4))
    x = torch.randn(2, 2, 8, 8)
    affine = nn.Sequential(conv, norm).double()
    zero = affine(torch.zeros(1, 2, 8, 8, dtype=torch.float64))
    conv_matrix = torch.stack(
        [(affine(e.view(1, 2, 8, 8)) - zero).flatten() for e in torch.eye(128, dtype=torch.float64)], 1
    )
    pool = torch.stack(
        [nn.functional.avg_pool2d(e.view(1, 3, 4, 4), 2).flatten() for e in torch.eye(48, dtype=torch.float64)], 1
    )
    head = tail[-1].double()
    last = head.weight @ pool
    weights, biases = [conv_matrix.detach(), last.detach()], [zero.flatten().detach(), head.bias.detach()]
    expected = naive(weights, biases, x.double().flatten(1), torch.ones(128, dtype=torch.float64))
    assert float(ibp_tightness(nn.Sequential(conv, norm, tail), x)) == pytest.approx(expected, rel=1e-9)


def test_dead_outputs_are_left_out_and_said() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    model[0].weight.data, model[2].weight.data = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.eye(2)
    found = ibp_tightness(model, torch.ones(1, 2))
    assert float(found) == 1
    assert "1 outputs do not depend" in found.notes[0]
    nothing = ibp_tightness(nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()), torch.zeros(1, 2))
    assert nothing.value is None


def test_bad_input() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(InputError, match="Tanh"):
        ibp_tightness(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.ones(1, 3))
    with pytest.raises(InputError, match="Sequential"):
        ibp_tightness(nn.Linear(3, 2), torch.ones(1, 3))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch"):
        ibp_tightness(model, torch.ones(3))
    with pytest.raises(InputError, match="half_width"):
        ibp_tightness(model, torch.ones(1, 3), half_width=torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(NotFiniteError):
        ibp_tightness(model, torch.full((1, 3), torch.nan))
    with pytest.raises(InputError, match="hidden units"):
        gaussian_tightness(0)
