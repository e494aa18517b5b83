"""One-shot pruning of whole models: in place, counted, checked before any change."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart.arch import find_sites
from eckart.errors import BudgetError, InputError, MismatchError, NotFiniteError
from eckart.moments import Moments, collect
from eckart.prune import MaskSet, one_shot


class Net(nn.Module):
    """Two maps with a bias and one without, of unlike sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16, bias=False)
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.down(torch.relu(self.up(x))))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).mean((2, 3)))


def batches(shape: tuple[int, ...] = (16,), n: int = 300) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(shape[0], shape[0], generator=generator)
    X = torch.einsum("nc...,cd->nd...", torch.randn(n, *shape, generator=generator), mix) + 0.5
    return list(X.split(100))


def loss(outputs: Tensor, batch: Any, generator: torch.Generator) -> tuple[Tensor, float]:
    v = torch.randn(outputs.shape, generator=generator)
    return (outputs * v).sum(), float(len(outputs))


def made(cls: type[nn.Module] = Net, gradients: Any = "full") -> tuple[nn.Module, Moments]:
    torch.manual_seed(0)
    model = cls()
    data = batches((4, 6, 6)) if cls is Conv else batches()
    found = collect(model, data, find_sites(model), loss=None if gradients == "none" else loss, gradients=gradients)
    return model, found


MODEL, MOMENTS = made()
X = torch.cat(batches())


def error(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(X) - MODEL(X)).square().sum() / MODEL(X).square().sum())


def pruned(model: nn.Module = MODEL, moments: Moments | None = MOMENTS, **options: Any) -> tuple[nn.Module, Any, Any]:
    model = copy.deepcopy(model)
    masks, outcome = one_shot(model, moments, **options)
    assert masks.leaks(model) == {}
    return model, masks, outcome


