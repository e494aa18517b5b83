"""Maestro, against naive twins: autograd for the penalty, sliced weights for the cut pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from transformers.pytorch_utils import Conv1D

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.layers import FactoredConv, FactoredLinear
from eckart.records import Rank
from eckart.training import Maestro


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5)).double()


def steps(model: nn.Module, maestro: Maestro, optimizer: torch.optim.Optimizer, count: int, start: int = 0) -> None:
    for step in range(start, start + count):
        x = gaussian(6, 9, seed=100 + step).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = maestro.loss(lambda x=x: model(x).square().mean())
        loss.backward()
        optimizer.step()


# ---- the start

MAPS = {
    "wide": (lambda: nn.Linear(9, 7), (3, 9)),
    "tall without bias": (lambda: nn.Linear(7, 9, bias=False), (3, 7)),
    "conv1d of transformers": (lambda: Conv1D(7, 9), (3, 9)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 7, 7)),
    "conv over time": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 8)),
}


@pytest.mark.parametrize(("make", "shape"), MAPS.values(), ids=MAPS)
def test_the_start_changes_nothing_and_is_balanced(make, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make()).double()
    x = gaussian(*shape)
    expected = model(x)
    maestro = Maestro(model)
    torch.testing.assert_close(model(x), expected)
    assert isinstance(model[0], (FactoredLinear, FactoredConv))
    assert maestro.ranks() == {"0": maestro.sites[0].full_rank}
    a, b = maestro._factors("0")  # √S Vᵀ and U√S have the same Gram matrices: S
    torch.testing.assert_close(a @ a.mT, b.mT @ b)
    assert (maestro.importance("0").diff() <= 0).all()
    assert all(p.requires_grad for p in model.parameters())


# ---- the cut pass


@pytest.mark.parametrize(("make", "shape"), MAPS.values(), ids=MAPS)
def test_a_cut_pass_is_that_of_sliced_factors(make, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make()).double()
    maestro = Maestro(model, seed=3)
    layer, x = model[0], gaussian(*shape)
    a, b = maestro._factors("0")
    seen = set()
    for _ in range(12):
        with maestro.sampled() as (name, kept):
            found = model(x)
        W = b[:, :, :kept] @ a[:, :kept]  # (groups, out, in · kernel)
        if isinstance(layer, FactoredLinear):
            expected = linear(x, W[0], layer.b.bias)
        else:
            flat = W.reshape(layer.out_channels, -1, *layer.kernel_size)
            expected = torch.nn.functional.__dict__[f"conv{layer.spatial}d"](
                x, flat, layer.b.bias, layer.stride, layer.padding, layer.dilation, layer.groups
            )
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found.square().sum(), layer.a.weight)[0],
            torch.autograd.grad(expected.square().sum(), layer.a.weight)[0],
        )
        assert name == "0"
        seen.add(kept)
    assert len(seen) > 2
    assert min(seen) >= 1
    torch.testing.assert_close(model(x), model(x))


def test_the_loss_is_the_whole_plus_one_cut_map() -> None:
    model = small()
    maestro = Maestro(model, seed=1)
    x = gaussian(4, 9)
    loss = maestro.loss(lambda: model(x).square().sum())
    twin = small()
    again = Maestro(twin, seed=1)
    drawn = int(torch.randint(7 + 5, (), generator=torch.Generator().manual_seed(1)))
    whole = twin(x).square().sum()
    with again.sampled() as (name, kept):
        assert (name, kept) == (("0", drawn + 1) if drawn < 7 else ("2", drawn - 6))
        cut = twin(x).square().sum()
    torch.testing.assert_close(loss, whole + cut)


def test_every_pair_of_map_and_rank_is_drawn_equally_often() -> None:
    maestro = Maestro(small())
    counts: dict[tuple[str, int], int] = {}
    for _ in range(6000):
        with maestro.sampled() as drawn:
            counts[drawn] = counts.get(drawn, 0) + 1
    assert set(counts) == {("0", k) for k in range(1, 8)} | {("2", k) for k in range(1, 6)}
    # 500 each; 5 standard deviations of a binomial count are 107.
    assert all(abs(n - 500) < 107 for n in counts.values())


def test_gradient_checkpointing_is_refused() -> None:
    model = small()
    maestro = Maestro(model)
    model[0].gradient_checkpointing = True
    with pytest.raises(InputError, match="gradient_checkpointing_disable"):
        maestro.loss(lambda: model(gaussian(1, 9)).sum())


# ---- the penalty


def naive_penalty(maestro: Maestro) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for name in maestro.ranks():
        a, b = maestro._factors(name)
        for j in range(a.shape[1]):
            total = total + a[:, j:].norm() + b[:, :, j:].norm()
    return total


@pytest.mark.parametrize(("make", "shape"), MAPS.values(), ids=MAPS)
def test_penalty_and_its_gradient_are_those_of_autograd(make, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make()).double()
    maestro = Maestro(model, penalty=0.3)
    expected = torch.autograd.grad(naive_penalty(maestro), maestro._weights("0"))
    torch.testing.assert_close(maestro.penalty_value(), naive_penalty(maestro).detach())
    for weight in maestro._weights("0"):
        weight.grad = torch.zeros_like(weight)
    maestro.before_step()
    for weight, gradient in zip(maestro._weights("0"), expected, strict=True):
        torch.testing.assert_close(weight.grad, 0.3 * gradient)


def test_penalty_of_empty_suffixes_has_gradient_zero() -> None:
    model = small()
    maestro = Maestro(model, penalty=1.0)
    layer = model[0]
    with torch.no_grad():
        layer.a.weight[3:] = 0
        layer.b.weight[:, 3:] = 0
    for weight in maestro._weights("0"):
        weight.grad = torch.zeros_like(weight)
    maestro.before_step()
    assert torch.isfinite(layer.a.weight.grad).all()
    assert torch.equal(layer.a.weight.grad[3:], torch.zeros(4, 9, dtype=torch.float64))
    assert (layer.a.weight.grad[:3].norm(dim=1) > 0).all()


def test_bf16_factors_train() -> None:
    model = small().to(torch.bfloat16)
    maestro = Maestro(model, penalty=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    maestro.attach(optimizer)
    before = model[0].a.weight.detach().clone()
    steps(model, maestro, optimizer, 2)
    assert model[0].a.weight.dtype == torch.bfloat16
    assert torch.isfinite(model[0].a.weight).all()
    assert not torch.equal(before, model[0].a.weight)


# ---- shrinking

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_dropped_directions_leave_the_optimizer(make) -> None:
    """The tail is worth nothing, so training goes on as if it had been there: exactly, for entry-wise optimizers."""
    model = small()
    maestro = Maestro(model, penalty=0.0, threshold=0.0)
    optimizer = make(list(model.parameters()))
    maestro.attach(optimizer)
    steps(model, maestro, optimizer, 3)
    state = {k: v for k, v in optimizer.state[model[0].a.weight].items() if isinstance(v, Tensor) and v.ndim == 2}
    count = len(optimizer.state)
    loss = maestro.loss(lambda: model(gaussian(2, 9)).sum())
    loss.backward()  # a graph that is still alive while the shapes change
    maestro._shrink("0", 4, optimizer)
    a, b = maestro._weights("0")
    assert (a.shape, b.shape, maestro.ranks()["0"]) == ((4, 9), (7, 4), 4)
    assert len(optimizer.state) == count
    for key, value in optimizer.state[a].items():
        if key in state:
            assert torch.equal(value, state[key][: len(value)])
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert a.grad.shape == (4, 9)
    steps(model, maestro, optimizer, 2, start=3)
    assert loss.requires_grad
    assert torch.isfinite(model(gaussian(2, 9))).all()


def test_shrinking_is_the_same_training_as_a_masked_tail() -> None:
    """Where the tail is zero and gets no gradient from u or v, dropping it changes nothing that follows."""
    model = small()
    whole = Maestro(model, penalty=0.01, threshold=0.0)
    with torch.no_grad():
        model[0].a.weight[4:] = 0
        model[0].b.weight[:, 4:] = 0
    small_model = copy.deepcopy(model)
    shrunk = copy.deepcopy(whole)
    shrunk.model = small_model
    results = []
    for maestro, net in ((whole, model), (shrunk, small_model)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        maestro.attach(optimizer)
        if maestro is shrunk:
            maestro.threshold, maestro.period = 1e-6, 1
        for step in range(5):
            optimizer.zero_grad()
            net(gaussian(6, 9, seed=step)).square().mean().backward()
            optimizer.step()
        results.append(net(gaussian(3, 9)))
    assert shrunk.ranks()["0"] == 4
    assert whole.ranks()["0"] == 7
    torch.testing.assert_close(*results)


def test_groups_shrink_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)).double()
    maestro = Maestro(model)
    a, b = maestro._factors("0")
    expected = (b[:, :, :2] @ a[:, :2]).reshape(8, 2, 3, 3)
    bias = model[0].b.bias.detach().clone()
    maestro._shrink("0", 2, None)
    x = gaussian(1, 4, 5, 5)
    torch.testing.assert_close(model(x), conv2d(x, expected, bias, groups=2))
    assert (model[0].rank, model[0].a.out_channels, model[0].b.in_channels) == (2, 4, 4)


def test_what_is_dropped_and_when() -> None:
    model = small()
    maestro = Maestro(model, penalty=0.0, threshold=0.01, period=2)
    with torch.no_grad():
        model[2].a.weight[2:] *= 1e-4
        model[0].a.weight[:] *= 1e-9  # all alike: relative to itself the map has lost nothing
    importance = maestro.importance("2")
    assert int((importance >= 0.01 * importance[0]).sum()) == 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    maestro.attach(optimizer)
    steps(model, maestro, optimizer, 1)
    assert maestro.ranks() == {"0": 7, "2": 5}
    steps(model, maestro, optimizer, 1)
    assert maestro.ranks() == {"0": 7, "2": 2}


def test_one_direction_stays() -> None:
    model = small()
    with torch.no_grad():
        model[0].weight.zero_()
    maestro = Maestro(model, penalty=0.0)
    outcome = maestro.finish(Rank(keep=1))
    assert [layer.rank for layer in outcome.layers] == [1, 1]
    assert torch.isfinite(model(gaussian(2, 9))).all()


def test_optimizers_that_cannot_shrink_are_refused() -> None:
    model = small()
    with pytest.raises(InputError, match="LBFGS"):
        Maestro(model).attach(torch.optim.LBFGS(model.parameters()))
    model = small()
    maestro = Maestro(model, threshold=0.9, period=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    maestro.attach(optimizer)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = None
        optimizer.state[p]["rotation"] = torch.eye(3)
    with pytest.raises(InputError, match="SGD remembers 'rotation'"):
        steps(model, maestro, optimizer, 1)


# ---- the end


def test_finish_cuts_prefixes_and_gives_back_dense_layers() -> None:
    model = small()
    original = model[2].weight.detach().clone()
    maestro = Maestro(model)
    a, b = (f[0].detach() for f in maestro._factors("0"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    outcome = maestro.finish(Rank(ratio=0.6))  # of 63: 2 · 16 = 32; of 35: 1 · 12
    assert [layer.rank for layer in outcome.layers] == [2, 1]
    torch.testing.assert_close(model[0].weight + 0, b[:, :2] @ a[:2])
    assert torch.equal(model[0].b.bias, before["0.b.bias"])
    kept = (b[:, :2] @ a[:2] - b @ a).square().sum() / (b @ a).square().sum()
    assert outcome.layers[0].predicted == pytest.approx(float(kept))
    assert outcome.model_before.parameters == 63 + 7 + 35 + 5
    assert outcome.model_after.parameters == sum(p.numel() for p in model.parameters()) == 32 + 7 + 12 + 5

    model = small()
    outcome = Maestro(model).finish()
    assert isinstance(model[2], nn.Linear)
    torch.testing.assert_close(model[2].weight.detach(), original)
    assert [layer.form for layer in outcome.layers] == ["dense", "dense"]
    assert outcome.model_after == outcome.model_before


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_finish_by_energy(share: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30)).double()
    S = torch.linalg.svdvals(model[0].weight.detach())
    expected = int((S.square().cumsum(0) < share * S.square().sum()).sum()) + 1
    outcome = Maestro(model).finish(Rank(energy=share))
    assert outcome.layers[0].rank == (expected if expected * 70 < 1200 else 30)


def test_finished_twice_says_what_is_wrong() -> None:
    maestro = Maestro(small())
    maestro.finish()
    with pytest.raises(Exception, match="the factors of maestro are gone"):
        maestro.finish()


# ---- resume


def test_resume_is_exact_after_shrinking(tmp_path) -> None:
    def fresh() -> tuple[nn.Module, Maestro]:
        model = small()
        return model, Maestro(model, penalty=0.02, threshold=0.3, period=2, seed=5)

    model, maestro = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    maestro.attach(optimizer)
    steps(model, maestro, optimizer, 4)
    assert sum(maestro.ranks().values()) < 12
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "maestro": maestro.state_dict()}
    torch.save(states, tmp_path / "state.pt")
    steps(model, maestro, optimizer, 5, start=4)

    again, resumed = fresh()
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(loaded["maestro"])
    again.load_state_dict(loaded["model"])
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.01)
    optimizer.load_state_dict(loaded["optimizer"])
    resumed.attach(optimizer)
    steps(again, resumed, optimizer, 5, start=4)
    assert resumed.ranks() == maestro.ranks()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_state_of_another_model_is_refused() -> None:
    maestro = Maestro(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(MismatchError, match="2 problems"):
        maestro.load_state_dict(Maestro(small()).state_dict())  # rank 7 of 3, and a site 2
    maestro.attach(torch.optim.SGD(maestro.model.parameters(), lr=0.1))
    with pytest.raises(InputError, match="before that"):
        maestro.load_state_dict(maestro.state_dict())


# ---- what it refuses


def test_all_options_are_checked_at_once_and_nothing_is_changed() -> None:
    model = small()
    with pytest.raises(InputError) as caught:
        Maestro(model, penalty=-1.0, threshold=1.0, period=0, seed=-1)
    for word in ("4 problems", "penalty", "threshold", "period", "seed"):
        assert word in str(caught.value)
    model[0].weight.requires_grad_(False)
    with pytest.raises(InputError, match="0: its weight is frozen"):
        Maestro(model)
    model[0].weight.requires_grad_(True)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="2"):
        Maestro(model)
    assert isinstance(model[0], nn.Linear)


def test_an_optimizer_made_before_is_refused() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    maestro = Maestro(model)
    with pytest.raises(InputError, match="make it after Maestro"):
        maestro.attach(optimizer)
    maestro.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(InputError, match="attached already"):
        maestro.attach(torch.optim.SGD(model.parameters(), lr=0.1))
