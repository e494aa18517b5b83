"""Progressive gradient flow: schedules against their formulas, forward and backward against plain loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.prune.gradient_flow import FLOWS, GradientFlow, flow_stages
from eckart.prune.masks import keep_zero
from eckart.prune.patterns import NofM

DECAYING = [name for name in FLOWS if name != "sdgf-custom"]


def net(dtype: torch.dtype = torch.float64, width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)


def data(dtype: torch.dtype = torch.float64, width: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(50, width, generator=generator, dtype=torch.float64)
    return X.to(dtype), torch.randn(50, 4, generator=generator, dtype=torch.float64).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, dtype: torch.dtype = torch.float64) -> None:
    X, y = data(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - y).square().mean().backward()
        optimizer.step()


def slow_mask(weight: Tensor, keep: int, of: int) -> Tensor:
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], of):
            group = weight[row, start : start + of].abs().tolist()
            best = sorted(range(of), key=lambda i: -group[i])[:keep]
            mask[row, [start + i for i in best]] = True
    return mask


# ---- the schedules


@pytest.mark.parametrize(
    ("schedule", "pattern", "expected"),
    [
        ("mdgf-linear", NofM(1, 16), ["1 of 16"]),
        ("sdgf-stepwise", NofM(1, 16), ["15 of 16", "8 of 16", "4 of 16", "2 of 16", "1 of 16"]),
        ("sdgf-stepwise", NofM(2, 4), ["3 of 4", "2 of 4"]),
        ("sdgf-stepwise", NofM(3, 8), ["7 of 8", "4 of 8", "3 of 8"]),
        ("sdgf-stepwise", NofM(3, 4), ["3 of 4"]),
        ("sdgf-geometric", NofM(2, 4), ["16 of 32", "8 of 16", "4 of 8", "2 of 4"]),
        ("sdgf-densify", NofM(1, 4), ["1 of 32", "1 of 16", "1 of 8", "1 of 4"]),
        ("sr-ste", NofM(2, 8), ["2 of 8"]),
    ],
)
def test_stages_are_those_of_the_paper(schedule: str, pattern: NofM, expected: list[str]) -> None:
    assert [str(stage) for stage in flow_stages(schedule, pattern)] == [f"keep {words}" for words in expected]


def test_beta_and_patterns_over_time() -> None:
    """10 dense steps, 80 that decay, 10 at the end."""
    share = {"steps": 100, "pattern": "1:8", "dense": 0.1, "fine_tune": 0.1, "include": ["0"]}
    linear = GradientFlow(net(), schedule="mdgf-linear", **share)
    exponential = GradientFlow(net(), schedule="mdgf-exponential", rate=5.0, **share)
    steps = GradientFlow(net(), schedule="sdgf-stepwise", **share)  # 7, 4, 2, 1 of 8: 20 steps each
    for t in range(105):
        x = (t - 10) / 80
        if t < 10:
            assert linear.now() == exponential.now() == steps.now() == (None, 1.0)
        elif t < 90:
            assert linear.now() == (NofM(1, 8), pytest.approx(1 - x))
            assert exponential.now() == (NofM(1, 8), pytest.approx(math.exp(-5 * x)))
            assert steps.now() == (NofM((7, 4, 2, 1)[(t - 10) // 20], 8), 0.0)
        else:
            assert linear.now() == exponential.now() == steps.now() == (NofM(1, 8), 0.0)
        for flow in (linear, exponential, steps):
            flow.step()


def test_a_custom_schedule_takes_its_stages() -> None:
    flow = GradientFlow(
        net(), pattern="1:4", steps=20, schedule="sdgf-custom", stages=["1:2", "1:4"], fine_tune=0.0, include=["0"]
    )
    seen = []
    for _ in range(20):
        seen.append(flow.now()[0])
        flow.step()
    assert seen == [NofM(1, 2)] * 10 + [NofM(1, 4)] * 10


# ---- forward and backward


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_is_the_formula(dtype: torch.dtype) -> None:
    model = net(dtype)
    W = model[0].weight.detach().clone()
    flow = GradientFlow(model, pattern="2:8", steps=10, schedule="mdgf-linear", fine_tune=0.0, include=["0"])
    for _ in range(4):
        flow.step()
    M = slow_mask(W, 2, 8)
    assert torch.equal(model[0].weight, torch.where(M, W, 0.6 * W))


@pytest.mark.parametrize("schedule", ["mdgf-linear", "sr-ste"])
def test_backward_is_straight_through_and_sr_ste_shrinks(schedule: str) -> None:
    model, plain = net(), net()
    X, y = data()
    flow = GradientFlow(model, pattern="1:4", steps=10, schedule=schedule, shrink=0.3, include=["0"])
    for _ in range(3):
        flow.step()
    W = model[0].parametrizations.weight.original
    plain[0].weight.data.copy_(model[0].weight)
    for m in (model, plain):
        (m(X) - y).square().mean().backward()
    expected = plain[0].weight.grad
    if schedule == "sr-ste":
        expected = expected + 0.3 * W.detach() * ~slow_mask(W.detach(), 1, 4)
    torch.testing.assert_close(W.grad, expected)


def test_backward_masked_is_the_derivative() -> None:
    model = net()
    flow = GradientFlow(
        model, pattern="1:4", steps=10, schedule="mdgf-linear", backward="masked", fine_tune=0, include=["0"]
    )
    for _ in range(6):
        flow.step()
    W = model[0].parametrizations.weight.original
    X, y = data()
    loss = (model(X) - y).square().mean()
    loss.backward()
    for i, j in ((0, 0), (3, 17), (31, 63)):
        with torch.no_grad():
            W[i, j] += 1e-6
            moved = (model(X) - y).square().mean()
            W[i, j] -= 1e-6
        assert float(W.grad[i, j]) == pytest.approx(float(moved - loss.detach()) / 1e-6, rel=1e-3, abs=1e-8)


def test_a_convolution_is_grouped_along_its_input_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, bias=False)).double()
    W = model[0].weight.detach().clone()
    masks = GradientFlow(model, pattern="2:4", steps=1).bake()
    rows = W.permute(0, 2, 3, 1).reshape(-1, 8)
    expected = slow_mask(rows, 2, 4).reshape(6, 3, 3, 8).permute(0, 3, 1, 2)
    assert torch.equal(masks["0.weight"], expected)
    assert torch.equal(model[0].weight, W * expected)
    assert model(torch.randn(2, 8, 5, 5, dtype=torch.float64)).shape == (2, 6, 5, 5)


def test_conv1d_of_transformers_is_grouped_along_its_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 8)).double()
    W = model[0].weight.detach().clone()
    GradientFlow(model, pattern="2:4", steps=1).bake()
    assert torch.equal(model[0].weight, W * slow_mask(W.T, 2, 4).T)


# ---- the model afterwards


@pytest.mark.parametrize("schedule", DECAYING)
@pytest.mark.parametrize("before", [True, False], ids=["optimizer first", "flow first"])
def test_bake_leaves_the_same_parameters_with_the_pattern(schedule: str, before: bool) -> None:
    model = net()
    parameters, names = list(model.parameters()), [name for name, _ in model.named_parameters()]
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01) if before else None
    flow = GradientFlow(model, pattern="1:4", steps=12, schedule=schedule, include=["0"])
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01)
    flow.attach(optimizer)
    train(model, optimizer, 12)
    model.eval()
    with torch.no_grad():
        last = model(data()[0])
    masks = flow.bake()
    assert torch.equal(model(data()[0]), last)  # what was trained is what is left
    assert type(model[0]) is nn.Linear
    assert [name for name, _ in model.named_parameters()] == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(parameters, start, strict=True))
    assert set(masks) == {"0.weight"}
    assert masks["0.weight"].reshape(-1, 4).sum(1).eq(1).all()
    assert not masks.leaks(model)
    copy.deepcopy(model).load_state_dict(model.state_dict())
    with keep_zero(masks, model, optimizer):
        train(model, optimizer, 3)
    assert not masks.leaks(model)


def test_pruned_weights_may_come_back_before_the_end() -> None:
    """Straight-through: the mask of the end is not that of the start."""
    model = net()
    first = slow_mask(model[0].weight.detach(), 1, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    flow = GradientFlow(model, pattern="1:4", steps=30, schedule="sr-ste", include=["0"])
    flow.attach(optimizer)
    train(model, optimizer, 30)
    assert not torch.equal(flow.bake()["0.weight"], first)


def test_a_resumed_flow_ends_where_the_other_does() -> None:
    share = {"pattern": "1:4", "steps": 10, "schedule": "mdgf-linear", "include": ["0"]}
    whole = net()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    flow = GradientFlow(whole, **share)
    flow.attach(optimizer)
    train(whole, optimizer, 4)
    state, weights = flow.state_dict(), copy.deepcopy(whole.state_dict())
    train(whole, optimizer, 6)
    flow.bake()

    resumed = net()
    again = GradientFlow(resumed, **share)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    second = torch.optim.SGD(resumed.parameters(), lr=0.1)
    again.attach(second)
    train(resumed, second, 6)
    again.bake()
    assert torch.equal(whole[0].weight, resumed[0].weight)
    assert torch.equal(whole[2].weight, resumed[2].weight)


def test_a_copy_computes_the_same_while_it_trains() -> None:
    model = net()
    flow = GradientFlow(model, pattern="1:4", steps=10, include=["0"])
    flow.step()
    assert torch.equal(copy.deepcopy(model)(data()[0]), model(data()[0]))


# ---- bad input


def test_all_bad_options_are_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        GradientFlow(net(), pattern="row", steps=0, schedule="sdgf", rate=-1.0, dense=0.6, fine_tune=0.5, shrink=-1)
    for word in ("schedule", "pattern", "steps", "rate", "dense", "shrink"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "4:4"},
        {"rate": 1.0, "schedule": "sdgf-stepwise"},
        {"stages": ["1:2"]},
        {"schedule": "sdgf-custom"},
        {"schedule": "sdgf-custom", "stages": ["1:4", "1:2"]},
        {"schedule": "sdgf-custom", "stages": ["row", "1:4"]},
        {"schedule": "sr-ste", "backward": "masked"},
        {"backward": "straight"},
        {"pattern": "1:6"},
    ],
)
def test_options_that_cannot_be_honoured(options: dict[str, object]) -> None:
    model = net()
    with pytest.raises(InputError):
        GradientFlow(model, **{"pattern": "1:4", "steps": 10, **options})
    assert list(model.state_dict()) == list(net().state_dict())  # nothing was changed


def test_every_map_that_does_not_divide_is_named() -> None:
    with pytest.raises(InputError, match="64 inputs do not divide into keep 8 of 128") as caught:
        GradientFlow(net(), pattern="1:16", steps=10, schedule="sdgf-geometric")
    assert "2: its 32 inputs do not divide into keep 8 of 128, keep 4 of 64" in str(caught.value)


def test_weights_that_cannot_be_trained() -> None:
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match="shares"):
        GradientFlow(tied, pattern="2:4", steps=1)
    frozen = net()
    frozen[0].weight.requires_grad_(False)
    with pytest.raises(InputError, match="frozen"):
        GradientFlow(frozen, pattern="2:4", steps=1)
    twice = net()
    GradientFlow(twice, pattern="2:4", steps=1)
    with pytest.raises(InputError):
        GradientFlow(twice, pattern="2:4", steps=1)
    broken = net()
    broken[0].weight.data[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="0"):
        GradientFlow(broken, pattern="2:4", steps=1)


def test_order_of_calls() -> None:
    model = net()
    flow = GradientFlow(model, pattern="2:4", steps=4)
    with pytest.raises(InputError, match="lacks"):
        flow.attach(torch.optim.SGD([model[0].bias], lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flow.attach(optimizer)
    with pytest.raises(InputError, match="attached"):
        flow.attach(optimizer)
    with pytest.raises(MismatchError, match="4 steps"):
        flow.load_state_dict({"taken": 1, "steps": 5})
    flow.bake()
    with pytest.raises(InputError, match="baked"):
        flow.bake()
    with pytest.raises(InputError, match="baked"):
        flow.attach(optimizer)
    train(model, optimizer, 1)
    assert flow.taken == 0  # the hook is gone
