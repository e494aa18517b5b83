r"""SparseGPT: column after column, and what each removal loses is taken up by the columns to come.

*What it does.* Optimal brain surgery made cheap: goes through the inputs from left to right, removes weights of small
effect, and changes the weights to the right of each so that the output moves least.

*Formula.* H = Σ + λI, λ = damping · tr(Σ)/n. Weights are chosen in blocks of columns by w² / [H_F⁻¹]_jj, H_F being H
over column j and those after it; an error e = w_j / [H_F⁻¹]_jj then changes the later ones: W_k ← W_k − e [H_F⁻¹]_jk.
With H⁻¹ = Uᵀ U, U upper triangular, [H_F⁻¹]_jk = u_jj u_jk, so that one factor serves all columns. N:M chooses when it
reaches the first column of a group.

*Cost.* n³ for the factor and out · n² for the changes, on the CPU in float64.

*When it does not help.* The order of columns is fixed, so early columns are chosen blind and later ones alone can make
up for them: fitting all at once afterwards (:func:`refit`) always gains, and Wanda's mask with a refit beats SparseGPT
without one (`benchmarks/prune_oneshot.py`, on both models).

*Departs from the paper in.* The factor of H⁻¹ comes from H in one step. λ is relative to the mean of the diagonal, as
in the authors' code; inputs that were never seen (a zero on the diagonal) lose their weights, there as here.

*Reference.* E. Frantar, D. Alistarh, “SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot”, 2023,
https://arxiv.org/abs/2301.00774.

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> W = torch.randn(8, 16, generator=generator, dtype=torch.float64)
>>> mix = torch.randn(6, 16, generator=generator, dtype=torch.float64)
>>> X = torch.randn(200, 6, generator=generator, dtype=torch.float64) @ mix
>>> S, mask = sparsegpt(W, X.T @ X / 200, 0.5, block=16)
>>> bool(((S != 0) == mask).all()), bool((X @ (W - S).T).norm() < 0.6 * (X @ (W - W * mask).T).norm())
(True, True)
"""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.compression.needs import needed
from eckart.compression.trial import LINEAR, calibrations
from eckart.errors import InputError, problems
from eckart.evidence import learned_problem
from eckart.forms import Dense
from eckart.linalg.exact import as_float64
from eckart.prune.magnitude import magnitude_masks
from eckart.prune.patterns import NofM, Pattern, parse_pattern
from eckart.prune.refit import pruned_rise
from eckart.records import Claim, Paper, Technique, Verdict


