r"""Maestro: factors that are trained in order of importance, so that the model can be cut anywhere.

*What it does.* Splits each map into two factors of full rank and trains them so that the first directions carry
most: beside the loss of the whole model, every step takes the loss with one random map cut to a random prefix of its
directions. A penalty on the suffixes empties the directions that are not needed, and they are dropped on the way.

*Formula.* W = U Vᵀ, from the SVD of the weights W = P S Qᵀ: U = P√S, V = Q√S. The objective is
L(W) + E_{i,b} L(W with map i cut to U_{:,:b} V_{:,:b}ᵀ) + λ Σ_i Σ_b (‖U_{:,b:}‖ + ‖V_{:,b:}‖), with (i, b) uniform over
all pairs of a map and a rank. On one linear map with white inputs, the second term alone is minimal at the SVD of the
map, in order; with inputs of covariance Σ at that of W Σ^½. The penalty's gradient is added in closed form, as
λ u_j Σ_{b ≤ j} 1/‖U_{:,b:}‖ (0 where the suffix is 0). Where ‖U_{:,b:}‖·‖V_{:,b:}‖ < τ ‖U‖·‖V‖, the directions from
b on go.

*Cost.* Two forward and backward passes per step, of a model whose maps hold k (m + n) numbers and multiply-adds,
up to twice those of m × n ones at the start; no SVD after the start. Masking is a multiplication; a cut pass saves
no time.

*When it does not help.* Where one size is wanted and known: on the problem of the claim (plain training: 1.76 nats
per byte) it ends at 2.21 with 35 % of the parameters after as many passes, where the SVD of the plain network gives
2.24 and its `kfac` 2.04. Its gain grows as one cuts deeper (19 %: 2.52 against 2.84 with the SVD; 9 %: 2.86 against
3.23), and uncut it loses: 2.08 even without a penalty. λ has to fit the optimizer: at 1e-5 (the authors' script: 1e-6)
nothing falls below τ in 500 steps of AdamW. The claim's λ (0.001) and learning rate (0.01) are the best of a few tried
on it, with one seed; at a rate of 0.003 it loses to the SVD at every size from 80 to 10 %.

*Departs from the paper in.* The cut pass is held to the labels; the authors' code
distils it from the full pass. Their script for the experiments passes ``--sampler`` where the parser knows
``--od-sampler``, so as published it runs without ordered dropout. Grouped convolutions work, with one order for all
groups (theirs: one group only). Dropped directions leave the optimizer, too; there they are masked until the end. τ is
relative to the map (theirs: absolute). At least one direction stays.

*Reference.* S. Horváth, S. Laskaridis, S. Rajput, H. Wang, “Maestro: Uncovering Low-Rank Structures via Trainable
Decomposition”, 2024, https://arxiv.org/abs/2308.14929.

*Example.*

>>> import torch
>>> from torch import nn
>>> generator = torch.Generator().manual_seed(0)
>>> model = nn.Sequential(nn.Linear(8, 6, bias=False))
>>> X, A = torch.randn(300, 8, generator=generator), torch.randn(8, 6, generator=generator)
>>> maestro = Maestro(model, penalty=0.0)
>>> optimizer = torch.optim.Adam(model.parameters(), lr=0.05)  # after Maestro: it holds the factors
>>> maestro.attach(optimizer)
>>> for _ in range(500):
...     optimizer.zero_grad()
...     maestro.loss(lambda: (model(X) - X @ A).square().mean()).backward()
...     optimizer.step()
>>> first = model[0].b.weight[:, :2] @ model[0].a.weight[:2]  # a prefix of the trained factors …
>>> U, S, Vh = torch.linalg.svd(A.T)
>>> best = U[:, :2] * S[:2] @ Vh[:2]  # … is close to the best of its rank
>>> bool((first - best).norm() < 0.2 * best.norm())
True
>>> outcome = maestro.finish(rank=Rank(keep=2))
>>> outcome.layers[0].rank
2
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from eckart.arch import check_finite, get_module, model_size, set_module, site_matrices
from eckart.errors import EckartError, InputError, MismatchError, problems
from eckart.evidence.trial import held_out_loss, plainly_trained, train, truncated, untrained
from eckart.forms import LowRank
from eckart.layers import FactoredConv, FactoredLinear
from eckart.linalg import truncated_svd
from eckart.records import Claim, LayerOutcome, Outcome, Paper, Rank, Site, Technique, Verdict
from eckart.training.targets import (
    chosen_rank,
    layer_outcome,
    outcome_of,
    parameter_of,
    pays,
    put_factors,
    rank_words,
    trainable_sites,
)


class Maestro:
    """Trains the linear maps of a model as ordered factors, in any PyTorch loop.

    ::

        maestro = Maestro(model)  # factors take the place of the weights: make the optimizer afterwards
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        maestro.attach(optimizer)
        for batch in data:
            optimizer.zero_grad()
            maestro.loss(lambda: loss_of(model, batch)).backward()
            optimizer.step()
        outcome = maestro.finish()

    Linear, ``Conv1D`` of transformers, nn.Conv1d and nn.Conv2d. A forward pass that is computed again in the
    backward pass (gradient checkpointing) would be computed without the cut; where a transformers model has it
    switched on, :meth:`sampled` refuses. Batch norms see both passes: estimate their statistics anew at the end. Under
    DistributedDataParallel give the inner module and set ``threshold=0``, since its buckets cannot shrink.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sites: Sequence[Site] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        penalty: float = 1e-3,
        threshold: float = 1e-3,
        period: int = 100,
        seed: int = 0,
    ) -> None:
        """Puts factors of full rank in the place of the chosen weights; outputs stay the same to rounding.

        ``sites``, or patterns as :func:`eckart.arch.find_sites` takes them, choose the maps. ``penalty``: λ ≥ 0.
        ``threshold``: τ in [0, 1), relative to a whole map's ‖U‖·‖V‖; 0 drops nothing. ``period``: steps between looks
        at what can be dropped. ``seed`` draws the maps and ranks. One SVD per map.

        Raises InputError for options out of range, and with every site that cannot be taken: embeddings, fused
        experts, frozen or shared weights; NotFiniteError for NaN or Inf. Nothing is changed then.
        """
        faults = []
        if not isinstance(penalty, (int, float)) or not 0 <= penalty < float("inf"):
            faults.append(f"penalty is a number of at least 0; got {penalty!r}")
        if not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
            faults.append(f"threshold is a share in [0, 1); got {threshold!r}")
        if not isinstance(period, int) or isinstance(period, bool) or period < 1:
            faults.append(f"period counts steps, an int of at least 1; got {period!r}")
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            faults.append(f"seed is an int of at least 0; got {seed!r}")
        if faults:
            raise InputError(problems("maestro", faults))
        found = trainable_sites(model, sites=sites, include=include, exclude=exclude, method="maestro")
        wrong = [f"{site.name}: fused experts" for site in found if site.kind == "experts"]
        wrong += [f"{s.name}: its weight is frozen" for s in found if not parameter_of(model, s).requires_grad]
        if wrong:
            raise InputError(problems("maestro cannot train these sites; exclude them", wrong))
        check_finite(model, found)
        self.model = model
        self.penalty, self.threshold, self.period = float(penalty), float(threshold), period
        self.steps = 0
        """Optimizer steps seen."""
        self._before = model_size(model)
        self._sites = {site.name: site for site in found}
        self._generator = torch.Generator().manual_seed(seed)
        self._handles: list[Any] = []
        for site in found:
            put_factors(model, site, [_balanced(**matrix) for matrix in site_matrices(model, site)])

    @property
    def sites(self) -> tuple[Site, ...]:
        """The maps that are trained as factors."""
        return tuple(self._sites.values())

    def ranks(self) -> dict[str, int]:
        """The directions that each site has left, per group for convolutions."""
        return {name: self._layer(name).rank for name in self._sites}

    def importance(self, name: str) -> Tensor:
        """(k,): ‖U_{:,b:}‖·‖V_{:,b:}‖ for b from 0, of which the first is the measure of the others."""
        a, b = self._factors(name)
        return (_suffix_norms(a.transpose(0, 1)) * _suffix_norms(b.movedim(2, 0))).detach()

    # ---- the loss

    def loss(self, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()`` with the whole model plus ``compute()`` with one map cut. Call backward on it.

        The penalty is no part of it: :meth:`before_step` adds its gradient, once per optimizer step.
        """
        whole = compute()
        with self.sampled():
            return whole + compute()

    @contextmanager
    def sampled(self) -> Iterator[tuple[str, int]]:
        """Within, one map computes with a prefix of its directions only. Yields its name and the rank.

        Every entry draws anew. Raises InputError where gradient checkpointing is switched on.
        """
        if any(getattr(m, "gradient_checkpointing", False) and m.training for m in self.model.modules()):
            raise InputError(
                "gradient checkpointing computes the forward pass again without the cut, so gradients would be wrong. "
                "Call model.gradient_checkpointing_disable()."
            )
        ranks = self.ranks()
        drawn = int(torch.randint(sum(ranks.values()), (), generator=self._generator))
        for name, rank in ranks.items():  # noqa: B007
            if drawn < rank:
                break
            drawn -= rank
        layer, kept = self._layer(name), drawn + 1
        handle = layer.a.register_forward_hook(lambda _, __, out: out * _prefix(layer, kept, out))
        try:
            yield name, kept
        finally:
            handle.remove()

    @torch.no_grad()
    def penalty_value(self) -> Tensor:
        """Σ_i Σ_b (‖U_{:,b:}‖ + ‖V_{:,b:}‖), without λ: a scalar for logs."""
        parts = [self._factors(name) for name in self._sites]
        return torch.stack(
            [_suffix_norms(a.transpose(0, 1)).sum() + _suffix_norms(b.movedim(2, 0)).sum() for a, b in parts]
        ).sum()

    # ---- training

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Runs :meth:`before_step` and :meth:`after_step` around every ``optimizer.step()`` until :meth:`detach`.

        Raises InputError where it is attached already, or the optimizer does not hold the factors.
        """
        if self._handles:
            raise InputError("maestro is attached already; call detach() first.")
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name in self._sites if not all(id(p) in owned for p in self._weights(name))]
        if missing:
            raise InputError(
                problems("the optimizer lacks the factors of these sites; make it after Maestro(model)", missing)
            )
        if self.threshold > 0:
            _check_state(optimizer, ())
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self.before_step()),
            optimizer.register_step_post_hook(lambda *_: self.after_step(optimizer)),
        ]

    def detach(self) -> None:
        """Lets go of the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def before_step(self) -> None:
        """Adds the gradient of the penalty to those of the factors that have one."""
        if self.penalty == 0:
            return
        for name in self._sites:
            for weight, factor, rank_dim in zip(self._weights(name), self._factors(name), (1, 2), strict=True):
                if weight.grad is not None:
                    weight.grad.add_(_penalty_gradient(factor, rank_dim).reshape(weight.shape), alpha=self.penalty)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Counts the step; on every ``period``-th drops the directions below the threshold, from the optimizer, too."""
        self.steps += 1
        if self.threshold == 0 or self.steps % self.period:
            return
        needed = {name: kept for name in self._sites if (kept := self._needed(name)) < self._layer(name).rank}
        _check_state(optimizer, [weight for name in needed for weight in self._weights(name)])
        for name, kept in needed.items():
            self._shrink(name, kept, optimizer)

    def _needed(self, name: str) -> int:
        importance = self.importance(name)
        return max(1, int((importance >= self.threshold * importance[0]).sum()))

    # ---- the end

    def finish(self, rank: Rank | None = None) -> Outcome:
        """Ends the training: drops what is below the threshold, or cuts to ``rank``, and lets go of the optimizer.

        ``rank`` means a prefix: a count, a share of the dense parameters, or the share of Σ_j ‖u_j‖²‖v_j‖². A map
        whose factors would not be smaller than its matrix becomes the layer that it was, with the product of all the
        factors that it has left. Parameters are new where ranks changed, so an optimizer that trains on is made anew.
        """
        started = time.perf_counter()
        self.detach()
        layers = [self._settle(site, rank) for site in self._sites.values()]
        words = f"importance of at least {self.threshold:g}" if rank is None else rank_words(rank)
        return outcome_of(layers, self._before, model_size(self.model), method="maestro", budget=words, started=started)

    @torch.no_grad()
    def _settle(self, site: Site, rank: Rank | None) -> LayerOutcome:
        layer, shape = self._layer(site.name), (site.out_features, site.in_features)
        element_size = layer.a.weight.element_size()
        if rank is None:
            kept = self._needed(site.name)
        else:
            a, b = self._factors(site.name)
            kept = chosen_rank(a.square().sum((0, 2)).sqrt() * b.square().sum((0, 1)).sqrt(), shape, rank)
        if not pays(kept, shape):
            set_module(self.model, site.name, layer.to_dense())
            return layer_outcome(site, element_size, None, shape)
        whole = layer.dense().double()
        self._shrink(site.name, kept, None)
        lost = float((whole - self._layer(site.name).dense().double()).square().sum())
        return layer_outcome(site, element_size, kept, shape, lost / max(float(whole.square().sum()), 1e-300))

    # ---- resume

    def state_dict(self) -> dict[str, Tensor | int]:
        """What an exact resume needs besides the model and the optimizer: ints and one tensor, flat by name."""
        ranks = {f"{name}:rank": rank for name, rank in self.ranks().items()}
        return {"steps": self.steps, "generator": self._generator.get_state(), **ranks}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Takes up what :meth:`state_dict` gave, and cuts the factors to its ranks.

        In this order: ``Maestro(model)``, this, ``model.load_state_dict``, the optimizer, its ``load_state_dict``,
        :meth:`attach`. Raises InputError once it is attached, MismatchError for a state of other sites or ranks.
        """
        if self._handles:
            raise InputError("maestro is attached to an optimizer; load its state before that.")
        ranks = self.ranks()
        expected = {"steps", "generator"} | {f"{name}:rank" for name in ranks}
        faults = [f"{key} is missing" for key in sorted(expected - set(state))]
        faults += [f"{key} is of no site of this model" for key in sorted(set(state) - expected)]
        for name, rank in ranks.items():
            if not 1 <= int(state.get(f"{name}:rank", 1)) <= rank:
                faults.append(f"{name} has rank {int(state[f'{name}:rank'])}; this model has at most {rank}")
        if faults:
            raise MismatchError(problems("the state of maestro does not fit", faults))
        self.steps = int(state["steps"])
        generator = state["generator"]
        if isinstance(generator, Tensor):
            self._generator.set_state(generator.cpu().clone())
        for name, rank in ranks.items():
            kept = int(state[f"{name}:rank"])
            if kept < rank:
                self._shrink(name, kept, None)

    # ---- the layers

    def _layer(self, name: str) -> FactoredLinear | FactoredConv:
        layer = get_module(self.model, name)
        if not isinstance(layer, (FactoredLinear, FactoredConv)):
            raise EckartError(f"{name} is a {type(layer).__name__} now; the factors of maestro are gone.")
        return layer

    def _weights(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        layer = self._layer(name)
        return layer.a.get_parameter("weight"), layer.b.get_parameter("weight")

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """V as (groups, k, in) and U as (groups, out, k)."""
        layer = self._layer(name)
        groups = layer.groups if isinstance(layer, FactoredConv) else 1
        a, b = self._weights(name)
        return a.reshape(groups, layer.rank, -1), b.reshape(groups, -1, layer.rank)

    @torch.no_grad()
    def _shrink(self, name: str, kept: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Keeps the first directions. New parameters: autograd still knows the old ones by their old shapes."""
        layer = self._layer(name)
        groups = layer.groups if isinstance(layer, FactoredConv) else 1
        index = torch.arange(groups * layer.rank, device=layer.a.weight.device)
        rows = index[index % layer.rank < kept]
        for child, dim, chosen in ((layer.a, 0, rows), (layer.b, 1, index[:kept])):
            old = child.get_parameter("weight")
            new = nn.Parameter(old.index_select(dim, chosen), requires_grad=old.requires_grad)
            if old.grad is not None:
                new.grad = old.grad.index_select(dim, chosen)
            if optimizer is not None:
                _replace_in(optimizer, old, new, dim, chosen)
            child.weight = new
        layer.rank = kept
        if isinstance(layer, FactoredConv):
            layer.a.out_channels = layer.b.in_channels = groups * kept
        else:
            layer.a.out_features = layer.b.in_features = kept


