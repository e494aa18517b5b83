"""Trained rank pruning, against a naive twin that runs a full SVD at every truncation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from transformers.pytorch_utils import Conv1D

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.layers import FactoredConv, FactoredLinear
from eckart.records import Rank
from eckart.training import TrainedRankPruning
from eckart.training.subspace import OVERSAMPLE, rank_for, truncate


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def falling(m: int, n: int, rank: int = 6, noise: float = 0.01, seed: int = 0) -> Tensor:
    return gaussian(m, rank, seed=seed) @ gaussian(rank, n, seed=seed + 1) + noise * gaussian(m, n, seed=seed + 2)


def naive_truncation(W: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    """T(W) and U_k V_kᵀ, by the full SVD."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    kept = S.square().cumsum(0) / S.square().sum()
    k = int((kept < energy).sum()) + 1
    return ((U[:, :k] * S[:k]) @ Vh[:k]).to(W.dtype), (U[:, :k] @ Vh[:k]).to(W.dtype)


# ---- the truncation


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(20, 30), (40, 400)], ids=str)
def test_exact_truncation_is_that_of_the_full_svd(shape: tuple[int, int], energy: float) -> None:
    W = gaussian(*shape)
    found = truncate(W, energy)
    expected, _ = naive_truncation(W, energy)
    assert found.exact
    torch.testing.assert_close(found.matrix, expected)
    torch.testing.assert_close(found.U @ (found.U.T @ W), expected)
    torch.testing.assert_close(found.S, torch.linalg.svdvals(W)[: len(found.S)])


def test_rank_keeps_at_least_the_energy_and_no_direction_more() -> None:
    squares = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [rank_for(squares, e, 10.0) for e in (0.1, 0.4, 0.41, 0.7, 0.71, 0.9, 0.95)] == [1, 1, 2, 2, 3, 3, 4]
    assert rank_for(squares[:2], 0.9, 10.0) is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=str)
def test_warm_start_follows_a_moving_matrix(dtype: torch.dtype, tolerance: float) -> None:
    W = falling(80, 120).to(dtype)
    U = None
    warm = 0
    for step in range(6):
        found = truncate(W, 0.99, U, seed=step)
        expected, _ = naive_truncation(W, 0.99)
        assert len(found.S) == torch.linalg.matrix_rank(expected.double(), rtol=1e-4)
        assert (found.matrix - expected).norm() < tolerance * expected.norm()
        warm += not found.exact
        U = found.U
        W = found.matrix + 0.02 * falling(80, 120, seed=10 + step).to(dtype)
    assert warm == 5


def test_warm_start_keeps_the_energy_even_from_a_useless_basis() -> None:
    W = gaussian(80, 120)  # a flat spectrum: few directions cannot keep 60 %
    useless = torch.linalg.qr(gaussian(80, 3, seed=5)).Q
    found = truncate(W, 0.6, useless)
    assert found.exact
    assert (W - found.matrix).square().sum() <= 0.4 * W.square().sum()


def test_warm_start_sees_directions_that_the_basis_lacks() -> None:
    basis = torch.linalg.qr(gaussian(80, 80)).Q
    W = basis[:, :3] @ gaussian(3, 120, seed=1) + 2 * basis[:, 70:72] @ gaussian(2, 120, seed=2)
    found = truncate(W, 0.999, basis[:, :3])  # 70 and 71 are orthogonal to all that is known
    torch.testing.assert_close(found.matrix, naive_truncation(W, 0.999)[0])
    assert len(found.S) <= 3 + OVERSAMPLE


def test_unsettled_iteration_falls_back() -> None:
    """A slowly falling spectrum: one half-iteration from a random basis is still far from the best."""
    Q, P = torch.linalg.qr(gaussian(80, 80)).Q, torch.linalg.qr(gaussian(120, 80, seed=1)).Q
    W = Q * torch.linspace(1, 0.1, 80, dtype=torch.float64) @ P.T
    start = torch.linalg.qr(gaussian(80, 12, seed=3)).Q
    found = truncate(W, 0.05, start)
    torch.testing.assert_close(found.matrix, naive_truncation(W, 0.05)[0])
    assert found.exact


def test_truncation_of_zeros_and_of_nan() -> None:
    assert torch.equal(truncate(torch.zeros(4, 6), 0.9).matrix, torch.zeros(4, 6))
    with pytest.raises(NotFiniteError):
        truncate(torch.tensor([[1.0, math.nan]]), 0.9)
    with pytest.raises(InputError, match=r"\(0, 1\)"):
        truncate(torch.ones(2, 2), 1.0)


