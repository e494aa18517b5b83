"""What every compression method promises, over the table: a new method is tested by being in it."""

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

from eckart.compression import METHODS, CompressMethod, Prepared, options_for
from eckart.errors import InputError, NotFiniteError
from eckart.forms import LowRank, Pivoted
from eckart.moments import SiteMoments
from eckart.records import Claim, Site, Verdict

Metrics = tuple[Tensor | None, Tensor | None]


def _half(S: Tensor) -> Tensor:
    return 0.5 * S + 0.5 * torch.diag(S.diagonal())


def _centred(moments: SiteMoments, bias: bool) -> Tensor:
    assert moments.second is not None
    assert moments.mean is not None
    return moments.second - moments.mean.outer(moments.mean) if bias else moments.second


# Each method's own objective tr(G ΔW Σ ΔWᵀ), written from its paper and not from its code: (Σ, G).
OBJECTIVES: dict[str, Callable[[SiteMoments, bool], Metrics]] = {
    "svd": lambda m, bias: (None, None),
    "fwsvd": lambda m, bias: (None, torch.diag(m.fisher_rows)),
    "asvd": lambda m, bias: (torch.diag(m.second.diagonal().sqrt()), None),
    "whitened": lambda m, bias: (m.second, None),
    "lord": lambda m, bias: (m.second, None),
    "afm": lambda m, bias: (_centred(m, bias), None),
    "kfac": lambda m, bias: (_centred(m, bias), _half(m.gradient)),
}

if set(OBJECTIVES) != set(METHODS):
    raise RuntimeError(f"methods without a test objective, or the reverse: {set(OBJECTIVES) ^ set(METHODS)}")
if lacking := [name for name, m in METHODS.items() if not isinstance(getattr(m, "claim", None), Claim)]:
    raise RuntimeError(f"methods without a claim: {lacking}")

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
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def moments_of(X: Tensor, g: Tensor) -> SiteMoments:
    """Moments by their definitions, one row per token."""
    n = X.shape[0]
    return SiteMoments(
        count=n,
        mean=X.mean(0),
        second=X.T @ X / n,
        gradient=g.T @ g / n,
        gradient_scale=float(g.square().sum(1).mean()),
        fisher_rows=(g.square() * X.square().sum(1, keepdim=True)).mean(0),
        fisher_columns=(X.square() * g.square().sum(1, keepdim=True)).mean(0),
    )


def case(
    shape: tuple[int, int], tokens: int = 200, bias: bool = True, seed: int = 0
) -> tuple[dict[str, Tensor], SiteMoments]:
    """A random map with correlated inputs of non-zero mean and correlated gradients, float64."""
    m, n = shape
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weights = {"weight": gaussian(m, n)} | ({"bias": gaussian(m)} if bias else {})
    X = gaussian(tokens, n) @ gaussian(n, n) + 2 * gaussian(n)
    return weights, moments_of(X, gaussian(tokens, m) @ gaussian(m, m))


def prepared(method: CompressMethod, weights: dict[str, Tensor], moments: SiteMoments | None) -> Prepared:
    return method.prepare(weights, moments, method.options())


def objective(delta: Tensor, metrics: Metrics) -> Tensor:
    second, gradient = metrics
    left = delta if gradient is None else gradient @ delta
    return ((left if second is None else left @ second) * delta).sum()


def module_of(method: CompressMethod):  # type: ignore[no-untyped-def]
    return importlib.import_module(method.prepare.__module__)


# ---- the record


@every_method
def test_lies_under_its_own_name_with_paper_and_claim(method: CompressMethod) -> None:
    assert METHODS[method.name] is method
    assert method.paper.authors
    assert method.paper.title
    assert method.paper.year > 1900
    assert method.claim.statement
    assert method.claim.source
    assert callable(method.claim.run)
    assert method.summary == method.summary.strip()


@every_method
def test_module_explains_itself_under_the_fixed_headings(method: CompressMethod) -> None:
    text = module_of(method).__doc__
    places = [text.find(f"*{heading}.*") for heading in HEADINGS]
    assert -1 not in places, [h for h, p in zip(HEADINGS, places, strict=True) if p == -1]
    assert places == sorted(places)