@pytest.mark.parametrize("method", ["kfac", "alps", "sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_every_method_keeps_the_share_and_says_so(method: str, keep: float) -> None:
    model, masks, outcome = pruned(method=method, keep=keep)
    total = 16 * 24 * 2 + 16 * 8
    assert outcome.weights == masks.numel() == total
    assert outcome.kept == masks.kept()
    assert keep * total - 3 <= outcome.kept <= keep * total
    assert list(masks) == ["up.weight", "down.weight", "out.weight"]
    assert [layer.kept for layer in outcome.layers] == [int(m.sum()) for m in masks.values()]
    assert outcome.dense_bytes == outcome.loadable_bytes == 4 * total
    assert outcome.stored_bytes == 4 * outcome.kept + total // 8
    assert "not the model faster" in str(outcome)
    assert math.isfinite(error(model))
    assert all(0 <= layer.error <= 1 for layer in outcome.layers)


def test_default_is_the_best_and_predicts_the_loss() -> None:
    errors = {m: error(pruned(method=m)[0]) for m in ("kfac", "sparsegpt", "wanda", "magnitude")}
    assert errors["kfac"] == min(errors.values())
    assert errors["kfac"] < 0.8 * error(pruned(method="sparsegpt", refit=False)[0])
    model, _, outcome = pruned()
    # the loss of these moments is ½‖y − y₀‖² per row
    with torch.no_grad():
        rise = 0.5 * float((model(X) - MODEL(X)).square().sum(1).mean())
    assert rise / 2.5 < outcome.loss < 2.5 * rise  # a sum over layers of a small network, cross terms left out
    assert outcome.loss == pytest.approx(sum(layer.loss for layer in outcome.layers))


def test_refit_lowers_the_error_and_moves_the_bias() -> None:
    plain, refitted = pruned(method="wanda", refit=False), pruned(method="wanda")
    assert error(refitted[0]) < error(plain[0])
    assert torch.equal(plain[0].up.bias, MODEL.up.bias)
    assert not torch.equal(refitted[0].up.bias, MODEL.up.bias)
    assert all(torch.equal(plain[1][n], refitted[1][n]) for n in plain[1])
    with torch.no_grad():
        means = (MODEL.up(X).mean(0), refitted[0].up(X).mean(0))
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-4)


def test_magnitude_needs_no_moments() -> None:
    _, masks, outcome = pruned(moments=None, method="magnitude", refit=False, allocation="global")
    flat = torch.cat([p.detach().abs().flatten() for n, p in MODEL.named_parameters() if "weight" in n])
    assert masks.kept() == flat.numel() // 2
    edge = flat.sort(descending=True).values[flat.numel() // 2 - 1]
    assert torch.equal(masks["up.weight"], MODEL.up.weight.detach().abs() >= edge)
    assert outcome.loss is None
    assert outcome.layers[0].error is None


@pytest.mark.parametrize("pattern", ["2:4", "keep 1 of 8", "row", "runs of 4", "outputs"])
def test_patterns(pattern: str) -> None:
    model, masks, outcome = pruned(pattern=pattern)
    assert outcome.pattern == ("keep 2 of 4" if pattern == "2:4" else pattern)
    if pattern == "2:4":
        assert all(bool((m.view(len(m), -1, 4).sum(-1) == 2).all()) for m in masks.values())
    if pattern == "outputs":
        assert all(bool((m == m[:, :1]).all()) for m in masks.values())
    assert math.isfinite(error(model))


@pytest.mark.parametrize("allocation", ["loss", "uniform", "owl", "farms"])
@pytest.mark.parametrize("method", ["wanda", "kfac", "sparsegpt"])
def test_allocations(allocation: Any, method: str) -> None:
    _, masks, outcome = pruned(method=method, allocation=allocation, keep=0.4)
    assert outcome.allocation == allocation
    assert outcome.kept / outcome.weights == pytest.approx(0.4, abs=0.01)
    if allocation == "uniform":
        assert all(share == pytest.approx(0.4, abs=0.01) for share in masks.densities().values())


@pytest.mark.parametrize("method", ["kfac", "wanda"])
def test_products_beside_tight_patterns(method: str) -> None:
    alone = pruned(method=method, pattern="2:4")
    model, _masks, outcome = pruned(method=method, pattern="2:4", rank=2)
    assert set(outcome.factors) == {"up", "down", "out"}
    with torch.no_grad():
        for name, product in outcome.factors.items():
            assert product.rank == 2
            model.get_submodule(name).weight += product.dense()
    assert error(model) < error(alone[0])
    beside = sum(2 * (s.site.out_features + s.site.in_features) * 4 for s in outcome.layers)
    assert outcome.loadable_bytes == outcome.dense_bytes + beside
    assert [layer.rank for layer in outcome.layers] == [2, 2, 2]


def test_without_gradients_other_methods_work_and_kfac_says_what_is_missing() -> None:
    model, blind = made(gradients="none")
    _, _, outcome = pruned(model, blind, method="wanda")
    assert outcome.loss is None
    for options in ({}, {"method": "wanda", "allocation": "loss"}):
        with pytest.raises(InputError, match="gradients='full'"):
            pruned(model, blind, **options)
    model, scaled = made(gradients="scale")
    assert pruned(model, scaled)[2].loss is not None


def test_grouped_convolutions() -> None:
    model, moments = made(Conv)
    after, masks, outcome = pruned(model, moments, keep=0.5)
    assert masks["conv.weight"].shape == model.conv.weight.shape  # type: ignore[union-attr]
    assert outcome.kept == (8 * 2 * 9 + 8 * 4) // 2
    assert bool(after.conv.weight.isfinite().all())  # type: ignore[union-attr, operator]
    with pytest.raises(InputError, match="beside"):
        pruned(model, moments, pattern="outputs", rank=1)


def test_half_precision_keeps_its_dtype() -> None:
    torch.manual_seed(0)
    model = Net().to(torch.bfloat16)
    moments = collect(model, [x.to(torch.bfloat16) for x in batches()], find_sites(model), gradients="none")
    after, _, outcome = pruned(model, moments, method="sparsegpt")
    assert after.up.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert outcome.dense_bytes == 2 * outcome.weights


def test_include_exclude_and_progress() -> None:
    seen: list[str] = []
    _, masks, outcome = pruned(
        exclude=["out"], progress=lambda stage, done, total: seen.append(f"{stage} {done}/{total}")
    )
    assert list(masks) == ["up.weight", "down.weight"]
    assert {"prune 16/16", "refit 2/2"} <= set(seen)
    assert json.loads(json.dumps(outcome.to_json()))["kept"] == outcome.kept
    with pytest.raises(InputError, match="unknown layer pattern 'uq'"):
        pruned(include=["uq"])


def refused(
    kind: type[Exception], match: str, model: nn.Module = MODEL, moments: Moments | None = MOMENTS, **options: Any
) -> None:
    """The error comes, and nothing was changed."""
    model = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=match):
        one_shot(model, moments, **options)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_bad_options() -> None:
    refused(InputError, "keep=1 keeps every weight", keep=1)
    refused(InputError, r"\(0, 1\]", keep=0)
    refused(InputError, "keeps 0.5 of the weights", keep=0.3, pattern="2:4")
    refused(InputError, "no multiple of 5", pattern="2:5")
    refused(InputError, "unknown method 'wonda'.*wanda", method="wonda")
    refused(InputError, "unknown allocation", allocation="even")
    refused(InputError, "kfac. refits by itself", refit=False)
    refused(InputError, r"(?s)2 problems.*refit=True.*takes 'unstructured'", method="sparsegpt", refit=False, rank=1,
            pattern="runs of 4")  # fmt: skip
    refused(InputError, "same share", pattern="2:4", allocation="owl")
    refused(InputError, "more than its full rank 8", rank=9)
    refused(InputError, "moments are needed", moments=None)
    refused(BudgetError, "less than one", pattern="row", keep=0.05)


def test_bad_models_and_moments() -> None:
    tied = copy.deepcopy(MODEL)
    tied.other = nn.Linear(16, 24)  # type: ignore[assignment]
    tied.other.weight = tied.up.weight  # type: ignore[union-attr]
    refused(InputError, "up: its weight is tied to other", model=tied)
    other = copy.deepcopy(MODEL)
    with torch.no_grad():
        other.up.weight.add_(1)  # type: ignore[union-attr, operator]
    refused(MismatchError, "Calibrate again", model=other)
    with torch.no_grad():
        other.up.weight[0, 0] = torch.nan  # type: ignore[index]
    refused(NotFiniteError, "up: 1 of 384", model=other)
    model, moments = made()
    few = collect(model, batches(), find_sites(model, exclude=["down"]), gradients="none")
    refused(InputError, "down: its moments were not collected", moments=few, method="wanda")
    assert moments.inputs["up"].second is not None
    moments.inputs["up"].second[0, 0, 0, 0] = torch.nan
    refused(NotFiniteError, "up: 1 numbers of second", moments=moments)


def test_masks_can_be_saved_and_read_again(tmp_path: Any) -> None:
    model, masks, _ = pruned()
    masks.save(tmp_path / "masks.safetensors", model)
    assert MaskSet.load(tmp_path / "masks.safetensors", model).same(masks)