# ---- training


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, count: int, shape: tuple[int, ...], start: int = 0
) -> None:
    weight = next(model.parameters())
    for step in range(start, start + count):
        x = gaussian(*shape, seed=100 + step).to(weight.dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


MAPS = {
    "wide": (lambda: nn.Linear(12, 7), (4, 12), lambda w: w),
    "tall": (lambda: nn.Linear(7, 12), (4, 7), lambda w: w),
    "conv1d of transformers": (lambda: Conv1D(9, 12), (4, 12), lambda w: w.T),
    "conv": (lambda: nn.Conv2d(5, 8, (3, 2)), (2, 5, 6, 6), lambda w: w.flatten(1)),
    "conv over time": (lambda: nn.Conv1d(5, 8, 3), (2, 5, 9), lambda w: w.flatten(1)),
}


@pytest.mark.parametrize("nuclear", [0.0, 0.3])
@pytest.mark.parametrize("kind", MAPS)
def test_training_is_that_of_the_naive_twin(kind: str, nuclear: float) -> None:
    make, shape, matrix = MAPS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make()).double()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trp = TrainedRankPruning(model, energy=0.8, period=2, nuclear=nuclear)
    trp.attach(optimizer)
    steps(model, optimizer, 7, shape)

    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    weight, pending = twin[0].weight, None
    for step in range(7):
        optimizer.zero_grad()
        twin(gaussian(*shape, seed=100 + step)).square().mean().backward()
        if pending is not None:
            weight.grad += nuclear * pending
        optimizer.step()
        pending = None
        if step % 2 == 1:
            cut, subgradient = naive_truncation(matrix(weight.detach()), 0.8)
            back = (lambda w: w.T) if kind.endswith("transformers") else (lambda w: w.reshape(weight.shape))
            weight.data.copy_(back(cut))
            pending = back(subgradient)
    torch.testing.assert_close(model[0].weight, weight)


def test_groups_are_matrices_of_their_own() -> None:
    model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trp = TrainedRankPruning(model, energy=0.7, period=1, nuclear=0.0)
    trp.attach(optimizer)
    before = model[0].weight.detach().clone()
    steps(model, optimizer, 1, (1, 8, 4, 4))
    expected = torch.cat([naive_truncation(part.flatten(1), 0.7)[0] for part in before.chunk(2)])
    torch.testing.assert_close(model[0].weight.flatten(1), expected)


def test_spatial_mode_truncates_columns_against_rows() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 5))).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trp = TrainedRankPruning(model, energy=0.7, period=1, mode="spatial")
    trp.attach(optimizer)
    W = model[0].weight.detach().clone()
    steps(model, optimizer, 1, (1, 4, 6, 6))
    matrix = torch.stack([W[:, c, v, :].flatten() for c in range(4) for v in range(3)])  # (C·V, N·H)
    cut = naive_truncation(matrix, 0.7)[0].reshape(4, 3, 6, 5)
    torch.testing.assert_close(model[0].weight.detach(), torch.einsum("cvnh->ncvh", cut))


def test_channels_last_weights_are_written() -> None:
    model = nn.Sequential(nn.Conv2d(5, 8, 3)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trp = TrainedRankPruning(model, energy=0.5, period=1)
    trp.attach(optimizer)
    steps(model, optimizer, 1, (1, 5, 4, 4))
    assert torch.linalg.matrix_rank(model[0].weight.flatten(1), rtol=1e-4) == trp.ranks()["0"] < 8
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_without_gradients_and_frozen_ones_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trp = TrainedRankPruning(model, energy=0.5, period=1)
    trp.attach(optimizer)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        model[1](model[0](torch.ones(2, 8))).sum().backward()  # the third is never called
        optimizer.step()
    assert not torch.equal(model[0].weight, before["0.weight"])
    for name in ("1.weight", "2.weight"):
        assert torch.equal(model.get_parameter(name), before[name])
    outcome = trp.finish()
    assert [layer.form for layer in outcome.layers] == ["lowrank", "dense", "dense"]


def test_bf16_weights_train_and_finish() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30)).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trp = TrainedRankPruning(model, energy=0.7, period=1)
    trp.attach(optimizer)
    steps(model, optimizer, 2, (4, 40))
    dense = model[0].weight.detach().float()
    outcome = trp.finish()
    assert model[0].a.weight.dtype == torch.bfloat16
    # bf16 keeps 8 bits; a product of two rounded factors is off by about 2 · 2⁻⁹ each.
    assert (model[0].weight.float() - dense).norm() < 0.02 * dense.norm()
    assert outcome.layers[0].after.bytes == 2 * outcome.layers[0].after.parameters


