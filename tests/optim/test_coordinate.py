"""Block coordinate descent, against closed forms, optimality conditions and naive twins."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError
from eckart.optim import Quadratic, coordinate_descent, forest_block, least_squares, logistic, solve_forest
from eckart.optim.coordinate import KINDS, RULES, UPDATES


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regression(n: int = 40, d: int = 12) -> tuple[Tensor, Tensor]:
    A = gaussian(n, d) * torch.linspace(1.0, 2.0, d, dtype=torch.float64)
    return A, A @ gaussian(d, seed=1) + gaussian(n, seed=2)


WAYS = [
    (rule, kind, update)
    for rule, kind, update in itertools.product(RULES, KINDS, UPDATES)
    if not (rule == "gsq" and kind != "fixed") and not (kind == "forest" and update == "gradient")
]


@pytest.mark.parametrize(("rule", "kind", "update"), WAYS)
def test_every_way_reaches_the_minimum_of_least_squares_and_never_rises(rule: str, kind: str, update: str) -> None:
    A, b = regression()
    found = coordinate_descent(
        least_squares(A, b, 0.1), rule=rule, blocks=kind, size=3, update=update, tolerance=1e-2, steps=1500
    )
    assert found.converged
    best = torch.linalg.solve(A.T @ A + 0.1 * torch.eye(12, dtype=A.dtype), A.T @ b)
    torch.testing.assert_close(found.x, best, rtol=0, atol=2e-3)  # 1e-2 over the least curvature, about 10
    direct = 0.5 * float((A @ found.x - b).square().sum()) + 0.05 * float(found.x.square().sum())
    assert found.objective == pytest.approx(direct)
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(found.history))
    assert len(found.history) == found.steps + 1


@pytest.mark.parametrize("update", UPDATES)
def test_logistic_regression_reaches_zero_gradient(update: str) -> None:
    A, b = regression()
    y = torch.where(b > 0, 1.0, -1.0).double()
    found = coordinate_descent(logistic(A, y, 0.5), size=3, update=update, tolerance=1e-5, steps=2000)
    assert found.converged
    x = found.x.clone().requires_grad_()
    loss = torch.log1p(torch.exp(-y * (A @ x))).sum() + 0.25 * x.square().sum()
    (g,) = torch.autograd.grad(loss, x)
    assert float(g.abs().max()) < 1e-5
    assert found.objective == pytest.approx(float(loss.detach()))
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(found.history))


@pytest.mark.parametrize("rule", ["gs", "gsl", "cyclic", "random"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("loss", ["squares", "logistic"])
def test_l1_satisfies_its_optimality_conditions(rule: str, update: str, loss: str) -> None:
    A, b = regression()
    f = least_squares(A, b) if loss == "squares" else logistic(A, torch.where(b > 0, 1.0, -1.0).double())
    l1 = 60.0 if loss == "squares" else 8.0
    found = coordinate_descent(f, rule=rule, size=3, update=update, l1=l1, tolerance=1e-5, steps=2000)
    assert found.converged
    f.start(found.x)
    g, on = f.gradient(), found.x != 0
    assert 0 < int(on.sum()) < 12
    torch.testing.assert_close(g[on], -l1 * found.x[on].sign(), rtol=0, atol=1e-4)
    assert float(g[~on].abs().max()) <= l1 + 1e-4
    assert found.active.tolist() == on.nonzero()[:, 0].tolist()
    assert found.objective == pytest.approx(f.value() + l1 * float(found.x.abs().sum()))
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(found.history))


@pytest.mark.parametrize("update", UPDATES)
def test_bounds_are_kept_and_optimal(update: str) -> None:
    A, b = regression()
    f = least_squares(A, b)
    found = coordinate_descent(f, size=4, update=update, lower=0.0, upper=0.3, tolerance=1e-5, steps=2000)
    assert found.converged
    x = found.x
    assert float(x.min()) >= 0
    assert float(x.max()) <= 0.3
    f.start(x)
    g = f.gradient()
    low, high = x == 0, x == 0.3
    assert int(low.sum()) > 0
    assert int(high.sum()) > 0
    inside = ~low & ~high
    assert float(g[inside].abs().max()) < 1e-4
    assert float(g[low].min()) > -1e-4
    assert float(g[high].max()) < 1e-4
    assert found.active.tolist() == inside.nonzero()[:, 0].tolist()


def test_newton_on_the_found_active_set_ends_in_finitely_many_steps() -> None:
    """Superlinear: once the support stays, few steps are left where blocks can hold it."""
    A, b = regression()
    found = coordinate_descent(least_squares(A, b), size=12, l1=60.0, steps=100, tolerance=1e-9)
    assert found.converged
    assert found.steps - found.identified <= 2
    by_gradient = coordinate_descent(
        least_squares(A, b), size=12, l1=60.0, steps=100, tolerance=1e-9, update="gradient"
    )
    assert by_gradient.steps > 3 * found.steps


def test_rules_pick_what_their_formula_says() -> None:
    """One step, single coordinates, against a loop over all of them."""
    A, b = regression()
    H, g = A.T @ A, -A.T @ b
    for rule, score in (("gs", g.abs()), ("gsl", g.square() / H.diagonal())):
        found = coordinate_descent(least_squares(A, b), rule=rule, steps=1)
        i = int(score.argmax())
        assert found.x.nonzero().flatten().tolist() == [i]
        torch.testing.assert_close(found.x[i], -g[i] / H[i, i])
    blocks = [slice(0, 4), slice(4, 8), slice(8, 12)]
    scores = {
        "gs": [float(g[s] @ g[s]) for s in blocks],
        "gsl": [float(g[s] @ g[s] / torch.linalg.eigvalsh(H[s, s])[-1]) for s in blocks],
        "gsq": [float(g[s] @ torch.linalg.solve(H[s, s], g[s])) for s in blocks],
    }
    for rule, values in scores.items():
        found = coordinate_descent(least_squares(A, b), rule=rule, blocks="fixed", size=4, steps=1)
        s = blocks[values.index(max(values))]
        assert found.x.nonzero().flatten().tolist() == list(range(s.start, s.stop))
        torch.testing.assert_close(found.x[s], -torch.linalg.solve(H[s, s], g[s]))


def test_quadratic_rule_gains_most_of_all_fixed_blocks_per_newton_step() -> None:
    A, b = regression()
    gains = {
        rule: coordinate_descent(least_squares(A, b), rule=rule, blocks="fixed", size=4, steps=1).objective
        for rule in ("gs", "gsl", "gsq", "cyclic")
    }
    assert gains["gsq"] == min(gains.values())


# ---- forests


def lattice(side: int) -> Tensor:
    """A random positive definite matrix on a side × side lattice."""
    n = side * side
    H = torch.zeros(n, n, dtype=torch.float64)
    for i, j in itertools.product(range(side), range(side)):
        for a, b in ((i + 1, j), (i, j + 1)):
            if a < side and b < side:
                H[i * side + j, a * side + b] = H[a * side + b, i * side + j] = -0.5 - (i + j) % 3 / 10
    return H + torch.diag(H.abs().sum(1) + 0.1)


def has_cycle(H: Tensor, members: list[int]) -> bool:
    """By counting: a forest has fewer edges than nodes in every component."""
    edges = [(a, b) for a, b in itertools.combinations(members, 2) if H[a, b] != 0]
    component = {a: a for a in members}

    def find(a: int) -> int:
        return a if component[a] == a else find(component[a])

    for a, b in edges:
        if find(a) == find(b):
            return True
        component[find(a)] = find(b)
    return False


@pytest.mark.parametrize("seed", range(4))
def test_forests_have_no_cycles_cannot_grow_and_are_solved_exactly(seed: int) -> None:
    H = lattice(5)
    neighbours = [[j for j in range(25) if j != i and H[i, j] != 0] for i in range(25)]
    order = torch.randperm(25, generator=torch.Generator().manual_seed(seed))
    block, sequence, parents = forest_block(neighbours, order)
    members = block.tolist()
    assert not has_cycle(H, members)
    assert all(has_cycle(H, [*members, i]) for i in range(25) if i not in members)
    assert members[0] == int(order[0])
    r = gaussian(len(members), seed=seed)
    torch.testing.assert_close(solve_forest(H, block, sequence, parents, r), torch.linalg.solve(H[block][:, block], r))


def test_a_tree_is_solved_in_one_step() -> None:
    chain = torch.diag(torch.full((30,), 2.5)) - torch.diag(torch.ones(29), 1) - torch.diag(torch.ones(29), -1)
    c = gaussian(30)
    found = coordinate_descent(Quadratic(chain, c), blocks="forest")
    assert found.converged
    assert found.steps == 1
    torch.testing.assert_close(found.x, torch.linalg.solve(chain.double(), c))


def test_variables_without_edges_are_a_forest() -> None:
    found = coordinate_descent(Quadratic(torch.diag(torch.tensor([1.0, 2.0])), torch.ones(2)), blocks="forest")
    assert found.x.tolist() == [1.0, 0.5]


# ---- starts, ends, bad input


def test_start_end_and_seed() -> None:
    A, b = regression()
    f = least_squares(A, b)
    best = coordinate_descent(f, size=12).x
    again = coordinate_descent(f, size=12, x0=best, tolerance=1e-6)
    assert again.converged
    assert again.steps == 0
    none = coordinate_descent(f, steps=0)
    assert (none.steps, none.converged, none.history) == (0, False, (none.objective,))
    assert none.residual == pytest.approx(float((A.T @ b).abs().max()))
    one, two = (coordinate_descent(f, rule="random", steps=7, seed=5).x for _ in range(2))
    assert torch.equal(one, two)
    started_outside = coordinate_descent(f, x0=torch.full((12,), 9.0), lower=-1.0, upper=1.0, steps=0)
    assert float(started_outside.x.max()) == 1.0


def test_bad_input_is_named_at_once() -> None:
    A, b = regression()
    f = least_squares(A, b)
    with pytest.raises(InputError) as caught:
        coordinate_descent(
            f, rule="greedy", blocks="all", size=13, update="none", l1=1.0, lower=1.0, upper=0.0, x0=b, steps=-1
        )
    for word in ("rule", "blocks", "update", "at most the 12", "do not go together", "lower bound", "x0", "steps"):
        assert word in str(caught.value)
    for options in (
        {"blocks": "forest", "l1": 1.0},
        {"blocks": "forest", "update": "gradient"},
        {"rule": "gsq"},
        {"rule": "gsq", "blocks": "fixed", "lower": 0.0},
        {"lower": torch.zeros(3)},
        {"lower": float("nan")},
    ):
        with pytest.raises(InputError):
            coordinate_descent(f, **options)
    with pytest.raises(InputError, match="needs a Quadratic"):
        coordinate_descent(logistic(A, b.sign()), blocks="forest")


def test_bad_problems() -> None:
    A, b = regression()
    with pytest.raises(InputError, match=r"A is \(n, d\)"):
        least_squares(A, b[:-1])
    with pytest.raises(InputError, match="l2"):
        least_squares(A, b, -1.0)
    with pytest.raises(InputError, match="columns of zeros"):
        logistic(A * (torch.arange(12) > 0), b.sign())
    with pytest.raises(InputError, match="−1 and 1"):
        logistic(A, b)
    with pytest.raises(NotFiniteError):
        least_squares(A * torch.nan, b)
    with pytest.raises(InputError, match="not symmetric"):
        Quadratic(gaussian(3, 3), torch.ones(3))
    with pytest.raises(InputError, match="diagonal"):
        Quadratic(torch.zeros(2, 2), torch.ones(2))
    with pytest.raises(InputError, match=r"H is \(d, d\)"):
        Quadratic(torch.eye(3), torch.ones(2))
