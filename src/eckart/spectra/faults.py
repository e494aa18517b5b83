r"""What is broken or idle in a weight: NaN, dead and repeated rows and columns, constants.

*What it does.* Counts entries that are not finite, outputs (rows) and inputs (columns) that do nothing, and rows and
columns that repeat another one, exactly or up to a factor.

*Formula.* A row is dead where its norm is at most 1e-6 of the median row norm. Two rows are candidates for a repetition
where their projections on one random vector r agree, w·r, or |w·r|/‖w‖ up to a factor, to 1e-9 relative; candidates are
then compared entry by entry (equal), or by |cos| ≥ 1 − 1e-6. Counted is what could go: a group of k equal rows
counts k − 1. Columns alike.

*Cost.* Two passes over the weight and a sort of its rows and its columns; linear in its size, where a
comparison of all pairs would be quadratic.

*When it does not help.* A neuron may be dead in use (its activation always negative) with a healthy row; that takes
data. A repeated row of a map before a nonlinearity can be merged at once only if its bias repeats too.

*Departs from the paper in.* Srinivas and Babu measure the distance of all pairs of neurons and merge the nearest; here
only those at distance 0 count, which need no threshold of accuracy. Random projections instead of all pairs miss none
that are equal and verify what they find.

*Reference.* S. Srinivas, R. V. Babu, “Data-free parameter pruning for Deep Neural Networks”, 2015,
https://arxiv.org/abs/1507.06149.

*Example.*

>>> import torch
>>> W = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
>>> W[1], W[4], W[:, 2] = 0, -2 * W[3], 0
>>> {name: finding.value for name, finding in defects(W, up_to_scale=True).items()}  # doctest: +NORMALIZE_WHITESPACE
{'not_finite': 0.0, 'constant': 0.0, 'dead_rows': 1.0, 'dead_columns': 1.0, 'duplicate_rows': 1.0,
 'duplicate_columns': 0.0}
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, gelu

from eckart.errors import InputError
from eckart.evidence import learned_problem
from eckart.records import Claim, Diagnostic, Finding, Paper, SiteKind, Verdict
from eckart.spectra.values import as_matrices, blocks, largest_entry, not_finite

NAMES = ("not_finite", "constant", "dead_rows", "dead_columns", "duplicate_rows", "duplicate_columns")
"""The findings of :func:`defects`."""

_NEAR = 1e-9
"""How close two projections of equal rows come; their sums are rounded in another order."""
_PARALLEL = 1 - 1e-6


def defects(
    W: Tensor,
    *,
    kind: SiteKind | None = None,
    groups: int = 1,
    up_to_scale: bool = False,
    tolerance: float = 1e-6,
) -> dict[str, Finding]:
    """What is broken in a weight (out, in), as counts by name (``NAMES`` of its module); of a stack, their sums.

    ``constant`` is 1 where all entries are equal. ``up_to_scale`` counts rows (and columns) that are another one times
    a factor, of either sign; otherwise equal ones. Dead ones are not counted again as repeated. ``tolerance``: a row is
    dead up to this share of the median norm of rows, in [0, 1). ``details["places"]`` holds the first 20 indices; of a
    stack, the first 20 ``[matrix, index]``.

    With NaN or Inf in the weight all but ``not_finite`` are None. Raises InputError for tensors that are no weights.
    """
    if not 0 <= tolerance < 1:
        raise InputError(f"defects: tolerance is a share in [0, 1); got {tolerance!r}.")
    matrices = as_matrices(W, "defects", kind, groups)
    if flaw := not_finite(matrices):
        bad = float(flaw.split(" ", 1)[0])
        return {
            name: Finding(name=name, value=bad if name == "not_finite" else None, n=W.numel(), notes=(flaw,))
            for name in NAMES
        }
    places: dict[str, list[tuple[int, int]]] = {name: [] for name in NAMES[2:]}
    for index, matrix in enumerate(matrices):
        sides = {"rows": matrix, "columns": matrix.T}
        for side, (norms, keys) in zip(sides, _both_sides(matrix), strict=True):
            dead = norms <= tolerance * norms.median()
            places[f"dead_{side}"] += [(index, int(i)) for i in dead.nonzero()]
            repeated = _repeated(sides[side], norms, keys, dead, up_to_scale)
            places[f"duplicate_{side}"] += [(index, i) for i in repeated]
    units = {"dead_rows": 1, "duplicate_rows": 1, "dead_columns": 2, "duplicate_columns": 2}
    found = {
        "not_finite": Finding(name="not_finite", value=0.0, uncertainty=0.0, n=W.numel()),
        "constant": Finding(name="constant", value=float(_constant(matrices)), uncertainty=0.0, n=W.numel()),
    }
    for name, where in places.items():
        shown = [list(place) if len(matrices) > 1 else place[1] for place in where[:20]]
        found[name] = Finding(
            name=name,
            value=float(len(where)),
            uncertainty=0.0,
            n=len(matrices) * matrices.shape[units[name]],
            details={"places": shown} if shown else {},
        )
    return found


def _constant(matrices: Tensor) -> bool:
    return all(bool((part == matrices[0, 0, 0]).all()) for matrix in matrices for part in blocks(matrix))


def _both_sides(matrix: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(norms, projections on one random vector) of the rows, and of the columns; float64 on the CPU, one pass."""
    if matrix.stride(0) < matrix.stride(1):  # read as it lies in memory
        columns, rows = _both_sides(matrix.T)
        return rows, columns
    generator = torch.Generator().manual_seed(0)
    m, n = matrix.shape
    across = torch.randn(n, dtype=torch.float64, generator=generator)
    down = torch.randn(m, dtype=torch.float64, generator=generator)
    scale = largest_entry(matrix) or 1.0
    squares, keys = [], []
    column_squares, column_keys = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    start = 0
    for part in blocks(matrix):
        A = part.to("cpu", torch.float64) / scale
        keys.append(A @ across)
        column_keys += down[start : start + len(A)] @ A
        A = A.square_() if A is not part else A.square()
        squares.append(A.sum(1))
        column_squares += A.sum(0)
        start += len(A)
    return (torch.cat(squares).sqrt(), torch.cat(keys)), (column_squares.sqrt(), column_keys)