def test_nan_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trp = TrainedRankPruning(model, period=1)
    trp.attach(optimizer)
    model(torch.full((1, 4), math.nan)).sum().backward()
    with pytest.raises(NotFiniteError, match=r"^0 holds NaN"):
        optimizer.step()


# ---- the end


def trained(model: nn.Module, shape: tuple[int, ...], **options) -> TrainedRankPruning:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trp = TrainedRankPruning(model, **({"energy": 0.6, "period": 1} | options))
    trp.attach(optimizer)
    steps(model, optimizer, 3, shape)
    return trp


CONVS = {
    "stride": {"kernel_size": 3, "stride": 2},
    "padding": {"kernel_size": (3, 5), "padding": (1, 2), "bias": False},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": (2, 1)},
    "same": {"kernel_size": (5, 3), "padding": "same"},
}


@pytest.mark.parametrize("mode", ["channel", "spatial"])
@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_factored_convolutions_compute_the_same(options: dict, mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, **options)).double()
    trp = trained(model, (1, 8, 11, 9), mode=mode)
    x = gaussian(2, 8, 11, 9, seed=7)
    expected = model(x)
    before = sum(p.numel() for p in model.parameters())
    outcome = trp.finish()
    torch.testing.assert_close(model(x), expected)
    layer = outcome.layers[0]
    assert layer.form == "lowrank"
    assert isinstance(model[0], FactoredConv if mode == "channel" else nn.Sequential)
    after = sum(p.numel() for p in model.parameters())
    assert after < before
    assert (outcome.model_before.parameters, outcome.model_after.parameters) == (before, after)
    bias = 12 if options.get("bias", True) else 0
    assert (layer.before.parameters, layer.after.parameters) == (before - bias, after - bias)


def test_groups_finish_at_one_rank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 24, 3, groups=2)).double()
    trp = trained(model, (1, 16, 6, 6))
    x = gaussian(2, 16, 6, 6)
    expected = model(x)
    rank = trp.ranks()["0"]
    trp.finish()
    assert model[0].rank == rank
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("make", [lambda: nn.Linear(20, 16), lambda: Conv1D(16, 20)], ids=["linear", "conv1d"])
def test_linear_maps_become_factored_layers(make) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make()).double()
    trp = trained(model, (3, 20))
    x = gaussian(3, 20, seed=9)
    expected = model(x)
    outcome = trp.finish()
    assert isinstance(model[0], FactoredLinear)
    assert outcome.layers[0].rank == model[0].rank
    assert outcome.layers[0].predicted < 1e-12
    torch.testing.assert_close(model(x), expected)


def test_weights_that_moved_since_are_cut_once_more() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16)).double()
    trp = trained(model, (3, 20), period=2)  # the third step comes after the last truncation
    expected, _ = naive_truncation(model[0].weight.detach(), 0.6)
    trp.finish()
    torch.testing.assert_close(model[0].weight + 0, expected)


def test_where_factors_cost_more_the_weight_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    trp = trained(model, (3, 8), energy=0.999)
    original, weight = model[0], model[0].weight.detach().clone()
    outcome = trp.finish()
    assert model[0] is original
    assert torch.equal(original.weight, weight)
    assert (outcome.layers[0].form, outcome.sites_after) == ("dense", outcome.sites_before)


def test_rank_and_threshold_at_the_end() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16)).double()
    trp = trained(model, (3, 20), energy=0.95)
    S = torch.linalg.svdvals(model[0].weight.detach())
    expected = {
        "keep": (Rank(keep=2), None, 2),
        "ratio": (Rank(ratio=0.5), None, int(0.5 * 320 / 36)),
        "threshold": (None, float(S[3:5].mean()), 4),
    }
    for rank, threshold, kept in expected.values():
        copied = copy.deepcopy(trp)
        outcome = copied.finish(rank, threshold=threshold)
        assert outcome.layers[0].rank == kept
        lost = float(S[kept:].square().sum() / S.square().sum())
        assert outcome.layers[0].predicted == pytest.approx(lost)
    with pytest.raises(InputError, match="not both"):
        trp.finish(Rank(keep=1), threshold=0.1)
    with pytest.raises(InputError, match="positive"):
        trp.finish(threshold=0.0)


