"""Every layer against the plain matrix that its forms stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import EckartError, InputError
from eckart.forms import Dense, Form, LowRank, Pivoted
from eckart.layers import describe, layer_from_forms, layer_skeleton, supported_forms, tie_to, unsupported
from eckart.records import Site


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def make_form(kind: str, out_features: int, in_features: int, rank: int, bias: bool, seed: int = 0) -> Form:
    b = draw(out_features, seed=seed + 7) if bias else None
    a = draw(rank, in_features, seed=seed)
    if kind == "lowrank":
        return LowRank(a=a, b=draw(out_features, rank, seed=seed + 1), bias=b)
    index = torch.randperm(out_features, generator=generator(seed + 2))
    return Pivoted(a=a, b=draw(out_features - rank, rank, seed=seed + 1), index=index, bias=b)


FORMS = pytest.mark.parametrize("form", ["lowrank", "pivoted"])
BIAS = pytest.mark.parametrize("bias", [True, False])


class Conv1D(nn.Module):
    """The layout of transformers' class of this name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.zeros(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def linear_case(form: str, bias: bool, conv1d: bool = False, rank: int = 3):
    original = Conv1D(7, 5) if conv1d else nn.Linear(5, 7, bias=bias)
    kind = "conv1d" if conv1d else "linear"
    site = Site(name="m", kind=kind, out_features=7, in_features=5, bias=bias)
    made = make_form(form, 7, 5, rank, bias)
    return site, original, made, layer_from_forms(site, original, [made])


@FORMS
@BIAS
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_linear_computes_what_its_form_says(form, bias, rank):
    _, original, made, layer = linear_case(form, bias, rank=rank)
    x = draw(2, 4, 5, seed=9)
    torch.testing.assert_close(layer(x), made.apply(x))
    torch.testing.assert_close(layer.weight + 0, made.dense())
    torch.testing.assert_close(layer.to_dense()(x), made.apply(x))
    assert type(layer.to_dense()) is type(original)
    assert (layer.in_features, layer.out_features) == (5, 7)
    assert (layer.bias is not None) == bias
    if bias:
        torch.testing.assert_close(layer.bias, made.bias)
    assert sum(p.numel() for p in layer.parameters()) == made.numel + (7 if bias else 0)


@FORMS
def test_conv1d_keeps_its_layout(form):
    _, _, made, layer = linear_case(form, bias=True, conv1d=True)
    x = draw(2, 5, seed=9)
    torch.testing.assert_close(layer(x), made.apply(x))
    assert layer.weight.shape == (5, 7)
    assert (layer.nf, layer.nx) == (7, 5)
    dense = layer.to_dense()
    assert isinstance(dense, Conv1D)
    torch.testing.assert_close(dense(x), made.apply(x))


@FORMS
@BIAS
@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (lambda b: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, bias=b), (2, 4, 11)),
        (lambda b: nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular", bias=b), (2, 4, 11)),
        (lambda b: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=b), (2, 4, 7, 6)),
        (lambda b: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=b), (4, 7, 6)),
        (lambda b: nn.Conv2d(4, 6, 2, groups=2, bias=b), (2, 4, 5, 6)),
    ],
)
def test_conv_of_any_geometry(form, bias, conv, shape):
    original = conv(bias)
    groups = original.groups
    m, n = 6 // groups, original.weight[0].numel()
    site = Site(name="c", kind="conv", out_features=m, in_features=n, slices=groups, bias=bias)
    made = [make_form(form, m, n, 2, bias, seed=10 * g) for g in range(groups)]
    if form not in supported_forms(site):
        with pytest.raises(InputError, match="cannot be pivoted"):
            layer_from_forms(site, original, made)
        return
    layer = layer_from_forms(site, original, made)
    reference = copy.deepcopy(original)
    with torch.no_grad():
        reference.weight.copy_(torch.cat([f.dense() for f in made]).reshape(original.weight.shape))
        if bias:
            reference.bias.copy_(torch.cat([f.bias for f in made]))
    x = draw(*shape, seed=9)
    torch.testing.assert_close(layer(x), reference(x))
    torch.testing.assert_close(layer.weight + 0, reference.weight.detach(), check_dtype=True)
    torch.testing.assert_close(layer.to_dense()(x), reference(x))
    if bias:
        torch.testing.assert_close(layer.bias, reference.bias.detach())


