"""Collected moments against a slow twin that loops over tokens."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import EckartWarning, InputError, NotFiniteError
from eckart.moments import collect, gauss_newton
from eckart.moments.accumulators import InputSums
from eckart.records import Site

pytestmark = pytest.mark.filterwarnings("ignore::eckart.errors.EckartWarning")


class Branches(nn.Module):
    """q and k read one tensor, v an equal copy of it; the output adds up."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(5, 4)
        self.out = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(torch.tanh(self.q(x)) * self.k(x) + self.v(x.clone())))


def linear(name: str, out: int, inn: int) -> Site:
    return Site(name=name, kind="linear", out_features=out, in_features=inn)


BRANCHES = (linear("q", 4, 5), linear("k", 4, 5), linear("v", 4, 5), linear("out", 3, 4))


def squares(outputs: Tensor, batch: object, generator: torch.Generator) -> tuple[Tensor, float]:
    """Deterministic, and different for every token."""
    weights = torch.arange(1, outputs.numel() + 1, dtype=outputs.dtype).reshape(outputs.shape).sin()
    return (weights * outputs.square()).sum(), float(outputs.shape[0])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Branches().double()


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 6, 5, generator=generator, dtype=torch.float64) for rows in (3, 2, 4)]


def twin(model: nn.Module, batches: list[Tensor], name: str, half: str | None) -> dict[str, Tensor]:
    """The definition: one token after the other."""
    model.eval()
    module = model.get_submodule(name)
    found: list[tuple[Tensor, Tensor]] = []
    row = 0
    for batch in batches:
        calls = []

        def keep(_: nn.Module, args: tuple[Tensor], output: Tensor, calls: list = calls) -> None:
            output.retain_grad()
            calls.append((args[0], output))

        handle = module.register_forward_hook(keep)
        loss, _ = squares(model(batch), batch, torch.Generator())
        loss.backward()
        handle.remove()
        for x, y in calls:
            for b in range(x.shape[0]):
                if half is None or "AB"[(row + b) % 2] == half:
                    found += [(x[b, t].detach(), y.grad[b, t]) for t in range(x.shape[1])]
        row += batch.shape[0]
    n = len(found)
    return {
        "count": torch.tensor(n),
        "mean": sum(x for x, _ in found) / n,
        "second": sum(torch.outer(x, x) for x, _ in found) / n,
        "gradient": sum(torch.outer(g, g) for _, g in found) / n,
        "gradient_scale": sum(g @ g for _, g in found) / n,
        "fisher_rows": sum(torch.outer(g, x).square().sum(1) for x, g in found) / n,
        "fisher_columns": sum(torch.outer(g, x).square().sum(0) for x, g in found) / n,
    }


@pytest.mark.parametrize("half", [None, "A", "B"])
def test_agrees_with_the_definition(model: nn.Module, batches: list[Tensor], half: str | None) -> None:
    moments = collect(model, batches, BRANCHES, loss=squares)
    for site in BRANCHES:
        expected = twin(model, batches, site.name, half)
        found = moments.site(site.name, half=half)
        for name, value in expected.items():
            measured = torch.as_tensor(getattr(found, name), dtype=torch.float64)
            torch.testing.assert_close(measured, value.double(), msg=lambda m, n=name: f"{n}: {m}")
        assert found.tokens_per_unit == 6
        assert found.loss_scale == 3


def test_halves_add_up_to_the_whole(model: nn.Module, batches: list[Tensor]) -> None:
    moments = collect(model, batches, BRANCHES, loss=squares)
    a, b, whole = (moments.site("out", half=half) for half in ("A", "B", None))
    assert a.count + b.count == whole.count
    for name in ("mean", "second", "gradient", "fisher_rows", "fisher_columns"):
        total = (a.count * getattr(a, name) + b.count * getattr(b, name)) / whole.count
        torch.testing.assert_close(total, getattr(whole, name))


def test_sites_share_the_moments_of_one_tensor_and_of_no_copy(model: nn.Module, batches: list[Tensor]) -> None:
    moments = collect(model, batches, BRANCHES, loss=squares)
    assert moments.input_of == {"q": "q", "k": "q", "v": "v", "out": "out"}
    assert set(moments.inputs) == {"q", "v", "out"}
    torch.testing.assert_close(moments.site("k").second, moments.site("v").second)


