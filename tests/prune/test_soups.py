"""Sparse soups: averages against plain arithmetic, masks asserted, batch norms against their definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eckart.errors import FileError, InputError, MismatchError, NotFiniteError
from eckart.prune.masks import MaskSet
from eckart.prune.soups import average, recalibrate_batch_norm, soup_phases, sparse_soup


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def masks_of(model: nn.Module) -> MaskSet:
    generator = torch.Generator().manual_seed(5)
    return MaskSet(
        {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters() if p.ndim == 2}
    )


def copies(count: int = 3, dtype: torch.dtype = torch.float64) -> tuple[list[dict[str, Tensor]], MaskSet]:
    masks, states = masks_of(net()), []
    for seed in range(count):
        model = net(dtype)
        torch.manual_seed(seed + 1)
        for p in model.parameters():
            p.data.copy_(torch.randn(p.shape))
        masks.apply(model)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states, masks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [True, False], ids=["masks given", "from zeros"])
def test_uniform_is_the_mean_with_the_same_zeros(dtype: torch.dtype, given: bool) -> None:
    states, masks = copies(dtype=dtype)
    model = net(dtype)
    soup = sparse_soup(model, states, masks=masks if given else None)
    assert soup.chosen == (0, 1, 2)
    assert soup.score is None
    assert soup.masks.same(masks)
    assert not masks.leaks(model)
    for name, value in model.state_dict().items():
        expected = sum(s[name].double() for s in states) / 3
        torch.testing.assert_close(value, expected.to(dtype), rtol=0, atol=0)


def test_greedy_keeps_only_what_helps() -> None:
    """Scores are distances to a target between models 0 and 1; model 2 is far away and must stay out."""
    states, masks = copies()
    states[1] = {n: t + 0.2 * torch.ones_like(t) * (t != 0) for n, t in states[0].items()}
    target = {n: (states[0][n] + states[1][n]) / 2 for n in states[0]}

    def score(model: nn.Module) -> float:
        assert not model.training
        return -sum(float((t - target[n]).square().sum()) for n, t in model.state_dict().items())

    model = net().train()
    soup = sparse_soup(model, states, masks=masks, greedy=True, score=score)
    assert set(soup.chosen) == {0, 1}
    assert soup.score == pytest.approx(0.0, abs=1e-12)
    assert soup.scores[2] < soup.scores[0]
    assert score(model.eval()) == pytest.approx(0.0, abs=1e-12)  # the soup is what the model holds at the end
    uniform = sparse_soup(net(), states, masks=masks, score=score)
    assert uniform.chosen == (0, 1, 2)
    assert uniform.score < soup.score


def test_greedy_of_one_is_the_best_model() -> None:
    states, masks = copies()

    def score(model: nn.Module) -> float:
        return -min(float((model[0].weight - s["0.weight"]).square().sum()) + i for i, s in enumerate(states))

    model = net()
    soup = sparse_soup(model, states, masks=masks, greedy=True, score=score)
    assert soup.chosen == (0,)
    assert all(torch.equal(value, states[0][name]) for name, value in model.state_dict().items())


def test_files_do_as_well(tmp_path: Path) -> None:
    states, masks = copies()
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path)
    a, b = net(), net()
    sparse_soup(a, states, masks=masks)
    sparse_soup(b, [str(paths[0]), *paths[1:]], masks=masks)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(FileError):
        sparse_soup(a, [tmp_path / "none", *paths])


def test_integers_are_not_averaged() -> None:
    states = [{"n": torch.tensor(3), "w": torch.tensor([1.0])}, {"n": torch.tensor(8), "w": torch.tensor([2.0])}]
    mean = average(states)
    assert mean["n"].dtype == torch.int64
    assert (int(mean["n"]), float(mean["w"])) == (3, 1.5)


def test_tied_weights_may_be_stored_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    states = [{"0.weight": torch.full((4, 4), value)} for value in (1.0, 3.0)]
    sparse_soup(model, states)
    assert model[1].weight is model[0].weight
    assert torch.equal(model[1].weight, torch.full((4, 4), 2.0))


# ---- batch norms


def bn_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=0.3), nn.Dropout(0.5), nn.Linear(8, 3)).double()


def test_recalibrated_statistics_are_plain_averages_over_the_batches() -> None:
    model = bn_net().train()
    model[1].running_mean.fill_(7.0)
    torch.manual_seed(1)
    batches = [torch.randn(20, 6, dtype=torch.float64) for _ in range(4)]
    recalibrate_batch_norm(model, batches)
    hidden = [model[0](x) for x in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert model[1].momentum == 0.3
    assert all(m.training for m in model.modules())
    with pytest.raises(InputError, match="no batches"):
        recalibrate_batch_norm(model, [])


def test_a_soup_recalibrates() -> None:
    states = []
    for seed in range(2):
        model = bn_net()
        torch.manual_seed(seed)
        model[0].weight.data.normal_()
        states.append(model.state_dict())
    torch.manual_seed(3)
    batches = [(torch.randn(50, 6, dtype=torch.float64),)]
    soup = bn_net()
    with pytest.raises(InputError, match="batch norms"):
        sparse_soup(soup, states)
    sparse_soup(soup, states, batches=batches)
    torch.testing.assert_close(soup[1].running_mean, soup[0](batches[0][0]).mean(0))
    with pytest.raises(InputError, match="iterator"):
        sparse_soup(soup, states, batches=iter(batches))


# ---- phases


@pytest.mark.parametrize(("keep", "phases"), [(0.1, 3), (0.02, 5), (0.5, 1), (1.0, 2)])
def test_every_phase_prunes_the_same_share(keep: float, phases: int) -> None:
    shares = soup_phases(keep, phases)
    assert len(shares) == phases
    assert shares[-1] == keep
    p, left = 1 - keep ** (1 / phases), 1.0
    for share in shares:
        left *= 1 - p
        assert share == pytest.approx(left)


@pytest.mark.parametrize(("keep", "phases"), [(0.0, 3), (1.1, 3), (0.5, 0), (0.5, True), (0.5, 1.5)])
def test_bad_phases(keep: float, phases: int) -> None:
    with pytest.raises(InputError):
        soup_phases(keep, phases)


# ---- bad input


def test_other_zeros_are_refused_and_named() -> None:
    states, masks = copies()
    states[1]["2.weight"] = states[1]["2.weight"] + 1.0
    model = net()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(MismatchError, match=r"checkpoint 1.*2\.weight"):
        sparse_soup(model, states, masks=masks)
    with pytest.raises(MismatchError, match=r"checkpoint 1: 2\.weight"):
        sparse_soup(model, states)
    dense = net().state_dict()
    with pytest.raises(MismatchError):
        sparse_soup(model, [dense, states[0]])  # the first has no zeros at all
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_checkpoints_of_another_model_are_named_all_at_once() -> None:
    states, masks = copies()
    del states[1]["0.bias"]
    states[2]["more"] = torch.zeros(1)
    states[2]["2.bias"] = torch.zeros(4)
    with pytest.raises(MismatchError) as caught:
        sparse_soup(net(), states, masks=masks)
    for words in (
        "checkpoint 1: 0.bias is missing",
        "checkpoint 2: more is not",
        "checkpoint 2: 2.bias has shape (4,)",
    ):
        assert words in str(caught.value)
    states, masks = copies()
    with pytest.raises(MismatchError, match="none"):
        sparse_soup(net(), states, masks=MaskSet({**masks, "none": torch.ones(2, 2, dtype=torch.bool)}))
    states[0]["0.bias"][0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"checkpoint 0: 0\.bias"):
        sparse_soup(net(), states, masks=masks)


def test_bad_options_are_named_all_at_once() -> None:
    states, _ = copies(1)
    with pytest.raises(InputError, match="2 problems"):
        sparse_soup(net(), states, greedy=True)
    states, masks = copies()
    with pytest.raises(NotFiniteError, match="score"):
        sparse_soup(net(), states, masks=masks, score=lambda m: float("nan"))
