"""What every adaptation method promises, over the table: a new method is tested by being in it."""

from __future__ import annotations

import doctest
import importlib
import inspect
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import nn

from eckart.adaptation import ADAPTATIONS, AdaptMethod, Delta, Layout, Source, adapt_options, get_adaptation
from eckart.errors import InputError
from eckart.moments import SiteMoments
from eckart.records import Claim, Verdict

HEADINGS = (
    "What it does",
    "Formula",
    "Cost",
    "When it does not help",
    "Departs from the paper in",
    "Reference",
    "Example",
)
SETTINGS: dict[str, dict[str, Any]] = {"sara": {"threshold": 0.5}}
"""Options for the small layers of these tests, where a method's defaults do not fit them."""
NOT_HELD = {"lora", "svfit", "salt", "soka", "flora", "osf", "sara", "said", "fedsvd", "snnk"}
"""Claims of papers that fail here; each docstring gives the figures. One that comes to hold has to leave this set."""
LAYOUTS = {
    "linear": Layout(name="a.up", kind="linear", out_features=24, in_features=20),
    "conv": Layout(name="a.conv", kind="conv", out_features=6, in_features=18, slices=2, kernel=(3, 3)),
    "embedding": Layout(name="a.table", kind="embedding", out_features=12, in_features=30),
}
RANK = 3

if lacking := [name for name, m in ADAPTATIONS.items() if not isinstance(getattr(m, "claim", None), Claim)]:
    raise RuntimeError(f"methods without a claim: {lacking}")

every_method = pytest.mark.parametrize("method", ADAPTATIONS.values(), ids=list(ADAPTATIONS))


def options_of(method: AdaptMethod) -> Any:
    return adapt_options(method, SETTINGS.get(method.name))


def moments_of(layout: Layout, seed: int = 0) -> tuple[SiteMoments, ...]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(layout.slices):
        x = torch.randn(200, layout.in_features, generator=generator, dtype=torch.float64)
        found.append(SiteMoments(count=200, mean=x.mean(0), second=x.T @ x / 200))
    return tuple(found)


def source_of(layout: Layout, dtype: torch.dtype = torch.float32, seed: int = 0) -> Source:
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(layout.slices, layout.out_features, layout.in_features, generator=generator)
    return Source(layout=layout, weight=weight.to(dtype), seed=seed, moments=moments_of(layout))


def served(method: AdaptMethod) -> list[Layout]:
    return [layout for layout in LAYOUTS.values() if method.delta.fits(layout, options_of(method)) is None]


def started(method: AdaptMethod, layout: Layout, rank: int | None = None) -> Delta:
    options, source = options_of(method), source_of(layout)
    size = min(RANK, method.delta.most(layout, options)) if rank is None else rank
    delta = method.delta(layout, size, options)
    delta.start(source)
    if method.tie is not None:
        method.tie([delta])
    return delta


@torch.no_grad()
def moved(delta: Delta, seed: int = 3) -> Delta:
    """The delta after a random step of every trained number."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in delta.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return delta


def module_of(method: AdaptMethod):  # type: ignore[no-untyped-def]
    return importlib.import_module(method.delta.__module__)


def test_no_name_is_lost_in_the_table() -> None:
    modules = {module_of(method) for method in ADAPTATIONS.values()}
    assert {id(module.METHOD) for module in modules} == {id(method) for method in ADAPTATIONS.values()}


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(InputError, match="'pissa'"):
        get_adaptation("pisa")
    with pytest.raises(InputError, match="'alpha'"):
        adapt_options(get_adaptation("lora"), {"alfa": 2})
    with pytest.raises(InputError, match="belong to"):
        adapt_options(get_adaptation("lora"), get_adaptation("pissa").options())


@every_method
def test_lies_under_its_own_name_with_paper_and_claim(method: AdaptMethod) -> None:
    assert ADAPTATIONS[method.name] is method
    assert method.name == method.name.lower().strip()
    assert method.paper.authors
    assert method.paper.title
    assert method.paper.year > 1900
    assert method.claim.statement
    assert method.claim.source
    assert method.summary == method.summary.strip()


@every_method
def test_options_are_frozen_explained_json_values(method: AdaptMethod) -> None:
    assert is_dataclass(method.options)
    assert method.options.__dataclass_params__.frozen  # type: ignore[attr-defined]
    options = method.options()
    source = inspect.getsource(method.options)
    for option in fields(method.options):
        assert isinstance(getattr(options, option.name), (int, float, str, bool, type(None), list, tuple, dict))
        assert f"    {option.name}:" in source
        assert '"""' in source.split(f"    {option.name}:")[1].split("\n", 2)[1]


@every_method
def test_module_explains_itself_under_the_fixed_headings(method: AdaptMethod) -> None:
    text = module_of(method).__doc__
    places = [text.find(f"*{heading}.*") for heading in HEADINGS]
    assert -1 not in places, [h for h, p in zip(HEADINGS, places, strict=True) if p == -1]
    assert places == sorted(places)


@every_method
def test_example_runs(method: AdaptMethod) -> None:
    result = doctest.testmod(module_of(method))
    assert result.attempted > 0
    assert result.failed == 0


@every_method
def test_serves_something_and_gives_reasons_for_the_rest(method: AdaptMethod) -> None:
    options = options_of(method)
    assert "linear" in [layout.kind for layout in served(method)]
    for layout in LAYOUTS.values():
        reason = method.delta.fits(layout, options)
        assert reason is None or (len(reason) > 10 and not reason.endswith("."))


