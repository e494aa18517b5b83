"""Learning rate and weight decay by width: the two presets, their exponents, and the check by top singular values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.optim import SCALING_RULES, layerwise_scaling, match_top_singular_values, param_groups
from eckart.optim.scaling import width_ratio


class Net(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, d)
        self.enter = nn.Linear(6, d)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)
        self.conv = nn.Conv1d(d, d, 3)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, 10)


def numbers(groups: list[dict], name: str) -> tuple[float, float]:
    group = next(g for g in groups if name in g["param_names"])
    return group["lr"], group["weight_decay"]


def test_exponents_of_both_rules() -> None:
    assert layerwise_scaling(0.01, 0.1, width=64, base_width=16) == (0.0025, 0.2)
    assert layerwise_scaling(0.01, 0.1, width=64, base_width=16, rule="mup") == (0.0025, 0.4)
    assert layerwise_scaling(0.01, 0.1, width=16, base_width=16) == (0.01, 0.1)


@pytest.mark.parametrize(("rule", "power"), [("mup", 1.0), ("layerwise", 0.5)])
def test_the_decay_keeps_what_the_rule_says(rule: str, power: float) -> None:
    """muP keeps η λ, the time in which AdamW forgets; the other keeps √(η/λ) d^¾, the paper's top singular value."""
    assert SCALING_RULES[rule].weight_decay == power
    for w in (2, 8):
        lr, decay = layerwise_scaling(0.01, 0.1, width=w, base_width=1, rule=rule)
        kept = {"mup": lr * decay / (0.01 * 0.1), "layerwise": (lr / decay / 0.1) ** 0.5 * w**0.75}
        assert kept[rule] == pytest.approx(1.0)


@pytest.mark.parametrize("rule", ["mup", "layerwise"])
def test_groups_by_base_width_and_by_base_model(rule: str) -> None:
    net = Net(32)
    power = SCALING_RULES[rule].weight_decay
    by_width = param_groups(net, lr=0.01, weight_decay=0.1, scale=rule, base_width=8, width=32)
    with torch.device("meta"):
        base = Net(8)
    by_model = param_groups(net, lr=0.01, weight_decay=0.1, scale=rule, base_model=base)
    for groups in (by_width, by_model):
        for name in ("up.weight", "down.weight", "conv.weight"):
            assert numbers(groups, name) == pytest.approx((0.0025, 0.1 * 4**power))
        for name in ("embed.weight", "norm.weight", "up.bias"):
            assert numbers(groups, name) == (0.01, 0.0)
        assert numbers(groups, "head.weight") == (0.01, 0.1 if rule == "mup" else 0.0)
    # Only one side of this one grows, which shapes tell and a width does not.
    assert numbers(by_model, "enter.weight") == (0.01, 0.1 if rule == "mup" else 0.0)
    assert numbers(by_width, "enter.weight")[0] == 0.0025


def test_ratios_of_shapes() -> None:
    assert width_ratio((64, 32), (16, 8)) == 4
    assert width_ratio((64, 6), (16, 6)) is None
    assert width_ratio((64, 16), (16, 8)) == 2
    assert width_ratio((64, 16), (16, 8), transposed=True) == 4
    assert width_ratio((16, 16, 3), (8, 8, 3)) == 2
    assert width_ratio((5, 16, 8), (5, 8, 4)) == 2
    assert width_ratio((5, 16, 8), (5, 8, 2), transposed=True) == 2


def test_top_singular_values_match_or_do_not() -> None:
    torch.manual_seed(0)
    base, wide = Net(8).double(), Net(16).double()
    with torch.no_grad():
        for name in ("up", "down"):
            small, large = getattr(base, name).weight, getattr(wide, name).weight
            large.zero_()[: small.shape[0], : small.shape[1]] = small
    found = match_top_singular_values(wide, base)
    assert set(found.details["ratios"]) == {"up.weight", "down.weight"}
    assert found.value == pytest.approx(1.0, abs=1e-12)
    with torch.no_grad():
        wide.up.weight.mul_(0.5)
    assert match_top_singular_values(wide, base).value == pytest.approx(2.0)
    assert match_top_singular_values(wide, base).details["ratios"]["up.weight"] == pytest.approx(0.5)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        layerwise_scaling(-1.0, float("nan"), width=0, base_width=2, rule="mpu")
    for part in ("lr is a number", "weight_decay is a number", "width is an int", "Did you mean 'mup'"):
        assert part in str(caught.value)
    with pytest.raises(MismatchError, match="there are none"):
        match_top_singular_values(nn.Linear(3, 3), nn.Linear(3, 3))
    spoilt = Net(16)
    with torch.no_grad():
        spoilt.up.weight[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"up\.weight"):
        match_top_singular_values(spoilt, Net(8))
