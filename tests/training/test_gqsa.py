"""GQSA: mask and refit against the definition, storage against a decoder of plain loops."""

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
from eckart.moments import SiteMoments, collect
from eckart.training import GroupSparseInt4, group_sparse, group_sparsify, quantiser_parameters
from eckart.training.gqsa import kept_groups, refitted


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n: int = 400, width: int = 32, seed: int = 0) -> Tensor:
    """Correlated, so that some inputs can stand in for others."""
    return gaussian(n, width, seed=seed) @ gaussian(width, width, seed=9) + 0.3 * gaussian(n, width, seed=seed + 1)


def moments_of(X: Tensor) -> SiteMoments:
    return SiteMoments(count=len(X), second=X.T @ X / len(X))


def linear(dtype: torch.dtype = torch.float64, out: int = 12, width: int = 32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out).to(dtype)


def decoded(layer: GroupSparseInt4) -> Tensor:
    """The weight, row by row, group by group, nibble by nibble."""
    W = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    pointers = layer.row_pointers.tolist()
    for row in range(layer.out_features):
        for entry in range(pointers[row], pointers[row + 1]):
            start = int(layer.columns[entry]) * layer.group
            for i, byte in enumerate(layer.packed[entry].tolist()):
                for j, code in enumerate((byte % 16, byte // 16)):
                    W[row, start + 2 * i + j] = float(layer.scales[entry].detach()) * (
                        code - float(layer.zeros[entry].detach())
                    )
    return W


# ---- which groups, and what the others become


def test_saliency_is_what_dropping_one_weight_costs_after_the_refit() -> None:
    H = moments_of(inputs()).second
    w = gaussian(1, 32)
    costs = torch.zeros(32, dtype=torch.float64)
    for j in range(32):
        mask = torch.ones(1, 32, dtype=torch.bool)
        mask[0, j] = False
        missed = w - refitted(w, H, mask)
        costs[j] = (missed @ H @ missed.T)[0, 0]
    torch.testing.assert_close(costs, w[0].square() / torch.linalg.inv(H).diagonal())


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_the_groups_of_least_saliency_go(per_row: bool, sparsity: float) -> None:
    H = moments_of(inputs(width=64)).second + 0.01 * torch.eye(64)
    W = gaussian(10, 64) * torch.arange(1, 11)[:, None]
    keep = kept_groups(W, H, sparsity, 16, per_row)
    saliency = (W.square() / torch.linalg.inv(H).diagonal()).reshape(10, 4, 16).sum(-1)
    pools = [(saliency[i], keep[i]) for i in range(10)] if per_row else [(saliency, keep)]
    for scores, kept in pools:
        assert int(kept.sum()) == round((1 - sparsity) * kept.numel())
        assert scores[kept].min() > scores[~kept].max()


def test_refit_is_least_squares_on_the_kept_columns() -> None:
    X, W = inputs(), gaussian(6, 32)
    mask = gaussian(6, 32, seed=5) > 0
    mask[2] = False
    fitted = refitted(W, X.T @ X / len(X), mask)
    for row in range(6):
        kept = mask[row].nonzero()[:, 0]
        expected = torch.zeros(32, dtype=torch.float64)
        if len(kept):
            expected[kept] = torch.linalg.lstsq(X[:, kept], (X @ W[row])[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted[row], expected, atol=1e-8, rtol=1e-6)


def test_the_refit_lowers_the_error_of_the_outputs() -> None:
    X = inputs(width=64)
    layer = linear(width=64)
    missed = {}
    for refit in (True, False):
        coded = group_sparse(layer, moments_of(X), refit=refit)
        missed[refit] = float((X @ (layer.weight - coded.matrix()).detach().T).square().sum())
        total = float((X @ layer.weight.detach().T).square().sum())
        assert coded.error == pytest.approx(missed[refit] / total)
    assert missed[True] < 0.7 * missed[False]


def test_rounding_alone_is_within_half_a_step() -> None:
    layer = linear(out=40)
    coded = group_sparse(layer, moments_of(inputs()), sparsity=0.0)
    groups = layer.weight.detach().reshape(40, 2, 16)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    missed = (groups - coded.matrix().detach().reshape(40, 2, 16)).abs().amax(-1)
    assert (missed <= step / 2 + 1e-9).all()
    torch.testing.assert_close(coded.scales.detach(), step.flatten())


def test_constant_groups_and_zero_weights_survive() -> None:
    layer = linear()
    with torch.no_grad():
        layer.weight[:6] = 0.25
        layer.weight[6:] = 0
    coded = group_sparse(layer, sparsity=0.0)
    torch.testing.assert_close(coded.matrix().detach(), layer.weight.detach(), atol=1e-9, rtol=1e-7)


# ---- the layer


@pytest.mark.parametrize(("sparsity", "per_row", "group"), [(0.5, True, 16), (0.5, False, 16), (0.3, False, 4)])
def test_forward_multiplies_by_the_decoded_weight(sparsity: float, per_row: bool, group: int) -> None:
    X = inputs(width=64)
    layer = linear(width=64)
    coded = group_sparse(layer, moments_of(X), sparsity=sparsity, per_row=per_row, group=group)
    W = decoded(coded)
    assert coded.row_pointers[-1] == len(coded.scales) == round((1 - sparsity) * 12 * 64 / group)
    torch.testing.assert_close(coded.matrix().detach(), W)
    torch.testing.assert_close(coded.weight + 0, W)
    expected = nn.functional.linear(X[:6], W, layer.bias)
    torch.testing.assert_close(coded(X[:6]), expected)
    torch.testing.assert_close(coded(X[:6].reshape(2, 3, 64)), expected.reshape(2, 3, 12))
    torch.testing.assert_close(coded.to_dense()(X[:6]), expected)


def test_stored_bits_are_those_of_the_docstring() -> None:
    layer = nn.Linear(1024, 16, bias=False)
    coded = group_sparse(layer).half()
    assert coded.stored_bits() == 16 * 1024 * 3.25 + 32 * 17
    assert coded.columns.dtype == torch.uint8
    assert GroupSparseInt4(16 * 257, 2, kept=3).columns.dtype == torch.int16


def test_the_second_stage_trains_scales_and_zeros_alone() -> None:
    X = inputs(width=64)
    layer = linear(width=64)
    model = nn.Sequential(group_sparse(layer, moments_of(X)))
    wanted = layer(X).detach()
    codes = model[0].packed.clone()
    parameters = quantiser_parameters(model)
    assert [id(p) for p in parameters] == [id(model[0].scales), id(model[0].zeros)]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(X) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert torch.equal(codes, model[0].packed)
    dense = model[0].to_dense()
    torch.testing.assert_close(dense.weight.detach(), decoded(model[0]))


def test_gradients_of_scales_and_zeros_are_those_of_the_decoded_weight() -> None:
    coded = group_sparse(linear(out=3), moments_of(inputs()), sparsity=0.5)
    scales, zeros = coded.scales.detach().clone(), coded.zeros.detach().clone()

    def matrix(s: Tensor, z: Tensor) -> Tensor:
        return torch.func.functional_call(coded, {"scales": s, "zeros": z}, (torch.eye(32, dtype=s.dtype),))

    assert torch.autograd.gradcheck(matrix, (scales.requires_grad_(), zeros.requires_grad_()))


def test_saves_loads_copies_and_changes_precision(tmp_path: Path) -> None:
    coded = group_sparse(linear(torch.float32), moments_of(inputs()), per_row=False)
    x = inputs(5).float()
    save_file(coded.state_dict(), tmp_path / "layer.safetensors")
    other = GroupSparseInt4(32, 12, kept=12)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x), coded(x))
    clone = copy.deepcopy(coded)
    assert torch.equal(clone(x), coded(x))
    clone.to(torch.bfloat16)
    assert clone.packed.dtype == torch.uint8
    assert clone.weight.dtype == torch.bfloat16
    # z of up to 15 is rounded by 0.03 codes, s by 0.4 %, and the product and its sum once more
    reference = coded(x).detach()
    torch.testing.assert_close(clone(x.bfloat16()).float(), reference, atol=0.03 * float(reference.abs().max()), rtol=0)


def test_an_empty_layer_is_valid_before_its_state_is_loaded() -> None:
    layer = GroupSparseInt4(32, 4, kept=3)
    assert torch.equal(layer(torch.ones(2, 32)), torch.zeros(2, 4))


# ---- a whole model


def test_a_model_is_coded_in_place_with_an_honest_report() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), Conv1D(20, 64), nn.Linear(20, 8), nn.Conv1d(2, 2, 3))
    nn.init.normal_(model[2].weight)
    original = copy.deepcopy(model)
    X = inputs().float()
    taken = find_sites(model[:4])
    moments = collect(model[:4], [X], taken, gradients="none")
    report = group_sparsify(model, moments)
    assert [site.name for site in report.sites] == ["0", "2"]
    assert dict(report.skipped)["3"].startswith("group is even and divides")
    assert dict(report.skipped)["4"] == "conv is not coded"
    assert report.bits_before == 32 * (32 * 64 + 64 * 20)
    assert report.bits_after == model[0].stored_bits() + model[2].stored_bits()
    assert all(0 < site.error < 0.5 for site in report.sites)
    hidden = torch.tanh(original[0](X))
    torch.testing.assert_close(model[2](hidden), hidden @ model[2].matrix().T + original[2].bias)
    assert len(quantiser_parameters(model)) == 4
    again = nn.Sequential(copy.deepcopy(original[0]))
    group_sparsify(again, None)
    assert (X @ (model[0].matrix() - original[0].weight).T).square().sum() < (
        X @ (again[0].matrix() - original[0].weight).T
    ).square().sum()


# ---- what it refuses


def test_wrong_options_are_named_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)group is even.*sparsity.*damping"):
        group_sparse(linear(), group=5, sparsity=1.0, damping=0.0)
    with pytest.raises(InputError, match="over 32 inputs"):
        group_sparse(linear(), moments_of(inputs(width=16)))
    with pytest.raises(InputError, match="over 32 inputs; got none"):
        group_sparse(linear(), SiteMoments(count=3))
    with pytest.raises(InputError, match="kept is in 1 … 24"):
        GroupSparseInt4(32, 12, kept=25)
    with pytest.raises(InputError, match="2-D weight"):
        group_sparse(nn.Conv2d(16, 4, 1))


def test_wrong_models_and_weights_are_named() -> None:
    with pytest.raises(InputError, match="no GroupSparseInt4"):
        quantiser_parameters(nn.Linear(3, 3))
    with pytest.raises(InputError, match="no map can be coded"):
        group_sparsify(nn.Sequential(nn.Linear(20, 8)), None)
    broken = linear()
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(NotFiniteError):
        group_sparse(broken)
