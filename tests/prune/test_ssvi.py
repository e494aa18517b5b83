"""SSVI: noise, KL and SNR against torch and sampling; exact supports; bad input."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.prune.masks import keep_zero
from eckart.prune.ssvi import SparseBayesian, absolute_mean, measure_confidence, snr


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    return X.to(dtype), (X[:, 0] > 0).long()


def bayesian(model: nn.Module, **options: object) -> SparseBayesian:
    return SparseBayesian(model, **{"keep": 0.25, "steps": 40, "examples": 60, "interval": 4, **options})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, bayes: SparseBayesian, steps: int) -> None:
    X, y = data(next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(X), y) + bayes.kl()).backward()
        optimizer.step()


def test_snr_is_that_of_samples() -> None:
    mean = torch.tensor([0.0, 0.3, -1.0, 2.5, -8.0], dtype=torch.float64)
    std = torch.tensor([1.0, 0.5, 1.0, 1.0, 0.5], dtype=torch.float64)
    drawn = (
        mean + std * torch.randn(100_000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ).abs()
    torch.testing.assert_close(absolute_mean(mean, std), drawn.mean(0), rtol=1e-2, atol=0)
    torch.testing.assert_close(snr(mean, std), drawn.mean(0) / drawn.std(0), rtol=2e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_snr_of_far_means_is_finite(dtype: torch.dtype) -> None:
    """E² and μ² agree to the last digit there: what is left is |μ|/σ."""
    found = snr(torch.tensor([1.0, -3.0], dtype=dtype), torch.full((2,), 1e-4, dtype=dtype))
    torch.testing.assert_close(found, torch.tensor([1e4, 3e4], dtype=dtype), rtol=2e-2, atol=0)


def test_kl_is_that_of_torch_over_the_support() -> None:
    model = net()
    bayes = bayesian(model, prior_std=0.3, initial_std=0.02, kl_scale=0.5)
    prior, expected = Normal(*torch.tensor([0.0, 0.3], dtype=torch.float64)), 0.0
    for m in bayes._maps.values():
        each = kl_divergence(Normal(m.mean, nn.functional.softplus(m.raw_std)), prior).detach()
        expected += float(each[m.support].sum())
    assert math.isclose(float(bayes.kl(weighted=False).detach()), expected, rel_tol=1e-10)
    for taken, warm in ((0, 0.0), (10, 0.5), (20, 1.0), (40, 1.0)):
        bayes.taken = taken
        assert math.isclose(float(bayes.kl().detach()), 0.5 / 60 * warm * expected, rel_tol=1e-10, abs_tol=1e-15)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(6, 4), torch.randn(1, 6, generator=torch.Generator().manual_seed(0))),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))),
        (nn.Conv1d(4, 6, 2), torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))),
    ],
)
def test_output_noise_has_the_moments_of_drawn_weights(module: nn.Module, x: Tensor) -> None:
    model = nn.Sequential(module).double()
    bayes = bayesian(model, keep=0.5, initial_std=0.3)
    torch.manual_seed(0)
    found = model(x.double().expand(40_000, *x.shape[1:]))
    with torch.no_grad():
        mean = model.eval()(x.double())[0]
        m = bayes._maps["0"]
        plain = nn.Sequential(copy.deepcopy(module)).double()
        expected = []
        for _ in range(3000):
            plain[0].weight.copy_(m.mean + m.std() * torch.randn_like(m.mean))
            expected.append(plain(x.double())[0])
    torch.testing.assert_close(found.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(found.std(0), torch.stack(expected).std(0), atol=0.02, rtol=0.06)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_map_keeps_its_number_of_weights_and_zeros_are_exact(dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    bayes = bayesian(model)
    bayes.attach(optimizer)
    before = bayes.masks()
    for _ in range(40):
        train(model, optimizer, bayes, 1)
        masks = bayes.masks()
        assert {name: int(mask.sum()) for name, mask in masks.items()} == {"0.weight": 60, "2.weight": 15}
        assert not masks.leaks(model)
        for m in bayes._maps.values():
            assert (m.std()[~m.support] == 0).all()
    assert bayes.taken == 40
    assert not masks.same(before)


def test_an_exchange_drops_the_least_snr_and_takes_the_largest_gradient() -> None:
    model = nn.Sequential(nn.Linear(10, 4)).double()
    bayes = bayesian(model, interval=1, steps=1000, keep=0.5, drop=0.5)
    m = bayes._maps["0"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        m.raw_std.copy_(torch.randn(4, 10, generator=generator, dtype=torch.float64) - 2)
    m.mean.grad = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    before, score = m.support.clone(), snr(m.mean, nn.functional.softplus(m.raw_std)).detach()
    old_raw = m.raw_std.detach().clone()
    bayes.step()
    moved = int(0.25 * (1 + math.cos(math.pi / 750)) * 20)
    cut = sorted(before.nonzero().tolist(), key=lambda ij: float(score[tuple(ij)]))[:moved]
    stays = before.clone()
    for i, j in cut:
        stays[i, j] = False
    come = sorted((~stays).nonzero().tolist(), key=lambda ij: -abs(float(m.mean.grad[tuple(ij)])))[:moved]
    expected = stays.clone()
    for i, j in come:
        expected[i, j] = True
    assert torch.equal(m.support, expected)
    new = expected & ~before
    assert new.any()
    assert (m.mean[new] == 0).all()
    torch.testing.assert_close(m.raw_std[new], old_raw[stays].mean().expand(int(new.sum())))


def test_the_support_rests_at_the_end() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    bayes = bayesian(model)
    bayes.attach(optimizer)
    train(model, optimizer, bayes, 30)
    masks = bayes.masks()
    train(model, optimizer, bayes, 10)
    assert bayes.masks().same(masks)


def test_baked_it_is_a_plain_model_of_the_means() -> None:
    model = net()
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    bayes = bayesian(model)
    bayes.attach(optimizer)
    train(model, optimizer, bayes, 20)
    X, _ = data()
    means = model.eval()(X)
    masks = bayes.bake()
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict()) == names
    assert torch.equal(model.train()(X), means)
    assert not masks.leaks(model)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(optimizer.state) == 4
    keep_zero(masks, model, optimizer)
    for call in (bayes.bake, bayes.kl, lambda: bayes.predict(X), lambda: bayes.attach(optimizer)):
        with pytest.raises(InputError, match="baked"):
            call()


def test_probabilities_are_the_mean_over_drawn_networks() -> None:
    model = net()
    bayes = bayesian(model, initial_std=0.3)
    X, _ = data()
    model[0].eval()
    found = bayes.predict(X, 7, generator=torch.Generator().manual_seed(5))
    assert [m.training for m in model] == [False, True, True]
    generator, total = torch.Generator().manual_seed(5), torch.zeros(60, 3, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(7):
            W = [m.mean + m.std() * torch.randn(m.mean.shape, generator=generator, dtype=torch.float64)
                 for m in bayes._maps.values()]  # fmt: skip
            total += ((X @ W[0].T + model[0].bias).relu() @ W[1].T + model[2].bias).softmax(1) / 7
    torch.testing.assert_close(found, total)
    assert not found.requires_grad


def test_copies_and_resumes() -> None:
    model = net()
    bayes = bayesian(model, initial_std=0.3)
    X, _ = data()
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        torch.manual_seed(3)
        expected = model(X)
        torch.manual_seed(3)
        assert torch.equal(other(X), expected)
    other = bayesian(net(), seed=1)
    other.model.load_state_dict(model.state_dict())
    bayes.taken = 13
    other.load_state_dict(bayes.state_dict())
    assert other.taken == 13
    assert other.masks().same(bayes.masks())
    with pytest.raises(MismatchError, match="40 steps"):
        other.load_state_dict({"taken": 3, "steps": 41})


# ---- calibration


def test_confidence_by_hand() -> None:
    p = torch.tensor([[0.91, 0.09], [0.85, 0.15], [0.28, 0.72], [0.95, 0.05]], dtype=torch.float64)
    found = measure_confidence(p, torch.tensor([0, 1, 1, 0]), bins=10)
    assert math.isclose(found.nll, -sum(math.log(x) for x in (0.91, 0.15, 0.72, 0.95)) / 4, rel_tol=1e-6)
    # bins: 0.72 (right), 0.85 (wrong), 0.91 and 0.95 (right)
    assert math.isclose(found.ece, (0.28 + 0.85 + abs(2 - 1.86)) / 4, rel_tol=1e-6)
    assert (found.accuracy, found.n) == (0.75, 4)


def test_confidence_of_the_truth_is_small_and_of_certainty_is_large() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(20_000, 3, generator=generator).softmax(1)
    labels = torch.multinomial(p, 1, generator=generator)[:, 0]
    assert measure_confidence(p, labels).ece < 0.02
    sure = nn.functional.one_hot(p.argmax(1), 3).float()
    assert measure_confidence(sure, labels).ece > 0.2
    assert math.isfinite(measure_confidence(sure, labels).nll)


@pytest.mark.parametrize(
    ("p", "labels", "words"),
    [
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.long), "logits"),
        (torch.full((4, 2), 0.5), torch.zeros(3, dtype=torch.long), "labels"),
        (torch.full((4, 2), 0.5), torch.full((4,), 2), "0 to 1"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), "expected probabilities"),
    ],
)
def test_bad_probabilities(p: Tensor, labels: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        measure_confidence(p, labels)


def test_probabilities_of_nan() -> None:
    with pytest.raises(NotFiniteError):
        measure_confidence(torch.full((2, 2), torch.nan), torch.zeros(2, dtype=torch.long))


# ---- bad input


def test_all_bad_options_are_named_and_nothing_changes() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    bad = {"steps": 0, "examples": 1.5, "interval": True, "prior_std": 0, "initial_std": math.inf, "std_lr": -1,
           "kl_scale": -1, "drop": 1.0}  # fmt: skip
    with pytest.raises(InputError) as caught:
        bayesian(model, **bad)
    for name in bad:
        assert name in str(caught.value)
    for keep in (0, 1.5, "half"):
        with pytest.raises(InputError, match="keep"):
            bayesian(model, keep=keep)
    with pytest.raises(InputError, match="leaves no weight"):
        bayesian(model, keep=0.001)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_maps_that_cannot_be_gaussian() -> None:
    tied = net()
    tied.append(nn.Linear(12, 20).double())
    tied[3].weight = tied[0].weight
    with pytest.raises(InputError, match="shares"):
        bayesian(tied)
    frozen = net()
    frozen[0].weight.requires_grad_(False)
    with pytest.raises(InputError, match="0: its weight is frozen"):
        bayesian(frozen)
    twice = net()
    bayesian(twice)
    with pytest.raises(InputError, match="already"):
        bayesian(twice)
    nan = net()
    with torch.no_grad():
        nan[2].weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError):
        bayesian(nan)
    with pytest.raises(InputError, match="no linear map"):
        bayesian(nn.Sequential(nn.ReLU()))


def test_optimizers_that_do_not_fit() -> None:
    model = net()
    bayes = bayesian(model)
    with pytest.raises(InputError, match="lacks"):
        bayes.attach(torch.optim.SGD(model[0].parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # made after: it has the deviations already
    bayes.attach(optimizer)
    assert len(optimizer.param_groups) == 1
    with pytest.raises(InputError, match="attached"):
        bayes.attach(optimizer)
    for samples in (0, 1.5, True):
        with pytest.raises(InputError, match="samples"):
            bayes.predict(data()[0], samples)


def test_gradients_of_nan_are_told() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bayes = bayesian(model, interval=1)
    bayes.attach(optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    with pytest.raises(NotFiniteError, match=r"0\.weight.*step 1"):
        optimizer.step()