@FORMS
@BIAS
def test_embedding_and_what_is_tied_to_it(form, bias):
    original = nn.Embedding(11, 6, padding_idx=2)
    site = Site(name="e", kind="embedding", out_features=6, in_features=11)
    made = make_form(form, 6, 11, 3, bias)
    layer = layer_from_forms(site, original, [made])
    table = made.dense().T + (made.bias if bias else 0)
    ids = torch.tensor([[0, 10], [3, 3]])
    torch.testing.assert_close(layer(ids), table[ids])
    torch.testing.assert_close(layer.weight + 0, table)
    assert layer.padding_idx == 2
    torch.testing.assert_close(layer.to_dense()(ids), table[ids])
    hidden = draw(2, 4, 6, seed=9)
    torch.testing.assert_close(layer.scores(hidden), hidden @ table.T)

    again = tie_to(layer, "e", nn.Embedding(11, 6))
    torch.testing.assert_close(again(ids), table[ids])
    assert not list(again.parameters())
    if bias:
        with pytest.raises(InputError, match="cannot share"):
            tie_to(layer, "e", nn.Linear(6, 11, bias=False))
        return
    head = tie_to(layer, "e", nn.Linear(6, 11))
    torch.testing.assert_close(head(hidden), hidden @ table.T + head.bias)
    assert [name for name, _ in head.named_parameters()] == ["bias"]
    model = nn.ModuleDict({"e": layer, "head": head})
    twin = copy.deepcopy(model)
    assert twin["head"].table is twin["e"]
    twin.to(torch.float32)
    assert twin["head"](hidden.float()).dtype == torch.float32
    model["head"](model["e"](ids)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@FORMS
@BIAS
def test_gradients_reach_every_parameter_and_flow_through_weight(form, bias):
    *_, layer = linear_case(form, bias)
    layer(draw(3, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    layer.zero_grad()
    (layer.weight * 2).sum().backward()
    assert layer.a.weight.grad is not None
    assert torch.autograd.gradcheck(layer, (draw(2, 5).requires_grad_(),))


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_take_the_dtype_device_mode_and_freezing_of_the_original(form, dtype):
    original = nn.Linear(5, 7, dtype=dtype).eval().requires_grad_(False)
    site = Site(name="m", kind="linear", out_features=7, in_features=5, bias=True)
    layer = layer_from_forms(site, original, [make_form(form, 7, 5, 3, True)])
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.half().weight.dtype == torch.float16
    if form == "pivoted":
        assert layer.index.dtype == torch.int32


def test_pivoted_rows_survive_a_cast_bit_for_bit():
    made = make_form("pivoted", 7, 5, 3, False)
    site = Site(name="m", kind="linear", out_features=7, in_features=5)
    layer = layer_from_forms(site, nn.Linear(5, 7, bias=False, dtype=torch.bfloat16), [made])
    kept = made.index < 3
    assert torch.equal((layer.weight + 0)[kept], made.dense().to(torch.bfloat16)[kept])


def test_weight_metadata_is_free_and_writing_is_refused(monkeypatch):
    *_, layer = linear_case("lowrank", True)
    expected = layer.dense()
    calls = []
    monkeypatch.setattr(layer, "dense", lambda: calls.append(1) or expected)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device.type, weight.shape, weight.numel()) == (
        torch.float64,
        "cpu",
        (7, 5),
        35,
    )
    assert weight.requires_grad
    assert weight.size(0) == 7
    assert weight.is_floating_point()
    assert hash(weight) == hash(weight)
    assert not calls
    torch.testing.assert_close(weight.float().double(), expected, rtol=1e-6, atol=1e-6)
    assert calls
    for write in (weight.zero_, lambda: nn.init.normal_(weight), lambda: weight.requires_grad_(False)):
        with pytest.raises(EckartError, match="factors"):
            write()
    with pytest.raises(EckartError, match="factors"):
        weight.data = expected
    with pytest.raises(EckartError, match="factors"):
        weight[0] = 0.0


@FORMS
@BIAS
def test_compile_export_deepcopy_and_state_dict(form, bias):
    *_, layer = linear_case(form, bias)
    x = draw(3, 5)
    expected = layer(x)

    class Peeks(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != self.inner.weight.dtype:
                x = x.to(self.inner.weight.dtype)
            return self.inner(x)

    peeks = Peeks(layer)
    compiled = torch.compile(peeks, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(peeks, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    assert torch.equal(copy.deepcopy(peeks)(x), expected)
    other = layer_skeleton(describe(peeks)["inner"], nn.Linear(5, 7, bias=bias))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)


@FORMS
def test_skeleton_on_meta_has_the_keys_and_shapes_of_the_layer(form):
    *_, layer = linear_case(form, True)
    entry = describe(nn.ModuleDict({"x": layer}))["x"]
    with torch.device("meta"):
        original = nn.Linear(5, 7)
    skeleton = layer_skeleton(entry, original)
    assert all(t.is_meta for t in skeleton.state_dict().values())
    assert {k: v.shape for k, v in skeleton.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}


def test_dense_forms_change_nothing():
    original = nn.Linear(5, 7)
    site = Site(name="m", kind="linear", out_features=7, in_features=5)
    assert layer_from_forms(site, original, [Dense(weight=draw(7, 5))]) is original


def test_what_does_not_fit_is_refused_with_the_reason():
    site = Site(name="m", kind="linear", out_features=7, in_features=5)
    with pytest.raises(InputError, match="1 forms"):
        layer_from_forms(site, nn.Linear(5, 7), [make_form("lowrank", 7, 5, 2, False)] * 2)
    with pytest.raises(InputError, match=r"expected matrices \(7, 5\)"):
        layer_from_forms(site, nn.Linear(5, 7), [make_form("lowrank", 6, 5, 2, False)])

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(InputError, match="Scaled computes something else"):
        layer_from_forms(site, Scaled(5, 7), [make_form("lowrank", 7, 5, 2, False)])
    attention = nn.MultiheadAttention(4, 2)
    assert "MultiheadAttention" in (unsupported(attention.out_proj) or "")
    assert unsupported(nn.Embedding(3, 4, sparse=True))
    assert unsupported(nn.LayerNorm(4))
    for entry in (
        {"kind": "linear", "form": "tucker", "rank": 2},
        {"kind": "linear", "form": "lowrank", "rank": 0},
        {"kind": "linear", "form": "lowrank", "rank": "2"},
        {"kind": "linear"},
        {"kind": "conv", "form": "lowrank", "rank": 2},
        {"kind": "tied-head", "table": "e"},
    ):
        with pytest.raises(InputError):
            layer_skeleton(entry, nn.Linear(5, 7))