def _balanced(weight: Tensor, bias: Tensor | None = None) -> LowRank:
    """W = (P√S)(√S Qᵀ) at full rank."""
    svd = truncated_svd(weight, min(weight.shape), method="full")
    root = svd.S.sqrt()
    return LowRank(a=root[:, None] * svd.Vh, b=svd.U * root, bias=bias)


def _prefix(layer: FactoredLinear | FactoredConv, kept: int, out: Tensor) -> Tensor:
    """1 for the first channels of every group of the output of ``a``, 0 for the others, shaped to multiply."""
    mask = (torch.arange(layer.rank, device=out.device) < kept).to(out.dtype)
    if isinstance(layer, FactoredConv):
        return mask.repeat(layer.groups).reshape(-1, *[1] * layer.spatial)
    return mask


def _suffix_norms(factor: Tensor) -> Tensor:
    """(k,): ‖·‖ of everything from direction b on, for a factor (k, …)."""
    squares = factor.to(torch.promote_types(factor.dtype, torch.float32)).flatten(1).square().sum(1)
    norms: Tensor = squares.flip(0).cumsum(0).flip(0).sqrt()
    return norms


def _penalty_gradient(factor: Tensor, rank_dim: int) -> Tensor:
    """∂/∂u_j Σ_b ‖U_{:,b:}‖ = u_j Σ_{b ≤ j} 1/‖U_{:,b:}‖; u_j = 0 wherever a suffix of it is, so 1/0 counts 0."""
    norms = _suffix_norms(factor.movedim(rank_dim, 0))
    weights = torch.where(norms > 0, 1 / norms, 0.0).cumsum(0)
    shape = [1] * factor.ndim
    shape[rank_dim] = -1
    return factor * weights.reshape(shape).to(factor.dtype)