def test_a_tensor_changed_in_place_is_another_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            y = self.a(x)
            x += 1
            return torch.relu_(self.b(x)) + torch.relu_(y)

    model = InPlace().double()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = collect(model, [x], [linear("a", 3, 3), linear("b", 3, 3)], loss=squares)
    torch.testing.assert_close(moments.site("a").mean, 2 * x.mean(0))
    torch.testing.assert_close(moments.site("b").mean, 2 * x.mean(0) + 1)
    g = moments.site("a")
    model.zero_grad()
    y = model.a(2 * x).detach().requires_grad_()
    (squares((model.b(2 * x + 1)).relu() + y.relu(), None, None)[0]).backward()
    expected = (y.grad.square().sum(1, keepdim=True) * (2 * x).square()).mean(0)
    torch.testing.assert_close(g.fisher_columns, expected)


def test_sharing_that_changes_is_refused() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.a(x) + self.b(x if self.calls == 1 else x.clone())

    x = torch.randn(4, 3)
    with pytest.raises(InputError, match="b shared its input with a"):
        collect(Fickle(), [x, x], [linear("a", 3, 3), linear("b", 3, 3)], gradients="none")


def test_a_module_that_is_called_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.tanh(self.a(x)))

    model = Twice().double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    moments = collect(model, [x], [linear("a", 3, 3)], loss=squares)
    expected = twin(model, [x], "a", None)
    torch.testing.assert_close(moments.site("a").gradient, expected["gradient"])
    torch.testing.assert_close(moments.site("a").second, expected["second"])
    assert moments.site("a").tokens_per_unit == 4


def test_scale_is_the_trace_and_needs_no_matrix(model: nn.Module, batches: list[Tensor]) -> None:
    full = collect(model, batches, BRANCHES, loss=squares).site("q")
    moments = collect(model, batches, BRANCHES, loss=squares, gradients="scale")
    cheap = moments.site("q")
    assert cheap.gradient is None
    assert cheap.fisher_rows is None
    assert cheap.gradient_scale == pytest.approx(float(full.gradient.trace()), rel=1e-12)
    assert float(full.fisher_rows.sum()) == pytest.approx(float(full.fisher_columns.sum()), rel=1e-12)


def test_without_gradients_nothing_runs_backward(model: nn.Module, batches: list[Tensor]) -> None:
    seen = []
    model.register_forward_hook(lambda _, args, out: seen.append(out.requires_grad))
    moments = collect(model, batches, BRANCHES, gradients="none")
    assert seen == [False] * 3
    assert moments.site("q").gradient_scale is None
    torch.testing.assert_close(moments.site("q").second, twin(model, batches, "q", None)["second"])


def test_probes_are_averaged(model: nn.Module, batches: list[Tensor]) -> None:
    loss = gauss_newton(lambda outputs, batch: outputs.flatten(1))
    one = collect(model, batches, BRANCHES, loss=loss, probes=1)
    many = collect(model, batches, BRANCHES, loss=loss, probes=400)
    assert many.units == one.units == 9
    # E over v of G at the last map is E[v vᵀ] = I; 54 tokens × 400 probes: standard error √(2/21600) ≈ .01.
    torch.testing.assert_close(many.site("out").gradient, torch.eye(3, dtype=torch.float64), atol=0.05, rtol=0)
    again = collect(model, batches, BRANCHES, loss=loss, probes=400)
    assert torch.equal(many.site("q").gradient, again.site("q").gradient)
    other = collect(model, batches, BRANCHES, loss=loss, seed=1)
    assert not torch.equal(one.site("q").gradient, other.site("q").gradient)


def test_a_site_that_the_loss_does_not_see_has_no_gradient(model: nn.Module, batches: list[Tensor]) -> None:
    model.unused = nn.Linear(3, 2).double()
    forward = model.forward

    def with_unused(x: Tensor) -> Tensor:
        y = forward(x)
        model.unused(y)
        return y

    model.forward = with_unused
    moments = collect(model, batches, [*BRANCHES, linear("unused", 2, 3)], loss=squares)
    assert moments.site("unused").gradient_scale == 0
    assert moments.site("unused").count == 54


def state_of(model: nn.Module) -> tuple[object, ...]:
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        ["forward" in module.__dict__ for module in model.modules()],
    )


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_the_model_is_left_as_it_was(model: nn.Module, batches: list[Tensor], error: type[BaseException]) -> None:
    model.train()
    model.drop.eval()
    model.q.weight.requires_grad_(False)
    before = state_of(model)

    def loss(outputs: Tensor, batch: object, generator: torch.Generator) -> tuple[Tensor, float]:
        if error is not None:
            raise error
        return squares(outputs, batch, generator)

    if error is None:
        collect(model, batches, BRANCHES, loss=loss)
    else:
        with pytest.raises(error):
            collect(model, batches, BRANCHES, loss=loss)
    assert state_of(model) == before


def test_no_activation_outlives_its_batch(model: nn.Module, batches: list[Tensor]) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watch(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        alive.append(weakref.ref(output))

    def count(stage: str, done: int, total: int) -> None:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))

    model.out.register_forward_hook(watch)
    collect(model, batches, BRANCHES, loss=squares, progress=count)
    assert len(alive) == 3
    assert most == 0


