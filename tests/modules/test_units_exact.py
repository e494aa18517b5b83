"""Narrower blocks against the dense models that they stand for, and their losses against naive twins."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from module_tiny_models import MODELS, Case, some_widths
from torch import Tensor

from eckart.arch import MLP, Attention, Rows, find_sites, head_columns, site_matrices
from eckart.modules import UnitFacts, module_units, prepare_unit
from eckart.modules.neurons import (
    DAMPING,
    ROUNDS,
    PreparedNeurons,
    damped,
    errors_in_order,
    leverage_order,
    removal_order,
)
from eckart.modules.obs import Options, scores_of
from eckart.modules.queries import PreparedQueries
from eckart.modules.values import PreparedValues, picked_heads
from eckart.moments import SiteMoments
from eckart.records import Unit

BASELINE = ("llama", "gpt2")
_CASES: dict[tuple[str, str], Case] = {}


def case(name: str, method: str = "modules") -> Case:
    if (name, method) not in _CASES:
        _CASES[name, method] = Case(name, method)
    return _CASES[name, method]


def same(a: Tensor, b: Tensor, tolerance: float = 1e-8) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


every_model = pytest.mark.parametrize("name", MODELS)
every_method = pytest.mark.parametrize(
    ("name", "method"), [(n, "modules") for n in MODELS] + [(n, "modegpt") for n in BASELINE]
)

# ---- what is applied


@every_model
def test_the_units_of_a_model(name: str) -> None:
    found = case(name)
    kinds = [part.unit.kind for part in found.cut.values()]
    attentions = 6 if name == "t5" else 2
    assert kinds.count("neurons") == (4 if name == "t5" else 2)
    assert kinds.count("values") == attentions
    assert kinds.count("queries") == (0 if name == "qwen3" else attentions)
    types = {"neurons": PreparedNeurons, "values": PreparedValues, "queries": PreparedQueries}
    for part in found.cut.values():
        assert isinstance(part, types[part.unit.kind])
        assert part.errors.shape == (part.unit.full_rank + 1,)
        assert (part.errors.diff() <= 1e-12 * part.errors[0]).all()
        assert part.errors[0] > 0
        assert abs(float(part.errors[-1])) <= 1e-12 * float(part.errors[0])


@every_method
def test_full_width_is_the_model(name: str, method: str) -> None:
    found = case(name, method)
    for unit, part in found.of_each_kind().items():
        full = {unit: part.unit.full_rank}
        assert same(found.narrowed(full), found.exact), unit
        assert same(found.stood_in(full), found.exact), unit
    everything = {unit: part.unit.full_rank for unit, part in found.cut.items()}
    assert same(found.narrowed(everything), found.exact)


@every_method
def test_what_probes_write_is_what_is_applied(name: str, method: str) -> None:
    found = case(name, method)
    for unit, part in found.of_each_kind().items():
        for width in some_widths(part)[:: 1 if method == "modules" else 2]:
            narrow = found.narrowed({unit: width})
            assert same(narrow, found.stood_in({unit: width})), (unit, width)
            if float(part.errors[width]) > 1e-6:  # neurons that never fire go at no cost
                assert not same(narrow, found.exact, 1e-9), (unit, width)
    together = {unit: some_widths(part)[1] for unit, part in found.cut.items()}
    assert same(found.narrowed(together), found.stood_in(together))


@every_model
def test_pieces_have_the_sizes_that_the_plan_counts(name: str) -> None:
    found = case(name)
    for part in found.cut.values():
        width, unit = some_widths(part)[1], part.unit
        pieces = part.cut(width)
        numbers = sum(piece.weight.numel() for piece in pieces)
        places = sum(len(piece.positions) for piece in pieces if piece.positions is not None)
        assert numbers == unit.width_parameters * width
        assert places == unit.width_indices * width
        assert {piece.site for piece in pieces} == set(unit.sites)
        sites = [found.by_name[name] for name in unit.sites]
        assert unit.width_parameters * unit.full_rank <= sum(site.out_features * site.in_features for site in sites)


def test_normalised_queries_are_skipped_and_say_why() -> None:
    found = case("qwen3")
    skipped = dict(module_units(found.model, find_sites(found.model))[1])
    assert "normalised head by head" in skipped["model.layers.0.self_attn"]


def test_units_need_all_of_their_maps() -> None:
    found = case("llama")
    some = find_sites(found.model, exclude=("*.layers.0.mlp.up_proj", "*.layers.1.self_attn.v_proj"))
    names = [each.unit.name for each in module_units(found.model, some)[0]]
    attention = {"model.layers.0.self_attn#values", "model.layers.0.self_attn#queries"}
    assert (set(names[:-1]), names[-1]) == (attention, "model.layers.1.mlp#neurons")
    (only,) = module_units(found.model, some, ("neurons",))[0]
    assert only.unit.role == "mlp#neurons"
    assert only.unit.depth == 1


# ---- losses of neurons


def metrics(moments: SiteMoments, bias: bool) -> tuple[Tensor, Tensor]:
    """(Σ, G) as the docstring of ``kfac`` has them, G in units of the loss."""
    assert moments.second is not None
    assert moments.mean is not None
    assert moments.gradient is not None
    second = moments.second - moments.mean.outer(moments.mean) if bias else moments.second
    rho = max(0.0, 0.2 * (1 - moments.count / (2.5 * len(second))))
    second = (1 - rho) * second + rho * torch.diag(second.diagonal())
    gradient = 0.5 * moments.gradient + 0.5 * torch.diag(moments.gradient.diagonal())
    return second, gradient * 0.5 * moments.tokens_per_unit


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "phi3"])
def test_losses_of_neurons_are_the_objective_of_what_is_applied(name: str) -> None:
    found = case(name)
    for part in found.cut.values():
        if not isinstance(part, PreparedNeurons):
            continue
        site, _, _ = part.stand_in(1)
        weights = site_matrices(found.model, found.by_name[site])[0]
        second, gradient = metrics(found.moments.site(site), "bias" in weights)
        floor = 1e-6 * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
        for width in range(1, part.unit.full_rank + 1):
            delta = weights["weight"] - part.stand_in(width)[1]
            loss = (gradient @ delta @ second * delta).sum()
            with_floor = (gradient @ delta @ (second + floor) * delta).sum()
            scale = float(part.errors[0])
            torch.testing.assert_close(part.errors[width], with_floor, rtol=1e-7, atol=1e-11 * scale)
            torch.testing.assert_close(part.errors[width], loss, rtol=1e-3, atol=1e-4 * scale)


def test_the_bias_takes_up_the_mean() -> None:
    """At every width the mean output of the second map is what it was."""
    found = case("bert")
    part = next(part for part in found.cut.values() if isinstance(part, PreparedNeurons))
    site = part.mlp.down
    weights, mean = site_matrices(found.model, found.by_name[site])[0], found.moments.site(site).mean
    assert mean is not None
    for width in (1, 7, 20):
        _, dense, bias = part.stand_in(width)
        assert bias is not None
        torch.testing.assert_close(dense @ mean + bias, weights["weight"] @ mean + weights["bias"])


def drawn(n: int, m: int = 5, seed: int = 0, tokens: int = 60) -> tuple[Tensor, Tensor]:
    """A target (m, n) and a second moment (n, n) of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    return torch.randn(m, n, generator=generator, dtype=torch.float64), X.T @ X / tokens