def _repeated(A: Tensor, norms: Tensor, keys: Tensor, dead: Tensor, up_to_scale: bool) -> list[int]:
    """Indices of the rows of A that repeat one of a smaller index."""
    keys = keys.abs() / norms.clamp_min(torch.finfo(torch.float64).tiny) if up_to_scale else keys
    alive = (~dead).nonzero()[:, 0]
    keys, order = keys[alive].sort(stable=True)
    order = alive[order]
    near = (keys.diff() <= _NEAR * (1.0 if up_to_scale else norms[order[1:]])).nonzero()[:, 0]
    same = torch.zeros(len(order), dtype=torch.bool)  # whether this row equals the one before it in the order of keys
    for part in torch.split(near, max(1, (1 << 22) // max(A.shape[1], 1))):
        one, other = A[order[part].to(A.device)], A[order[part + 1].to(A.device)]
        if up_to_scale:
            equal = cosine_similarity(one.double(), other.double(), dim=1).abs() >= _PARALLEL
        else:
            equal = (one == other).all(1)
        same[part + 1] = equal.cpu()
    if not same.any():
        return []
    groups = (~same).cumsum(0) - 1
    firsts = torch.full((int(groups[-1]) + 1,), A.shape[0]).scatter_reduce(0, groups, order, "amin")
    return sorted(int(i) for i in order[order != firsts[groups]])


def _run_claim() -> Verdict:
    """Hidden units of a learned MLP are repeated, found, and merged by adding up their outgoing weights."""
    problem = learned_problem()
    up, down = (problem.weights(name) for name in ("up", "down"))
    W, b, V = (t.double() for t in (up["weight"], up["bias"], down["weight"]))
    copies = torch.randperm(len(W), generator=torch.Generator().manual_seed(0))[:16]
    W, b, V = torch.cat([W, W[copies]]), torch.cat([b, b[copies]]), torch.cat([V, V[:, copies]], 1)
    both = torch.cat([W, b[:, None]], 1)
    found = defects(both)["duplicate_rows"]
    twins = [(int(i), int((both == both[i]).all(1).nonzero()[0])) for i in found.details["places"]]
    merged = V.clone()
    for later, first in twins:
        merged[:, first] += merged[:, later]
    keep = [i for i in range(len(W)) if i not in {later for later, _ in twins}]
    x = problem.inputs(256)["up"]
    whole = gelu(x @ W.T + b) @ V.T
    smaller = gelu(x @ W[keep].T + b[keep]) @ merged[:, keep].T
    error = float((whole - smaller).abs().max() / whole.abs().max())
    figures = {
        "repeated units": float(len(copies)),
        "found": float(found),
        "relative change of the outputs": error,
    }
    return Verdict(held=found.value == len(copies) and error < 1e-12, figures=figures)


METHOD = Diagnostic(
    name="defects",
    summary="NaN and Inf, dead and repeated rows and columns, constants",
    group="weights",
    paper=Paper(
        authors="S. Srinivas, R. V. Babu",
        title="Data-free parameter pruning for Deep Neural Networks",
        year=2015,
        link="https://arxiv.org/abs/1507.06149",
    ),
    entry=defects,
    claim=Claim(
        statement="Hidden units that repeat another one are all found, and merging them by adding their outgoing "
        "weights leaves the outputs as they are, to 1e-12.",
        source="Srinivas and Babu 2015, section 3: neurons with equal weights can be wired together without a change",
        run=_run_claim,
    ),
)