def test_finish_lets_go_of_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(20, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trp = TrainedRankPruning(model, period=1)
    trp.attach(optimizer)
    steps(model, optimizer, 1, (2, 20))
    trp.finish()
    optimizer.step()
    assert trp.steps == 1


# ---- resume


def test_resume_is_exact(tmp_path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, TrainedRankPruning]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(160, 120), nn.Tanh(), nn.Linear(120, 100))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, TrainedRankPruning(model, energy=0.2, period=3, nuclear=0.1)

    model, optimizer, trp = fresh()
    trp.attach(optimizer)
    steps(model, optimizer, 6, (4, 160))
    assert (max(trp.ranks().values()) + OVERSAMPLE) * 4 <= 100  # so that the warm start is what is resumed
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "trp": trp.state_dict()}
    torch.save(states, tmp_path / "state.pt")
    steps(model, optimizer, 7, (4, 160), start=6)

    again, optimizer, resumed = fresh()
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    resumed.load_state_dict(loaded["trp"])
    resumed.attach(optimizer)
    steps(again, optimizer, 7, (4, 160), start=6)
    assert resumed.steps == 13
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_state_of_another_model_is_refused() -> None:
    trp = TrainedRankPruning(nn.Sequential(nn.Linear(8, 6)))
    other = TrainedRankPruning(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)))
    with pytest.raises(MismatchError, match="1:moved is of no site"):
        trp.load_state_dict(other.state_dict())
    state = trp.state_dict() | {"0:0:U": torch.ones(5, 2), "0:0:S": torch.ones(2)}
    with pytest.raises(MismatchError, match="0:0:U has 5 rows, expected 6"):
        trp.load_state_dict(state)


# ---- what it refuses


def test_all_options_are_checked_at_once() -> None:
    with pytest.raises(InputError) as caught:
        TrainedRankPruning(nn.Sequential(nn.Linear(4, 4)), energy=1.0, period=0, nuclear=-1.0, mode="chanel")
    for word in ("4 problems", "energy", "period", "nuclear", "'channel'"):
        assert word in str(caught.value)


def test_shared_weights_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    with pytest.raises(InputError, match="0: its weight is shared with 2"):
        TrainedRankPruning(model)
    assert [s.name for s in TrainedRankPruning(model, exclude=["0"]).sites] == ["1"]


def test_spatial_mode_names_what_it_cannot_read() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(InputError, match=r"2 problems\n  - 0\n  - 1"):
        TrainedRankPruning(model, mode="spatial")


def test_attach_twice_or_to_an_optimizer_of_others() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    trp = TrainedRankPruning(model)
    with pytest.raises(InputError, match=r"does not train these sites.*: 1"):
        trp.attach(torch.optim.SGD(model[0].parameters(), lr=0.1))
    trp.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(InputError, match="attached already"):
        trp.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_loop_without_torch_optim() -> None:
    model = nn.Sequential(nn.Linear(20, 16)).double()
    trp = TrainedRankPruning(model, energy=0.5, period=1, nuclear=0.0)
    model(gaussian(3, 20)).sum().backward()
    trp.before_step()
    expected, _ = naive_truncation(model[0].weight.detach(), 0.5)
    trp.after_step()
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_sites_or_patterns_not_both() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sites = TrainedRankPruning(model, include=["0"]).sites
    assert TrainedRankPruning(model, sites=sites).sites == sites
    with pytest.raises(InputError, match="not both"):
        TrainedRankPruning(model, sites=sites, include=["0"])


def test_spatial_kernel_is_the_product_of_a_column_and_a_row() -> None:
    """A kernel that is an outer product by construction is found as rank 1 and rebuilt."""
    column, row = gaussian(1, 4, 3, 1), gaussian(6, 1, 1, 5, seed=1)
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 5), bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(column * row)
    trp = TrainedRankPruning(model, mode="spatial", period=1)
    model(gaussian(1, 4, 6, 6)).sum().backward()
    trp.before_step()
    trp.after_step()
    assert trp.ranks() == {"0": 1}
    trp.finish()
    x = gaussian(1, 4, 7, 8, seed=3)
    torch.testing.assert_close(model(x), conv2d(x, column * row))
