"""Turbo-VBI: messages against enumeration, closed forms against integration, engine manners, bad input."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import gamma
from torch import Tensor, nn

from eckart.errors import InputError, NotFiniteError
from eckart.prune.turbo_vbi import TurboVBI, mean_run, support_evidence, support_odds


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def turbo_of(model: nn.Module, **options: object) -> TurboVBI:
    return TurboVBI(model, **{"share": 0.4, "examples": 50, "interval": 2, **options})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, turbo: TurboVBI, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    X = torch.randn(50, 10, generator=generator, dtype=torch.float64).to(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(X), (X[:, 0] > 0).long()) + turbo.kl()).backward()
        optimizer.step()


def enumerated(evidence: Tensor, share: float, run: float) -> Tensor:
    """Log-odds of each bit of one chain, over all 2ⁿ words."""
    off = 1 / run
    on = share * off / (1 - share)
    step = [[1 - on, on], [off, 1 - off]]
    n = len(evidence)
    total = np.zeros((n, 2))
    for word in itertools.product((0, 1), repeat=n):
        p = (1 - share, share)[word[0]]
        for a, b in itertools.pairwise(word):
            p *= step[a][b]
        p *= math.exp(sum(float(e) for e, s in zip(evidence, word, strict=True) if s))
        for j, s in enumerate(word):
            total[j, s] += p
    return torch.from_numpy(np.log(total[:, 1] / total[:, 0]))


@pytest.mark.parametrize(("share", "run"), [(0.3, 5.0), (0.5, 2.0), (0.7, 4.0), (0.1, 1.2)])
@pytest.mark.parametrize("column", [False, True])
def test_a_single_chain_is_exact(share: float, run: float, column: bool) -> None:
    evidence = 2 * torch.randn(1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = support_odds(evidence.T if column else evidence, share, run).reshape(-1)
    torch.testing.assert_close(found, enumerated(evidence[0], share, run))


def test_the_shortest_run_is_that_of_independent_bits() -> None:
    evidence = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(support_odds(evidence, 0.25, 1 / 0.75), support_odds(evidence, 0.25, None))


def test_rows_and_columns_are_treated_alike_once_they_agree() -> None:
    evidence = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = support_odds(evidence, 0.4, 3.0, sweeps=60)
    torch.testing.assert_close(found, support_odds(evidence.T, 0.4, 3.0, sweeps=60).T)
    assert not torch.allclose(found, support_odds(evidence, 0.4, None))


def test_extreme_evidence_stays_finite() -> None:
    assert torch.isfinite(support_odds(1e4 * torch.randn(6, 9), 0.3, 50.0)).all()


@pytest.mark.parametrize("square", [0.0, 0.01, 1.0, 30.0])
def test_evidence_and_precision_are_the_integrals(square: float) -> None:
    """∫ √ρ e^(−ρ⟨w²⟩/2) Γ(ρ; a, b) dρ for both bits, and the mean of ρ under what is integrated."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    turbo = turbo_of(model, share=0.4, run=None, contrast=0.05, shape=1.5, initial_std=1e-9)
    with torch.no_grad():
        model[0].weight.fill_(math.sqrt(square))
    turbo.update()
    mass, first = [], []
    for b in (1.5 * 0.05, 1.5):  # b = a · mean w² = 1.5

        def density(rho: float, b: float = b) -> float:
            return math.sqrt(rho) * math.exp(-rho * square / 2) * float(gamma.pdf(rho, 1.5, scale=1 / b))

        mass.append(quad(density, 0, 400, limit=400)[0])
        first.append(quad(lambda r: r * density(r), 0, 400, limit=400)[0])
    evidence = support_evidence(torch.tensor(square, dtype=torch.float64), 1.5, 1.5, 0.075)
    assert math.isclose(float(evidence), math.log(mass[1] / mass[0]), rel_tol=1e-4, abs_tol=1e-5)
    mean = (0.6 * first[0] + 0.4 * first[1]) / (0.6 * mass[0] + 0.4 * mass[1])
    assert math.isclose(float(turbo._precision["0"][0, 0]), mean, rel_tol=1e-4)


def test_gradient_of_the_term_is_the_precision() -> None:
    model = net()
    turbo = turbo_of(model, kl_scale=0.5)
    turbo.kl().backward()
    for name, m in turbo._maps.items():
        torch.testing.assert_close(m.mean.grad, 0.5 / 50 * turbo._precision[name] * m.mean.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [None, 0.3])
def test_training_and_baking(dtype: torch.dtype, keep: float | None) -> None:
    model = net(dtype)
    names = list(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    turbo = turbo_of(model)
    turbo.attach(optimizer)
    before = {name: p.clone() for name, p in turbo.in_use().items()}
    train(model, optimizer, turbo, 6)
    assert turbo.taken == 6
    assert not torch.equal(turbo.in_use()["0.weight"], before["0.weight"])
    probabilities = turbo.predict(torch.ones(2, 10, dtype=dtype), 3)
    torch.testing.assert_close(probabilities.double().sum(1), torch.ones(2).double(), atol=2e-2, rtol=0)
    turbo.update()
    likely = {name: p > 0.5 for name, p in turbo.in_use().items()}
    masks = turbo.bake(keep)
    if keep is None:
        assert masks.same(likely)
    else:
        assert {name: int(m.sum()) for name, m in masks.items()} == {"0.weight": 24, "2.weight": 7}
    assert not masks.leaks(model)
    assert list(model.state_dict()) == names
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    for call in (turbo.bake, turbo.kl, turbo.update, turbo.in_use, lambda: turbo.attach(optimizer)):
        with pytest.raises(InputError, match="baked"):
            call()


def test_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    turbo = turbo_of(model)
    turbo.kl().backward()
    masks = turbo.bake(0.5)
    assert masks["0.weight"].shape == (4, 3, 3, 3)
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 2)


def test_mean_run() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]).bool()
    assert mean_run(mask) == 2.0
    assert mean_run(torch.zeros(2, 3).bool()) == 0.0


def test_all_bad_options_are_named_and_nothing_changes() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    bad = {"examples": 0, "interval": 1.5, "sweeps": 0, "shape": 0, "initial_std": -1, "std_lr": 0, "share": 1.0,
           "contrast": 1.0, "kl_scale": -1}  # fmt: skip
    with pytest.raises(InputError) as caught:
        turbo_of(model, **bad)
    for name in bad:
        assert name in str(caught.value)
    with pytest.raises(InputError, match=r"at least 1\.667"):
        turbo_of(model, run=1.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="matrix"):
        support_odds(torch.zeros(3), 0.5, None)


def test_models_and_optimizers_that_do_not_fit() -> None:
    zero = net()
    nn.init.zeros_(zero[2].weight)
    with pytest.raises(InputError, match="all 0: 2"):
        turbo_of(zero)
    model = net()
    turbo = turbo_of(model)
    with pytest.raises(InputError, match="lacks"):
        turbo.attach(torch.optim.SGD(model[0].parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    turbo.attach(optimizer)
    with pytest.raises(InputError, match="attached"):
        turbo.attach(optimizer)
    for keep in (0, 2, True):
        with pytest.raises(InputError, match="keep"):
            turbo.bake(keep)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"0\.weight"):
        turbo.update()
