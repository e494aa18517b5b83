r"""Trained rank pruning: training that keeps coming back to low rank, so that the cut at the end costs little.

*What it does.* Every few steps each weight is replaced by its truncation, which keeps a given share of its
squared singular values; the network trains on from there. A nuclear-norm sub-gradient pushes the same way.

*Formula.* After every ``period``-th optimizer step W ← T(W) = Σ_{i ≤ k} σ_i u_i v_iᵀ, with the least k for
which Σ_{i ≤ k} σ_i² ≥ energy · ‖W‖²_F. At T(W) the gradient of the next step becomes ∇L + λ U_k V_kᵀ, a sub-gradient
of λ‖W‖_* there. Convolutions are read as (out, in/groups · kernel) (``channel``) or as
(in · height, out · width) (``spatial``: a column, then a row).

*Cost.* No full SVD. The basis of the last truncation is iterated once with a few random columns beside it: about
5 m n k multiply-adds, against m² n and an ``eigh`` of m³. Measured for one truncation of a 768 × 3072 matrix in
float32 on one CPU thread: 1.7 s with ``torch.linalg.svd``, 0.27 s with the Gram matrix, 0.06 s so (rank 44; 0.13 s at
rank 97), to 3e-6 the same matrix. The energy is kept for certain; a check of convergence falls
back to the Gram matrix (:mod:`eckart.training.subspace`). At the start, while ranks are above a quarter of the
smaller side, the Gram matrix is what runs. Between truncations nothing is added but the sub-gradient, 2 m n k.

*When it does not help.* When the energy is too low for the learning rate. Each truncation takes up to 1 − energy
of ‖W‖²_F, and training has to win it back; as the learning rate falls, it cannot, and a map with one dominant singular
value goes to rank 1. On the problem of the claim (AdamW, learning rate to zero; plain training: 1.76 nats per byte)
energy 0.9 ends at 2.80 with 4 % of the parameters, 0.98 at 2.08 with 20 %, 0.99 at 1.88 with 32 %. The plainly
trained network at these ranks: 4.54, 3.00, 2.38 with an SVD, and with `kfac`, which needs data but no training, 2.45
and 1.99 at the last two. The nuclear norm adds little: 2.08 with it, 2.09 without. It is no way to fine-tune for few
steps, since the first cuts of weights of full rank are deep.

*Departs from the paper in.* The energy is 0.98 by default, for the reason above (the authors' code: 0.9, SGD, batch
norms). Weights that got no gradient since the last truncation are left alone (cut again and
again, they would shrink to rank 1). The first cut comes after ``period`` steps, not before the first. Any stride,
padding, dilation and groups are factored at the end (the authors' code sets stride and padding to 1), and first
layers and 1 × 1 convolutions are treated like the others unless excluded. The variant that splits each
filter into depthwise and pointwise parts is left out. The authors' code ends with a threshold on σ (0.05);
``finish`` repeats by default the cut that training has grown used to, and takes a threshold, too.

*Reference.* Y. Xu, Y. Li, S. Zhang, W. Wen, B. Wang, Y. Qi, Y. Chen, W. Lin, H. Xiong, “TRP: Trained Rank
Pruning for Efficient Deep Neural Networks”, 2020, https://arxiv.org/abs/2004.14566.

*Example.*

>>> import torch
>>> from torch import nn
>>> generator = torch.Generator().manual_seed(0)
>>> model = nn.Sequential(nn.Linear(40, 30))
>>> X, A = torch.randn(200, 40, generator=generator), torch.randn(40, 30, generator=generator)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
>>> trp = TrainedRankPruning(model, energy=0.8, period=5)
>>> trp.attach(optimizer)  # the one line that a training loop needs
>>> for _ in range(60):
...     optimizer.zero_grad()
...     (model(X) - X @ A / 40).square().mean().backward()
...     optimizer.step()
>>> outcome = trp.finish()
>>> outcome.layers[0].form, model[0].rank == outcome.layers[0].rank, outcome.layers[0].rank < 18
('lowrank', True, True)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eckart.arch import get_module, model_size, set_module
from eckart.errors import InputError, MismatchError, NotFiniteError, problems, unknown
from eckart.evidence.trial import held_out_loss, plainly_trained, train, truncated, untrained
from eckart.forms import LowRank
from eckart.linalg import fold, matricize, truncated_svd
from eckart.records import Claim, LayerOutcome, Outcome, Paper, Rank, Site, Technique, Verdict
from eckart.training.subspace import truncate
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

Mode = Literal["channel", "spatial"]


@dataclass
class _Part:
    """One site and what is known of it between steps."""

    site: Site
    spatial: bool
    U: list[Tensor | None] = field(default_factory=list)
    """Per slice the basis (smaller side, k) of the last truncation."""
    S: list[Tensor | None] = field(default_factory=list)
    """Per slice its singular values (k,)."""
    moved: bool = False
    """Whether a gradient came since the last truncation."""
    pending: bool = False
    """Whether the sub-gradient of the last truncation is still to be added."""

    def __post_init__(self) -> None:
        self.U = [None] * self.site.slices
        self.S = [None] * self.site.slices

    def matrices(self, weight: Tensor) -> Tensor:
        """(slices, m, n), maybe a copy."""
        if self.spatial:
            return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1).unsqueeze(0)
        return matricize(weight, self.site.kind, self.site.slices if self.site.kind == "conv" else 1)

    def weight(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of :meth:`matrices`."""
        if self.spatial:
            out, channels, height, width = shape
            return matrices.reshape(channels, height, out, width).permute(2, 0, 1, 3)
        return fold(matrices, self.site.kind, shape)


