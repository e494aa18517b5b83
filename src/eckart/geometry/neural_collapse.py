r"""Neural collapse NC1–NC4, and where classes are uneven the norms that theory expects and the classes it loses.

*What it does.* Four gauges of the last layer of a classifier, all 0 at full collapse: the spread within classes
(NC1), the distance of the class means and of the classifier from a simplex (NC2), their distance from each other
(NC3), and how often the nearest class mean disagrees with the classifier (NC4). For uneven classes: the norm that
each row of a bias-free classifier has at the optimum, and a warning for the classes whose row is zero there.

*Formula.* With class means μ_k, their mean μ, Σ_B = Σ_k (μ_k − μ)(μ_k − μ)ᵀ / K, Σ_W the mean of
(h − μ_{y})(h − μ_{y})ᵀ over all samples, M = [μ_k − μ] (d × K), W (K × d) and T = (I − 11ᵀ/K)/√(K−1):
NC1 = tr(Σ_W Σ_B†)/K; NC2 = ‖WWᵀ/‖WWᵀ‖_F − T‖_F, and the same with MᵀM; NC3 = ‖WM/‖WM‖_F − T‖_F; NC4 = share of
samples with argmax(Wh + b) ≠ argmin_k ‖h − μ_k‖.

Uneven, bias-free: L(W, H) = ‖WH − Y‖²/2N + λ_W‖W‖²/2 + λ_H‖H‖²/2 over W and free features H, with n_k samples of
class k and N = Σ n_k. At the optimum the rows are orthogonal and the features of class k are all parallel to w_k. With
w = ‖w_k‖, h = ‖h_k‖, s = wh the two conditions are n(1−s)h/N = λ_W w and (1−s)w/N = λ_H h. Their ratio gives
h = w√(λ_W/(n λ_H)), their product s = 1 − N√(λ_W λ_H/n); so

    ‖w_k‖² = √(n_k λ_H/λ_W) · max(0, 1 − N√(λ_W λ_H/n_k)),

and a class with n_k ≤ N² λ_W λ_H has w_k = 0: it is lost.

*Cost.* O(n d² + d³) for the gauges, nothing for the closed form.

*When it does not help.* On training data the gauges say how far optimisation went, not how well the model
generalises; feed held-out features too. NC1 of features with fewer samples than dimensions is small by chance.
The closed form is for squared loss and features that are free, without bias, and d ≥ K; for cross-entropy minorities
collapse too, at other thresholds.

*Departs from the paper in.* NC2 and NC3 compare Gram matrices with the simplex T (as Zhu et al. 2021) rather than the
spread of norms and angles apart; those are in ``details``. For uneven classes μ is the mean of the class means, so
that a large class does not pull it; for even ones it is the global mean of the papers.

*Reference.* V. Papyan, X. Y. Han, D. L. Donoho, “Prevalence of neural collapse during the terminal phase of deep
learning training”, PNAS 2020, https://arxiv.org/abs/2008.08186; Z. Zhu, T. Ding, J. Zhou, X. Li, C. You, J. Sulam,
Q. Qu, “A geometric analysis of neural collapse with unconstrained features”, 2021,
https://arxiv.org/abs/2105.02375; uneven classes: H. Dang, T. Tran, S. Osher, H. Tran-The, N. Ho, T. Nguyen, “Neural
collapse in deep linear networks: from balanced to imbalanced data”, 2023, https://arxiv.org/abs/2301.00437.

*Example.*

>>> import torch
>>> norms = collapse_norms([40, 20, 10, 4], weight_decay=5e-3, feature_decay=5e-3)
>>> [round(norm, 3) for norm in norms.tolist()]
[2.44, 2.025, 1.671, 1.277]
>>> float(minority_collapse([40, 20, 10, 4], weight_decay=0.05, feature_decay=0.05))
2.0
>>> labels = torch.arange(3).repeat_interleave(5)
>>> simplex = torch.eye(3, dtype=torch.float64) - 1 / 3
>>> float(neural_collapse(simplex[labels], labels, simplex)["nc1"])
0.0
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eckart.errors import InputError, problems
from eckart.geometry.representations import real_tensor
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict


def neural_collapse(
    features: Tensor, labels: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> dict[str, Finding]:
    """Findings ``nc1``, ``nc2_means`` and, where the classifier is given, ``nc2_weight``, ``nc3``, ``nc4``.

    ``features`` (samples × d): inputs of the last layer; ``labels`` (samples,) int, 0 … K−1; ``weight`` (K × d) and
    ``bias`` (K,) of that layer. All values are ≥ 0 and 0 at full collapse; ``nc4`` is a share. With one class only,
    or class means that coincide, there is nothing to measure: value None and a note. Classes without a sample are
    left out and named.

    Raises InputError for shapes that do not belong together, labels that are no such integers, sparse or empty
    features; NotFiniteError for NaN or Inf.
    """
    H = real_tensor(features, "features", "samples × features")
    n, d = H.shape
    W = None if weight is None else real_tensor(weight, "weight", "classes × features")
    b = None if bias is None else real_tensor(bias, "bias", "classes")
    y = check_labels(labels, n, None if W is None else W.shape[0])
    found = []
    if W is not None and W.shape[1] != d:
        found.append(f"weight has {W.shape[1]} columns, features have {d}")
    if b is not None and (W is None or b.shape[0] != W.shape[0]):
        found.append("bias has one entry per row of weight; got " + ("no weight" if W is None else str(tuple(b.shape))))
    if found:
        raise InputError(problems("neural_collapse", found))
    present, y = torch.unique(y, return_inverse=True)
    K = present.numel()
    counts = y.bincount(minlength=K)
    means = torch.zeros(K, d, dtype=H.dtype).index_add_(0, y, H) / counts[:, None]
    M = means - means.mean(0)
    notes = _notes(counts, W, n, d)
    if K < 2 or not M.abs().max() > 1e-12 * H.abs().max():
        why = "one class only" if K < 2 else "all class means coincide"
        names = ["nc1", "nc2_means"] + (["nc2_weight", "nc3", "nc4"] if W is not None else [])
        return {name: Finding(name=name, value=None, n=n, notes=(why, *notes)) for name in names}
    within = H - means[y]
    # tr(Σ_W Σ_B†) = mean over samples of (h − μ_y)ᵀ Σ_B† (h − μ_y), without forming Σ_W.
    between = torch.linalg.pinv(M.T @ M / K, hermitian=True, rtol=1e-10)
    nc1 = float(((within @ between) * within).sum() / n / K)
    norms = M.norm(dim=1)
    cosines = (M @ M.T / (norms[:, None] * norms).clamp_min(1e-300))[~torch.eye(K, dtype=torch.bool)]
    details = {
        "classes": K,
        "norm_spread": float(norms.std(correction=0) / norms.mean()),
        "mean_cosine": float(cosines.mean()),
        "simplex_cosine": -1 / (K - 1),
    }
    findings = {
        "nc1": Finding(name="nc1", value=nc1, n=n, notes=notes),
        "nc2_means": Finding(name="nc2_means", value=_off_simplex(M @ M.T), n=n, notes=notes, details=details),
    }
    if W is not None:
        logits = H @ W.T + (0.0 if b is None else b)
        nearest = torch.cdist(H, means, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        chosen = W[present]
        findings["nc2_weight"] = _gauge("nc2_weight", chosen @ chosen.T, n, notes)
        findings["nc3"] = _gauge("nc3", chosen @ M.T, n, notes)
        share = float((logits.argmax(1) != present[nearest]).double().mean())
        findings["nc4"] = Finding(
            name="nc4", value=share, uncertainty=1.96 * math.sqrt(share * (1 - share) / n), n=n, notes=notes
        )
    return findings


def collapse_norms(counts: Sequence[int], *, weight_decay: float, feature_decay: float) -> Tensor:
    """(K,) float64: the norms ‖w_k‖ that the bias-free squared loss with free features ends at; see the formula above.

    ``counts``: samples per class, each at least 1; the decays λ_W and λ_H are positive.

    Raises InputError otherwise.
    """
    found = []
    if len(counts) == 0 or any(isinstance(c, bool) or not isinstance(c, int) or c < 1 for c in counts):
        found.append(f"counts are whole numbers of samples, at least 1 each; got {list(counts)!r}")
    for name, value in (("weight_decay", weight_decay), ("feature_decay", feature_decay)):
        if not (isinstance(value, (int, float)) and 0 < value < math.inf):
            found.append(f"{name} is a positive number; got {value!r}")
    if found:
        raise InputError(problems("collapse_norms", found))
    n = torch.tensor(counts, dtype=torch.float64)
    fit = (1 - n.sum() * (weight_decay * feature_decay / n).sqrt()).clamp_min(0)
    return ((n * feature_decay / weight_decay).sqrt() * fit).sqrt()


def minority_collapse(counts: Sequence[int], *, weight_decay: float, feature_decay: float) -> Finding:
    """How many classes have a zero row in :func:`collapse_norms`, with a warning that names them.

    ``details``: the norms, and ``threshold`` N² λ_W λ_H, the number of samples that a class has to exceed. Exact under
    the assumptions of the formula.

    Raises InputError as :func:`collapse_norms` does.
    """
    norms = collapse_norms(counts, weight_decay=weight_decay, feature_decay=feature_decay)
    threshold = sum(counts) ** 2 * weight_decay * feature_decay
    lost = [k for k, norm in enumerate(norms.tolist()) if norm == 0]
    note = f"minority collapse: classes {', '.join(map(str, lost))} have at most {threshold:.4g} samples and get no row"
    return Finding(
        name="minority_collapse",
        value=float(len(lost)),
        uncertainty=0.0,
        n=sum(counts),
        unit="classes",
        notes=(note + "; lower the decay or give them more samples",) if lost else (),
        details={"norms": norms.tolist(), "threshold": threshold, "lost": lost},
    )


def check_labels(labels: Tensor, n: int, classes: int | None) -> Tensor:
    """(n,) int64 labels on the CPU. Raises InputError unless they are n whole numbers, 0 or more, below ``classes``."""
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not whole or labels.dtype == torch.bool or labels.shape != (n,):
        got = f"{labels.dtype}, shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(f"labels: expected {n} whole numbers, one per sample; got {got}.")
    y = labels.detach().cpu().long()
    if int(y.min()) < 0 or (classes is not None and int(y.max()) >= classes):
        top = "" if classes is None else f" to {classes - 1}"
        raise InputError(f"labels: expected classes from 0{top}; got {int(y.min())} to {int(y.max())}.")
    return y


def _off_simplex(gram: Tensor) -> float:
    """‖G/‖G‖_F − (I − 11ᵀ/K)/√(K−1)‖_F, between 0 and 2."""
    K = gram.shape[0]
    simplex = (torch.eye(K, dtype=gram.dtype) - 1 / K) / math.sqrt(K - 1)
    return float((gram / gram.norm() - simplex).norm())


def _gauge(name: str, gram: Tensor, n: int, notes: tuple[str, ...]) -> Finding:
    if not gram.norm() > 0:
        return Finding(name=name, value=None, n=n, notes=("the classifier is zero on the means", *notes))
    return Finding(name=name, value=_off_simplex(gram), n=n, notes=notes)


def _notes(counts: Tensor, W: Tensor | None, n: int, d: int) -> tuple[str, ...]:
    notes = []
    if single := int((counts == 1).sum()):
        notes.append(f"{single} classes have one sample and so no spread")
    if W is not None and counts.numel() < W.shape[0]:
        notes.append(f"{W.shape[0] - counts.numel()} classes have no sample and are left out")
    if n - counts.numel() < d:
        notes.append(f"{n} samples in {d} dimensions: NC1 reads low")
    return tuple(notes)


CLAIM_COUNTS, CLAIM_DECAY = (40, 20, 10, 4), 5e-3
CLAIM_STRONG = 0.03
"""N² λ_W λ_H = 4.93 here, so that the class of 4 samples is lost."""


def free_features_optimum(counts: Sequence[int], decay: float, dim: int, seed: int) -> Tensor:
    """W (K × dim) where L-BFGS ends on the loss of the module docstring, both decays equal, from a random start."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    Y = torch.nn.functional.one_hot(y).T.double()
    K, N = Y.shape
    W = torch.randn(K, dim, generator=generator, dtype=torch.float64).requires_grad_()
    H = torch.randn(dim, N, generator=generator, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [W, H], max_iter=3000, history_size=20, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = (W @ H - Y).square().sum() / (2 * N) + decay / 2 * (W.square().sum() + H.square().sum())
        torch.autograd.backward(loss)
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return W.detach()


def _run_claim() -> Verdict:
    figures: dict[str, float] = {}
    held = True
    for decay in (CLAIM_DECAY, CLAIM_STRONG):
        theory = collapse_norms(CLAIM_COUNTS, weight_decay=decay, feature_decay=decay)
        W = free_features_optimum(CLAIM_COUNTS, decay, dim=8, seed=0)
        error = float((W.norm(dim=1) - theory).abs().max())
        gram = W @ W.T
        figures[f"λ = {decay:g}: largest error of a norm"] = error
        figures[f"λ = {decay:g}: largest inner product of two rows"] = float((gram - gram.diag().diag()).abs().max())
        figures[f"λ = {decay:g}: classes lost"] = float((theory == 0).sum())
        held = held and error < 1e-3 and float((gram - gram.diag().diag()).abs().max()) < 1e-3
    return Verdict(held=held, figures=figures, note="squared loss, free features, 40, 20, 10 and 4 samples")


METHOD = Diagnostic(
    name="neural-collapse",
    summary="four gauges of collapse of the last layer, and the classes that uneven data would lose",
    group="representations",
    paper=Paper(
        authors="H. Dang, T. Tran, S. Osher, H. Tran-The, N. Ho, T. Nguyen",
        title="Neural collapse in deep linear networks: from balanced to imbalanced data",
        year=2023,
        link="https://arxiv.org/abs/2301.00437",
    ),
    entry=neural_collapse,
    claim=Claim(
        statement="For 40, 20, 10 and 4 samples per class the minimiser that L-BFGS finds has orthogonal rows with "
        "the norms of the closed form, to three decimals, also where the smallest class is lost.",
        source="abstract: orthogonal vectors whose lengths depend on the amount of data of their classes",
        run=_run_claim,
    ),
)
