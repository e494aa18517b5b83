"""What every compensation method promises, over the table: a new method is tested by being in it."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eckart.compensation import COMPENSATIONS, CompensateMethod, Repair, compensation_options, get_compensation
from eckart.errors import InputError, NotFiniteError
from eckart.moments import SiteMoments
from eckart.records import Claim, Verdict

Metrics = tuple[Tensor | None, Tensor | None]

# Each method's own objective tr(G (E − R) Σ (E − R)ᵀ), written from its paper and not from its code: (Σ, G).
OBJECTIVES: dict[str, Callable[[SiteMoments], Metrics]] = {
    "svd": lambda m: (None, None),
    "eora": lambda m: (m.second, None),
    "qera": lambda m: (m.second, None),
    "kfac": lambda m: (m.second, 0.5 * m.gradient + 0.5 * torch.diag(m.gradient.diagonal())),
}

if set(OBJECTIVES) != set(COMPENSATIONS):
    raise RuntimeError(f"methods without a test objective, or the reverse: {set(OBJECTIVES) ^ set(COMPENSATIONS)}")

HEADINGS = (
    "What it does",
    "Formula",
    "Cost",
    "When it does not help",
    "Departs from the paper in",
    "Reference",
    "Example",
)
SHAPES = [(7, 12), (12, 7), (8, 8)]
every_method = pytest.mark.parametrize("method", COMPENSATIONS.values(), ids=list(COMPENSATIONS))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def gaussian(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(shape: tuple[int, int], tokens: int = 200) -> tuple[Tensor, Tensor, SiteMoments]:
    """A random map, a coarsely rounded one, and moments of correlated inputs and gradients, float64."""
    m, n = shape
    W = gaussian(m, n)
    X = gaussian(tokens, n, seed=1) @ gaussian(n, n, seed=2) + gaussian(n, seed=3)
    g = gaussian(tokens, m, seed=4) @ gaussian(m, m, seed=5)
    moments = SiteMoments(
        count=tokens,
        mean=X.mean(0),
        second=X.T @ X / tokens,
        gradient=g.T @ g / tokens,
        gradient_scale=float(g.square().sum(1).mean()),
    )
    return W, W.round(), moments


def repair(
    method: CompensateMethod, W: Tensor, approximation: Tensor, moments: SiteMoments | None, rank: int
) -> Repair:
    return method.repair(W, approximation, moments, method.options(), rank)


def objective(delta: Tensor, metrics: Metrics) -> Tensor:
    second, gradient = metrics
    left = delta if gradient is None else gradient @ delta
    return ((left if second is None else left @ second) * delta).sum()


def module_of(method: CompensateMethod):  # type: ignore[no-untyped-def]
    return importlib.import_module(method.repair.__module__)


# ---- the record


@every_method
def test_lies_under_its_own_name_with_paper_and_claim(method: CompensateMethod) -> None:
    assert get_compensation(method.name) is method
    assert method.paper.authors
    assert method.paper.title
    assert method.paper.year > 1900
    assert isinstance(method.claim, Claim)
    assert method.claim.statement
    assert method.claim.source
    assert method.summary == method.summary.strip()


@every_method
def test_module_explains_itself_under_the_fixed_headings(method: CompensateMethod) -> None:
    text = module_of(method).__doc__
    places = [text.find(f"*{heading}.*") for heading in HEADINGS]
    assert -1 not in places, [h for h, p in zip(HEADINGS, places, strict=True) if p == -1]
    assert places == sorted(places)


@every_method
def test_example_runs_and_asserts(method: CompensateMethod) -> None:
    result = doctest.testmod(module_of(method))
    assert result.attempted > 0
    assert result.failed == 0
    assert "True" in module_of(method).__doc__.split("*Example.*")[1]


@every_method
def test_options_are_frozen_keyword_only_explained_and_json(method: CompensateMethod) -> None:
    options = method.options()
    assert options.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(options))
    tree = ast.parse(inspect.getsource(method.options)).body[0]
    assert isinstance(tree, ast.ClassDef)
    for here, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(here, ast.AnnAssign):
            assert isinstance(after, ast.Expr), ast.unparse(here)
    given = json.loads(json.dumps(dataclasses.asdict(options)))
    assert compensation_options(method, given) == options


@every_method
def test_unknown_option_is_an_error(method: CompensateMethod) -> None:
    with pytest.raises(InputError, match="bogus"):
        compensation_options(method, {"bogus": 1})


def test_unknown_method_names_its_neighbours() -> None:
    with pytest.raises(InputError, match="Did you mean 'eora'"):
        get_compensation("eorra")


# ---- the repair


@every_method
@every_shape
def test_error_curve_is_the_measured_objective(method: CompensateMethod, shape: tuple[int, int]) -> None:
    W, damaged, moments = case(shape)
    metrics = OBJECTIVES[method.name](moments)
    total = objective(W - damaged, metrics)
    errors = repair(method, W, damaged, moments, 1).errors
    assert errors.shape == (min(shape) + 1,)
    torch.testing.assert_close(errors[0], total)
    assert (errors.diff() <= 1e-12 * total).all()
    for rank in range(1, min(shape) + 1):
        left = W - damaged - repair(method, W, damaged, moments, rank).form.dense()
        torch.testing.assert_close(objective(left, metrics), errors[rank], rtol=1e-9, atol=1e-12 * float(total))


@every_method
@every_shape
def test_no_nearby_repair_of_that_rank_is_better(method: CompensateMethod, shape: tuple[int, int]) -> None:
    W, damaged, moments = case(shape)
    metrics = OBJECTIVES[method.name](moments)
    found = repair(method, W, damaged, moments, 3)
    for seed in range(20):
        a = found.form.a + 1e-3 * gaussian(*found.form.a.shape, seed=10 + seed)
        b = found.form.b + 1e-3 * gaussian(*found.form.b.shape, seed=50 + seed)
        assert objective(W - damaged - b @ a, metrics) > found.errors[3]


@every_method
@every_shape
def test_full_rank_gives_everything_back(method: CompensateMethod, shape: tuple[int, int]) -> None:
    W, damaged, moments = case(shape)
    found = repair(method, W, damaged, moments, 10**6)
    assert found.form.rank == min(shape)
    assert found.form.bias is None
    torch.testing.assert_close(damaged + found.form.dense(), W, rtol=1e-9, atol=1e-9)


@every_method
@every_shape
def test_a_cut_is_the_repair_of_that_rank(method: CompensateMethod, shape: tuple[int, int]) -> None:
    W, damaged, moments = case(shape)
    full = repair(method, W, damaged, moments, min(shape))
    for rank in range(1, min(shape)):
        alone = repair(method, W, damaged, moments, rank).form
        torch.testing.assert_close(full.cut(rank).a, alone.a)
        torch.testing.assert_close(full.cut(rank).b, alone.b)
    assert full.cut(0).rank == 0


@every_method
@pytest.mark.parametrize(
    # Two factors of half a unit in the last place each, and as much for their product.
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1.6e-2), (torch.float16, 2e-3)],
    ids=str,
)
def test_dtypes(method: CompensateMethod, dtype: torch.dtype, tolerance: float) -> None:
    W, _, moments = case((7, 12))
    W = W.to(dtype)
    damaged = W.float().round()  # in another dtype than W
    found = repair(method, W, damaged, moments, 4)
    assert found.form.a.dtype == found.form.b.dtype == dtype
    assert found.errors.dtype == torch.float64
    exact = repair(method, W.double(), damaged.double(), moments, 4).form.dense()
    assert (found.form.dense().double() - exact).norm() <= tolerance * exact.norm()


@every_method
def test_nothing_given_is_changed(method: CompensateMethod) -> None:
    W, damaged, moments = case((7, 12))
    before = W.clone(), damaged.clone(), moments.second.clone()
    repair(method, W, damaged, moments, 4)
    for old, new in zip(before, (W, damaged, moments.second), strict=True):
        assert torch.equal(old, new)


# ---- hard cases


@every_method
@every_shape
def test_fewer_tokens_than_features(method: CompensateMethod, shape: tuple[int, int]) -> None:
    W, damaged, moments = case(shape, tokens=4)
    found = repair(method, W, damaged, moments, min(shape))
    assert found.errors.isfinite().all()
    assert (found.errors.diff() <= 1e-9 * found.errors[0]).all()
    torch.testing.assert_close(damaged + found.form.dense(), W, rtol=1e-6, atol=1e-6)


@every_method
def test_nothing_lost(method: CompensateMethod) -> None:
    W, _, moments = case((6, 9))
    found = repair(method, W, W.clone(), moments, 3)
    assert torch.equal(found.errors, torch.zeros_like(found.errors))
    assert torch.equal(found.form.dense(), torch.zeros_like(W))


@every_method
def test_damage_of_low_rank_is_found_whole(method: CompensateMethod) -> None:
    W, _, moments = case((6, 9))
    damaged = W - gaussian(6, 2, seed=7) @ gaussian(2, 9, seed=8)
    torch.testing.assert_close(damaged + repair(method, W, damaged, moments, 2).form.dense(), W, rtol=1e-6, atol=1e-6)


@every_method
@pytest.mark.parametrize("where", ["weight", "approximation", "moments"])
def test_not_finite(method: CompensateMethod, where: str) -> None:
    W, damaged, moments = case((6, 9))
    if where == "moments":
        if not method.needs:
            pytest.skip("uses no moments")
        moments.second.view(-1)[0] = float("nan")
        moments.gradient.view(-1)[0] = float("nan")
    else:
        (W if where == "weight" else damaged).view(-1)[0] = float("nan")
    with pytest.raises(NotFiniteError, match="NaN or Inf"):
        repair(method, W, damaged, moments, 2)


@every_method
def test_missing_moments(method: CompensateMethod) -> None:
    W, damaged, _ = case((6, 9))
    if not method.needs:
        assert repair(method, W, damaged, None, 2).form.rank == 2
        return
    with pytest.raises(InputError, match=r"needs the moments.*calibrate"):
        repair(method, W, damaged, None, 2)
    with pytest.raises(InputError, match=r"needs the moment .*calibrate"):
        repair(method, W, damaged, SiteMoments(count=3), 2)


@every_method
def test_asks_for_what_it_uses(method: CompensateMethod) -> None:
    W, damaged, moments = case((6, 9))
    least = SiteMoments(count=moments.count, **{name: getattr(moments, name) for name in method.needs})
    torch.testing.assert_close(
        repair(method, W, damaged, least, 2).errors, repair(method, W, damaged, moments, 2).errors
    )


@every_method
def test_shapes_and_rank_are_checked(method: CompensateMethod) -> None:
    W, damaged, moments = case((6, 9))
    with pytest.raises(InputError, match="one shape"):
        repair(method, W, damaged.T, moments, 2)
    with pytest.raises(InputError, match="at least 1"):
        repair(method, W, damaged, moments, 0)


# ---- the claims


@every_method
def test_claim_ran_and_reports_figures(method: CompensateMethod) -> None:
    verdict = method.claim.run()
    assert isinstance(verdict, Verdict)
    assert verdict.figures
    assert all(isinstance(value, float) for value in verdict.figures.values())
    assert verdict.held, verdict
