"""LR²VQ: the fit against brute force, the layers against their decoded weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.arch import find_sites
from eckart.errors import InputError, NotFiniteError
from eckart.moments import collect
from eckart.training import LR2VQLinear, quantise_vectors, vector_coded, vector_coded_conv
from eckart.training.lr2vq import fit_vectors, represent


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def weighted() -> tuple[Tensor, Tensor]:
    """Vectors near a plane, and weights that differ by vector and place."""
    vectors = gaussian(300, 2) @ gaussian(2, 6, seed=1) + 0.3 * gaussian(300, 6, seed=2)
    return vectors, gaussian(300, 6, seed=3).square() + 0.1


def decoded_linear(layer: LR2VQLinear) -> Tensor:
    """The weight, entry by entry."""
    P = torch.eye(layer.subvector) if layer.projection is None else layer.projection.detach()
    W = torch.zeros(layer.shape[0], layer.shape[1])
    per_row = layer.shape[1] // layer.subvector
    for i, code in enumerate(layer.assignments.tolist()):
        row, block = divmod(i, per_row)
        W[row, block * layer.subvector : (block + 1) * layer.subvector] = P.to(W) @ layer.codebook.detach()[code].to(W)
    return W


# ---- the fit


@pytest.mark.parametrize("dimension", [1, 3, 6])
def test_the_fit_never_gets_worse_and_ends_with_nearest_codes(dimension: int) -> None:
    vectors, weights = weighted()
    fit = fit_vectors(vectors, weights, codes=12, dimension=dimension, generator=generator())
    errors = torch.tensor(fit.errors, dtype=torch.float64)
    assert len(errors) > 3
    assert (errors.diff() <= 1e-9 * errors[0]).all()
    decoded = fit.codebook @ fit.projection.T
    distances = (weights[:, None] * (vectors[:, None] - decoded).square()).sum(-1)
    assert torch.equal(fit.assignments, distances.argmin(1))
    assert float(distances.min(1).values.sum()) == pytest.approx(fit.errors[-1])
    torch.testing.assert_close(fit.projection.T @ fit.projection, torch.eye(dimension, dtype=torch.float64))


def test_one_code_of_full_dimension_is_the_weighted_mean() -> None:
    vectors, weights = weighted()
    fit = fit_vectors(vectors, weights, codes=1, dimension=6, generator=generator())
    mean = (weights * vectors).sum(0) / weights.sum(0)
    torch.testing.assert_close((fit.codebook @ fit.projection.T)[0], mean)


def test_vectors_that_are_codes_of_a_subspace_are_found_exactly() -> None:
    centres = 5 * gaussian(8, 2) @ gaussian(2, 6, seed=1)
    vectors = centres[torch.randint(0, 8, (400,), generator=generator(4))]
    fit = fit_vectors(vectors, torch.ones_like(vectors), codes=8, dimension=2, generator=generator())
    assert fit.errors[-1] < 1e-12 * float(vectors.square().sum())


def test_more_codes_than_different_vectors_leave_no_nan() -> None:
    vectors = gaussian(3, 4).repeat(10, 1)
    fit = fit_vectors(vectors, torch.ones_like(vectors), codes=9, dimension=4, generator=generator())
    assert torch.isfinite(fit.codebook).all()
    assert fit.errors[-1] < 1e-12


def test_representation_without_codes_is_the_best_of_its_rank() -> None:
    vectors = gaussian(50, 6) @ gaussian(6, 6, seed=1)
    for dimension in range(1, 7):
        fit = represent(vectors, torch.ones_like(vectors), dimension)
        tail = torch.linalg.svdvals(vectors)[dimension:].square().sum()
        assert fit.errors[0] == pytest.approx(float(tail), abs=1e-8)


def test_the_diagonal_moves_the_error_to_inputs_that_matter_less() -> None:
    linear = nn.Linear(32, 64)
    diagonal = torch.ones(32)
    diagonal[:8] = 100
    missed = {}
    for name, given in (("plain", None), ("weighted", diagonal)):
        layer = vector_coded(linear, subvector=8, dimension=8, codes=32, diagonal=given)
        missed[name] = (linear.weight - layer.matrix()).detach().square().sum(0)
    assert missed["weighted"][:8].sum() < 0.7 * missed["plain"][:8].sum()
    assert missed["weighted"][8:].sum() > missed["plain"][8:].sum()


def test_auto_finds_the_dimension_of_weights_in_a_subspace() -> None:
    linear = nn.Linear(32, 64)
    with torch.no_grad():
        linear.weight.copy_((gaussian(256, 3) @ gaussian(3, 8, seed=1)).reshape(64, 32))
    assert vector_coded(linear, subvector=8, codes=32).dimension == 3


# ---- the layers


@pytest.mark.parametrize(("dimension", "codes"), [(2, 5), (4, 16), (8, 16)])
def test_linear_computes_with_the_decoded_weight(dimension: int, codes: int) -> None:
    linear = nn.Linear(24, 10)
    layer = vector_coded(linear, subvector=8, dimension=dimension, codes=codes)
    assert (layer.projection is None) == (dimension == 8)
    W = decoded_linear(layer)
    torch.testing.assert_close(layer.matrix().detach(), W)
    torch.testing.assert_close(layer.weight + 0, W)
    x = gaussian(3, 2, 24).float()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, W, linear.bias))
    torch.testing.assert_close(layer.to_dense()(x), layer(x))
    original = linear.weight.detach()
    assert layer.error == pytest.approx(float((original - W).square().sum() / original.square().sum()), rel=1e-5)


def test_as_many_codes_as_subvectors_is_the_weight_itself() -> None:
    linear = nn.Linear(16, 8).double()
    layer = vector_coded(linear, subvector=4, dimension=4, codes=None)
    torch.testing.assert_close(layer.matrix(), linear.weight)


def test_a_trained_low_rank_layer_is_clustered_from_itself() -> None:
    low_rank = vector_coded(nn.Linear(16, 32), subvector=8, dimension=3, codes=None)
    with torch.no_grad():
        low_rank.projection.mul_(1.5)
    again = vector_coded(low_rank, subvector=8, dimension=3, codes=None)
    torch.testing.assert_close(again.matrix(), low_rank.matrix(), atol=1e-5, rtol=1e-4)
    coded = vector_coded(low_rank, subvector=8, dimension=3, codes=16)
    assert coded.error is not None
    assert 0 < coded.error < 0.5


def test_conv_computes_with_the_decoded_kernel() -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1)
    layer = vector_coded_conv(conv, subvector=6, dimension=3, codes=8)
    dense = copy.deepcopy(conv)
    with torch.no_grad():
        dense.weight.copy_(layer.matrix().reshape(6, 4, 3, 3))
    x = gaussian(2, 4, 9, 9).float()
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer.to_dense()(x), dense(x))
    torch.testing.assert_close(layer.bake()(x), dense(x))
    assert layer.weight.shape == conv.weight.shape


def test_gradients_go_through_the_gather_to_codes_and_projection() -> None:
    layer = vector_coded(nn.Linear(12, 6).double(), subvector=4, dimension=2, codes=5)
    x = gaussian(7, 12)
    layer(x).square().sum().backward()
    dense = layer.to_dense()
    dense(x).square().sum().backward()
    blocks = dense.weight.grad.reshape(-1, 4)
    codes = torch.zeros(5, 4, dtype=torch.float64).index_add_(0, layer.assignments.int(), blocks)
    assert layer.projection is not None
    torch.testing.assert_close(layer.codebook.grad, codes @ layer.projection.detach())
    torch.testing.assert_close(layer.projection.grad, codes.T @ layer.codebook.detach())


def test_training_lowers_the_error_that_the_fit_left() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 16)
    x = gaussian(200, 16).float() @ gaussian(16, 16, seed=1).float()
    layer = vector_coded(linear, subvector=4, dimension=2, codes=8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x) - linear(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_baked_layer_is_free_of_the_projection() -> None:
    layer = vector_coded(nn.Linear(16, 8, bias=False), subvector=8, dimension=2, codes=6)
    baked = layer.bake()
    assert baked.projection is None
    assert set(baked.state_dict()) == {"codebook", "assignments"}
    assert baked.codebook.shape == (6, 8)
    torch.testing.assert_close(baked.matrix(), layer.matrix())
    torch.testing.assert_close(baked.bake().matrix(), layer.matrix())


@pytest.mark.parametrize(("codes", "dtype"), [(256, torch.uint8), (257, torch.int16), (2**15 + 1, torch.int32)])
def test_assignments_take_the_smallest_integer(codes: int, dtype: torch.dtype) -> None:
    layer = LR2VQLinear(256, 256, subvector=1, dimension=1, codes=codes, bias=False)
    assert layer.assignments.dtype == dtype
    assert layer.stored_bits() == 32 * codes + 8 * dtype.itemsize * 256 * 256


def test_stored_bits_count_integers_codes_and_projection() -> None:
    layer = vector_coded(nn.Linear(32, 64), subvector=8, dimension=4, codes=16)
    assert layer.stored_bits() == 8 * 256 + 32 * (16 * 4 + 8 * 4)
    assert layer.half().stored_bits() == 8 * 256 + 16 * (16 * 4 + 8 * 4)


def test_saves_loads_copies_and_changes_precision(tmp_path: Path) -> None:
    layer = vector_coded(nn.Linear(16, 8), subvector=4, dimension=2, codes=6)
    x = gaussian(3, 16).float()
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = LR2VQLinear(16, 8, subvector=4, dimension=2, codes=6)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x), layer(x))
    clone = copy.deepcopy(layer)
    assert torch.equal(clone(x), layer(x))
    clone.to(torch.bfloat16)
    assert clone.assignments.dtype == torch.uint8
    assert clone.weight.dtype == torch.bfloat16
    # 8 bits of mantissa in codes, P, their product and the sum over 16 inputs
    torch.testing.assert_close(clone(x.bfloat16()).float(), layer(x), atol=0.03, rtol=0.03)


def test_fits_bfloat16_layers_and_draws_nothing_global() -> None:
    linear = nn.Linear(16, 8).bfloat16()
    before = torch.get_rng_state()
    layer = vector_coded(linear, subvector=4, dimension=4, codes=32)
    assert torch.equal(before, torch.get_rng_state())
    assert layer.codebook.dtype == torch.bfloat16
    torch.testing.assert_close(layer.matrix(), linear.weight, atol=0.01, rtol=0.01)  # a code each, rounded twice


# ---- a whole model


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.conv1d = Conv1D(12, 16)
        self.odd = nn.Linear(12, 7)
        self.linear = nn.Linear(7, 8)
        nn.init.normal_(self.conv1d.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self.conv1d(self.conv(x).flatten(1)))


def test_a_model_is_coded_in_place_with_an_honest_report() -> None:
    model = Small()
    x = gaussian(5, 1, 4, 4).float()
    conv1d = model.conv1d
    expected = {name: getattr(model, name).weight.numel() for name in ("conv", "conv1d", "odd")}
    report = quantise_vectors(model, subvector=3, codes=4, dimension=2, exclude=["conv1d"])
    assert {site.name: site.weights for site in report.sites} == {n: expected[n] for n in ("conv", "odd")}
    assert [name for name, _ in report.skipped] == ["linear"]
    assert "divides" in report.skipped[0][1]
    assert report.bits_before == 32 * sum(site.weights for site in report.sites)
    layers = [model.conv, model.odd]
    assert report.bits_after == sum(layer.stored_bits() for layer in layers)
    assert report.bits_per_weight == pytest.approx(report.bits_after / (36 + 84))
    assert model.conv1d is conv1d
    quantise_vectors(model, subvector=4, codes=6, include=["conv1d"])
    assert isinstance(model.conv1d, LR2VQLinear)
    y = gaussian(3, 16).float()
    torch.testing.assert_close(model.conv1d(y), y @ model.conv1d.matrix().T + conv1d.bias)
    assert model(x).shape == (5, 7)


def test_moments_of_the_model_weigh_the_fit() -> None:
    torch.manual_seed(0)
    plain, weighed = (nn.Sequential(nn.Linear(16, 32)) for _ in range(2))
    weighed.load_state_dict(plain.state_dict())
    original = plain[0].weight.detach().clone()
    x = gaussian(100, 16).float() * torch.logspace(-1, 1, 16)
    moments = collect(weighed, [x], find_sites(weighed), gradients="none")
    for model, given in ((plain, None), (weighed, moments)):
        quantise_vectors(model, subvector=4, codes=16, dimension=4, moments=given)

    def missed(model: nn.Sequential) -> float:
        return float((x @ (original - model[0].matrix().detach()).T).square().sum())

    assert missed(weighed) < missed(plain)


# ---- what it refuses


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"subvector": 5}, "divides the 16"),
        ({"dimension": 5}, "1 … 4"),
        ({"codes": 33}, "1 … 32"),
        ({"dimension": "all"}, "int or 'auto'"),
        ({"codes": None, "dimension": "auto"}, "give a dimension"),
        ({"diagonal": torch.ones(3)}, r"\(16,\)"),
    ],
)
def test_wrong_sizes_are_refused(given: dict[str, object], message: str) -> None:
    sizes: dict[str, object] = {"subvector": 4, "codes": 4, "dimension": 2, **given}
    with pytest.raises(InputError, match=message):
        vector_coded(nn.Linear(16, 8), **sizes)  # type: ignore[arg-type]


def test_wrong_layers_are_refused() -> None:
    with pytest.raises(InputError, match="2-D weight"):
        vector_coded(nn.ReLU(), subvector=4, codes=4, dimension=2)
    with pytest.raises(InputError, match="one group"):
        vector_coded_conv(nn.Conv2d(4, 4, 3, groups=2), subvector=3, codes=4, dimension=2)
    linear = nn.Linear(16, 8)
    with torch.no_grad():
        linear.weight[0, 0] = float("inf")
    with pytest.raises(NotFiniteError):
        vector_coded(linear, subvector=4, codes=4, dimension=2)
    with pytest.raises(InputError, match="no map can be coded"):
        quantise_vectors(nn.Sequential(nn.Linear(7, 5)), subvector=4, codes=2)