# ---- the optimizer


def _check_state(optimizer: torch.optim.Optimizer, weights: Iterable[Tensor]) -> None:
    """Raises InputError for memory of a weight that cannot shrink with it: neither of its shape (but for sizes of 1,
    as factored second moments have), nor a scalar, nor None. LBFGS keeps flat vectors of all weights."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            "LBFGS keeps flat vectors of all parameters, which cannot shrink. Take another, or threshold=0."
        )
    for weight in weights:
        for key, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1:
                fits = value.ndim == weight.ndim and all(
                    n in (1, full) for n, full in zip(value.shape, weight.shape, strict=True)
                )
            else:
                fits = isinstance(value, (Tensor, int, float, bool, type(None)))
            if not fits:
                raise InputError(
                    f"{type(optimizer).__name__} remembers {key!r} in a shape that cannot shrink with its weight; "
                    "take another optimizer, or threshold=0."
                )


def _replace_in(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, dim: int, chosen: Tensor
) -> None:
    """Puts ``new`` in the place of ``old``, and cuts what the optimizer remembers of it along ``dim``.

    A tensor that has the size of ``old`` along ``dim`` is cut; one that has size 1 there (factored second moments) or
    is a scalar (step counts) stays.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = {
            key: value.index_select(dim, chosen) if _spans(value, old, dim) else value for key, value in state.items()
        }


