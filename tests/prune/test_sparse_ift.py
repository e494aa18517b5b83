"""Sparse-IFT: budgets to the last weight, forward passes against the formulas, folding exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError
from eckart.prune.masks import keep_zero
from eckart.prune.sparse_ift import TRANSFORMATIONS, SparseIFT


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5)).to(dtype)


def conv() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 8, (3, 1), stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(8 * 2 * 3, 4),
    ).double()


X = torch.randn(7, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IMAGES = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
CONVS = ["0", "3"]


def in_use(ift: SparseIFT, model: nn.Module) -> int:
    """Numbers that take part in multiply-adds: masked ones as masked, other matrices whole."""
    masks = ift.masks()
    total = masks.kept()
    return total + sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and n not in masks)


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("build", [mlp, conv])
def test_the_budget_is_that_of_the_dense_model(build, transformation: str, sparsity: float) -> None:
    dense = sum(p.numel() for p in build().parameters() if p.ndim > 1)
    model = build()
    choice = {"include": CONVS} if build is conv and transformation != "wide" else {}
    ift = SparseIFT(model, transformation, sparsity=sparsity, **choice)
    assert in_use(ift, model) == dense
    x = X if build is mlp else IMAGES
    ift.masks().apply(model)
    assert model.eval()(x).shape == build()(x).shape
    assert ift.masks().densities() == pytest.approx(ift.densities)


def test_widths_ranks_and_branches_are_the_papers() -> None:
    wide = mlp()
    SparseIFT(wide, "wide", sparsity=0.75)
    assert [tuple(m.weight.shape) for m in wide if isinstance(m, nn.Linear)] == [(48, 40), (48, 48), (5, 48)]
    parallel = mlp()
    SparseIFT(parallel, "parallel", sparsity=0.75, include=["2"])
    assert [tuple(b.weight.shape) for b in parallel[2].branches] == [(24, 24)] * 4
    doped = mlp()
    SparseIFT(doped, "doped", sparsity=0.5, include=["0"])
    assert doped[0].a.out_features == math.floor(0.5 * 40 * 24 / (40 + 24))
    factorized = mlp()
    SparseIFT(factorized, "factorized", sparsity=0.75, include=["0"])
    assert factorized[0].a.out_features == math.ceil(40 * 24 / (0.25 * (40 + 24)))
    images = conv()
    SparseIFT(images, "factorized", sparsity=0.5, include=["0"])
    assert images[0].a.out_channels == math.ceil(9 * 3 * 12 / (0.5 * (9 * 3 + 12)))


def test_a_wide_convolutional_net_keeps_its_ends() -> None:
    model = conv()
    SparseIFT(model, "wide", sparsity=0.75)
    assert tuple(model[0].weight.shape) == (24, 3, 3, 3)
    assert model[1].num_features == 24
    assert tuple(model[3].weight.shape) == (16, 24, 3, 1)
    assert tuple(model[5].weight.shape) == (4, 16 * 2 * 3)


@pytest.mark.parametrize("transformation", ["parallel", "factorized", "doped"])
@pytest.mark.parametrize("build", [mlp, conv])
@pytest.mark.parametrize("norm", [True, False])
def test_folding_changes_no_output(build, transformation: str, norm: bool) -> None:
    if norm and transformation == "doped":
        pytest.skip("doped layers have no norm")
    model, x = build(), X if build is mlp else IMAGES
    shapes = {n: p.shape for n, p in model.named_parameters() if p.ndim > 1}
    extra = {} if transformation == "doped" else {"norm": norm}
    if transformation == "factorized":
        extra["activation"] = False
    ift = SparseIFT(model, transformation, sparsity=0.5, include=CONVS if build is conv else ["0", "2"], **extra)
    ift.masks().apply(model)
    for _ in range(3):  # batch norms learn statistics
        model(x)
    model.eval()
    before = model(x)
    folded = ift.bake()
    torch.testing.assert_close(model(x), before)
    if transformation == "factorized" and norm:
        assert folded == ()  # something is between the factors
    else:
        assert folded == (tuple(CONVS) if build is conv else ("0", "2"))
        assert {n: p.shape for n, p in model.named_parameters() if p.ndim > 1} == shapes
        assert ift.densities == {}


def test_factorized_convolutions_get_norm_and_relu_and_stay() -> None:
    model = conv()
    ift = SparseIFT(model, "factorized", sparsity=0.5, include=CONVS)
    first = model[0]
    y = first.b(first.norm(first.a(IMAGES)).relu())
    torch.testing.assert_close(first(IMAGES), y)
    assert ift.bake() == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_outputs_start_as_large_as_the_dense_ones(transformation: str, dtype: torch.dtype) -> None:
    """Standard deviation within a factor of 1.5, masks applied; one layer of many outputs, white inputs."""
    torch.manual_seed(0)
    x = torch.randn(64, 256).to(dtype)
    dense = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False)).to(dtype)
    expected = float(dense(x).detach().float().std())
    choice = {} if transformation == "wide" else {"include": ["0", "1"]}
    ift = SparseIFT(dense, transformation, sparsity=0.75, **choice)
    ift.masks().apply(dense)
    assert dense(x).dtype == dtype
    assert 1 / 1.5 < float(dense(x).detach().float().std()) / expected < 1.5


def loss_of(model: nn.Module) -> Tensor:
    return (model(X) - X[:, :5]).square().mean()


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_training_keeps_the_budget(transformation: str, dynamic: bool) -> None:
    model = mlp()
    ift = SparseIFT(model, transformation, sparsity=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if dynamic:
        engine = ift.rigl(steps=20, interval=5)
        engine.attach(optimizer)
    else:
        held = keep_zero(ift.masks(), model, optimizer)
    first = float(loss_of(model).detach())
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert float(loss_of(model).detach()) < first
    if dynamic:
        assert engine.masks.kept() == ift.masks().kept()
        assert not engine.masks.leaks(model)
    else:
        held.remove()
        assert not ift.masks().leaks(model)


def test_seeds() -> None:
    a, b, c = mlp(), mlp(), mlp()
    masks = [SparseIFT(m, "doped", seed=s).masks(s) for m, s in ((a, 0), (b, 0), (c, 1))]
    assert torch.equal(a[0].sparse.weight, b[0].sparse.weight)
    assert masks[0].same(masks[1])
    assert not torch.equal(a[0].sparse.weight, c[0].sparse.weight)
    assert not masks[0].same(masks[2])
    model = mlp()
    state = torch.get_rng_state()
    SparseIFT(model, "doped")
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


# ---- bad input


@pytest.mark.parametrize(
    ("transformation", "options", "words"),
    [
        ("deep", {}, "transformation"),
        ("doped", {"sparsity": 1.0}, "sparsity"),
        ("doped", {"sparsity": 0}, "sparsity"),
        ("parallel", {"sparsity": 0.7}, "0.666667"),
        ("doped", {"norm": True}, "norm"),
        ("parallel", {"activation": True}, "activation"),
        ("wide", {"include": ["0"]}, "whole model"),
        ("doped", {"sparsity": 0.01, "include": ["2"]}, "no rank"),
        ("doped", {"include": ["nothing"]}, "pattern"),
    ],
)
def test_bad_options(transformation: str, options: dict[str, object], words: str) -> None:
    model = mlp()
    with pytest.raises(InputError, match=words):
        SparseIFT(model, transformation, **options)
    assert list(model.state_dict()) == list(mlp().state_dict())


def test_layers_that_cannot_be_transformed_are_named() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Linear(4, 4), nn.Linear(4, 4))
    model[3].weight = model[2].weight
    with pytest.raises(InputError) as caught:
        SparseIFT(model, "doped")
    for words in ("0: expected nn.Linear", "1: a convolution in groups", "2: it shares"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 4),
        nn.Sequential(nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)),
    ],
)
def test_models_that_cannot_become_wider(model: nn.Module) -> None:
    with pytest.raises(InputError, match="wider"):
        SparseIFT(model, "wide")
