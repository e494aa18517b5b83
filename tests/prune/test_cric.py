"""CRIC's cycles: what they collect, that they leave no trace, and bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError, NotFiniteError
from eckart.prune import Schedule, chained, cric_scores, fixed
from eckart.prune.selectors import Selector, View


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.BatchNorm1d(10), nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 6))
    return model.double()


X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_model_and_optimizer_are_as_before() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (model(X) - X).square().mean().backward()
        optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    groups = [chained(model, "3", "5")]
    found = cric_scores(model, groups, lambda: (model(X) - X).square().mean(), optimizer, keep=0.4)
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())  # running statistics too
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before[1][index][k]) for k, v in state.items())
    assert all(p.grad is None for p in model.parameters())
    assert found.scores["3→5"].isfinite().all()
    assert len(found.probes["3→5"]) == 3
    engine = Schedule(model, groups=groups, selector=fixed(found.scores), keep=0.4, steps=4, curve="one-shot")
    engine.attach(optimizer)
    assert int(engine.kept["3→5"].sum()) == 2  # 0.4 of 7 groups of 14 weights, from below


def test_cycles_end_when_nobody_new_falls_low() -> None:
    """Scores that do not change: one cycle. Scores that change at every look: the newcomers join the next."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    group = chained(model, "0", "2")

    def loss() -> Tensor:
        return (model(X) - X).square().mean()

    still = Selector("still", lambda views: {name: torch.arange(8.0) for name in views})
    found = cric_scores(model, [group], loss, optimizer, keep=0.5, selector=still)
    assert (found.cycles, found.settled) == (1, True)
    torch.testing.assert_close(found.scores["0→2"], torch.arange(8.0) + sum(found.probes["0→2"]) / 3 / 8)

    turns = iter(range(10_000))

    def turning(views: dict[str, View]) -> dict[str, Tensor]:
        return {name: torch.arange(8.0).roll(next(turns)) for name in views}

    found = cric_scores(model, [group], loss, optimizer, keep=0.5, steps=1, selector=Selector("turning", turning))
    assert found.settled
    assert 2 <= found.cycles <= 5  # each cycle of one step brings one group of the other four
    found = cric_scores(
        model, [group], loss, optimizer, keep=0.5, steps=1, cycles=1, selector=Selector("turning", turning)
    )
    assert not found.settled


def test_probes_are_ratios_of_the_loss() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss() -> Tensor:
        return (model(X) - X).square().mean()

    order = torch.arange(8.0)
    fixed_order = Selector("order", lambda views: dict.fromkeys(views, order))
    found = cric_scores(model, [chained(model, "0", "2")], loss, optimizer, keep=0.5, cycles=1, selector=fixed_order)
    for ratio, gone in zip(found.probes["0→2"], (2, 4, 6), strict=True):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for tensor in (twin[0].weight, twin[0].bias, twin[2].weight.T):
                tensor[:gone] = 0
            assert ratio == pytest.approx(float((twin(X) - X).square().mean() / loss()), rel=1e-6)


def test_bad_input() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    groups = [chained(model, "3", "5")]
    with pytest.raises(InputError) as error:
        cric_scores(model, groups, lambda: X.sum(), optimizer, keep=0.5, steps=0, cycles=0, probes=(0, 2), tolerance=-1)
    for part in ("steps is", "cycles is", "got 0", "got 2", "tolerance"):
        assert part in str(error.value)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotFiniteError, match="nan"):
        cric_scores(model, groups, lambda: (model(X) * float("nan")).sum(), optimizer, keep=0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