@pytest.mark.parametrize("gradients", ["full", "none"])
def test_a_bad_weight_is_named(model: nn.Module, batches: list[Tensor], gradients: str) -> None:
    with torch.no_grad():
        model.out.weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"^out: .*output"):
        collect(model, batches, BRANCHES, loss=squares if gradients == "full" else None, gradients=gradients)


def test_a_bad_input_is_named(model: nn.Module, batches: list[Tensor]) -> None:
    batches[1][0, 0, 0] = torch.inf
    with pytest.raises(NotFiniteError, match=r"^q: .*input"):
        collect(model, batches, BRANCHES, gradients="none")


def test_a_bad_gradient_is_named(model: nn.Module, batches: list[Tensor]) -> None:
    def loss(outputs: Tensor, batch: object, generator: torch.Generator) -> tuple[Tensor, float]:
        return (outputs - outputs.detach()).abs().sqrt().sum(), 1.0  # value 0, slope infinite

    with pytest.raises(NotFiniteError, match=r"^out: .*gradients"):
        collect(model, batches, BRANCHES, loss=loss)


def test_warns_once_about_too_few_tokens(model: nn.Module) -> None:
    with pytest.warns(EckartWarning, match="3 inputs were seen on fewer tokens") as caught:
        collect(model, [torch.randn(1, 2, 5, dtype=torch.float64)], BRANCHES, gradients="none")
    assert len(caught) == 1


def test_reports_sites_that_nothing_reaches(model: nn.Module, batches: list[Tensor]) -> None:
    model.idle = nn.Linear(2, 2)
    with pytest.warns(EckartWarning, match="no token reached 1 sites, as idle"):
        moments = collect(model, batches, [*BRANCHES, linear("idle", 2, 2)], gradients="none")
    assert moments.meta["unreached"] == ["idle"]
    with pytest.raises(InputError, match="no calibration token reached this site"):
        moments.site("idle")
    with pytest.raises(InputError, match="Did you mean 'out'"):
        moments.site("outt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": None}, "gradients are those of a loss"),
        ({"gradients": "none"}, "gradients are those of a loss"),
        ({"gradients": "some"}, "'full', 'scale' or 'none'"),
        ({"probes": 0}, "at least one probe"),
        ({"batches": []}, "needs batches"),
        ({"batches": [torch.zeros(0, 6, 5)]}, "holds numbers"),
        ({"batches": [{}]}, "at least one tensor"),
        ({"batches": [{"x": torch.zeros(2, 3), "attention_mask": torch.ones(3)}]}, "attention_mask marks padding"),
        ({"sites": [linear("q", 4, 9)]}, "maps 9 to 4"),
        ({"loss": lambda o, b, g: (torch.tensor(1.0), 1.0)}, "depends on none of the sites"),
    ],
)
def test_bad_arguments(model: nn.Module, batches: list[Tensor], change: dict, message: str) -> None:
    arguments = {"batches": batches, "sites": BRANCHES, "loss": squares, **change}
    with pytest.raises(InputError, match=message):
        collect(model, **arguments)


def test_bfloat16_activations_are_summed_in_higher_precision(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = Branches().bfloat16()
    low = [batch.bfloat16() for batch in batches]
    found = collect(model, low, BRANCHES, gradients="none").site("q").second
    x = torch.cat([batch.double().reshape(-1, 5) for batch in low])
    torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-6, atol=1e-6)  # float32 products of a batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_of_the_sums(dtype: torch.dtype) -> None:
    """Products of a batch are float32: of 3000 numbers, √3000 · 6e-8 of the largest entries at worst."""
    x = torch.randn(3000, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = InputSums(1, 40, matrix=True)
    for start in range(0, 3000, 100):
        assert sums.add(0, x[start : start + 100], (torch.arange(60), torch.arange(60, 100)))
    sums.finish()
    exact = x.double().T @ x.double()
    found = sums.second.sum((0, 1))
    assert torch.equal(found, found.T)
    assert float((found - exact).abs().max() / exact.abs().max()) < 3e-6
    assert sums.count.squeeze(1).tolist() == [1800, 1200]
    torch.testing.assert_close(sums.total.sum((0, 1)), x.double().sum(0))


def test_squares_beyond_float32_are_summed_in_float64() -> None:
    x = torch.tensor([[1e25, 2.0], [3e25, 4.0]])
    sums = InputSums(1, 2, matrix=True)
    assert sums.add(0, x, (torch.arange(2), torch.arange(0)))
    torch.testing.assert_close(sums.second[0, 0], x.double().T @ x.double())