def _spans(value: Any, weight: Tensor, dim: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == weight.ndim and value.shape[dim] == weight.shape[dim] != 1


# ---- the claim


def _ordering(*, cut: bool) -> float:
    """How far the prefixes of a trained linear map are from the best of their rank, at worst over the ranks.

    Excess of tr((W_b − A) Σ (W_b − A)ᵀ) over its least value, as a share of tr(A Σ Aᵀ), after 1000 steps of Adam
    from a random start; without ``cut`` the factors are trained on the loss of the whole map alone.
    """
    generator = torch.Generator().manual_seed(0)
    A, mixing, start = (torch.randn(*shape, generator=generator) for shape in ((6, 8), (8, 8), (6, 8)))
    X = torch.randn(500, 8, generator=generator) @ mixing / 8**0.5
    Y = X @ A.T
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    model.load_state_dict({"0.weight": start / 8**0.5})
    maestro = Maestro(model, penalty=0.0, threshold=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    maestro.attach(optimizer)

    def loss() -> Tensor:
        error: Tensor = model(X) - Y
        return error.square().sum(1).mean()

    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 1000)
        optimizer.zero_grad()
        torch.autograd.backward(maestro.loss(loss) if cut else loss())
        optimizer.step()
    a, b = maestro._weights("0")
    squares = torch.linalg.svdvals(Y).square()
    with torch.no_grad():
        excess = [
            float((X @ (b[:, :rank] @ a[:rank]).T - Y).square().sum() - squares[rank:].sum()) for rank in range(1, 7)
        ]
    return max(excess) / float(squares.sum())


def _run_claim() -> Verdict:
    model = untrained()
    maestro = Maestro(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    maestro.attach(optimizer)
    train(model, optimizer, steps=500, seed=0, total=maestro.loss)
    maestro.detach()
    figures: dict[str, float] = {}
    gains = []
    for rank in (None, Rank(ratio=0.2), Rank(ratio=0.1)):
        smaller = copy.deepcopy(maestro)
        outcome = smaller.finish(rank)
        ranks = {layer.site.name: layer.rank for layer in outcome.layers if layer.form == "lowrank"}
        share = outcome.sites_after.parameters / outcome.sites_before.parameters
        found, cut = held_out_loss(smaller.model), held_out_loss(truncated(plainly_trained(), ranks))
        figures |= {f"maestro: loss at keep {share:.2f}": found, f"SVD of plain: loss at keep {share:.2f}": cut}
        gains.append(cut - found)
    figures |= {
        "linear map: excess over the SVD, maestro": _ordering(cut=True),
        "linear map: excess over the SVD, plain factors": _ordering(cut=False),
    }
    return Verdict(
        held=fmean(gains) > 0 and figures["linear map: excess over the SVD, maestro"] < 0.02,
        figures=figures,
        note="held-out nats per byte at equal ranks, after equal numbers of forward and backward passes; the excess is "
        "the worst over all ranks, as a share of the map",
    )


METHOD = Technique(
    name="maestro",
    summary="factors trained in order of importance: one training, cut anywhere",
    paper=Paper(
        authors="S. Horváth, S. Laskaridis, S. Rajput, H. Wang",
        title="Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
        year=2024,
        link="https://arxiv.org/abs/2308.14929",
    ),
    entry=Maestro,
    claim=Claim(
        statement="At equal final ranks (its own, 20 and 10 % of the parameters; mean of the three) the loss is lower "
        "than with the SVD of the plainly trained network; on one linear map, prefixes come within 2 % of the SVD.",
        source="theorems on linear maps, and the experiments against SVD baselines",
        run=_run_claim,
    ),
)
