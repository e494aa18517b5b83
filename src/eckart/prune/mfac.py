r"""M-FAC pruning: the optimal brain surgeon with the empirical Fisher matrix of collected gradients.

*What it does.* Removes the weights whose removal raises the loss least to second order, and moves the others to make up
for it; from a few dozen gradients, in blocks of neighbouring weights, in several rounds.

*Formula.* At a minimum δL ≈ ½ δᵀFδ, F = λI + (1/m)Σ gᵢgᵢᵀ within each block. Removing weight i alone costs
wᵢ²/(2[F⁻¹]ᵢᵢ), the score; over all tensors the smallest go. Removing the set D of a block at once costs least with δ_K
= F_KK⁻¹F_KD w_D on the kept K, which by the Woodbury identity is G_Kᵀ(mλI + G_K G_Kᵀ)⁻¹G_D w_D. Round r of R keeps the
share keep^(r/R).

*Cost.* m gradients of memory (4 m bytes per weight in float32), per round two factorisations per block: O(m² d) in all
for blocks of more than m weights, else O(b (b + m) d). No pass over data unless ``gradients`` is a function.

*When it does not help.* With few gradients or a tiny λ the Fisher matrix of a block has directions of no curvature, and
the joint update spends them freely. On the byte model of the claim, 30 % kept, the loss rises by 0.67 nats per byte
with magnitude; with 64 gradients of single samples and one round by 0.54 with the joint update, 0.37 with single ones,
0.52 with none; with 64 of 16 samples each 0.29 and 0.28, and after 4 rounds 0.17 with either. At λ = 1e-6 joint: 0.43.
The predicted rise (0.003 for that 0.17) is far too small: it is measured on the gradients that the update was fitted
to.

*Departs from the paper in.* The update: the paper adds up the updates of the single weights, −F⁻¹(w_D/[F⁻¹]_DD), and
zeroes D after it, which ignores that the dropped weights make up for each other; the joint update above costs the same
(``update="single"`` gives theirs). Scores and updates come from Cholesky factorisations, not from their recursion over
gradients. Blocks lie within one tensor.

*Reference.* E. Frantar, E. Kurtic, D. Alistarh, “M-FAC: Efficient Matrix-Free Approximations of Second-Order
Information”, NeurIPS 2021, https://arxiv.org/abs/2107.03356; B. Hassibi, D. G. Stork, “Second order derivatives for
network pruning: Optimal Brain Surgeon”, 1992.

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> w = {"w": torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)}
>>> G = {"w": torch.randn(100, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.01, 1.0, 1.0])}
>>> pruned = mfac_prune(w, G, keep=2 / 3, block=3)  # the largest weight matters least
>>> pruned.masks["w"].tolist()
[False, True, True]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eckart.errors import InputError, NotFiniteError, problems
from eckart.evidence import learned_problem
from eckart.evidence.network import CONTEXT
from eckart.evidence.trial import held_out_loss, plainly_trained
from eckart.linalg.mfac import InverseFisher
from eckart.records import Claim, Paper, Technique, Verdict

Weights = Mapping[str, Tensor]
Gradients = Mapping[str, Tensor] | Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""Per weight (m, *shape); or a function that gives them for the weights of a round."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MFACPruned:
    """Weights after pruning, and what was removed."""

    weights: dict[str, Tensor]
    """The same names, shapes and dtypes; 0 where the mask is False."""
    masks: dict[str, Tensor]
    """bool, True where a weight was kept."""
    kept: int
    """How many weights that is, over all tensors."""
    predicted: float
    """Σ over rounds and blocks of ½δᵀFδ: the rise of the loss to second order, in its units."""


def mfac_scores(
    weights: Weights, gradients: Mapping[str, Tensor], *, block: int | None = 128, damping: float = 1e-5
) -> dict[str, Tensor]:
    """wᵢ²/(2[F⁻¹]ᵢᵢ) for every weight: how much the loss rises, to second order, when it alone is removed.

    ``weights`` by name, of any shape; ``gradients[name]`` (m, *shape), one per sample or batch, collected at these
    weights. ``block``: how many neighbouring weights share a block of F; None for the whole tensor. Scores in float64,
    shaped as the weights. Raises what :func:`mfac_prune` raises.
    """
    _check(weights, 0.5, block, damping, 1, "joint")
    collected = _collected(weights, gradients)
    return {
        name: _score(w, InverseFisher(collected[name].flatten(1), damping, block=block)) for name, w in weights.items()
    }


@torch.no_grad()
def mfac_prune(
    weights: Weights,
    gradients: Gradients,
    keep: float,
    *,
    block: int | None = 128,
    damping: float = 1e-5,
    recomputations: int = 16,
    update: Literal["joint", "single", "none"] = "joint",
) -> MFACPruned:
    """Keeps the share ``keep`` in (0, 1] of all weights together, rounded down, and updates the kept ones.

    ``gradients``: m of them per weight, (m, *shape), or a function of the present weights (by name, 0 where pruned)
    that collects them anew for every round. ``block``, ``damping`` as for :func:`mfac_scores`. ``recomputations``: R,
    the rounds. ``update``: of the kept weights, "joint" (exact), "single" (the paper's) or "none". Nothing is changed
    in place; work is done in float64 on the device of the gradients.

    Raises InputError for options out of range, missing names and shapes that do not fit; NotFiniteError for NaN or
    Inf.
    """
    _check(weights, keep, block, damping, recomputations, update)
    present = {name: w.detach().double() for name, w in weights.items()}
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    predicted = 0.0
    fixed = None if callable(gradients) else _collected(weights, gradients)
    for r in range(1, recomputations + 1):
        # Rounding of keep^(r/R)·N must not cost a weight that the share grants.
        left = math.floor(total * keep ** (r / recomputations) * (1 + 1e-12))
        if fixed is None:
            assert callable(gradients)
            now = {name: w.to(weights[name].dtype) for name, w in present.items()}
            collected = _collected(weights, gradients(now))
        else:
            collected = fixed
        inverses = {}
        scores = []
        for name, w in present.items():
            G = collected[name].flatten(1) * masks[name].flatten()
            inverses[name] = InverseFisher(G, damping, block=block)
            scores.append(_score(w, inverses[name]).masked_fill(~masks[name], math.inf).flatten().to("cpu"))
        flat = torch.cat(scores)
        drop_flat = torch.zeros(total, dtype=torch.bool)
        gone = sum(int((~mask).sum()) for mask in masks.values())
        drop_flat[flat.argsort(stable=True)[: total - left - gone]] = True
        for name, part in zip(present, torch.split(drop_flat, [w.numel() for w in present.values()]), strict=True):
            drop = part.to(present[name].device)
            if not bool(drop.any()):
                continue
            w, inverse = present[name].flatten(), inverses[name]
            delta = inverse.surgery(w, drop, joint=update == "joint") if update != "none" else torch.where(drop, -w, 0)
            delta = torch.where(masks[name].flatten(), delta, 0)
            predicted += float(inverse.energy(delta))
            present[name] = torch.where(drop, 0, w + delta).view(present[name].shape)
            masks[name] = masks[name] & ~drop.view(masks[name].shape)
    return MFACPruned(
        weights={name: w.to(weights[name].dtype) for name, w in present.items()},
        masks=masks,
        kept=sum(int(mask.sum()) for mask in masks.values()),
        predicted=predicted,
    )


def sample_gradients(
    model: nn.Module, losses: Iterable[Callable[[nn.Module], Tensor]], names: Iterable[str]
) -> dict[str, Tensor]:
    """(m, *shape) gradients of the named parameters, one row per loss: ``lambda m: cross_entropy(m(x), y)``.

    One sample per loss gives the Fisher matrix of the paper; small batches give a coarser one for less. The gradients
    of the model itself are left alone. Raises InputError for unknown names, no losses, or one that is not a scalar.
    """
    parameters = dict(model.named_parameters())
    wanted = list(names)
    if unknown_names := [name for name in wanted if name not in parameters]:
        raise InputError(problems("sample_gradients: no such parameters", unknown_names))
    rows: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for loss in losses:
        value = loss(model)
        if value.numel() != 1:
            raise InputError(f"sample_gradients: a loss has to be a scalar; got {tuple(value.shape)}.")
        found = torch.autograd.grad(value, [parameters[name] for name in wanted], materialize_grads=True)
        for name, g in zip(wanted, found, strict=True):
            rows[name].append(g)
    if not all(rows.values()):
        raise InputError("sample_gradients: expected at least one loss and one name.")
    return {name: torch.stack(gs) for name, gs in rows.items()}


def _score(w: Tensor, inverse: InverseFisher) -> Tensor:
    return w.detach().double().square() / (2 * inverse.diagonal().view(w.shape))


def _collected(weights: Weights, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The gradients, if they fit the weights. InputError and NotFiniteError otherwise."""
    wrong = []
    for name, w in weights.items():
        g = gradients.get(name)
        if g is None:
            wrong.append(f"{name}: no gradients")
        elif g.ndim == 0 or g.shape[0] == 0 or g.shape[1:] != w.shape:
            wrong.append(f"{name}: expected (m, {', '.join(map(str, w.shape))}), m ≥ 1; got {tuple(g.shape)}")
        elif g.device != w.device:
            wrong.append(f"{name}: weights on {w.device}, gradients on {g.device}")
    if wrong:
        raise InputError(problems("M-FAC pruning: gradients that do not fit", wrong))
    if bad := [name for name in weights if not bool(torch.isfinite(gradients[name]).all())]:
        raise NotFiniteError(problems("M-FAC pruning: gradients with NaN or Inf", bad))
    return gradients


def _check(weights: Weights, keep: float, block: int | None, damping: float, recomputations: int, update: str) -> None:
    def counts(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    found = []
    if not weights or any(w.numel() == 0 for w in weights.values()):
        found.append("expected at least one weight, none of them empty")
    if not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        found.append(f"keep is a share in (0, 1]; got {keep!r}")
    elif weights and keep * sum(w.numel() for w in weights.values()) < 1:
        found.append(f"keep={keep!r} leaves no weight at all")
    if block is not None and not counts(block):
        found.append(f"block counts weights, an int of at least 1, or None; got {block!r}")
    if not isinstance(damping, (int, float)) or not math.isfinite(damping) or damping <= 0:
        found.append(f"damping is a positive number; got {damping!r}")
    if not counts(recomputations):
        found.append(f"recomputations is an int of at least 1; got {recomputations!r}")
    if update not in ("joint", "single", "none"):
        found.append(f"update is 'joint', 'single' or 'none'; got {update!r}")
    if found:
        raise InputError(problems("M-FAC pruning", found))
    if bad := [name for name, w in weights.items() if not bool(torch.isfinite(w).all())]:
        raise NotFiniteError(problems("M-FAC pruning: weights with NaN or Inf", bad))


CLAIM_KEEP = 0.3
CLAIM_MAPS = ("mix.weight", "up.weight", "down.weight", "head.weight")


def _losses(count: int, batch: int) -> list[Callable[[nn.Module], Tensor]]:
    """The losses of ``count`` batches of training text."""
    windows = learned_problem().calibration
    picked = torch.randint(0, windows.shape[0], (count, batch), generator=torch.Generator().manual_seed(1))
    samples = windows[picked].long()
    return [lambda m, s=s: cross_entropy(m(s[:, :CONTEXT]), s[:, CONTEXT]) for s in samples]  # type: ignore[misc]


@torch.no_grad()
def _rise(weights: Mapping[str, Tensor]) -> float:
    """How much the held-out loss of the trained model rises with these weights."""
    model = plainly_trained()
    for name, w in weights.items():
        model.get_parameter(name).copy_(w)
    return held_out_loss(model) - learned_problem().loss


def _run_claim() -> Verdict:
    model = plainly_trained()
    weights = {name: model.get_parameter(name).detach() for name in CLAIM_MAPS}
    sizes = torch.cat([w.abs().flatten() for w in weights.values()])
    bar = sizes.sort(descending=True).values[int(CLAIM_KEEP * sizes.numel())]
    figures = {"magnitude": _rise({name: torch.where(w.abs() > bar, w, 0) for name, w in weights.items()})}
    gradients = sample_gradients(model, _losses(64, 16), CLAIM_MAPS)
    for rounds in (1, 4):
        pruned = mfac_prune(weights, gradients, CLAIM_KEEP, recomputations=rounds)
        figures[f"m-fac, {rounds} rounds"] = _rise(pruned.weights)
    return Verdict(
        held=figures["m-fac, 4 rounds"] < figures["m-fac, 1 rounds"] < figures["magnitude"],
        figures=figures,
        note=f"rise of the held-out loss (nats per byte) with {CLAIM_KEEP:.0%} of four maps kept, no training",
    )


METHOD = Technique(
    name="m-fac",
    summary="optimal brain surgeon with the empirical Fisher matrix of a few dozen gradients, in blocks and rounds",
    paper=Paper(
        authors="E. Frantar, E. Kurtic, D. Alistarh",
        title="M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
        year=2021,
        link="https://arxiv.org/abs/2107.03356",
    ),
    entry=mfac_prune,
    claim=Claim(
        statement="With 30 % of the weights of a trained byte model kept in one shot, M-FAC raises the held-out loss "
        "less than global magnitude, and less with four recomputations than with one.",
        source="Frantar et al. 2021, one-shot pruning: better than magnitude, the more so with recomputations",
        run=_run_claim,
    ),
)