@every_method
def test_example_runs_and_asserts(method: CompressMethod) -> None:
    result = doctest.testmod(module_of(method))
    assert result.attempted > 0
    assert result.failed == 0
    assert "True" in module_of(method).__doc__.split("*Example.*")[1]


@every_method
def test_options_are_frozen_keyword_only_explained_and_json(method: CompressMethod) -> None:
    options = method.options()
    assert options.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(options))
    tree = ast.parse(inspect.getsource(method.options)).body[0]
    assert isinstance(tree, ast.ClassDef)
    for here, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(here, ast.AnnAssign):
            assert isinstance(after, ast.Expr), ast.unparse(here)
            assert isinstance(after.value, ast.Constant), ast.unparse(here)
    given = json.loads(json.dumps(dataclasses.asdict(options)))
    assert options_for(method, given) == options


@every_method
def test_unknown_option_is_an_error(method: CompressMethod) -> None:
    with pytest.raises(InputError, match="bogus"):
        options_for(method, {"bogus": 1})


@every_method
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv", "embedding", "experts"])
def test_fits_answers_with_none_or_a_reason(method: CompressMethod, kind: str) -> None:
    site = Site(name="x", kind=kind, out_features=4, in_features=6)
    reason = method.fits(site)
    assert reason is None or (isinstance(reason, str) and len(reason) > 20)
    assert kind == "embedding" or reason is None


# ---- the decomposition


@every_method
@every_shape
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_error_curve_is_the_measured_objective(method: CompressMethod, shape: tuple[int, int], bias: bool) -> None:
    weights, moments = case(shape, bias=bias)
    ready = prepared(method, weights, moments)
    metrics = OBJECTIVES[method.name](moments, bias)
    total = objective(weights["weight"], metrics)
    assert ready.errors.shape == (min(shape) + 1,)
    torch.testing.assert_close(ready.errors[0], total)
    assert (ready.errors.diff() <= 1e-12 * total).all()
    for rank in range(1, min(shape) + 1):
        delta = weights["weight"] - method.cut(ready, rank, "lowrank").dense()
        measured = objective(delta, metrics)
        torch.testing.assert_close(measured, ready.errors[rank], rtol=1e-9, atol=1e-12 * float(total))


@every_method
@every_shape
def test_no_nearby_matrix_of_that_rank_is_better(method: CompressMethod, shape: tuple[int, int]) -> None:
    weights, moments = case(shape)
    ready = prepared(method, weights, moments)
    metrics = OBJECTIVES[method.name](moments, True)
    form = method.cut(ready, 3, "lowrank")
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        a = form.a + 1e-3 * torch.randn(form.a.shape, generator=generator, dtype=torch.float64)
        b = form.b + 1e-3 * torch.randn(form.b.shape, generator=generator, dtype=torch.float64)
        assert objective(weights["weight"] - b @ a, metrics) > ready.errors[3]