class TrainedRankPruning:
    """Holds the linear maps of a model at low rank while any PyTorch loop trains it.

    ::

        trp = TrainedRankPruning(model)
        trp.attach(optimizer)
        ...  # train as ever
        outcome = trp.finish()

    A loop without ``torch.optim`` calls :meth:`before_step` and :meth:`after_step` around its update.
    Frozen weights, weights without gradients, biases and everything that is no linear map are left alone.
    float16, bfloat16, float32 and float64 weights. With DistributedDataParallel give the inner module; every process
    then does the same work. Sharded parameters (FSDP) are not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sites: Sequence[Site] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        energy: float = 0.98,
        period: int = 5,
        nuclear: float = 3e-4,
        mode: Mode = "channel",
    ) -> None:
        """``sites``, or patterns as :func:`eckart.arch.find_sites` takes them, choose the maps. The model stays as is.

        ``energy``: share of the squared singular values that each truncation keeps, in (0, 1). ``period``: optimizer
        steps from one truncation to the next, from 1. ``nuclear``: λ ≥ 0, the weight of the nuclear norm, in units
        of the gradient. ``mode``: how 2-D convolutions are read; ``spatial`` needs one group.

        Raises InputError for options out of range, and with every site that cannot be taken: embeddings,
        shared weights, grouped or 1-D convolutions in spatial mode.
        """
        faults = []
        if not isinstance(energy, (int, float)) or not 0 < energy < 1:
            faults.append(f"energy is a share in (0, 1); got {energy!r}")
        if not isinstance(period, int) or isinstance(period, bool) or period < 1:
            faults.append(f"period counts steps, an int of at least 1; got {period!r}")
        if not isinstance(nuclear, (int, float)) or not 0 <= nuclear < float("inf"):
            faults.append(f"nuclear is a number of at least 0; got {nuclear!r}")
        if mode not in ("channel", "spatial"):
            faults.append(unknown("mode", str(mode), ("channel", "spatial")))
        if faults:
            raise InputError(problems("trp", faults))
        found = trainable_sites(model, sites=sites, include=include, exclude=exclude, method="trp")
        if mode == "spatial" and (wrong := [s.name for s in found if s.kind == "conv" and _unspatial(model, s)]):
            raise InputError(
                problems(
                    "trp: mode='spatial' needs 2-D convolutions of one group; exclude these, or take mode='channel'",
                    wrong,
                )
            )
        self.model = model
        self.energy, self.period, self.nuclear, self.mode = float(energy), period, float(nuclear), mode
        self.steps = 0
        """Optimizer steps seen."""
        self._parts = {s.name: _Part(s, mode == "spatial" and s.kind == "conv" and _is_large(model, s)) for s in found}
        self._handles: list[Any] = []

    @property
    def sites(self) -> tuple[Site, ...]:
        """The maps that are held at low rank."""
        return tuple(part.site for part in self._parts.values())

    def ranks(self) -> dict[str, int]:
        """The rank of each site after its last truncation, the largest of its slices; full before the first."""
        return {
            name: max(self._full(part) if S is None else max(len(S), 1) for S in part.S)
            for name, part in self._parts.items()
        }

    # ---- training

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Runs :meth:`before_step` and :meth:`after_step` around every ``optimizer.step()`` until :meth:`detach`.

        Raises InputError where it is attached already, and where the optimizer lacks a trainable weight.
        """
        if self._handles:
            raise InputError("trp is attached already; call detach() first.")
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        weights = {name: parameter_of(self.model, part.site) for name, part in self._parts.items()}
        missing = [name for name, weight in weights.items() if weight.requires_grad and id(weight) not in owned]
        if missing:
            raise InputError(problems("the optimizer does not train these sites; exclude or freeze them", missing))
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self.before_step()),
            optimizer.register_step_post_hook(lambda *_: self.after_step()),
        ]

    def detach(self) -> None:
        """Lets go of the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def before_step(self) -> None:
        """Adds λ U_k V_kᵀ to the gradients of the weights that were truncated after the step before."""
        for part in self._parts.values():
            weight = parameter_of(self.model, part.site)
            if weight.grad is None:
                continue
            part.moved = True
            if part.pending and self.nuclear > 0:
                rows = [_subgradient(W, U, S) for W, U, S in zip(part.matrices(weight), part.U, part.S, strict=True)]
                weight.grad.add_(part.weight(torch.stack(rows), weight.shape), alpha=self.nuclear)
            part.pending = False

    @torch.no_grad()
    def after_step(self) -> None:
        """Counts the step; on every ``period``-th truncates the weights that got a gradient.

        Raises NotFiniteError, naming the site, for NaN or Inf in a weight.
        """
        self.steps += 1
        if self.steps % self.period == 0:
            for part in self._parts.values():
                if part.moved:
                    self._truncate(part)

    def _truncate(self, part: _Part) -> None:
        weight = parameter_of(self.model, part.site)
        cut = []
        for i, W in enumerate(part.matrices(weight)):
            wide = W.shape[0] <= W.shape[1]
            try:
                found = truncate(W if wide else W.T, self.energy, part.U[i], seed=self.steps)
            except NotFiniteError:
                raise NotFiniteError(f"{part.site.name} holds NaN or Inf after step {self.steps}.") from None
            part.U[i], part.S[i] = found.U, found.S
            cut.append(found.matrix if wide else found.matrix.T)
        weight.copy_(part.weight(torch.stack(cut), weight.shape))
        part.moved, part.pending = False, True

    # ---- the end

    def finish(self, rank: Rank | None = None, *, threshold: float | None = None) -> Outcome:
        """Puts factored layers in the place of the weights, in the model itself, and lets go of the optimizer.

        By default at the rank of the last truncation, or, where a weight has moved since, at the rank that the next
        would have left. ``rank`` gives it as a count, as a share of the dense parameters or as an energy;
        ``threshold`` keeps the singular values of at least that size. All slices of a site get the largest
        rank among them. Sites whose factors would not be smaller, that are frozen, or that never got a
        gradient, stay as they are. An SVD in float64 per site. The new layers have new parameters: an optimizer that
        trains on has to be made anew.

        Spatial sites become an ``nn.Sequential`` of two nn.Conv2d, which torch saves and :func:`eckart.save` does not
        know; all others the layers of :mod:`eckart.layers`.

        Raises InputError where both, or a threshold that is not positive, are given; NotFiniteError as above.
        """
        if rank is not None and threshold is not None:
            raise InputError("trp: finish takes a rank or a threshold, not both.")
        if threshold is not None and not 0 < threshold < float("inf"):
            raise InputError(f"trp: threshold is a positive singular value; got {threshold!r}.")
        started, before = time.perf_counter(), model_size(self.model)
        self.detach()
        layers = [self._replace(part, rank, threshold) for part in self._parts.values()]
        return outcome_of(
            layers,
            before,
            model_size(self.model),
            method="trp",
            budget=_words(rank, threshold, self.energy),
            started=started,
        )

    @torch.no_grad()
    def _replace(self, part: _Part, rank: Rank | None, threshold: float | None) -> LayerOutcome:
        site, weight = part.site, parameter_of(self.model, part.site)
        matrices = part.matrices(weight)
        shape = (matrices.shape[1], matrices.shape[2])
        dense = layer_outcome(site, weight.element_size(), None, shape)
        if not weight.requires_grad or not (part.moved or part.S[0] is not None):
            return dense
        if not torch.isfinite(matrices).all():
            raise NotFiniteError(f"{site.name} holds NaN or Inf.")
        found = [truncated_svd(W, min(shape)) for W in matrices]
        k = 1
        for svd, S in zip(found, part.S, strict=True):
            if rank is not None:
                k = max(k, chosen_rank(svd.S, shape, rank))
            elif threshold is not None:
                k = max(k, int(svd.S.ge(threshold).sum()))
            elif part.moved or S is None:
                k = max(k, chosen_rank(svd.S, shape, Rank(energy=self.energy)))
            else:
                k = max(k, len(S))
        if not pays(k, shape):
            return dense
        lost = sum(float(svd.S[k:].square().sum()) for svd in found)
        whole = sum(float(svd.S.square().sum()) for svd in found)
        outcome = layer_outcome(site, weight.element_size(), k, shape, lost / whole if whole else 0.0)
        factors = [(svd.U[:, :k] * svd.S[:k].sqrt(), svd.S[:k].sqrt()[:, None] * svd.Vh[:k]) for svd in found]
        if part.spatial:
            set_module(self.model, site.name, _column_then_row(get_module(self.model, site.name), *factors[0]))
            return outcome
        bias = getattr(get_module(self.model, site.name), "bias", None) if site.bias else None
        biases: Sequence[Tensor | None] = [None] * site.slices
        if bias is not None:
            biases = list(bias.reshape(site.slices, -1))
        put_factors(
            self.model, site, [LowRank(a=a, b=b, bias=bias) for (b, a), bias in zip(factors, biases, strict=True)]
        )
        return outcome

    # ---- resume

    def state_dict(self) -> dict[str, Tensor | int]:
        """What an exact resume needs besides the model and the optimizer: ints and tensors, flat by name."""
        state: dict[str, Tensor | int] = {"steps": self.steps}
        for name, part in self._parts.items():
            state |= {f"{name}:moved": int(part.moved), f"{name}:pending": int(part.pending)}
            for i, (U, S) in enumerate(zip(part.U, part.S, strict=True)):
                if U is not None and S is not None:
                    state |= {f"{name}:{i}:U": U, f"{name}:{i}:S": S}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Takes up what :meth:`state_dict` gave. Raises MismatchError where it is of other sites or shapes."""
        needed = {"steps"} | {f"{name}:{what}" for name in self._parts for what in ("moved", "pending")}
        possible = {
            f"{name}:{i}:{what}" for name, p in self._parts.items() for i in range(p.site.slices) for what in "US"
        }
        faults = [f"{key} is missing" for key in sorted(needed - set(state))]
        faults += [f"{key} is of no site of this model" for key in sorted(set(state) - needed - possible)]
        for name, part in self._parts.items():
            faults += [
                f"{key} has {len(U)} rows, expected {self._full(part)}"
                for i in range(part.site.slices)
                if isinstance(U := state.get(key := f"{name}:{i}:U"), Tensor) and len(U) != self._full(part)
            ]
        if faults:
            raise MismatchError(problems("the state of trp does not fit", faults))
        self.steps = int(state["steps"])
        for name, part in self._parts.items():
            device = parameter_of(self.model, part.site).device
            part.moved, part.pending = bool(state[f"{name}:moved"]), bool(state[f"{name}:pending"])
            for i in range(part.site.slices):
                U, S = state.get(f"{name}:{i}:U"), state.get(f"{name}:{i}:S")
                part.U[i] = U.to(device, copy=True) if isinstance(U, Tensor) else None
                part.S[i] = S.to(device, copy=True) if isinstance(S, Tensor) else None

    def _full(self, part: _Part) -> int:
        """The smaller side of the matrices of a site."""
        if not part.spatial:
            return part.site.full_rank
        out, channels, height, width = parameter_of(self.model, part.site).shape
        return min(channels * height, out * width)


