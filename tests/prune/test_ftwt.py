"""Dynamic routing: labels against a loop, gradients apart, counts, model manners, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.prune.ftwt import DynamicRouting, firing


def conv_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16, 3)),
    ).to(dtype)


def images(n: int = 10, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.8, 1.0])
def test_the_fewest_filters_that_hold_the_mass_fire(mass: float) -> None:
    heat = torch.rand(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heat[heat < 0.2] = 0
    heat[3] = 0
    for row, found in zip(heat.tolist(), firing(heat, mass), strict=True):
        expected, reached = set(), 0.0
        for i in sorted(range(9), key=lambda i: -row[i]):
            if reached < mass * sum(row) * (1 - 1e-6) and row[i] > 0:
                expected.add(i)
                reached += row[i]
        assert set(found.nonzero()[:, 0].tolist()) == expected


def test_at_first_all_filters_are_on_and_the_model_is_as_before() -> None:
    model = conv_net()
    X = images()
    expected = model.eval()(X)
    names = list(model.state_dict())
    routing = DynamicRouting(model, mass=0.7, include=["0", "3"])
    assert routing.names == ("0", "3")
    torch.testing.assert_close(model(X), expected)
    assert list(model.state_dict()) == names
    assert [tuple(p.weight.shape) for p in routing.predictors] == [(6, 2), (4, 6)]
    routing.remove()
    routing.remove()
    torch.testing.assert_close(model(X), expected)
    for call in (routing.loss, lambda: routing.report(X)):
        with pytest.raises(InputError, match="removed"):
            call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_off_is_zero_for_that_example_only(dtype: torch.dtype) -> None:
    model = conv_net(dtype).eval()
    X = images(dtype=dtype)
    whole = model[:3](X)
    routing = DynamicRouting(model, mass=0.7, include=["0"], at={"0": "1"})
    with torch.no_grad():
        routing.predictors[0].weight.normal_(generator=torch.Generator().manual_seed(2))
        routing.predictors[0].bias.fill_(-2.5)
    found = model[:3](X)
    on = routing._routes["0"].logits > 0
    torch.testing.assert_close(
        routing._routes["0"].logits, routing.predictors[0](X.abs().flatten(2).amax(2)), rtol=2e-2, atol=1e-2
    )
    assert on.any()
    assert not on.all()
    assert (on != on[0]).any()
    torch.testing.assert_close(found, whole * on[:, :, None, None])


def test_the_losses_are_apart() -> None:
    model = mlp()
    X = torch.randn(12, 5, dtype=torch.float64)
    routing = DynamicRouting(model, mass=0.6, include=["0"])
    out = model(X)
    heat = model[0](X).relu()
    label = firing(heat.detach(), 0.6).double()
    expected = nn.functional.binary_cross_entropy_with_logits(torch.ones_like(label), label) * 8
    torch.testing.assert_close(routing.loss(), expected)
    out.square().sum().backward()
    assert all(p.grad is None for p in routing.predictors.parameters())
    model.zero_grad()
    model(X)
    routing.loss().backward()
    assert all(p.grad is not None for p in routing.predictors.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_loss_is_the_mean_over_layers() -> None:
    model = conv_net()
    both = DynamicRouting(model, mass=0.7, include=["0", "3"])
    model(images())
    routes = both._seen()
    each = [nn.functional.binary_cross_entropy_with_logits(r.logits, r.label) * r.label.shape[1] for r in routes]
    torch.testing.assert_close(both.loss(), sum(each) / 2)


def test_predictors_learn_what_fires() -> None:
    model = mlp()
    X = torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    routing = DynamicRouting(model, mass=0.8, include=["0"])
    before = routing.report(X).agreement
    optimizer = torch.optim.Adam(routing.predictors.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        model(X)
        routing.loss().backward()
        optimizer.step()
    assert routing.report(X).agreement > before + 0.1


def test_counts_by_hand() -> None:
    model = conv_net()
    routing = DynamicRouting(model, mass=0.7, include=["0"], at={"0": "1"}, readers={"0": "3"})
    with torch.no_grad():
        routing.predictors[0].bias.copy_(torch.tensor([1.0, -1, -1, 1, 1, -1]))
    model.train()
    model[3].eval()
    report = routing.report(images())
    assert model.training
    assert not model[3].training
    first, reader = 6 * 2 * 9 * 16, 4 * 3 * 9 * 4  # filters · channels · kernel · places, two groups
    assert report.kept == {"0": 0.5}
    assert report.macs_dense == first + reader
    assert report.macs == (first + reader) / 2 + 12
    assert report.saved == 1 - report.macs / report.macs_dense


def test_all_bad_options_are_named() -> None:
    model = conv_net()
    with pytest.raises(InputError) as caught:
        DynamicRouting(model, mass=0, activation=torch.exp, include=["0"], at={"3": "9"}, readers={"0": "2"})
    for words in ("mass", "activation", "3 is no routed layer", "no module 9", "2 is no linear map"):
        assert words in str(caught.value)
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(InputError, match="no layer"):
        DynamicRouting(nn.Sequential(nn.ReLU()), mass=0.5)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(NotFiniteError):
        DynamicRouting(model, mass=0.5, include=["0"])


def test_forward_passes_that_do_not_fit() -> None:
    model = mlp()
    routing = DynamicRouting(model, mass=0.5, include=["0"])
    with pytest.raises(InputError, match="no forward pass"):
        routing.loss()
    X = torch.ones(2, 5, dtype=torch.float64)
    with pytest.raises(NotFiniteError, match="0"):
        routing.report(X * torch.nan)
    wrong = DynamicRouting(mlp(), mass=0.5, include=["0"], at={"0": "2"})
    with pytest.raises(MismatchError, match="8 filters after 0"):
        wrong.report(X)