@every_method
@every_shape
@pytest.mark.parametrize("form", ["lowrank", "pivoted"])
def test_full_rank_rebuilds_the_weight(method: CompressMethod, shape: tuple[int, int], form: str) -> None:
    weights, moments = case(shape)
    full = method.cut(prepared(method, weights, moments), min(shape), form)
    torch.testing.assert_close(full.dense(), weights["weight"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(full.bias, weights["bias"], rtol=1e-9, atol=1e-9)


@every_method
@every_shape
def test_pivoted_is_the_same_matrix_in_fewer_numbers(method: CompressMethod, shape: tuple[int, int]) -> None:
    weights, moments = case(shape)
    ready = prepared(method, weights, moments)
    for rank in range(1, min(shape) + 1):
        factors, rows = method.cut(ready, rank, "lowrank"), method.cut(ready, rank, "pivoted")
        assert isinstance(factors, LowRank)
        assert isinstance(rows, Pivoted)
        assert factors.rank == rows.rank == rank
        assert factors.numel - rows.numel == rank * rank
        torch.testing.assert_close(rows.dense(), factors.dense(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rows.bias, factors.bias, rtol=1e-9, atol=1e-9)


@every_method
def test_prefixes_are_nested_and_cutting_changes_nothing(method: CompressMethod) -> None:
    weights, moments = case((7, 12))
    ready = prepared(method, weights, moments)
    before = ready.left.clone(), ready.right.clone(), weights["weight"].clone()
    first = method.cut(ready, 4, "lowrank").dense()
    method.cut(ready, 2, "pivoted")
    assert torch.equal(method.cut(ready, 4, "lowrank").dense(), first)
    for old, new in zip(before, (ready.left, ready.right, weights["weight"]), strict=True):
        assert torch.equal(old, new)


@every_method
@pytest.mark.parametrize("form", ["lowrank", "pivoted"])
@pytest.mark.parametrize(
    # Two factors of half a unit in the last place each, and as much for their product.
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1.6e-2), (torch.float16, 2e-3)],
    ids=lambda value: str(value),
)
def test_dtypes(method: CompressMethod, form: str, dtype: torch.dtype, tolerance: float) -> None:
    weights, moments = case((7, 12))
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    ready = prepared(method, weights, moments)
    found = method.cut(ready, 4, form)
    assert found.a.dtype == found.b.dtype == found.bias.dtype == dtype
    assert found.a.is_contiguous()
    assert found.b.is_contiguous()
    assert ready.left.dtype == ready.errors.dtype == torch.float64
    exact = ready.left[:, :4] @ ready.right[:4]
    assert (found.dense().double() - exact).norm() <= tolerance * exact.norm()


# ---- hard cases


@every_method
@every_shape
def test_singular_moments_of_layer_norm_outputs(method: CompressMethod, shape: tuple[int, int]) -> None:
    weights, _ = case(shape)
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(200, shape[1], generator=generator, dtype=torch.float64)
    X = torch.nn.functional.layer_norm(X, (shape[1],))
    g = torch.randn(200, shape[0], generator=generator, dtype=torch.float64)
    moments = moments_of(X, g - g.mean(1, keepdim=True))
    ready = prepared(method, weights, moments)
    metrics = OBJECTIVES[method.name](moments, True)
    for rank in (1, min(shape) - 1, min(shape)):
        form = method.cut(ready, rank, "pivoted")
        measured = objective(weights["weight"] - form.dense(), metrics)
        total = float(ready.errors[0])
        torch.testing.assert_close(measured, ready.errors[rank], rtol=1e-8, atol=1e-9 * total)
    full = method.cut(ready, min(shape), "lowrank").dense()
    torch.testing.assert_close(full, weights["weight"], rtol=1e-6, atol=1e-6)


@every_method
@every_shape
def test_fewer_tokens_than_features(method: CompressMethod, shape: tuple[int, int]) -> None:
    weights, moments = case(shape, tokens=4)
    ready = prepared(method, weights, moments)
    assert ready.errors.isfinite().all()
    assert (ready.errors.diff() <= 1e-9 * ready.errors[0]).all()
    for rank in range(1, min(shape) + 1):
        lowrank, pivoted = method.cut(ready, rank, "lowrank"), method.cut(ready, rank, "pivoted")
        torch.testing.assert_close(pivoted.dense(), lowrank.dense(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lowrank.dense(), weights["weight"], rtol=1e-6, atol=1e-6)


@every_method
@pytest.mark.parametrize("form", ["lowrank", "pivoted"])
@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)], ids=str)
def test_single_rows_and_columns(method: CompressMethod, shape: tuple[int, int], form: str) -> None:
    weights, moments = case(shape)
    found = method.cut(prepared(method, weights, moments), 1, form)
    torch.testing.assert_close(found.dense(), weights["weight"])


@every_method
@pytest.mark.parametrize("form", ["lowrank", "pivoted"])
def test_zero_weight(method: CompressMethod, form: str) -> None:
    weights, moments = case((6, 9))
    weights["weight"] = torch.zeros_like(weights["weight"])
    ready = prepared(method, weights, moments)
    assert torch.equal(ready.errors, torch.zeros_like(ready.errors))
    found = method.cut(ready, 3, form)
    assert torch.equal(found.dense(), weights["weight"])
    assert torch.equal(found.bias, weights["bias"])


@every_method
@pytest.mark.parametrize("form", ["lowrank", "pivoted"])
def test_weight_of_lower_rank_than_asked(method: CompressMethod, form: str) -> None:
    weights, moments = case((6, 9))
    weights["weight"] = weights["weight"][:, :2] @ weights["weight"][:2]
    found = method.cut(prepared(method, weights, moments), 4, form)
    assert found.rank == 4
    torch.testing.assert_close(found.dense(), weights["weight"], rtol=1e-6, atol=1e-6)


