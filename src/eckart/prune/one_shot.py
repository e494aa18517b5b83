"""One shot: a model pruned in place from its moments, under one budget or layer by layer, nothing trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eckart.arch import check_finite, find_sites, fingerprint, site_matrices, site_module, skipped_sites, stored_weight
from eckart.compression import kfac
from eckart.errors import InputError, NotFiniteError, problems, unknown
from eckart.forms import LowRank
from eckart.linalg import fold
from eckart.moments import Moments, SiteMoments
from eckart.prune.alps import alps
from eckart.prune.kfac import CostMap, loss_shares, prune_kfac
from eckart.prune.masks import MaskSet
from eckart.prune.owl import owl_shares
from eckart.prune.patterns import NofM, Pattern, check_fits, check_keep, global_masks, parse_pattern
from eckart.prune.refit import corrected_bias, floored, refit, row_errors
from eckart.prune.sparse_lowrank import sparse_lowrank
from eckart.prune.sparsegpt import sparsegpt
from eckart.prune.wanda import wanda_scores
from eckart.records import Progress, Site, silent
from eckart.spectra import farms, pruning_ratios

OneShotMethod = Literal["kfac", "alps", "sparsegpt", "wanda", "magnitude"]
OneShotAllocation = Literal["loss", "uniform", "global", "owl", "farms"]
METHODS: tuple[OneShotMethod, ...] = ("kfac", "alps", "sparsegpt", "wanda", "magnitude")
ALLOCATIONS: tuple[OneShotAllocation, ...] = ("loss", "uniform", "global", "owl", "farms")
_FITTED = ("kfac", "alps")
"""Methods that refit by themselves."""
DEFAULT_KEEP = 0.5
NO_SPEED = (
    "zeros are stored and multiplied like other numbers unless a runtime says otherwise: this makes the file smaller, "
    "not the model faster"
)


@dataclass(frozen=True, kw_only=True)
class PrunedLayer:
    """What happened to one map."""

    site: Site
    keep: float
    """The share of its weights that stay."""
    kept: int
    """Weights that stay."""
    rank: int
    """Of the product beside the sparse weight; 0: none."""
    error: float | None
    """tr(G Δ Σ Δᵀ) / tr(G W Σ Wᵀ) on the calibration data, 0 … 1; None without moments."""
    loss: float | None
    """Predicted rise of the loss, in nats per token or whatever it is summed over; None without gradients."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PruneOutcome:
    """What a one-shot pruning did, all of it. Sizes are those of the pruned maps' weights, biases left out."""

    layers: tuple[PrunedLayer, ...]
    method: str
    pattern: str
    allocation: str
    refitted: bool
    weights: int
    """Weights of the pruned maps."""
    kept: int
    """Those that stay."""
    dense_bytes: int
    """Before."""
    stored_bytes: int
    """One bit per weight, the values that stay, and the products: what a file of masks and values takes."""
    loadable_bytes: int
    """Dense with zeros, and the products: what every runtime loads, and what memory holds."""
    seconds: float
    notes: tuple[str, ...] = ()
    """Modules that were left alone and why, and that zeros are no speed."""
    factors: Mapping[str, LowRank] = field(default_factory=dict)
    """By map: b a is to be added to its sparse weight. Not part of the model: attach or save them as a LoRA."""

    @property
    def keep(self) -> float:
        """The share of all weights that stay."""
        return self.kept / self.weights

    @property
    def loss(self) -> float | None:
        """Predicted rise of the loss, summed over the maps; None without gradients."""
        known = [layer.loss for layer in self.layers if layer.loss is not None]
        return sum(known) if len(known) == len(self.layers) else None

    def __str__(self) -> str:
        return (
            f"{len(self.layers)} maps, {self.keep:.1%} of {self.weights:,} weights kept ({self.pattern}, {self.method}"
            f"{', refitted' if self.refitted else ''}); weights: {self.dense_bytes:,} bytes dense, "
            f"{self.stored_bytes:,} as bits and values, {self.loadable_bytes:,} as loaded; {NO_SPEED}."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the factors."""
        names = ("method", "pattern", "allocation", "refitted", "weights", "kept", "keep", "loss")
        sizes = ("dense_bytes", "stored_bytes", "loadable_bytes", "seconds")
        layers = [
            {"name": layer.site.name, **{n: getattr(layer, n) for n in ("keep", "kept", "rank", "error", "loss")}}
            for layer in self.layers
        ]
        return {
            **{name: getattr(self, name) for name in (*names, *sizes)},
            "notes": list(self.notes),
            "layers": layers,
        }


def one_shot(
    model: nn.Module,
    moments: Moments | None = None,
    *,
    keep: float | None = None,
    pattern: str | Pattern = "unstructured",
    method: OneShotMethod | None = None,
    refit: bool = True,
    allocation: OneShotAllocation | None = None,
    rank: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress = silent,
) -> tuple[MaskSet, PruneOutcome]:
    """Prunes the linear maps of a model in place, without training; gives the masks and what was done.

    Args:
        model: any module; its maps are those of :func:`eckart.arch.find_sites`.
        moments: of this model, see :func:`eckart.moments.collect`; ``magnitude`` without a refit needs none.
        keep: share of the weights of these maps that stay, in (0, 1). None: half, or what "keep n of m" says.
        pattern: see :func:`parse_pattern`: ``unstructured``, ``row``, ``2:4``, ``keep 2 of 8``, ``runs of 16``, …
        method: ``kfac`` (moments with gradients), ``alps``, ``sparsegpt``, ``wanda``, ``magnitude``. None: ``alps`` for
            "keep n of m" (2:4, MiniLM: cosine of .929, SparseGPT refitted under the same metric .912, ``kfac`` .904; a
            small causal model: 1.236, 1.257 and 1.256 bits per byte, dense 1.157), else ``kfac``. At half
            kept MiniLM's embeddings had a cosine of .958 with ``kfac`` (.965 with ``alps`` and shares by loss, .943
            with Wanda and a refit under Σ, .923 with SparseGPT as published), a small causal model 1.172 bits per byte
            (1.175, 1.219 and 1.228).
        refit: least squares on the mask afterwards, under Σ and G where the moments have it, the bias taking up the
            mean. ``kfac`` and ``alps`` refit by themselves.
        allocation: ``loss`` (one budget in units of the loss; default for ``kfac``), ``uniform`` (default for the
            others, and all that "keep n of m" can have), ``global`` (one threshold on the scores of ``wanda`` or
            ``magnitude``), ``owl`` and ``farms`` (shares by block).
        rank: of a product beside every sparse weight, in ``outcome.factors``; 0 for none. Needs ``refit``.
        include: patterns of names, the only ones that are pruned.
        exclude: patterns of names that are left alone.

    Everything is checked before any change, and nothing is written until all maps are done. Embeddings and the head
    stay, as does what :func:`eckart.arch.skipped_sites` names. Work is done on the CPU, with both moments of a map in
    float32 beside it, of all maps at a time for ``kfac``.

    Raises InputError with everything that is wrong: options, patterns that do not divide a layer, tied weights, layers
    without moments; MismatchError for moments of another model; NotFiniteError for NaN or Inf in weights or moments;
    BudgetError where nothing would stay.
    """
    began = time.perf_counter()
    rule = parse_pattern(pattern)
    method = default_method(rule) if method is None else method
    chosen = _allocation(method, allocation, rule)
    share = _share(keep, rule)
    _check_options(method, refit, chosen, rule, rank, moments)
    sites = find_sites(model, include=include, exclude=exclude)
    if not sites:
        raise InputError("one_shot: the model has no linear map to prune.")
    _check_sites(sites, rule, rank)
    check_finite(model, sites)
    if moments is not None:
        moments.check(fingerprint(model))
        _check_moments(sites, moments, method, chosen)
    maps = _maps(model, sites, moments)
    shares = _shares(maps, share, chosen)
    pruned = _METHODS[method](_Task(maps, share, shares, rule, chosen, progress))
    done: dict[str, _Result] = {}
    for index, (name, each) in enumerate(maps.items()):
        progress("refit", index, len(maps))
        S, mask = pruned[name]
        done[name] = _finished(each, S, mask, refit and method not in _FITTED, refit, rank)
    progress("refit", len(maps), len(maps))
    masks, layers = _write(model, sites, maps, done)
    weights, kept = (sum(values) for values in zip(*((m.numel(), int(m.sum())) for m in masks.values()), strict=True))
    factors = {name: each.factors for name, each in done.items() if each.factors is not None}
    beside = sum(product.nbytes for product in factors.values())
    dense = sum(stored_weight(model, site).nbytes for site in sites)
    values = sum(layer.kept * stored_weight(model, layer.site).element_size() for layer in layers)
    return MaskSet(masks), PruneOutcome(
        layers=layers,
        method=method,
        pattern=str(rule),
        allocation=chosen,
        refitted=refit,
        weights=weights,
        kept=kept,
        dense_bytes=dense,
        stored_bytes=values + sum(math.ceil(mask.numel() / 8) for mask in masks.values()) + beside,
        loadable_bytes=dense + beside,
        seconds=time.perf_counter() - began,
        notes=(NO_SPEED, *(f"{name} was left alone: {reason}" for name, reason in skipped_sites(model))),
        factors=factors,
    )


def default_method(pattern: str | Pattern) -> OneShotMethod:
    """``alps`` for "keep n of m", where no budget can be shared; ``kfac`` for every other pattern."""
    return "alps" if isinstance(parse_pattern(pattern), NofM) else "kfac"


# ---- checks


def _allocation(method: str, allocation: str | None, rule: Pattern) -> OneShotAllocation:
    if method not in METHODS:
        raise InputError(unknown("method", str(method), METHODS))
    if allocation is None:
        return "loss" if method == "kfac" and not rule.local else "uniform"
    if allocation not in ALLOCATIONS:
        raise InputError(unknown("allocation", str(allocation), ALLOCATIONS))
    return allocation


def _share(keep: float | None, rule: Pattern) -> float:
    if rule.share is not None:
        if keep is not None and not math.isclose(check_keep(keep), rule.share):
            raise InputError(f"pattern {rule} keeps {rule.share:g} of the weights; leave out keep={keep!r}.")
        return rule.share
    share = DEFAULT_KEEP if keep is None else check_keep(keep)
    if share == 1:
        raise InputError("keep=1 keeps every weight: there is nothing to prune. Give a share below 1.")
    return share


def _check_options(
    method: str, refit: bool, allocation: str, rule: Pattern, rank: int, moments: Moments | None
) -> None:
    wrong = []
    if not isinstance(refit, bool):
        wrong.append(f"refit is true or false; got {refit!r}")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
        wrong.append(f"rank is an int of at least 0; got {rank!r}")
    elif rank and not refit:
        wrong.append("rank fits a product to what a refit leaves; it needs refit=True")
    if method in _FITTED and refit is False:
        wrong.append(f"method {method!r} refits by itself; refit=False goes with sparsegpt, wanda and magnitude")
    if isinstance(rule, NofM) and allocation != "uniform":
        wrong.append(f"pattern {rule} gives every layer the same share; allocation={allocation!r} has nothing to share")
    if rule.local and allocation == "global":
        wrong.append(f"pattern {rule} has a count in every row; allocation='global' goes with free patterns")
    if allocation == "global" and method not in ("wanda", "magnitude"):
        wrong.append(f"allocation 'global' compares scores of wanda or magnitude; for {method!r} take 'loss'")
    if method == "sparsegpt" and not isinstance(rule, NofM) and str(rule) not in ("unstructured", "row"):
        wrong.append(f"method 'sparsegpt' takes 'unstructured', 'row' and 'keep n of m'; got pattern {rule}")
    if moments is None and (method != "magnitude" or refit or allocation in ("loss", "owl")):
        wrong.append("moments are needed; only method='magnitude' with refit=False does without")
    if wrong:
        raise InputError(problems("one_shot", wrong))


def _check_sites(sites: Sequence[Site], rule: Pattern, rank: int) -> None:
    wrong = [f"{s.name}: its weight is tied to {', '.join(s.tied)}" for s in sites if s.tied]
    if rank:
        wrong += [f"{s.name}: a product goes beside linear maps, not beside {s.kind}" for s in sites if s.slices > 1]
        wrong += [
            f"{s.name}: rank {rank} is more than its full rank {s.full_rank}" for s in sites if rank > s.full_rank
        ]
        wrong += [f"{s.name}: a product goes beside linear maps only" for s in sites if s.kind == "conv"]
    if wrong:
        raise InputError(problems("one_shot cannot prune these layers so; exclude them", dict.fromkeys(wrong)))
    check_fits(rule, {site.name: (site.out_features, site.in_features) for site in sites})


def _check_moments(sites: Sequence[Site], moments: Moments, method: str, allocation: str) -> None:
    known, lost = set(moments.names()), set(moments.meta.get("unreached", []))
    wrong = [
        f"{site.name}: {'no calibration token reached it' if site.name in lost else 'its moments were not collected'}"
        for site in sites
        if site.name not in known
    ]
    if wrong:
        raise InputError(problems("layers without moments; exclude them, or calibrate with them", wrong))
    bad, flat = [], []
    for site in sites:
        for slice_ in range(site.slices):
            found = moments.site(site.name, slice_)
            if found.gradient is None and found.gradient_scale is None and (method == "kfac" or allocation == "loss"):
                flat.append(site.name)
            for what in ("mean", "second", "gradient"):
                value = getattr(found, what)
                if value is not None and not bool(value.isfinite().all()):
                    bad.append(f"{_key(site, slice_)}: {int((~value.isfinite()).sum())} numbers of {what}")
    if bad:
        raise NotFiniteError(problems("moments with NaN or Inf; calibrate in float32", bad))
    if flat:
        raise InputError(
            f"method {method!r} with allocation {allocation!r} weighs layers by gradients, and the moments have none. "
            "Calibrate with gradients='full', or take method='sparsegpt'."
        )


# ---- the maps


@dataclass(frozen=True, kw_only=True, eq=False)
class _Map:
    """One matrix of a site with what is known of it."""

    site: Site
    weight: Tensor
    bias: Tensor | None
    moments: SiteMoments | None
    second: Tensor | None
    """Σ, shrunk, and centred where ``mean`` is there."""
    gradient: Tensor | None
    """G, shrunk and floored; None where no gradient was collected."""
    mean: Tensor | None

    @property
    def cost(self) -> CostMap:
        if self.second is None or self.moments is None:
            raise InputError(f"{self.site.name}: expected moments; got none.")
        return CostMap(weight=self.weight, second=self.second, gradient=self.gradient, scale=self.moments.loss_scale)


def _key(site: Site, slice_: int) -> str:
    return site.name if site.slices == 1 else f"{site.name}[{slice_}]"


def _maps(model: nn.Module, sites: Sequence[Site], moments: Moments | None) -> dict[str, _Map]:
    found = {}
    for site in sites:
        for slice_, matrix in enumerate(site_matrices(model, site)):
            known = None if moments is None else moments.site(site.name, slice_)
            second = gradient = mean = None
            if known is not None:
                blind = known.gradient is None and known.gradient_scale is None
                scaled = replace(known, gradient_scale=float(site.out_features)) if blind else known
                second, gradient, mean = kfac.metrics(matrix, scaled, kfac.Options())
                gradient = None if blind or gradient is None else floored(gradient)
            found[_key(site, slice_)] = _Map(
                site=site,
                weight=matrix["weight"],
                bias=matrix.get("bias"),
                moments=known,
                second=second,
                gradient=gradient,
                mean=mean,
            )
    return found


def _raw(each: _Map) -> Tensor:
    """E[x xᵀ] as it was seen."""
    if each.moments is None or each.moments.second is None:
        raise InputError(f"{each.site.name}: expected moments with E[x xᵀ]; got none.")
    return each.moments.second


# ---- budgets and methods


def _shares(maps: Mapping[str, _Map], keep: float, allocation: str) -> dict[str, float]:
    """The share of each map by ``allocation``; equal ones where a budget is shared weight by weight."""
    sizes = {name: each.weight.numel() for name, each in maps.items()}
    block: dict[str, Hashable] = {
        name: name if each.site.depth is None else each.site.depth for name, each in maps.items()
    }
    if allocation == "owl":
        return owl_shares({n: wanda_scores(m.weight, _raw(m)) for n, m in maps.items()}, keep, groups=block)
    if allocation == "farms":
        alphas = {name: float(farms(each.weight)["alpha_farms"]) for name, each in maps.items()}
        known: dict[Hashable, list[float]] = {}
        for name, alpha in alphas.items():
            if math.isfinite(alpha):
                known.setdefault(block[name], []).append(alpha)
        means = {name: fmean(known.get(block[name], [math.nan])) for name in maps}
        return {name: 1 - s for name, s in pruning_ratios(means, sizes, sparsity=1 - keep).items()}
    return dict.fromkeys(maps, keep)


_Pruned = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class _Task:
    """All maps, and what is asked of them together."""

    maps: Mapping[str, _Map]
    keep: float
    given: Mapping[str, float]
    """Shares by map, where the loss does not decide."""
    rule: Pattern
    allocation: str
    progress: Progress

    @property
    def costs(self) -> dict[str, CostMap]:
        return {name: each.cost for name, each in self.maps.items()}

    def shares(self) -> Mapping[str, float]:
        return loss_shares(self.costs, self.keep) if self.allocation == "loss" else self.given


def _by_kfac(task: _Task) -> _Pruned:
    if isinstance(task.rule, NofM):
        return prune_kfac(task.costs, None, task.rule, progress=task.progress)
    if task.allocation == "loss" and not task.rule.local:
        return prune_kfac(task.costs, task.keep, task.rule, progress=task.progress)
    return prune_kfac(task.costs, None, task.rule, shares=task.shares(), progress=task.progress)


def _map_by_map(prune_one: Callable[[_Map, float, Pattern], tuple[Tensor, Tensor]]) -> Callable[[_Task], _Pruned]:
    def prune(task: _Task) -> _Pruned:
        shares, found = task.shares(), {}
        for index, (name, each) in enumerate(task.maps.items()):
            task.progress("prune", index, len(task.maps))
            found[name] = prune_one(each, shares[name], task.rule)
        return found

    return prune


def _by_scores(score: Callable[[_Map], Tensor]) -> Callable[[_Task], _Pruned]:
    def prune(task: _Task) -> _Pruned:
        scores = {name: score(each) for name, each in task.maps.items()}
        if task.allocation == "global":
            masks = global_masks(scores, task.keep, task.rule)
        else:
            shares = task.shares()
            masks = {name: task.rule.mask(s, shares[name]) for name, s in scores.items()}
        return {name: (torch.where(mask, task.maps[name].weight, 0), mask) for name, mask in masks.items()}

    return prune


_METHODS: dict[str, Callable[[_Task], _Pruned]] = {
    "kfac": _by_kfac,
    "alps": _map_by_map(lambda m, share, rule: alps(m.weight, m.cost.second, share, rule, gradient=m.gradient)),
    "sparsegpt": _map_by_map(lambda m, share, rule: sparsegpt(m.weight, _raw(m), share, rule)),
    "wanda": _by_scores(lambda each: wanda_scores(each.weight, _raw(each))),
    "magnitude": _by_scores(lambda each: each.weight.abs()),
}


# ---- the end


@dataclass(frozen=True, kw_only=True, eq=False)
class _Result:
    weight: Tensor
    mask: Tensor
    bias: Tensor | None
    """None: as it was."""
    factors: LowRank | None
    error: float | None
    loss: float | None


def _finished(each: _Map, S: Tensor, mask: Tensor, refitting: bool, corrected: bool, rank: int) -> _Result:
    """Refitted, with its product, its bias and its errors."""
    W, factors = each.weight, None
    if refitting and each.second is not None:
        S = refit(W, mask, each.second, start=S, gradient=each.gradient)
    if rank and each.second is not None:
        S, factors = sparse_lowrank(W, mask, each.second, rank, gradient=each.gradient, start=S)
    if not bool(S.isfinite().all()):
        raise NotFiniteError(f"{each.site.name}: refitted weights leave the range of {W.dtype}; take refit=False.")
    whole = S.double() if factors is None else S.double() + factors.b.double() @ factors.a.double()
    bias = None
    if corrected and each.bias is not None and each.mean is not None:
        bias = corrected_bias(W, whole, each.bias, each.mean)
    error, loss = _errors(each, whole)
    return _Result(weight=S, mask=mask, bias=bias, factors=factors, error=error, loss=loss)


def _errors(each: _Map, whole: Tensor) -> tuple[float | None, float | None]:
    """Relative error and predicted rise of the loss, under the metrics of the fit."""
    sigma, G = each.second, each.gradient
    if sigma is None or each.moments is None:
        return None, None
    W = each.weight.detach().to("cpu", torch.float64)
    delta = W - whole.to("cpu", torch.float64)

    def cost(X: Tensor) -> float:
        if G is None or G.ndim == 1:
            rows = row_errors(X, sigma)
            return float(rows.sum() if G is None else rows @ G)
        return max(float(((G @ X) * (X @ sigma)).sum()), 0.0)

    total, left = cost(W), cost(delta)
    loss = None if G is None else each.moments.loss_scale * left
    return (left / total if total > 0 else 0.0), loss


@torch.no_grad()
def _write(
    model: nn.Module, sites: Sequence[Site], maps: Mapping[str, _Map], done: Mapping[str, _Result]
) -> tuple[dict[str, Tensor], tuple[PrunedLayer, ...]]:
    """Puts everything in its place; the masks by parameter, shaped as stored, and what became of each site."""
    masks, layers = {}, []
    for site in sites:
        results = [done[_key(site, slice_)] for slice_ in range(site.slices)]
        stored = stored_weight(model, site)
        parameter = site.name if site.kind == "experts" else f"{site.name}.weight"
        masks[parameter] = fold(torch.stack([r.mask for r in results]), site.kind, stored.shape).contiguous()
        stored.copy_(fold(torch.stack([r.weight for r in results]), site.kind, stored.shape))
        if results[0].bias is not None:
            bias = site_module(model, site).get_parameter("bias")
            bias.copy_(torch.cat([r.bias for r in results if r.bias is not None]).reshape(bias.shape))
        kept = sum(int(r.mask.sum()) for r in results)
        known = [(r.error, r.loss) for r in results]
        errors, losses = [e for e, _ in known if e is not None], [x for _, x in known if x is not None]
        layers.append(
            PrunedLayer(
                site=site,
                keep=kept / site.weight_parameters,
                kept=kept,
                rank=0 if results[0].factors is None else results[0].factors.rank,
                error=fmean(errors) if errors else None,
                loss=sum(losses) if losses else None,
            )
        )
    return masks, tuple(layers)
