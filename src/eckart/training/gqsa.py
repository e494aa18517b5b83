r"""GQSA: half of the groups of 16 weights dropped, the other half kept in four bits.

*What it does.* Cuts every row of a weight into groups of 16 neighbours, drops the groups that matter least for the
layer's outputs, moves the others to make up for it, and rounds them to 4 bits with a scale and a zero point per
group. What stays can be tuned on the task through the scales and zero points alone, with the codes frozen.

*Formula.* With H = E[x xᵀ] + damping · mean(diag H), a weight's saliency is w_j² / [H⁻¹]_jj, the rise of E(Δw · x)²
when it is dropped and the others make up for it (OBS), and a group's the sum over its weights. The lowest half of
each row goes. On the kept columns S of a row ŵ_S = H_SS⁻¹ H_S: w, the least squares fit of its outputs. Then
w ≈ s (q − z), q ∈ 0 … 15, from the group's smallest to its largest weight. Stored as block sparse rows: where each
row starts, the place of each kept group, 8 bytes of codes, s and z in the layer's dtype. With s and z of 16 bits and
half of the groups ½ (4 + 32/16 + 8/16) = 3.25 bits per weight, and 32 per row.

*Cost.* One inverse of H, and for every row a Cholesky factorisation of size in / 2: out · in³ / 24 multiply-adds in
float64, about 7 s for 1024 × 1024 on one thread; ``refit=False`` leaves it out. The forward pass decodes a dense
weight and multiplies by it: there is no sparse kernel here. This is a format for size, not for speed.

*When it does not help.* Against other ways to spend as many bits. With the same tuning (150 steps, scales and zero
points) the loss of the learned problem rises by 0.15 nats per byte at 3.5 bits, by 0.10 with all weights in 2 bits (3.0
with scales), by 0.07 with 2:4 sparsity in 4 bits (4.0), so the claim below fails here. One-shot, all refitted, it is
0.23, 0.20 and 0.13. The paper's order appears where GQSA alone is refitted and tuned: 2:4 as it comes costs 0.32.
Without a kernel that skips what was dropped take 2 or 3 bits, or a factorisation. Without ``moments`` the groups
of least norm go, nothing makes up for them, and the loss is far worse.

*Departs from the paper in.* Groups are compared within a row, as Wanda compares weights; ``per_row=False`` compares
them over the matrix, which empties rows that a layer norm scales up again (0.31 before rounding, against 0.22). The
first stage (BQPO) tunes the weights of a block by gradient; here it is the least squares fit. The second stage
(E2E-OQP) is any optimiser over :func:`quantiser_parameters`. Known from the abstract and summaries; no code was found.

*Reference.* C. Zeng, S. Liu, S. Yang, F. Chen, L. Fu, X. Mei, “GQSA: Group Quantization and Sparsity for Accelerating
Large Language Model Inference”, 2024, https://arxiv.org/abs/2412.17560.

*Example.*

>>> import torch
>>> from torch import nn
>>> x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
>>> linear = nn.Linear(64, 32)
>>> layer = group_sparse(linear, SiteMoments(count=500, second=x.T @ x / 500))
>>> {name: (tuple(value.shape), str(value.dtype)[6:]) for name, value in layer.state_dict().items()}
... # doctest: +NORMALIZE_WHITESPACE
{'scales': ((64,), 'float32'), 'zeros': ((64,), 'float32'), 'bias': ((32,), 'float32'),
 'row_pointers': ((33,), 'int32'), 'columns': ((64,), 'uint8'), 'packed': ((64, 8), 'uint8')}
>>> int((layer.matrix() == 0).sum()) >= 32 * 64 // 2
True
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eckart.arch import find_sites, get_module, set_module
from eckart.errors import InputError, NotFiniteError, problems
from eckart.evidence import learned_problem
from eckart.evidence.trial import held_out_loss, plainly_trained, train
from eckart.layers import GroupSparseInt4
from eckart.layers.group_sparse import group_fault
from eckart.layers.linear import is_conv1d
from eckart.moments import Moments, SiteMoments
from eckart.records import Claim, Paper, Site, Technique, Verdict
from eckart.training.coded import CodedReport, CodedSite

LEVELS = 15
"""Steps of a 4-bit code."""
DAMPING = 0.01


def group_sparse(
    layer: nn.Module,
    moments: SiteMoments | None = None,
    *,
    sparsity: float = 0.5,
    group: int = 16,
    per_row: bool = True,
    refit: bool = True,
    damping: float = DAMPING,
) -> GroupSparseInt4:
    """The layer for an nn.Linear or transformers' ``Conv1D``: groups dropped, the others refitted and rounded.

    ``moments.second`` (in, in) is H; without moments, and for a diagonal, columns are taken as uncorrelated.
    ``sparsity`` is the share of groups to drop, in [0, 1), of each row or with ``per_row=False`` of the matrix;
    ``group`` is even and divides in; ``damping`` > 0 is a share of the mean of diag(H). Raises InputError for
    values out of range, NotFiniteError for NaN or Inf.
    """
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise InputError(f"GroupSparseInt4: expected a layer with a 2-D weight; got {type(layer).__name__}.")
    transposed = is_conv1d(layer)
    W = (weight.T if transposed else weight).detach().cpu().double()
    out_features, in_features = W.shape
    _check_options(in_features, out_features, sparsity, group, damping)
    H = _metric(moments, in_features)
    if not torch.isfinite(W).all() or not torch.isfinite(H).all():
        raise NotFiniteError("GroupSparseInt4: NaN or Inf in the weight or the moments.")
    damped = H + torch.eye(in_features, dtype=H.dtype) * (damping * H.diagonal().mean() or 1.0)
    keep = kept_groups(W, damped, sparsity, group, per_row)
    fitted = refitted(W, damped, keep.repeat_interleave(group, 1)) if refit else W
    new = GroupSparseInt4(
        in_features,
        out_features,
        kept=int(keep.sum()),
        group=group,
        bias=bias is not None,
        original=type(layer) if transposed else nn.Linear,
        device=weight.device,
        dtype=weight.dtype,
    )
    _fill(new, fitted.reshape(out_features, -1, group), keep)
    if new.bias is not None and isinstance(bias, Tensor):
        new.bias.data.copy_(bias)
    missed = W - new.matrix().detach().cpu().double()
    total = float(((W @ H) * W).sum())
    new.error = float(((missed @ H) * missed).sum()) / total if total else 0.0
    return new.train(layer.training)


@torch.no_grad()
def _fill(layer: GroupSparseInt4, groups: Tensor, keep: Tensor) -> None:
    """Codes, scales and zero points of the kept ones of ``groups`` (out, in / group, group)."""
    values = groups[keep]
    low = values.amin(1, keepdim=True)
    scales = (values.amax(1, keepdim=True) - low) / LEVELS
    # A group of equal weights is w = s (q − z) with q = 0, s = 1, z = −w.
    scales = torch.where(scales > 0, scales, 1.0)
    codes = ((values - low) / scales).round().to(torch.uint8)
    layer.scales.copy_(scales[:, 0])
    layer.zeros.copy_((-low / scales)[:, 0])
    layer.packed.copy_(codes[:, ::2] | codes[:, 1::2] << 4)
    layer.columns.copy_(keep.nonzero()[:, 1])
    layer.row_pointers[1:].copy_(keep.sum(1).cumsum(0))


def kept_groups(W: Tensor, H: Tensor, sparsity: float, group: int, per_row: bool) -> Tensor:
    """(out, in / group) bool, false for the groups of least saliency; H (in, in) is positive definite."""
    saliency = W.square() / torch.linalg.inv(H).diagonal()
    costs = saliency.reshape(W.shape[0], -1, group).sum(-1)
    ranked = costs if per_row else costs.reshape(1, -1)
    count = max(1, round((1 - sparsity) * ranked.shape[1]))
    best = ranked.topk(count, dim=1).indices
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, best, True).reshape(costs.shape)


def refitted(W: Tensor, H: Tensor, mask: Tensor) -> Tensor:
    """The weights that are zero outside of ``mask`` and nearest to W (out, in) in H, each row for itself."""
    fitted = torch.zeros_like(W)
    for row, target, columns in zip(fitted, W @ H, mask, strict=True):
        kept = columns.nonzero()[:, 0]
        if len(kept):
            factor = torch.linalg.cholesky(H[kept][:, kept])
            row[kept] = torch.cholesky_solve(target[kept, None], factor)[:, 0]
    return fitted


def group_sparsify(
    model: nn.Module,
    moments: Moments | None,
    *,
    sparsity: float = 0.5,
    group: int = 16,
    per_row: bool = True,
    refit: bool = True,
    damping: float = DAMPING,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    head: bool = False,
) -> CodedReport:
    """Replaces the linear maps of ``model`` in place by :class:`GroupSparseInt4`, and says what it cost.

    Maps are chosen as by :func:`eckart.arch.find_sites`. nn.Linear and transformers' ``Conv1D`` are taken; other
    maps, shared weights and maps that the group does not divide are listed in the report's ``skipped`` and stay. The
    moments are those of the original model throughout. Raises InputError where no map is left.
    """
    sites = find_sites(model, include=include, exclude=exclude, head=head)
    skipped = [(site.name, why) for site in sites if (why := _unfit(site, group))]
    left = {name for name, _ in skipped}
    if len(left) == len(sites):
        raise InputError(problems("group_sparsify: no map can be coded", [f"{n}: {why}" for n, why in skipped]))
    done = []
    for site in (site for site in sites if site.name not in left):
        new = group_sparse(
            get_module(model, site.name),
            None if moments is None else moments.site(site.name),
            sparsity=sparsity,
            group=group,
            per_row=per_row,
            refit=refit,
            damping=damping,
        )
        bits = 8 * get_module(model, site.name).get_parameter("weight").nbytes
        set_module(model, site.name, new)
        done.append(
            CodedSite(
                name=site.name,
                weights=site.weight_parameters,
                bits_before=bits,
                bits_after=new.stored_bits(),
                error=new.error or 0.0,
            )
        )
    return CodedReport(sites=tuple(done), skipped=tuple(skipped))


def quantiser_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The scales and zero points of every :class:`GroupSparseInt4` in ``model``: what the second stage trains.

    Give them alone to an optimiser and minimise the loss of the task. The scales are small, about a tenth of a
    weight's size: learning rates near 10⁻³ with Adam. Raises InputError where there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, GroupSparseInt4)]
    if not layers:
        raise InputError("the model has no GroupSparseInt4 layer; call group_sparsify first.")
    return [parameter for layer in layers for parameter in (layer.scales, layer.zeros)]


def _metric(moments: SiteMoments | None, in_features: int) -> Tensor:
    if moments is None:
        return torch.eye(in_features, dtype=torch.float64)
    second = moments.second
    if second is None or second.shape[0] != in_features:
        got = "none" if second is None else tuple(second.shape)
        raise InputError(f"GroupSparseInt4: expected second moments over {in_features} inputs; got {got}.")
    return torch.diag(second) if second.ndim == 1 else second


def _check_options(in_features: int, out_features: int, sparsity: float, group: int, damping: float) -> None:
    found = [fault] if (fault := group_fault(in_features, group)) else []
    if not 0 <= sparsity < 1:
        found.append(f"sparsity is the share of groups to drop, in [0, 1); got {sparsity!r}")
    if not 0 < damping < float("inf"):
        found.append(f"damping is a positive share of the mean of diag(H); got {damping!r}")
    if found:
        raise InputError(problems("GroupSparseInt4", found))


def _unfit(site: Site, group: int) -> str | None:
    """Why a map stays dense; None where it is coded."""
    if site.kind not in ("linear", "conv1d"):
        return f"{site.kind} is not coded"
    if site.tied:
        return f"it shares its weight with {', '.join(site.tied)}"
    return group_fault(site.in_features, group)


CLAIM_MAPS = ("mix", "up", "down", "head")
CLAIM_STEPS = 150
CLAIM_GROUP = 32
"""Of the two rivals: 3 bits per weight for W2, 4 for 2:4 (4-bit values, 2 bits for each place)."""


class _Grid(nn.Module):
    """A rival as a parametrisation: frozen codes of ``bits``, trained scales and zero points, an optional mask."""

    def __init__(self, W: Tensor, mask: Tensor, bits: int) -> None:
        super().__init__()
        groups = W.reshape(W.shape[0], -1, CLAIM_GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scales = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
        self.codes, self.mask = ((groups - low) / scales).round().float(), mask.float()
        self.scales, self.zeros = nn.Parameter(scales.float()), nn.Parameter((-low / scales).float())

    def forward(self) -> Tensor:
        decoded: Tensor = (self.codes - self.zeros) * self.scales
        return decoded.reshape(self.mask.shape) * self.mask

    def right_inverse(self, weight: Tensor) -> tuple[()]:
        return ()


def _two_of_four(W: Tensor, H: Tensor) -> Tensor:
    """The two weights of every four with the largest OBS saliency."""
    scores = (W.square() / torch.linalg.inv(H).diagonal()).reshape(W.shape[0], -1, 4)
    best = scores.topk(2, dim=2).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(2, best, True).reshape(W.shape)


def _run_claim() -> Verdict:
    problem = learned_problem()
    moments = problem.moments()
    figures: dict[str, float] = {}
    bits = 0
    for name in ("GQSA W4S50", "W2", "2:4 W4"):
        model = plainly_trained()
        trained: list[nn.Parameter] = []
        for site in CLAIM_MAPS:
            old: Any = get_module(model, site)
            if name == "GQSA W4S50":
                new = group_sparse(old, moments[site])
                bits += new.stored_bits() - 16 * (len(new.scales) + len(new.zeros))  # both kept in 16 bits
                set_module(model, site, new)
                trained += [new.scales, new.zeros]
                continue
            W, H = old.weight.detach().double(), _metric(moments[site], old.in_features)
            H = H + torch.eye(len(H), dtype=H.dtype) * DAMPING * H.diagonal().mean()
            if name == "W2":
                grid = _Grid(W, torch.ones_like(W), 2)
            else:
                mask = _two_of_four(W, H)
                grid = _Grid(refitted(W, H, mask), mask, 4)
            parametrize.register_parametrization(old, "weight", grid)
            trained += [grid.scales, grid.zeros]
        figures[f"{name}: loss rise, one-shot"] = held_out_loss(model) - problem.loss
        optimizer = torch.optim.Adam(
            [{"params": trained[::2], "lr": 2e-3}, {"params": trained[1::2], "lr": 4e-2}]  # zeros are 20 times as large
        )
        train(model, optimizer, CLAIM_STEPS, seed=0)
        with torch.no_grad():
            for parameter in trained:
                parameter.copy_(parameter.half())
        figures[f"{name}: loss rise, tuned"] = held_out_loss(model) - problem.loss
    figures["GQSA W4S50: bits per weight"] = bits / sum(problem.weights(site)["weight"].numel() for site in CLAIM_MAPS)
    tuned = {name: value for name, value in figures.items() if name.endswith("tuned")}
    return Verdict(
        held=min(tuned, key=lambda name: tuned[name]).startswith("GQSA"),
        figures=figures,
        note="nats per byte; W2 takes 3.0 and 2:4 4.0 bits per weight; the same tuning for all three",
    )


METHOD = Technique(
    name="gqsa",
    summary="half of the groups of 16 weights dropped, the others in 4 bits, scales tuned on the task",
    paper=Paper(
        authors="C. Zeng, S. Liu, S. Yang, F. Chen, L. Fu, X. Mei",
        title="GQSA: Group Quantization and Sparsity for Accelerating Large Language Model Inference",
        year=2024,
        link="https://arxiv.org/abs/2412.17560",
    ),
    entry=group_sparsify,
    claim=Claim(
        statement="At three to four bits per weight, half of the groups in 4 bits end at a lower held-out loss than "
        "all weights in 2 bits and than 2:4 sparsity in 4 bits, each with its scales tuned for as many steps.",
        source="abstract: W4S50 % surpasses both 2:4 pruning and W2 quantisation",
        run=_run_claim,
    ),
)
