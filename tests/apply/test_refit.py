"""The last factor refitted, against least squares on the rows themselves."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import eckart
from eckart.apply.refit import refit
from eckart.arch import set_module
from eckart.compression import svd
from eckart.errors import InputError, NotFiniteError
from eckart.layers import NarrowColumns, layer_from_forms, narrow_layer, quantise_layer
from eckart.records import Site

N = 90


class Net(nn.Module):
    """Three maps; the mask is read by nobody but the statistics."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 12, bias=bias, dtype=dtype)
        self.mid = nn.Linear(12, 10, bias=bias, dtype=dtype)
        self.down = nn.Linear(10, 6, bias=bias, dtype=dtype)
        self.runs = 0

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.runs += 1
        out: Tensor = self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))
        return out


def sites(net: Net, depths: Sequence[int | None] = (None, None, None)) -> list[Site]:
    layers = {"up": net.up, "mid": net.mid, "down": net.down}
    return [
        Site(name=name, kind="linear", out_features=layer.out_features, in_features=layer.in_features, depth=depth)
        for (name, layer), depth in zip(layers.items(), depths, strict=True)
    ]


def data(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(10, 3, 8, generator=draw, dtype=torch.float64).to(dtype) + 0.5 for _ in range(N // 30)]


def compressed(base: Net, form: str = "lowrank", rank: int = 3) -> Net:
    net = copy.deepcopy(base)
    for site in sites(base):
        layer = net.get_submodule(site.name)
        weights = {name: p.detach() for name, p in layer.named_parameters()}
        prepared = svd.prepare(weights, None, svd.Options())
        set_module(net, site.name, layer_from_forms(site, layer, [svd.METHOD.cut(prepared, rank, form)]))  # type: ignore[arg-type]
    return net


def least_squares(t: Tensor, z: Tensor, old: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """B and c on stacked rows: the data, and one row for every feature that holds on to the present factor."""
    t_mean, z_mean = (t.mean(0), z.mean(0)) if bias else (t.new_zeros(t.shape[1]), z.new_zeros(z.shape[1]))
    t, z = t - t_mean, z - z_mean
    hold = torch.diag((z.shape[1] / len(z) * z.square().sum(0)).sqrt())
    B = torch.linalg.lstsq(torch.cat([z, hold]), torch.cat([t, hold @ old.T])).solution.T
    return B, t_mean - B @ z_mean


def twin(net: Net, base: Net, blend: float) -> None:
    """The same for factors, one map after the other, with all rows at once."""
    X = torch.cat(data()).flatten(0, 1)
    with torch.no_grad():
        for name in ("up", "mid", "down"):
            x, seen = X, X
            for before in ("up", "mid", "down")[: ("up", "mid", "down").index(name)]:
                x, seen = torch.tanh(base.get_submodule(before)(x)), torch.tanh(net.get_submodule(before)(seen))
            dense, layer = base.get_submodule(name), net.get_submodule(name)
            t = dense(blend * x + (1 - blend) * seen)
            if layer.form == "pivoted":
                places = [int((layer.index == layer.rank + j).nonzero()) for j in range(layer.b.out_features)]
                t = t[:, places]
            B, c = least_squares(t, layer.a(seen), layer.b.weight, layer.b.bias is not None)
            layer.b.weight.copy_(B)
            if layer.b.bias is not None:
                layer.b.bias.copy_(c)


@pytest.mark.parametrize("form", ["lowrank", "pivoted"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("blend", [0.0, 0.25])
def test_factors_against_least_squares(form: str, bias: bool, blend: float) -> None:
    base = Net(bias)
    found, wanted = compressed(base, form), compressed(base, form)
    before = copy.deepcopy(found)
    assert refit(found, base, data(), sites(base), blend=blend) == ("up", "mid", "down")
    twin(wanted, base, blend)
    for (name, mine), theirs in zip(found.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10, msg=name)
        refitted = ".b." in name
        assert torch.equal(mine, before.get_parameter(name)) != refitted


def test_the_output_comes_nearer() -> None:
    base = Net()
    net = compressed(base)
    X = torch.cat(data())
    lost = []
    for blend in (None, 0.0, 0.25):
        if blend is not None:
            net = compressed(base)
            refit(net, base, data(), sites(base), blend=blend)
        lost.append((net(X) - base(X)).square().sum().item())
    assert lost[0] > lost[1] > lost[2]


@pytest.mark.parametrize("kind", ["columns", "marked"])
@pytest.mark.parametrize("blend", [0.0, 0.1])
def test_maps_with_fewer_inputs(kind: str, blend: float) -> None:
    base, places = Net(), torch.tensor([0, 3, 4, 8, 11])
    net = copy.deepcopy(base)
    if kind == "columns":
        layer: nn.Module = NarrowColumns(12, 10, 5, dtype=torch.float64)
        layer.index.copy_(places)
        layer.a.load_state_dict({"weight": base.mid.weight[:, places], "bias": base.mid.bias})
        net.mid = layer  # type: ignore[assignment]
        solved = layer.a
    else:
        net.up = narrow_layer(base.up, base.up.weight[places], base.up.bias[places])  # type: ignore[assignment]
        solved = net.mid = narrow_layer(base.mid, base.mid.weight[:, places], base.mid.bias)  # type: ignore[assignment]
    old = copy.deepcopy(solved)
    assert refit(net, base, data(), sites(base), blend=blend) == ("mid",)
    x = torch.tanh(base.up(torch.cat(data()).flatten(0, 1)))
    z = x[:, places]
    B, c = least_squares(blend * base.mid(x) + (1 - blend) * old(z), z, old.weight, bias=True)
    torch.testing.assert_close(solved.weight, B, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(solved.bias, c, rtol=1e-8, atol=1e-10)
    assert torch.allclose(solved.weight, old.weight, atol=1e-8) == (blend == 0.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    exact, base = Net(), Net().to(dtype)
    wanted = compressed(exact)
    refit(wanted, exact, data(), sites(exact), blend=0.25)
    net = compressed(exact).to(dtype)
    refit(net, base, data(dtype), sites(base), blend=0.25)
    assert net.mid.b.weight.dtype == dtype
    found, exact_map = net.mid.dense().detach().double(), wanted.mid.dense().detach()
    assert float((found - exact_map).norm() / exact_map.norm()) < tolerance


def test_padding_counts_nothing() -> None:
    base = Net()
    mask = torch.tensor([[1, 1, 0]] * 10)
    results = []
    for filler in (0.0, 100.0):
        batches = [{"x": x.masked_fill(mask[:, :, None] == 0, filler), "attention_mask": mask} for x in data()]
        net = compressed(base)
        refit(net, base, batches, sites(base), blend=0.1)
        results.append(net.down.b.weight)
    torch.testing.assert_close(results[0], results[1])


def test_one_pass_for_each_block_and_none_of_the_original_without_its_stream() -> None:
    base = Net()
    net = compressed(base)
    refit(net, base, data(), sites(base, (0, 0, 1)))
    assert (net.runs, base.runs) == (2 * len(data()), 0)
    refit(net, base, data(), sites(base, (0, 0, 1)), blend=0.1)
    assert (net.runs, base.runs) == (4 * len(data()), 2 * len(data()))


def test_what_has_no_factor_stays_and_so_does_everything_else() -> None:
    base = Net(dtype=torch.float32)
    net = copy.deepcopy(base)
    before = copy.deepcopy(base.state_dict())
    assert refit(net, base, data(torch.float32), sites(base)) == ()
    net = compressed(base)
    quantise_layer(net, "mid.a", bits=8, group=None, second=None)
    quantise_layer(net, "mid.b", bits=8, group=None, second=None)
    net.train()
    assert refit(net, base, data(torch.float32), sites(base), blend=0.25) == ("up", "down")
    assert net.training
    assert net.up.b.weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(module._forward_hooks for each in (net, base) for module in each.modules())


@pytest.mark.parametrize("wrong", [-0.1, 0.3, 1, True, float("nan"), "0.1", None])
def test_blends_out_of_range(wrong) -> None:  # type: ignore[no-untyped-def]
    base = Net()
    with pytest.raises(InputError, match="blend"):
        refit(compressed(base), base, data(), sites(base), blend=wrong)


def test_data_and_models_that_do_not_fit() -> None:
    base = Net()
    with pytest.raises(InputError, match="batches"):
        refit(compressed(base), base, [], sites(base))
    with pytest.raises(NotFiniteError, match="up"):
        refit(compressed(base), base, [torch.full((2, 2, 8), float("nan"), dtype=torch.float64)], sites(base))

    class Twice(Net):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            self.up(x)
            return super().forward(x)

    with pytest.raises(InputError, match="different number"):
        refit(compressed(base), Twice(), data(), sites(base), blend=0.1)
    base.config = type("Config", (), {"is_encoder_decoder": True})()  # type: ignore[assignment]
    with pytest.raises(InputError, match="encoder-decoder"):
        refit(compressed(base), base, data(), sites(base))


def test_compress_refits_a_copy_on_its_data() -> None:
    base = Net(dtype=torch.float32)
    before = copy.deepcopy(base.state_dict())
    asked = {"data": data(torch.float32), "method": "whitened", "keep": 0.6, "gradients": "none", "certify": False}
    plain, fitted = eckart.compress(base, **asked), eckart.compress(base, **asked, refit_blend=0.25)
    wanted = plain.model
    names = refit(wanted, base, data(torch.float32), [layer.site for layer in plain.outcome.layers], blend=0.25)
    assert names
    assert fitted.outcome.notes == (f"{len(names)} maps were refitted (β = 0.25); their errors are those from before.",)
    for mine, theirs in zip(fitted.model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize(("asked", "words"), [({"refit_blend": 0.5}, "blend"), ({"refit_blend": 0.1}, "data")])
def test_compress_refuses_a_refit_at_once(asked, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=words):
        eckart.compress(Net(), method="svd", keep=0.5, **asked)