def _unspatial(model: nn.Module, site: Site) -> bool:
    return site.slices > 1 or not isinstance(get_module(model, site.name), nn.Conv2d)


def _is_large(model: nn.Module, site: Site) -> bool:
    return parameter_of(model, site).shape[2:].numel() > 1


def _subgradient(W: Tensor, U: Tensor | None, S: Tensor | None) -> Tensor:
    """U_k V_kᵀ of a truncated W (m, n), from its basis on the smaller side: V_kᵀ = S⁻¹ U_kᵀ W."""
    if U is None or S is None:
        return torch.zeros_like(W)
    A = (W if W.shape[0] <= W.shape[1] else W.T).to(U.dtype)
    found = (U / S) @ (U.T @ A)
    return (found if W.shape[0] <= W.shape[1] else found.T).to(W.dtype)


def _column_then_row(original: nn.Module, left: Tensor, right: Tensor) -> nn.Sequential:
    """Two convolutions, height × 1 and 1 × width, with the product of ``left`` (in · height, k) and ``right``
    (k, out · width) as their joint kernel. The second carries the bias; padding and strides are split."""
    if not isinstance(original, nn.Conv2d):
        raise InputError(f"a {type(original).__name__} has no columns and rows.")
    k = left.shape[1]
    height, width = original.kernel_size
    weight = original.weight

    def half(inputs: int, outputs: int, axis: int, bias: bool) -> nn.Conv2d:
        def only(values: Any, other: int) -> Any:
            return values if isinstance(values, str) else tuple(v if i == axis else other for i, v in enumerate(values))

        return nn.Conv2d(
            inputs,
            outputs,
            only(original.kernel_size, 1),
            stride=only(original.stride, 1),
            padding=only(original.padding, 0),
            dilation=only(original.dilation, 1),
            bias=bias,
            device=weight.device,
            dtype=weight.dtype,
        )

    column = half(original.in_channels, k, 0, False)
    row = half(k, original.out_channels, 1, original.bias is not None)
    column.weight.copy_(left.T.reshape(k, original.in_channels, height, 1))
    row.weight.copy_(right.reshape(k, original.out_channels, 1, width).permute(1, 0, 2, 3))
    if original.bias is not None and row.bias is not None:
        row.bias.copy_(original.bias)
    return nn.Sequential(column, row)


