"""What differs between two models, read from whatever stores it, and which pairs do not belong together."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from eckart.arch import find_sites
from eckart.compensation import dense_map, find_damage
from eckart.errors import InputError, MismatchError
from eckart.forms import LowRank
from eckart.layers import layer_from_forms
from eckart.records import Site


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def rounded(base: nn.Module, names: tuple[str, ...] = ("blocks.0.up", "blocks.1.down")) -> nn.Module:
    damaged = copy.deepcopy(base)
    for name in names:
        weight = damaged.get_submodule(name).weight.data
        weight.copy_((weight * 8).round() / 8)
    return damaged


def test_the_maps_that_differ_are_found() -> None:
    base = model()
    damage = find_damage(base, rounded(base))
    assert [site.name for site in damage.sites] == ["blocks.0.up", "blocks.1.down"]
    assert damage.notes == ()


def test_the_same_model_in_another_dtype_is_not_damaged() -> None:
    base = model()
    with pytest.raises(InputError, match="nothing to repair"):
        find_damage(base, copy.deepcopy(base))
    with pytest.raises(InputError, match="nothing to repair"):
        find_damage(base, copy.deepcopy(base).bfloat16())
    with pytest.raises(InputError, match="nothing to repair"):
        find_damage(copy.deepcopy(base).bfloat16(), copy.deepcopy(base).bfloat16().float())


def test_damage_in_another_dtype_is_found() -> None:
    base = model()
    assert len(find_damage(base, rounded(base).bfloat16()).sites) == 2


def test_another_model_is_refused_with_what_differs() -> None:
    with pytest.raises(MismatchError, match=r"blocks.0.up is further from the base's \(1\.\d+\) than zeros"):
        find_damage(model(0), rounded(model(1)))
    base = model()
    damaged = rounded(base)
    damaged.blocks[0].norm.weight.data.mul_(1.5)
    with pytest.raises(MismatchError, match=r"blocks.0.norm.weight differs"):
        find_damage(base, damaged)
    damaged = rounded(base)
    damaged.blocks[0].up = nn.Linear(8, 14)
    with pytest.raises(MismatchError, match=r"blocks.0.up is \(14, 8\) here and \(12, 8\) in the base"):
        find_damage(base, damaged)
    damaged = rounded(base)
    damaged.table.weight.data.normal_()
    with pytest.raises(MismatchError, match=r"table.weight differs"):
        find_damage(base, damaged)
    with pytest.raises(MismatchError, match="Sequential cannot come from a Model"):
        find_damage(base, nn.Sequential(nn.Linear(2, 2)))


def test_everything_pruned_away_is_still_damage() -> None:
    base = model()
    damaged = copy.deepcopy(base)
    damaged.blocks[0].up.weight.data.zero_()
    assert [site.name for site in find_damage(base, damaged).sites] == ["blocks.0.up"]


def test_what_is_not_repaired_is_noted() -> None:
    base = model()
    damaged = rounded(base)
    damaged.table.weight.data.mul_(1.01)
    damaged.blocks[1].up.bias.data.add_(1)
    notes = " ".join(find_damage(base, damaged).notes)
    assert "table.weight differs and stays as it is" in notes
    assert "blocks.1.up differs in its bias alone" in notes
    only = copy.deepcopy(base)
    only.table.weight.data.mul_(1.01)
    with pytest.raises(InputError, match=r"nothing to repair. .*table.weight differs"):
        find_damage(base, only)


def test_narrowed_maps_are_noted_and_the_others_repaired() -> None:
    base = model()
    damaged = rounded(base)
    damaged.blocks[0].up = nn.Linear(8, 10)
    damage = find_damage(base, damaged)
    assert [site.name for site in damage.sites] == ["blocks.1.down"]
    assert "blocks.0.up is (10, 8) here and (12, 8) in the base: narrowed" in damage.notes[0]


def test_factored_layers_and_anything_with_dense_are_read() -> None:
    base = model()
    damaged = copy.deepcopy(base)
    site = next(site for site in find_sites(base) if site.name == "blocks.0.up")
    form = LowRank(a=torch.randn(3, 8), b=torch.randn(12, 3) / 100, bias=base.blocks[0].up.bias.detach())
    damaged.blocks[0].up = layer_from_forms(site, damaged.blocks[0].up, [form])
    weight, bias = dense_map(damaged.blocks[0].up, site)
    torch.testing.assert_close(weight, form.dense())
    assert torch.equal(bias, base.blocks[0].up.bias)

    class Packed(nn.Module):
        def dense(self) -> torch.Tensor:
            return torch.ones(12, 8)

    assert torch.equal(dense_map(Packed(), site)[0], torch.ones(12, 8))


def test_layers_that_hide_their_weight_are_refused() -> None:
    base = model()
    damaged = rounded(base)
    damaged.blocks[0].up = nn.Identity()
    with pytest.raises(InputError, match=r"blocks.0.up: a Identity does not say what its weight is"):
        find_damage(base, damaged)


def test_torchao_tensors_are_read() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(64, 32))
    before = layer[0].weight.detach().clone()
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    site = Site(name="0", kind="linear", out_features=32, in_features=64, bias=True)
    weight, bias = dense_map(layer[0], site)
    assert type(weight) is torch.Tensor
    assert 0 < float((weight - before).norm() / before.norm()) < 0.02
    assert bias is not None