def sparsegpt(
    weight: Tensor,
    second: Tensor,
    keep: float | None = None,
    pattern: str | Pattern = "unstructured",
    *,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """S (out, in) in the dtype of ``weight``, and its bool mask.

    Args:
        weight: W (out, in).
        second: Σ = E[x xᵀ] (in, in), positive semi-definite.
        keep: share of the weights of every block of columns, in (0, 1]; None for "keep n of m".
        pattern: ``unstructured``, ``row`` or "keep n of m"; applied within blocks.
        damping: λ in multiples of the mean of Σ's diagonal, above 0.
        block: columns chosen together.

    Raises InputError with what does not fit or a Σ that is not positive semi-definite, NotFiniteError for NaN or Inf,
    BudgetError where nothing would stay.
    """
    rule = parse_pattern(pattern)
    _check(weight, second, rule, damping, block)
    W = as_float64(weight, "weight", (2,)).clone()
    U, dead = _factor(as_float64(second, "second", (2,)), damping)
    W[:, dead] = 0
    mask = torch.empty(W.shape, dtype=torch.bool)
    n = W.shape[1]
    group = rule.of if isinstance(rule, NofM) else 1
    size = max(group, block // group * group)
    for start in range(0, n, size):
        stop = min(start + size, n)
        part, factor = W[:, start:stop], U[start:stop, start:stop]
        pivots, kept = factor.diagonal(), mask[:, start:stop]
        errors = torch.empty_like(part)
        if group == 1:
            kept.copy_(rule.mask((part / pivots).square(), keep))
        for j in range(stop - start):
            if group > 1 and j % group == 0:
                ahead = slice(j, j + group)
                kept[:, ahead] = rule.mask((part[:, ahead] / pivots[ahead]).square(), keep)
            errors[:, j] = torch.where(kept[:, j], 0, part[:, j]) / pivots[j]
            part[:, j:] -= errors[:, j].outer(factor[j, j:])
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return torch.where(mask, W, 0).to(weight.device, weight.dtype), mask.to(weight.device)


def _check(weight: Tensor, second: Tensor, rule: Pattern, damping: float, block: int) -> None:
    shape = tuple(weight.shape)
    if weight.ndim != 2 or 0 in shape:
        raise InputError(f"sparsegpt: weight: expected a matrix with entries; got shape {shape}.")
    wrong = []
    if tuple(second.shape) != (shape[1], shape[1]):
        wrong.append(f"second: expected shape {(shape[1], shape[1])}; got {tuple(second.shape)}")
    if str(rule) not in ("unstructured", "row") and not isinstance(rule, NofM):
        wrong.append(f"pattern is 'unstructured', 'row' or 'keep n of m'; got {str(rule)!r}")
    elif (reason := rule.unfit(shape)) is not None:
        wrong.append(f"pattern {rule}: {reason}")
    if not isinstance(damping, (int, float)) or not 0 < damping < float("inf"):
        wrong.append(f"damping is a number above 0; got {damping!r}")
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        wrong.append(f"block is an int of at least 1; got {block!r}")
    if wrong:
        raise InputError(problems("sparsegpt", wrong))


def _factor(sigma: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """U upper triangular with (Σ + λI)⁻¹ = Uᵀ U, and which inputs were never seen.

    With the rows and columns in reverse order H = L Lᵀ; turned back, L is an upper triangular R with H = R Rᵀ, and
    U = R⁻¹ is upper triangular with Uᵀ U = R⁻ᵀ R⁻¹ = H⁻¹.
    """
    diagonal = sigma.diagonal()
    identity = torch.eye(len(sigma), dtype=sigma.dtype)
    H = sigma + (damping * float(diagonal.mean()) or 1.0) * identity  # without any input, any H serves
    L, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    if info:
        raise InputError("second: expected a positive semi-definite matrix, such as E[x xᵀ]; this one is not.")
    return torch.linalg.solve_triangular(L.flip(0, 1), identity, upper=True), diagonal <= 0


def _run_claim() -> Verdict:
    problem = learned_problem()
    weights = {name: problem.weights(name) for name in LINEAR}
    figures, held = {}, True
    for keep in (0.5, 0.3):
        plain = magnitude_masks({name: w["weight"] for name, w in weights.items()}, keep, scope="layer")
        figures[f"keep {keep:g}, magnitude: loss rise"] = pruned_rise(
            plain, calibrations()[0], refitted=False, biased=False
        )
        rises = []
        for moments in calibrations():
            forms = {}
            for name, w in weights.items():
                S, _ = sparsegpt(w["weight"], needed(moments[name], "second", "sparsegpt"), keep)
                forms[name] = Dense(S, bias=w.get("bias"))
            rises.append(problem.rise(forms))
        figures[f"keep {keep:g}, sparsegpt: loss rise"] = sum(rises) / len(rises)
        held = (
            held and figures[f"keep {keep:g}, sparsegpt: loss rise"] < figures[f"keep {keep:g}, magnitude: loss rise"]
        )
    return Verdict(held=held, figures=figures, note="nats per byte; 4 learned maps, 3 calibration samples")


METHOD = Technique(
    name="sparsegpt",
    summary="column after column, the later ones take up the error; unstructured, by row and N:M",
    paper=Paper(
        authors="E. Frantar, D. Alistarh",
        title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        year=2023,
        link="https://arxiv.org/abs/2301.00774",
    ),
    entry=sparsegpt,
    claim=Claim(
        statement="With 50 and 30 % of four learned maps kept, the held-out loss rises less than with magnitude by "
        "layer (mean of 3 calibration samples).",
        source="Frantar & Alistarh 2023, table 1: SparseGPT against magnitude",
        run=_run_claim,
    ),
)
