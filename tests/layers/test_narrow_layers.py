"""Layers with fewer rows or columns against their dense twins."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.layers import (
    NarrowColumns,
    NarrowRows,
    describe,
    is_narrowed,
    layer_skeleton,
    narrow_layer,
    quantise_layer,
    widened,
)
from eckart.layers.build import dense_keys

OUT, IN = 6, 5
ROWS, COLUMNS = torch.tensor([0, 2, 5]), torch.tensor([1, 3, 4])


def linear(kind: str, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT, bias=bias)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.to(dtype).eval()


def matrix(layer: nn.Module) -> Tensor:
    weight = layer.get_parameter("weight").detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def narrowed(kind: str, form: str, dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[nn.Module, Tensor]:
    """The narrower layer, and the dense matrix that it stands for."""
    original = linear(kind, dtype, bias)
    weight, b = matrix(original), getattr(original, "bias", None)
    dense = torch.zeros_like(weight)
    if form == "rows":
        dense[ROWS] = weight[ROWS]
        kept = None if b is None else b[ROWS]
        return narrow_layer(original, weight[ROWS], kept, rows=ROWS), dense
    dense[:, COLUMNS] = weight[:, COLUMNS]
    return narrow_layer(original, weight[:, COLUMNS], b, columns=COLUMNS), dense


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("form", ["rows", "columns"])
def test_outputs_are_those_of_the_dense_twin(form: str, kind: str, bias: bool, dtype, tolerance: float) -> None:
    if kind == "conv1d" and not bias:
        pytest.skip("Conv1D always has a bias")
    layer, dense = narrowed(kind, form, dtype, bias)
    x = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    expected = x @ dense.T
    if layer.bias is not None:
        expected = expected + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(layer.dense(), dense)
    full = layer.to_dense()
    assert type(full) is (Conv1D if kind == "conv1d" else nn.Linear)
    torch.testing.assert_close(full(x), layer(x), rtol=tolerance, atol=tolerance)
    assert layer.weight.shape == full.weight.shape
    assert torch.equal(layer.weight + 0, full.weight)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("form", ["rows", "columns"])
@pytest.mark.parametrize("bits", [0, 4])
def test_what_is_described_can_be_built_and_filled(form: str, kind: str, bits: int) -> None:
    model = nn.ModuleDict({"map": narrowed(kind, form, torch.float32)[0]})
    if bits:
        quantise_layer(model, "map.a", bits=bits, group=2)
    entries = describe(model)
    assert set(entries) == {"map", "map.a"} if bits else {"map"}
    again = nn.ModuleDict({"map": linear(kind, torch.float32)})
    for name, entry in sorted(entries.items()):
        again.set_submodule(name, layer_skeleton(entry, again.get_submodule(name)))
    again.load_state_dict(model.state_dict())
    x = torch.randn(4, IN)
    assert torch.equal(again["map"](x), model["map"](x))
    assert dense_keys("map", entries["map"]) == ("map.weight",)
    assert torch.equal(copy.deepcopy(model)["map"](x), model["map"](x))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_plain_smaller_layer_is_marked_and_can_be_widened(kind: str, bits: int, blocks: int) -> None:
    original = linear(kind, torch.float32)
    kept = torch.tensor([0, 2]) if blocks == 1 else torch.tensor([0, 2, 3, 4])
    layer = narrow_layer(original, matrix(original)[kept], original.bias[kept], blocks=blocks)
    model = nn.ModuleDict({"map": layer})
    assert is_narrowed(layer)
    x = torch.randn(4, IN)
    torch.testing.assert_close(layer(x), original(x)[..., kept])
    if bits:
        quantise_layer(model, "map", bits=bits)
    (entry,) = describe(model).values()
    again = nn.ModuleDict({"map": layer_skeleton(entry, linear(kind, torch.float32))})
    again.load_state_dict(model.state_dict())
    assert torch.equal(again["map"](x), model["map"](x))
    assert is_narrowed(again["map"])
    plain = again["map"].to_dense() if bits else again["map"]
    wide = widened(plain)
    assert not is_narrowed(wide)
    half = OUT // blocks
    each = len(kept) // blocks
    expected = torch.zeros(4, OUT)
    for block in range(blocks):
        expected[:, block * half : block * half + each] = model["map"](x)[:, block * each : (block + 1) * each]
    torch.testing.assert_close(wide(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_gradients_and_compile(form: str) -> None:
    layer, dense = narrowed("linear", form)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    torch.autograd.backward(layer(x).square().sum())
    y = (x @ dense.T + layer.bias).detach()
    torch.testing.assert_close(x.grad, 2 * y @ dense)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_the_kinds_of_layers() -> None:
    assert isinstance(narrowed("linear", "rows")[0], NarrowRows)
    assert isinstance(narrowed("linear", "columns")[0], NarrowColumns)
