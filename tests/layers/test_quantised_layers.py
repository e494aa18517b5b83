"""Quantised layers against the dense matrices that their integers stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eckart.arch import find_sites, model_size
from eckart.errors import EckartError, InputError
from eckart.forms import LowRank, Pivoted
from eckart.layers import (
    QuantisedEmbedding,
    QuantisedLinear,
    describe,
    is_factored,
    layer_from_forms,
    layer_skeleton,
    quantise_layer,
    unsupported,
)
from eckart.layers.quantised import pack, unpack
from eckart.linalg import round_groups
from eckart.records import Site


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Conv1D(nn.Module):
    """The layout of transformers' class of this name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.zeros(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def original(kind: str = "linear", bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(10, 7, bias=bias)
    layer = Conv1D(7, 10)
    with torch.no_grad():
        layer.weight.copy_(draw(10, 7))
        layer.bias.copy_(draw(7))
    return layer


def quantised(layer: nn.Module, bits: int = 4, group: int | None = 4, rank: int = 0) -> tuple[QuantisedLinear, Tensor]:
    """The layer and the dense matrix (out × in) that it should stand for."""
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    rounded = round_groups(weight, bits=bits, group=group)
    repair = (draw(rank, 10, seed=1).to(weight.dtype), draw(7, rank, seed=2).to(weight.dtype)) if rank else None
    dense = rounded.dense() + (repair[1] @ repair[0] if repair else 0)
    return QuantisedLinear.from_linear(layer, rounded, repair), dense


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 4, 7, 16])
def test_packing_is_undone_by_unpacking(bits, columns):
    codes = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, -(-columns * bits // 8))
    assert torch.equal(unpack(packed, bits, columns), codes)
    assert int(packed[0, 0]) & (2**bits - 1) == int(codes[0, 0])


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
@pytest.mark.parametrize(("bits", "group"), [(2, 3), (4, 4), (4, None), (8, 5), (8, 64)])
def test_a_linear_layer_computes_with_the_rounded_matrix(bits, group, kind, rank):
    old = original(kind.split()[0], bias="without" not in kind)
    layer, dense = quantised(old, bits, group, rank)
    bias = getattr(old, "bias", None)
    x = draw(2, 5, 10, seed=3)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, bias))
    torch.testing.assert_close(layer.dense(), dense)
    torch.testing.assert_close(layer.weight + 0, dense.T if kind == "conv1d" else dense)
    assert layer.weight.shape == old.weight.shape
    assert (layer.in_features, layer.out_features, layer.nx, layer.nf) == (10, 7, 10, 7)
    assert (layer.bias is None) == (bias is None)
    back = layer.to_dense()
    assert type(back) is type(old)
    torch.testing.assert_close(back(x), layer(x))
    assert back.weight.requires_grad
    assert [n for n, _ in back.named_parameters()] == [n for n, _ in old.named_parameters()]
    with pytest.raises(EckartError, match="would be lost"):
        layer.weight.zero_()


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_survives_files_copies_and_casts(dtype, rank, tmp_path):
    layer, _ = quantised(original().to(dtype), rank=rank)
    x = draw(4, 10).to(dtype)
    expected = layer(x)
    assert expected.dtype == layer.weight.dtype == layer.scale.dtype == dtype
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    skeleton = layer_skeleton(describe(nn.ModuleDict({"x": layer}))["x"], nn.Linear(10, 7).to(dtype))
    skeleton.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(skeleton(x), expected)
    twin = copy.deepcopy(layer)
    layer.codes.zero_()
    assert torch.equal(twin(x), expected)
    half = twin.to(torch.bfloat16)
    assert {t.dtype for t in half.state_dict().values()} == {torch.uint8, torch.bfloat16}
    torch.testing.assert_close(half(x.bfloat16()).float(), expected.float(), rtol=0.05, atol=0.05)


def test_skeleton_on_meta_has_the_keys_and_shapes_of_the_layer():
    for old in (original(), original(bias=False), original("conv1d")):
        layer, _ = quantised(old, rank=2)
        skeleton = layer_skeleton(layer.entry(), copy.deepcopy(old).to("meta"))
        assert all(t.is_meta for t in skeleton.state_dict().values())
        expected = {key: (t.shape, t.dtype) for key, t in layer.state_dict().items()}
        assert {key: (t.shape, t.dtype) for key, t in skeleton.state_dict().items()} == expected
    table = QuantisedEmbedding(9, 5, bits=4, group=2)
    assert layer_skeleton(table.entry(), nn.Embedding(9, 5)).state_dict().keys() == table.state_dict().keys()


