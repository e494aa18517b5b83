from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from arch_tiny_models import MODELS, build
from torch import nn
from torch.nn.functional import linear, one_hot, unfold

from eckart.arch import check_finite, find_sites, site_matrices, site_module, stored_weight
from eckart.errors import InputError, NotFiniteError
from eckart.linalg import fold


@pytest.mark.parametrize("name", MODELS)
def test_matrices_of_a_family_compute_what_the_modules_do(name: str) -> None:
    model = build(name).double()
    generator = torch.Generator().manual_seed(1)
    for site in find_sites(model, embeddings=True, head=True):
        matrices = site_matrices(model, site)
        assert len(matrices) == site.slices
        assert all(m["weight"].shape == (site.out_features, site.in_features) for m in matrices)
        if site.kind in ("linear", "conv1d"):
            x = torch.randn(5, site.in_features, dtype=torch.float64, generator=generator)
            expected = linear(x, matrices[0]["weight"], matrices[0].get("bias"))
            torch.testing.assert_close(site_module(model, site)(x), expected, rtol=1e-12, atol=1e-12)
        elif site.kind == "embedding":
            ids = torch.randint(site.in_features, (7,), generator=generator)
            expected = one_hot(ids, site.in_features).double() @ matrices[0]["weight"].T
            assert torch.equal(site_module(model, site)(ids), expected)


@pytest.mark.parametrize("name", MODELS)
def test_fold_is_the_way_back(name: str) -> None:
    model = build(name)
    for site in find_sites(model, embeddings=True, head=True):
        stored = stored_weight(model, site)
        stack = torch.stack([m["weight"] for m in site_matrices(model, site)])
        assert torch.equal(fold(stack, site.kind, stored.shape), stored)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_its_matrices_on_patches(groups: int) -> None:
    generator = torch.Generator().manual_seed(2)
    conv = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=groups, dtype=torch.float64)
    (site,) = find_sites(nn.Sequential(conv))
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=generator)
    patches = unfold(x, (3, 2), stride=2, padding=1).unflatten(1, (groups, -1))  # (2, groups, in, positions)
    rows = [
        m["weight"] @ patches[:, g] + m["bias"][:, None] for g, m in enumerate(site_matrices(nn.Sequential(conv), site))
    ]
    torch.testing.assert_close(torch.cat(rows, 1), conv(x).flatten(2), rtol=1e-12, atol=1e-12)


def test_experts_are_one_matrix_each() -> None:
    model = build("mixtral")
    site = next(site for site in find_sites(model) if site.role.endswith("down_proj"))
    matrices = site_matrices(model, site)
    for e in range(3):
        assert torch.equal(matrices[e]["weight"], model.model.layers[0].mlp.experts.down_proj[e])
        assert "bias" not in matrices[e]


def test_matrices_are_detached_views() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    (site,) = find_sites(model)
    (matrix,) = site_matrices(model, site)
    assert not matrix["weight"].requires_grad
    assert matrix["weight"].data_ptr() == model[0].weight.data_ptr()


def test_a_site_of_another_model() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    (site,) = find_sites(model)
    with pytest.raises(InputError, match=r"0: expected 1 × \(5 × 3\) numbers, got shape \(2, 3\)"):
        site_matrices(model, replace(site, out_features=5))
    with pytest.raises(InputError, match="expected a bias of 2 numbers"):
        site_matrices(nn.Sequential(nn.Linear(3, 2, bias=False)), site)


def test_check_finite_names_every_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 3))
    sites = find_sites(model)
    check_finite(model, sites)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
        model[2].bias[:2] = float("inf")
    with pytest.raises(NotFiniteError) as caught:
        check_finite(model, sites)
    assert "0: 1 of 6 numbers of the weight are NaN or Inf" in str(caught.value)
    assert "2: 2 of 3 numbers of the bias are NaN or Inf" in str(caught.value)
    check_finite(model, sites[1:2])