def _words(rank: Rank | None, threshold: float | None, energy: float) -> str:
    if threshold is not None:
        return f"singular values of at least {threshold:g}"
    return f"energy {energy:g}, as in training" if rank is None else rank_words(rank)


def _run_claim() -> Verdict:
    model = untrained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    trp = TrainedRankPruning(model)
    trp.attach(optimizer)
    train(model, optimizer, steps=1000, seed=0)
    trained = held_out_loss(model)
    outcome = trp.finish()
    ranks = {layer.site.name: layer.rank for layer in outcome.layers if layer.form == "lowrank"}
    found, plain = held_out_loss(model), held_out_loss(plainly_trained())
    cut = held_out_loss(truncated(plainly_trained(), ranks))
    return Verdict(
        held=found - trained < 0.1 * (cut - plain) and found < cut,
        figures={
            "trp: loss before the cut": trained,
            "trp: loss after the cut": found,
            "plain: loss before the cut": plain,
            "plain: loss after the cut": cut,
            "share of the parameters": outcome.sites_after.parameters / outcome.sites_before.parameters,
        },
        note="held-out nats per byte; both cut to the ranks " + ", ".join(f"{n} {k}" for n, k in ranks.items()),
    )


METHOD = Technique(
    name="trp",
    summary="training that keeps coming back to low rank, for a cut that costs nothing at the end",
    paper=Paper(
        authors="Y. Xu, Y. Li, S. Zhang, W. Wen, B. Wang, Y. Qi, Y. Chen, W. Lin, H. Xiong",
        title="TRP: Trained Rank Pruning for Efficient Deep Neural Networks",
        year=2020,
        link="https://arxiv.org/abs/2004.14566",
    ),
    entry=TrainedRankPruning,
    claim=Claim(
        statement="Cut to the ranks that TRP found, the loss of the network trained with it rises less than a tenth as "
        "much as that of the plainly trained one, and ends lower; same data, steps and first weights.",
        source="abstract: the trained network can be approximated with negligible performance loss",
        run=_run_claim,
    ),
)