@pytest.mark.parametrize("rank", [0, 2])
def test_gradients_reach_inputs_bias_and_repair(rank):
    layer, dense = quantised(original(), rank=rank)
    x = draw(3, 10).requires_grad_()
    layer(x).square().sum().backward()
    y = draw(3, 10).requires_grad_()
    reference = nn.functional.linear(y, dense, layer.bias.detach()).square().sum()
    (expected,) = torch.autograd.grad(reference, y)
    torch.testing.assert_close(x.grad, expected)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    assert len(list(layer.parameters())) == (3 if rank else 1)
    frozen, _ = quantised(original().requires_grad_(False), rank=rank)
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("rank", [0, 2])
def test_compiles_and_exports_without_graph_breaks(rank):
    layer, _ = quantised(original(), rank=rank)
    table = QuantisedEmbedding.from_embedding(nn.Embedding(6, 10), round_groups(draw(6, 10), bits=4, group=4))
    model = nn.Sequential(table, layer)
    ids = torch.tensor([[0, 3], [5, 1]])
    expected = model(ids)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(ids), expected)
    torch.testing.assert_close(torch.export.export(model, (ids,)).module()(ids), expected)


@pytest.mark.parametrize("form", ["lowrank", "pivoted"])
@pytest.mark.parametrize("children", ["a", "b", "ab"])
def test_children_of_factored_layers(form, children):
    bias = draw(7, seed=9)
    if form == "lowrank":
        made = LowRank(a=draw(4, 10), b=draw(7, 4, seed=1), bias=bias)
    else:
        index = torch.tensor([3, 0, 6, 1, 2, 5, 4])
        made = Pivoted(a=draw(4, 10), b=draw(3, 4, seed=1), index=index, bias=bias)
    site = Site(name="m", kind="linear", out_features=7, in_features=10, bias=True)
    model = nn.ModuleDict({"m": layer_from_forms(site, nn.Linear(10, 7), [made])})
    layer = model["m"]
    reference = copy.deepcopy(layer)
    for child in children:
        new = quantise_layer(model, f"m.{child}", bits=8)
        with torch.no_grad():
            getattr(reference, child).weight.copy_(new.dense())
    x = draw(3, 10)
    torch.testing.assert_close(layer(x), reference(x))
    torch.testing.assert_close(layer.weight + 0, reference.dense())
    torch.testing.assert_close(layer.bias, reference.bias)
    assert layer.weight.shape == (7, 10)
    torch.testing.assert_close(layer.to_dense()(x), reference(x))
    assert list(describe(model)) == ["m", *(f"m.{child}" for child in children)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    twin = nn.ModuleDict({"m": nn.Linear(10, 7)})
    for name, entry in describe(model).items():
        twin.set_submodule(name, layer_skeleton(entry, twin.get_submodule(name)))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin["m"](x), layer(x))