@every_method
def test_starts_at_exactly_zero(method: AdaptMethod) -> None:
    for layout in served(method):
        delta = started(method, layout)
        if delta.linear:
            assert float(delta.delta().detach().abs().max()) == 0
        if layout.slices == 1:
            x = torch.randn(7, layout.in_features)
            assert float(delta(x, torch.randn(7, layout.out_features)).detach().abs().max()) == 0


@every_method
def test_start_depends_on_seed_and_name_only(method: AdaptMethod) -> None:
    layout = LAYOUTS["linear"]
    torch.manual_seed(1)
    one = started(method, layout).state_dict()
    torch.manual_seed(2)
    two = started(method, layout).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@every_method
def test_numbers_are_float32_one_level_below_and_counted(method: AdaptMethod) -> None:
    for layout in served(method):
        delta = started(method, layout)
        assert all("." not in name for name in delta.state_dict())
        assert all(p.dtype == torch.float32 for p in delta.parameters())
        assert all(b.dtype in (torch.float32, torch.int32, torch.int64, torch.bool) for b in delta.buffers())
        count = sum(p.numel() for p in delta.parameters())
        assert delta.parameter_count() == count
        assert method.delta.cost(layout, delta.rank, options_of(method)) == count


@every_method
def test_a_bfloat16_base_starts_it_as_its_float32_copy_does(method: AdaptMethod) -> None:
    layout = LAYOUTS["linear"]
    options = options_of(method)
    low = source_of(layout, torch.bfloat16)
    size = min(RANK, method.delta.most(layout, options))
    one, two = method.delta(layout, size, options), method.delta(layout, size, options)
    one.start(low)
    two.start(Source(layout=layout, weight=low.weight.float(), seed=low.seed, moments=low.moments))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@every_method
def test_forward_factors_and_dense_change_agree(method: AdaptMethod) -> None:
    for layout in served(method):
        delta = moved(started(method, layout))
        if not delta.linear:
            continue
        change = delta.delta().detach().double()
        assert float(change.abs().max()) > 0
        factors = delta.factors()
        assert (factors is not None) or not method.exact
        if factors is not None:
            torch.testing.assert_close((factors[0].double() @ factors[1].double()).detach(), change, atol=1e-5, rtol=0)
        if layout.slices == 1:
            x = torch.randn(2, 5, layout.in_features)
            y = torch.randn(2, 5, layout.out_features)
            torch.testing.assert_close(delta(x, y).detach().double(), x.double() @ change[0].T, atol=1e-4, rtol=1e-4)


@every_method
def test_gradients_reach_every_trained_number(method: AdaptMethod) -> None:
    for layout in served(method):
        if layout.slices != 1:
            continue
        delta = moved(started(method, layout))
        x, y = torch.randn(50, layout.in_features), torch.randn(50, layout.out_features)
        torch.autograd.backward(delta(x, y).square().sum())
        for name, parameter in delta.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert float(parameter.grad.abs().max()) > 0, name
        # At the start some of them may be zero, but not all, or nothing would ever move.
        fresh = started(method, layout)
        torch.autograd.backward((delta(x, y).detach() + fresh(x, y)).square().sum())
        assert any(float(p.grad.abs().max()) > 0 for p in fresh.parameters() if p.grad is not None)


@every_method
def test_a_file_needs_no_weight(method: AdaptMethod) -> None:
    for layout in served(method):
        delta = moved(started(method, layout))
        empty = method.delta(layout, delta.rank, options_of(method))
        assert not empty.started
        empty.load_state_dict(delta.state_dict())
        assert empty.started
        assert all(
            torch.equal(a, b) for a, b in zip(empty.state_dict().values(), delta.state_dict().values(), strict=True)
        )
        if delta.linear:
            assert torch.equal(empty.delta(), delta.delta())


@every_method
def test_default_rank_is_in_range(method: AdaptMethod) -> None:
    for layout in served(method):
        options = options_of(method)
        rank = method.delta.default_rank(source_of(layout), options)
        assert 1 <= rank <= method.delta.most(layout, options)


@every_method
def test_penalty_and_step_leave_it_finite(method: AdaptMethod) -> None:
    delta = moved(started(method, LAYOUTS["linear"]))
    penalty = delta.penalty()
    if penalty is not None:
        assert penalty.ndim == 0
        assert float(penalty.detach()) >= 0
        torch.autograd.backward(penalty)
        assert all(p.grad is None or p.grad.isfinite().all() for p in delta.parameters())
    delta.after_step(1)
    assert all(t.isfinite().all() for t in delta.state_dict().values())


@every_method
def test_compiles(method: AdaptMethod) -> None:
    delta = moved(started(method, LAYOUTS["linear"]))
    x, y = torch.randn(4, 20), torch.randn(4, 24)
    compiled = torch.compile(delta, backend="eager")
    torch.testing.assert_close(compiled(x, y), delta(x, y))


@every_method
def test_claim_ran_and_reports_figures(method: AdaptMethod) -> None:
    verdict = method.claim.run()
    assert isinstance(verdict, Verdict)
    assert verdict.figures
    assert all(isinstance(value, float) for value in verdict.figures.values())
    assert verdict.held is (method.name not in NOT_HELD), verdict


def test_deltas_are_modules_without_children() -> None:
    for method in ADAPTATIONS.values():
        assert issubclass(method.delta, nn.Module)
        assert not list(started(method, LAYOUTS["linear"]).children())