@every_method
def test_silent_moments(method: CompressMethod) -> None:
    """A layer that no token and no gradient ever reached."""
    weights, moments = case((6, 9))
    zero = {
        field.name: torch.zeros_like(value)
        for field in dataclasses.fields(moments)
        if isinstance(value := getattr(moments, field.name), Tensor)
    }
    moments = dataclasses.replace(moments, gradient_scale=0.0, **zero)
    ready = prepared(method, weights, moments)
    assert method.cut(ready, 3, "pivoted").dense().isfinite().all()
    torch.testing.assert_close(method.cut(ready, 6, "lowrank").dense(), weights["weight"])


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "bias", "moments"])
def test_not_finite(method: CompressMethod, where: str, bad: float) -> None:
    weights, moments = case((6, 9))
    if where == "moments":
        for field in dataclasses.fields(moments):
            if isinstance(tensor := getattr(moments, field.name), Tensor):
                tensor.view(-1)[0] = bad
        if not method.needs:
            pytest.skip("uses no moments")
    else:
        weights[where].view(-1)[0] = bad
    with pytest.raises(NotFiniteError, match="NaN or Inf"):
        prepared(method, weights, moments)


@every_method
def test_missing_moments(method: CompressMethod) -> None:
    weights, _ = case((6, 9))
    if not method.needs:
        assert prepared(method, weights, None).errors.shape == (7,)
        return
    with pytest.raises(InputError, match=r"needs the moments.*calibrate"):
        prepared(method, weights, None)
    with pytest.raises(InputError, match=r"needs the moment .*calibrate"):
        prepared(method, weights, SiteMoments(count=3))


@every_method
def test_asks_for_what_it_uses(method: CompressMethod) -> None:
    """``needs`` is enough: with every other moment left out, nothing is missing and nothing changes."""
    weights, moments = case((6, 9))
    fields = {
        "mean": ("mean",),
        "second": ("second",),
        "diagonal": ("second",),
        "gradient": ("gradient",),
        "gradient_scale": ("gradient_scale",),
        "fisher": ("fisher_rows", "fisher_columns"),
    }
    kept = {name: getattr(moments, name) for need in method.needs for name in fields[need]}
    if method.needs & {"diagonal"}:
        kept["second"] = moments.diagonal
    least = SiteMoments(count=moments.count, **kept)
    enough = prepared(method, weights, least).errors
    torch.testing.assert_close(enough, prepared(method, weights, moments).errors)


@every_method
def test_rank_and_form_are_checked(method: CompressMethod) -> None:
    weights, moments = case((6, 9))
    ready = prepared(method, weights, moments)
    with pytest.raises(InputError, match="at least 1"):
        method.cut(ready, 0, "lowrank")
    with pytest.raises(InputError, match="'lowrank' or 'pivoted'"):
        method.cut(ready, 2, "dense")  # type: ignore[arg-type]
    assert method.cut(ready, 10**6, "lowrank").rank == 6


@every_method
def test_embedding_by_frequency(method: CompressMethod) -> None:
    if method.fits(Site(name="e", kind="embedding", out_features=4, in_features=20)) is not None:
        pytest.skip("declines embedding tables, with a reason")
    weights, moments = case((4, 20), bias=False)
    counts = torch.arange(20, dtype=torch.float64)  # entry 0 was never seen
    moments = dataclasses.replace(moments, mean=None, second=counts / counts.sum(), count=10**6)
    ready = prepared(method, weights, moments)
    for form in ("lowrank", "pivoted"):
        found = method.cut(ready, 4, form)
        torch.testing.assert_close(found.dense(), weights["weight"])
        assert found.bias is None
    assert ready.mean is None


# ---- the claims


@every_method
def test_claim_ran_and_reports_figures(method: CompressMethod) -> None:
    verdict = method.claim.run()
    assert isinstance(verdict, Verdict)
    assert verdict.figures
    assert all(isinstance(value, float) for value in verdict.figures.values())
    assert verdict.held, verdict