@pytest.mark.parametrize(("bits", "group"), [(4, 4), (8, None), (2, 3)])
def test_an_embedding_and_its_tied_head(bits, group):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(12, 10, padding_idx=0)
            self.head = nn.Linear(10, 12)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    torch.manual_seed(0)
    model = Model()
    dense = round_groups(model.table.weight, bits=bits, group=group).dense()
    bias = model.head.bias.detach().clone()
    before = model_size(model)
    with pytest.raises(InputError, match="shares its weight with table"):
        quantise_layer(model, "head", bits=bits)
    new = quantise_layer(model, "table", bits=bits, group=group)
    ids = torch.tensor([[1, 5, 11], [0, 2, 2]])
    assert torch.equal(new(ids), dense[ids])
    assert new(torch.tensor(3)).shape == (10,)
    torch.testing.assert_close(model(ids), dense[ids] @ dense.T + bias)
    torch.testing.assert_close(model.head.weight + 0, dense)
    after = model_size(model)
    assert (after.parameters, after.macs) == (before.parameters, before.macs) == (12 * 10 + 12, 120)
    assert after.bytes == sum(t.nbytes for t in model.state_dict().values())
    assert [entry["kind"] for entry in describe(model).values()] == ["quantised", "tied-head"]
    twin = copy.deepcopy(model)
    assert twin.head.table is twin.table
    back = new.to_dense()
    assert (type(back), back.padding_idx) == (nn.Embedding, 0)
    assert torch.equal(back.weight, dense)
    skeleton = layer_skeleton(new.entry(), nn.Embedding(12, 10, padding_idx=0))
    skeleton.load_state_dict(new.state_dict())
    assert torch.equal(skeleton(ids), new(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_quantised_model_costs(dtype):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8, bias=False)).to(dtype)
    before = model_size(model)
    quantise_layer(model, "0", bits=4, group=16)
    after = model_size(model)
    assert (after.parameters, after.macs) == (before.parameters, before.macs)
    quarter = 64 * 32 // 2 + 32 * 4 * dtype.itemsize + 32 * 4 // 2
    assert after.bytes == quarter + (32 + 32 * 8) * dtype.itemsize
    assert not [site for site in find_sites(model) if site.name == "0"]
    repaired, _ = quantised(original(), bits=8, group=None, rank=2)
    assert model_size(repaired).parameters == 7 * 10 + 2 * (7 + 10) + 7
    assert model_size(repaired).macs == 7 * 10 + 2 * (7 + 10)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_quantise_layer_with_the_second_moment(kind):
    model = nn.ModuleDict({"m": original(kind)}).eval()
    weight = model["m"].weight.detach().T if kind == "conv1d" else model["m"].weight.detach()
    X = draw(40, 3, seed=4) @ draw(3, 10, seed=5)
    second = X.T @ X / 40
    options = {"bits": 2, "group": 5, "second": second, "order": "natural", "damping": 0.1, "clip": False}
    expected = round_groups(weight, **options)
    layer = quantise_layer(model, "m", **options)
    assert model["m"] is layer
    assert not layer.training
    assert torch.equal(layer.dense(), expected.dense())
    assert not torch.equal(layer.dense(), round_groups(weight, bits=2, group=5, clip=False).dense())


def test_what_cannot_be_is_refused_and_changes_nothing():
    model = nn.ModuleDict({"m": original(), "norm": nn.LayerNorm(4), "conv": nn.Conv2d(2, 2, 1), "n": nn.Linear(4, 4)})
    weight = model["m"].weight
    for name, options, message in (
        ("k", {"bits": 4}, "unknown module 'k'"),
        ("norm", {"bits": 4}, "no linear map"),
        ("conv", {"bits": 4}, "Conv2d"),
        ("m", {"bits": 3}, "2, 4 or 8"),
        ("m", {"bits": 4, "group": 0}, "group"),
        ("m", {"bits": 4, "second": torch.eye(3)}, "second"),
    ):
        with pytest.raises(InputError, match=message):
            quantise_layer(model, name, **options)
    assert model["m"].weight is weight
    with pytest.raises(TypeError, match="colour"):
        quantise_layer(model, "m", bits=4, colour="red")
    layer = quantise_layer(model, "m", bits=4)
    assert is_factored(layer)
    assert "quantised already" in (unsupported(layer) or "")
    with pytest.raises(InputError, match="quantised already"):
        quantise_layer(model, "m", bits=4)
    rounded = round_groups(draw(7, 10), bits=8, group=5)
    with pytest.raises(InputError, match="expected a repair"):
        QuantisedLinear.from_linear(original(), rounded, (draw(2, 9), draw(7, 2)))
    with pytest.raises(InputError, match="shape"):
        QuantisedLinear.from_linear(nn.Linear(9, 7), rounded)
    with pytest.raises(InputError, match="dtype of the scales"):
        QuantisedLinear.from_linear(original().bfloat16(), rounded)
    for wrong in ({"bits": 3}, {"bits": 4, "group": -1}, {"bits": 4, "rank": -1}):
        with pytest.raises(InputError):
            QuantisedLinear(4, 4, **wrong)
    for entry in ({"bits": 5}, {"group": "8"}, {"rank": 0.5}):
        with pytest.raises(InputError):
            layer_skeleton({**layer.entry(), **entry}, original())
    with pytest.raises(InputError, match="Conv2d"):
        layer_skeleton(layer.entry(), nn.Conv2d(2, 2, 1))