def refit_error(target: Tensor, second: Tensor, kept: list[int]) -> float:
    """min over X of tr((T − X_J) Σ (T − X_J)ᵀ), by the normal equations and in full."""
    approximation = torch.zeros_like(target)
    if kept:
        approximation[:, kept] = torch.linalg.solve(second[kept][:, kept], (target @ second[:, kept]).T).T
    delta = target - approximation
    return float((delta @ second * delta).sum())


def test_removal_is_one_at_a_time_optimal_brain_surgery() -> None:
    for seed in range(5):
        target, second = drawn(12, seed=seed)
        left, gone = list(range(12)), []
        while left:
            costs = [refit_error(target, damped(second), [j for j in left if j != i]) for i in left]
            gone.append(left.pop(min(range(len(left)), key=costs.__getitem__)))
        assert removal_order(target, second).tolist() == gone[::-1]


def test_errors_along_any_order_are_those_of_refits() -> None:
    target, second = drawn(10)
    for order in (torch.arange(10), torch.arange(9, -1, -1), torch.randperm(10)):
        errors = errors_in_order(target, second, order)
        naive = [refit_error(target, damped(second), order[:k].tolist()) for k in range(11)]
        torch.testing.assert_close(errors, torch.tensor(naive, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_removal_in_rounds_stays_near_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    target, second = drawn(64, m=16, tokens=200)
    single = errors_in_order(target, second, removal_order(target, second))
    monkeypatch.setattr("eckart.modules.neurons.ROUNDS", 16)
    rounds = removal_order(target, second)
    assert sorted(rounds.tolist()) == list(range(64))
    rounded = errors_in_order(target, second, rounds)
    assert float(rounded[32]) < 1.3 * float(single[32])
    by_leverage = errors_in_order(target, second, leverage_order(second, 0.01))
    assert float(rounded[32]) < float(by_leverage[32])


def removal_order_naive(target: Tensor, second: Tensor) -> list[int]:
    """The rounds of ``removal_order``, with all of Σ⁻¹ brought up to date after each."""
    inverse, left, gone = torch.linalg.inv(damped(second)), torch.arange(len(second)), []
    size = max(1, len(second) // ROUNDS)
    while len(left):
        least = (target.square().sum(0) / inverse.diagonal()).argsort(stable=True)
        out, stay = least[:size], least[size:].sort().values
        gone += left[out].tolist()
        shared = torch.linalg.solve(inverse[out][:, out], inverse[out][:, stay])
        target = target[:, stay] - target[:, out] @ shared
        inverse = inverse[stay][:, stay] - inverse[stay][:, out] @ shared
        left = left[stay]
    return gone[::-1]


@pytest.mark.parametrize("width", [5, 40, 300, 390])
def test_panels_change_nothing(width: int) -> None:
    target, second = drawn(width, m=9, tokens=3 * width)
    assert removal_order(target, second).tolist() == removal_order_naive(target, second)


def test_duplicates_and_the_dead_go_first_at_no_cost() -> None:
    target, second = drawn(8)
    spread = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 7, 2])
    second, target = second[spread][:, spread], target[:, spread]
    second = torch.block_diag(second, torch.zeros(2, 2, dtype=torch.float64))
    target = torch.cat([target, torch.ones(5, 2, dtype=torch.float64)], 1)
    order = removal_order(target, second)
    errors = errors_in_order(target, second, order)
    assert {10, 11} & set(order[:8].tolist()) == set()
    assert len({int(spread[i]) for i in order[:8]}) == 8
    assert float(errors[8]) < 1e-4 * float(errors[0])
    assert float(errors[7]) > 1e-3 * float(errors[0])


def test_a_layer_that_nothing_reached() -> None:
    zero = torch.zeros(6, 6, dtype=torch.float64)
    target, _ = drawn(6)
    assert sorted(removal_order(target, zero).tolist()) == list(range(6))
    assert errors_in_order(target, zero, torch.arange(6)).isfinite().all()
    assert sorted(leverage_order(zero + 0.0, 0.01).tolist()) == list(range(6))


def test_leverage_is_its_definition() -> None:
    _, second = drawn(9)
    ridge = 0.1 * second.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    scores = (second @ torch.linalg.inv(second + ridge)).diagonal()
    assert leverage_order(second, 0.1).tolist() == scores.argsort(descending=True).tolist()


def test_damping_is_small_and_positive() -> None:
    _, second = drawn(4)
    added = damped(second) - second
    torch.testing.assert_close(added, DAMPING * second.diagonal().mean() * torch.eye(4, dtype=torch.float64))


def synthetic(width: int, dead: int) -> tuple[UnitFacts, dict[str, dict[str, Tensor]], SiteMoments]:
    """An MLP of ReLU neurons on random tokens, some of which never fire."""
    generator = torch.Generator().manual_seed(2)
    W1 = torch.randn(width, 5, generator=generator, dtype=torch.float64)
    W2 = torch.randn(4, width, generator=generator, dtype=torch.float64)
    X = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    bias = torch.zeros(width, dtype=torch.float64)
    bias[:dead] = -1e3
    hidden = (X @ W1.T + bias).relu()
    g = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    moments = SiteMoments(
        count=300, mean=hidden.mean(0), second=hidden.T @ hidden / 300, gradient=g.T @ g / 300, tokens_per_unit=2.0
    )
    facts = MLP(name="m", inputs=(Rows(site="up", stop=width),), down="down", width=width, depth=0, gated=False)
    unit = Unit(name="m#neurons", kind="neurons", sites=("up", "down"), full_rank=width, width_parameters=9,
                width_indices=0)  # fmt: skip
    return UnitFacts(unit, facts), {"up": {"weight": W1, "bias": bias}, "down": {"weight": W2}}, moments


def test_dead_neurons_leave_first_and_change_no_bias() -> None:
    unit, weights, moments = synthetic(12, dead=3)
    part = prepare_unit(unit, weights, {"down": moments}, scores_of(Options()))
    up, down = part.cut(9)
    assert torch.equal(up.weight, weights["up"]["weight"][3:])
    assert up.bias is not None
    assert torch.equal(up.bias, weights["up"]["bias"][3:])
    assert down.bias is None
    torch.testing.assert_close(down.weight, weights["down"]["weight"][:, 3:], rtol=1e-9, atol=1e-9)
    assert down.second is not None
    assert float(part.errors[9]) < 1e-5 * float(part.errors[0])
    assert float(part.errors[8]) > 1e-5 * float(part.errors[0])


# ---- losses of values


def heads_of_values(group: int) -> tuple[UnitFacts, dict[str, dict[str, Tensor]], SiteMoments]:
    """An attention whose heads are not correlated; those of one group have one second moment."""
    generator = torch.Generator().manual_seed(3)
    kv, d, features, out = 2, 4, 6, 9
    heads = kv * group
    blocks = []
    for _ in range(kv):
        root = torch.randn(d, d, generator=generator, dtype=torch.float64)
        blocks += [root @ root.T] * group
    g = torch.randn(50, out, generator=generator, dtype=torch.float64)
    moments = SiteMoments(count=10**6, second=torch.block_diag(*blocks), gradient=g.T @ g / 50, tokens_per_unit=3.0)
    facts = Attention(
        name="a", query=Rows(site="q", stop=heads * d), key=Rows(site="k", stop=kv * d),
        value=Rows(site="v", stop=kv * d), output="o", heads=heads, kv_heads=kv, head_dim=d, rotary=False,
        rotary_dim=0, query_norm=None, key_norm=None, cross=False, depth=0,
    )  # fmt: skip
    weights = {
        "v": {"weight": torch.randn(kv * d, features, generator=generator, dtype=torch.float64)},
        "o": {"weight": torch.randn(out, heads * d, generator=generator, dtype=torch.float64)},
    }
    unit = Unit(name="a#values", kind="values", sites=("v", "o"), full_rank=kv * d, width_parameters=1, width_indices=1)
    return UnitFacts(unit, facts), weights, moments


@pytest.mark.parametrize("group", [1, 2])
def test_losses_of_values_are_the_objective_where_heads_do_not_correlate(group: int) -> None:
    unit, weights, moments = heads_of_values(group)
    part = prepare_unit(unit, weights, {"o": moments}, scores_of(Options(gradient_shrinkage=0.0)))
    W = weights["o"]["weight"]
    assert moments.second is not None
    assert moments.gradient is not None
    for width in range(1, 9):
        delta = W - part.stand_in(width)[1]
        loss = 1.5 * (moments.gradient @ delta @ moments.second * delta).sum()
        torch.testing.assert_close(part.errors[width], loss, rtol=1e-4, atol=1e-5 * float(part.errors[0]))


def test_no_other_subspace_of_values_is_better() -> None:
    """One head, one direction: a search over the circle of projections, each with its own best output map."""
    unit, weights, moments = heads_of_values(1)
    part = prepare_unit(unit, weights, {"o": moments}, scores_of(Options(gradient_shrinkage=0.0)))
    assert isinstance(part, PreparedValues)
    W = weights["o"]["weight"]
    assert moments.second is not None
    assert moments.gradient is not None
    ranks = [part.picked[:5].count(head) for head in range(2)]
    generator = torch.Generator().manual_seed(4)
    for _ in range(200):
        parts = [torch.randn(4, rank, generator=generator, dtype=torch.float64) for rank in ranks]
        R = torch.block_diag(*parts)
        fitted = torch.linalg.solve(R.T @ moments.second @ R, (W @ moments.second @ R).T).T
        delta = W - fitted @ R.T
        loss = 1.5 * (moments.gradient @ delta @ moments.second * delta).sum()
        assert float(loss) > float(part.errors[5])


def test_equal_heads_keep_equal_numbers() -> None:
    found = case("llama", "modegpt")
    for part in found.cut.values():
        heads = 2
        for width in range(2, part.unit.full_rank + 1, 2):
            if isinstance(part, PreparedValues):
                counts = [part.picked[:width].count(head) for head in range(heads)]
                assert max(counts) - min(counts) == 0
            elif isinstance(part, PreparedQueries):
                counts = [sum(entry[0] == head for entry in part.picked[: width // 2]) for head in range(heads)]
                assert max(counts) - min(counts) <= 1


def test_heads_take_their_directions_by_gain_or_in_turn() -> None:
    gains = [torch.tensor([5.0, 4.0, 1.0]), torch.tensor([2.0, 0.5])]
    picked, errors = picked_heads(gains, 3, False)
    assert picked == (0, 0, 1, 0, 1, 1)
    assert errors.tolist() == [12.5, 7.5, 3.5, 1.5, 0.5, 0.0, 0.0]
    picked, errors = picked_heads(gains, 3, True)
    assert picked == (0, 1, 0, 1, 0, 1)
    assert errors.tolist() == [12.5, 7.5, 5.5, 1.5, 1.0, 0.0, 0.0]


# ---- losses of queries


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_losses_of_rotary_pairs_are_those_of_zeroed_coordinates(name: str) -> None:
    """tr(G_q S_q) and tr(G_k S_k) of a pair, from queries and keys as the model computes them."""
    found = case(name)
    part = next(part for part in found.cut.values() if isinstance(part, PreparedQueries))
    attention = part.attention
    half, d = attention.rotary_dim // 2, attention.head_dim
    sides = []
    for rows in (attention.query, attention.key):
        known = found.moments.site(rows.site)
        weights = site_matrices(found.model, found.by_name[rows.site])[0]
        assert known.second is not None
        assert known.mean is not None
        assert known.gradient is not None
        bias = weights.get("bias", torch.zeros(len(weights["weight"]), dtype=torch.float64))
        extended = torch.cat([weights["weight"], bias[:, None]], 1)
        inputs = torch.cat(
            [torch.cat([known.second, known.mean[:, None]], 1), torch.cat([known.mean, torch.ones(1)])[None]]
        )
        outputs = extended @ inputs @ extended.T
        sides.append(
            (known.gradient * 0.5 * known.tokens_per_unit * outputs)[rows.start : rows.stop, rows.start : rows.stop]
        )
    scores = {}
    for head in range(2):
        for i in range(half):
            pair = torch.tensor([i, i + half])
            q = sum(float(sides[0][(2 * head + h) * d + pair][:, (2 * head + h) * d + pair].sum()) for h in range(2))
            k = float(sides[1][head * d + pair][:, head * d + pair].sum())
            scores[head, i] = (max(q, 0.0) * max(k, 0.0)) ** 0.5
    expected = sorted(scores, key=lambda key: -scores[key])
    assert [(head, i) for head, i, _ in part.picked] == expected
    torch.testing.assert_close(float(part.errors[0]), sum(scores.values()), rtol=1e-9, atol=0.0)
    left = sum(scores[key] for key in expected[2:])
    torch.testing.assert_close(float(part.errors[4]), left, rtol=1e-9, atol=1e-15)


def test_head_columns_of_the_cases_are_disjoint() -> None:
    unit, _, _ = heads_of_values(2)
    assert isinstance(unit.facts, Attention)
    spans = [head_columns(unit.facts, head) for head in range(4)]
    assert not any(a.start < b.stop and b.start < a.stop for a, b in combinations(spans, 2))
