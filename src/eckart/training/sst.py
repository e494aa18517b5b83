r"""Sparse Spectral Training: all singular values at every step, and a few pairs of singular vectors at a time.

*What it does.* Puts U Σ Vᵀ in the place of each chosen weight. All of Σ is trained, and r columns of U and V, which are
drawn anew every ``period`` steps, large singular values more often. Optimizers keep state for what is trained only: r
(m + n) + k numbers of k (m + n + 1). At the end the layers are the ordinary ones that they were.

*Formula.* W = U Σ Vᵀ with k = min(m, n). A column is drawn with p_i ∝ ½ (1/k + |σ_i| / Σ_j |σ_j|), r of them without
replacement. With D = ∂L/∂W, gradients are "enhanced": ∂u_i = D v_i and ∂v_i = Dᵀ u_i, without the factor σ_i that the
chain rule has, so that directions of small σ_i turn as fast as others; ∂σ_i = u_iᵀ D v_i. After each step columns get
length 1 again. After a drawing, what the optimizer remembers of U and V is dropped, and for ``warmup`` steps its moves
are scaled by (t + 1)/(warmup + 1). Every ``svd_every`` drawings U, Σ, V come from a new SVD of W, which makes columns
orthogonal again; then Σ starts anew, too.

*Cost.* Forward and backward pass of a layer are those of two factors with k + r columns: k (m + n) instead of m n
multiply-adds, twice as many for a square matrix. Memory of the weights rises alike; that of gradients and optimizer
state falls to r (m + n) + k. An SVD in float64 on the CPU every ``period`` × ``svd_every`` steps.

*When it does not help.* Where memory is that of the weights, since U and V are larger than W; and a rank of a quarter
of a square matrix's side still takes half of its state. On the byte model of the claim (120 steps from random weights,
rank 8 of 96) it ends at 2.54 nats per byte, ReLoRA* at 2.57, LoRA at 2.67, all weights at 2.30. The rate is the best of
0.01, 0.03 and 0.1 for the other two; at 0.01 it is 2.78, 2.83 and 2.91, at 0.1 2.48, 2.67 and 2.84. One seed. A run
took 1.3 times as long as LoRA's. Drawings every 10 to 60 steps ended within 0.08 of each other there, the frequent ones
best; on a Llama of width 128 after 300 steps, ``period`` 200 ended at 2.21 and 40 at 2.26.

*Departs from the paper in.* Paper and repository were out of reach: p_i, enhanced gradients, resets and the warm-up
are as remembered of the paper, unchecked; ``period`` and ``svd_every`` (as many drawings as it takes to see k columns)
are Eckart's. Scaling the moves works with any optimizer, but where moments decay (Adam), they fill up during the warm-
up as without it. What the optimizer remembers is dropped for all columns of a layer, also those that are drawn again:
Adam's step count is one per tensor. Hyperbolic layers are left out.

*Reference.* J. Zhao, Y. Zhang, X. Li, H. Liu, C. V. Cannistraci, “Sparse Spectral Training and Inference on Euclidean
and Hyperbolic Neural Networks”, ICML 2025, https://arxiv.org/abs/2405.15481.

*Example.*

>>> import torch
>>> from torch import nn
>>> generator = torch.Generator().manual_seed(0)
>>> model = nn.Sequential(nn.Linear(8, 6, bias=False))
>>> X, A = torch.randn(300, 8, generator=generator), torch.randn(8, 6, generator=generator)
>>> engine = SparseSpectralTraining(model, rank=2, period=20, warmup=2)
>>> optimizer = torch.optim.Adam(model.parameters(), lr=0.05)  # afterwards: it holds the trained columns
>>> engine.attach(optimizer)
>>> for _ in range(400):
...     optimizer.zero_grad()
...     (model(X) - X @ A).square().mean().backward()
...     optimizer.step()
>>> engine.finish()
>>> type(model[0]).__name__, bool((model[0].weight - A.T).norm() < 0.1 * A.norm())  # of full rank, two at a time
('Linear', True)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from eckart.arch import check_finite, get_module, set_module, site_matrices
from eckart.errors import EckartError, InputError, MismatchError, NotFiniteError, problems
from eckart.evidence.trial import held_out_loss, train, untrained
from eckart.linalg import truncated_svd
from eckart.records import Claim, Paper, Site, Technique, Verdict
from eckart.training.targets import parameter_of, trainable_sites


class _Product(torch.autograd.Function):
    """x (N, n) → x Wᵀ (N, m), with the gradients that the paper calls enhanced."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, v: Tensor, s: Tensor, U: Tensor, V: Tensor, active: Tensor) -> Tensor:
        h, a = x @ V, x @ v
        ctx.save_for_backward(x, u, v, s, U, V, active, h, a)
        return (h * s) @ U.T + (a * s[active]) @ u.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, v, s, U, V, active, h, a = ctx.saved_tensors
        g, b = dy @ U, dy @ u
        dx = (g * s) @ V.T + (b * s[active]) @ v.T if ctx.needs_input_grad[0] else None
        ds = (g * h).sum(0).index_add(0, active, (b * a).sum(0))
        return dx, dy.T @ a, x.T @ b, ds, None, None, None


class SpectralLinear(nn.Module):
    """U Σ Vᵀ x + bias while it is trained; :meth:`SparseSpectralTraining.finish` takes it out again.

    Parameters: ``u`` (m, r), ``v`` (n, r), ``s`` (k,), ``bias`` as before. Buffers: ``U`` (m, k) and ``V`` (n, k), with
    zeros in the columns ``active`` (r,), whose values are in ``u`` and ``v``.
    """

    U: Tensor
    V: Tensor
    active: Tensor
    bias: nn.Parameter | None

    def __init__(self, original: nn.Module, weight: Tensor, rank: int) -> None:
        """``weight`` (m, n) is what ``original`` computes with; ``rank`` r from 1 to min(m, n)."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._original = [original]  # in a list: no child, so that its weight is no parameter of the model
        stored = original.get_parameter("weight")
        self._transposed = stored.shape != weight.shape or type(original).__name__ == "Conv1D"
        self._full = min(weight.shape)
        like: dict[str, Any] = {"dtype": stored.dtype, "device": stored.device}
        self.u = nn.Parameter(torch.empty(self.out_features, rank, **like))
        self.v = nn.Parameter(torch.empty(self.in_features, rank, **like))
        self.s = nn.Parameter(torch.empty(self._full, **like))
        bias = getattr(original, "bias", None)
        self.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
        self.register_buffer("U", torch.empty(self.out_features, self._full, **like))
        self.register_buffer("V", torch.empty(self.in_features, self._full, **like))
        self.register_buffer("active", torch.arange(rank, device=stored.device))
        self.decompose(weight)
        original.weight = nn.Parameter(torch.empty(0, **like))  # the memory is needed elsewhere

    @property
    def rank(self) -> int:
        """r, the columns that are trained at a time."""
        return self.u.shape[1]

    @property
    def full_rank(self) -> int:
        """k = min(m, n)."""
        return self._full

    def forward(self, x: Tensor) -> Tensor:
        tensors = [self.u, self.v, self.s, self.U, self.V]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, *tensors = (t.to(dtype) for t in (x, *tensors))
        y: Tensor = _Product.apply(x.reshape(-1, self.in_features), *tensors, self.active)  # type: ignore[no-untyped-call]
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def dense(self) -> Tensor:
        """W (m, n), in float64."""
        U, V = self._whole()
        return (U.double() * self.s.double()) @ V.double().T

    def _whole(self) -> tuple[Tensor, Tensor]:
        return self.U.index_copy(1, self.active, self.u.detach()), self.V.index_copy(1, self.active, self.v.detach())

    @torch.no_grad()
    def decompose(self, weight: Tensor) -> None:
        """Takes U, Σ, V from an SVD of a weight (m, n); the trained columns are at the same places as before."""
        svd = truncated_svd(weight, self._full, method="full")
        self.U.copy_(svd.U)
        self.V.copy_(svd.Vh.T)
        self.s.copy_(svd.S)
        self._take(self.active)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Puts the trained columns back and takes others, in place."""
        U, V = self._whole()
        self.U.copy_(U)
        self.V.copy_(V)
        size = self.s.detach().double().abs().cpu()
        total = float(size.sum())
        share = size / total if total > 0 else torch.zeros_like(size)
        drawn = torch.multinomial(1 / self._full + share, self.rank, replacement=False, generator=generator)
        self._take(drawn.sort().values.to(self.active.device))

    def _take(self, active: Tensor) -> None:
        self.active.copy_(active)
        self.u.copy_(self.U[:, active])
        self.v.copy_(self.V[:, active])
        self.U[:, active] = 0
        self.V[:, active] = 0

    @torch.no_grad()
    def normalise(self) -> None:
        """Gives the trained columns length 1."""
        for factor in (self.u, self.v):
            factor.div_(torch.linalg.vector_norm(factor, dim=0).clamp_min(torch.finfo(factor.dtype).tiny))

    def to_dense(self) -> nn.Module:
        """The module that was here, with the weight as trained."""
        original, weight = self._original[0], self.dense().to(self.u.dtype)
        original.weight = nn.Parameter(weight.T.contiguous() if self._transposed else weight)
        if self.bias is not None:
            original.bias = self.bias
        return original

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank} of {self._full}, bias={self.bias is not None}"
        )


class SparseSpectralTraining:
    """Trains the linear maps of a model in their singular vectors, a few at a time, in any PyTorch loop.

    ::

        engine = SparseSpectralTraining(model, rank=32)  # replaces weights: make the optimizer afterwards
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        engine.attach(optimizer)
        for batch in data:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        engine.finish()

    nn.Linear and ``Conv1D`` of transformers. Any optimizer of torch.optim but LBFGS, and others that make their state
    at the first step. Gradients of the loss are once differentiable. Weight decay acts on Σ only, since columns have
    length 1. Under DistributedDataParallel give the inner module; all processes draw alike.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int | float,
        sites: Sequence[Site] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        period: int = 200,
        svd_every: int | None = None,
        warmup: int = 20,
        seed: int = 0,
    ) -> None:
        """Puts the SVD in the place of the chosen weights; outputs stay the same to rounding.

        ``rank``: r, an int of at least 1, or a share of k = min(m, n) in (0, 1] (a float). ``sites``, or patterns as
        :func:`eckart.arch.find_sites` takes them, choose the maps. ``period``: steps between drawings. ``svd_every``:
        drawings between SVDs, None for ⌈k/r⌉. ``warmup``: steps after a drawing in which moves are shortened; below
        ``period``. ``seed`` draws the columns. One SVD per map.

        Raises InputError for options out of range, and with every site that cannot be taken: convolutions, embeddings,
        fused experts, frozen or shared weights, one with k below ``rank``; NotFiniteError for NaN or Inf. Nothing is
        changed then.
        """
        faults = []
        if (
            isinstance(rank, bool)
            or not isinstance(rank, (int, float))
            or not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1)
        ):
            faults.append(f"rank is an int of at least 1, or a share (float) in (0, 1]; got {rank!r}")
        for name, value, least in (("period", period, 1), ("warmup", warmup, 0), ("seed", seed, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                faults.append(f"{name} is an int of at least {least}; got {value!r}")
        if svd_every is not None and (not isinstance(svd_every, int) or isinstance(svd_every, bool) or svd_every < 1):
            faults.append(f"svd_every counts drawings, an int of at least 1, or None; got {svd_every!r}")
        if not faults and warmup >= period:
            faults.append(f"warmup has to end before the next drawing: below period = {period}; got {warmup}")
        if faults:
            raise InputError(problems("sparse spectral training", faults))
        found = trainable_sites(model, sites=sites, include=include, exclude=exclude, method="sparse spectral training")
        wrong = [f"{s.name}: {s.kind}, not a linear layer" for s in found if s.kind not in ("linear", "conv1d")]
        taken = [s for s in found if s.kind in ("linear", "conv1d")]
        wrong += [f"{s.name}: its weight is frozen" for s in taken if not parameter_of(model, s).requires_grad]
        if isinstance(rank, int):
            wrong += [f"{s.name}: rank {rank} is above its {s.full_rank}" for s in taken if rank > s.full_rank]
        if wrong:
            raise InputError(problems("sparse spectral training cannot train these sites; exclude them", wrong))
        check_finite(model, found)
        self.model = model
        self.period, self.svd_every, self.warmup = period, svd_every, warmup
        self.steps = 0
        """Optimizer steps seen."""
        self._generator = torch.Generator().manual_seed(seed)
        self._handles: list[Any] = []
        self._before: dict[str, list[Tensor]] = {}
        self._sites = {site.name: site for site in found}
        for site in found:
            r = rank if isinstance(rank, int) else max(1, int(rank * site.full_rank))
            layer = SpectralLinear(get_module(model, site.name), site_matrices(model, site)[0]["weight"], r)
            layer.draw(self._generator)
            set_module(model, site.name, layer)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The maps that are trained in their singular vectors."""
        return tuple(self._sites.values())

    def active(self) -> dict[str, list[int]]:
        """The columns that each site trains now, rising."""
        return {name: self._layer(name).active.tolist() for name in self._sites}

    # ---- training

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Runs :meth:`before_step` and :meth:`after_step` around every ``optimizer.step()`` until :meth:`detach`.

        Raises InputError where it is attached already, the optimizer does not hold the trained columns, or is LBFGS.
        """
        if self._handles:
            raise InputError("sparse spectral training is attached already; call detach() first.")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise InputError("LBFGS remembers all parameters in one vector, which cannot be reset in part.")
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [n for n in self._sites if not all(id(p) in owned for p in self._trained(n))]
        if missing:
            heading = "the optimizer lacks u, v or s of these sites; make it after SparseSpectralTraining(model)"
            raise InputError(problems(heading, missing))
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self.before_step()),
            optimizer.register_step_post_hook(lambda *_: self.after_step(optimizer)),
        ]

    def detach(self) -> None:
        """Lets go of the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before_step(self) -> None:
        """During a warm-up, remembers where the step starts."""
        if self.steps % self.period < self.warmup:
            self._before = {n: [p.detach().clone() for p in self._trained(n)] for n in self._sites}

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Shortens the move during a warm-up, normalises, and every ``period`` steps draws anew.

        Raises NotFiniteError where Σ has NaN or Inf when columns are to be drawn.
        """
        scale = (self.steps % self.period + 1) / (self.warmup + 1)
        for name in self._sites:
            trained = self._trained(name)
            for p, start in zip(trained, self._before.get(name, ()), strict=False):
                p.copy_(start + scale * (p - start))
            self._layer(name).normalise()
        self._before = {}
        self.steps += 1
        if self.steps % self.period == 0:
            self._draw(optimizer)

    def _draw(self, optimizer: torch.optim.Optimizer) -> None:
        layers = {name: self._layer(name) for name in self._sites}
        bad = [name for name, layer in layers.items() if not bool(torch.isfinite(layer.dense()).all())]
        if bad:
            raise NotFiniteError(problems("NaN or Inf in trained weights", bad))
        for name, layer in layers.items():
            u, v, s = self._trained(name)
            forgotten = [u, v]
            every = self.svd_every or math.ceil(layer.full_rank / layer.rank)
            if self.steps // self.period % every == 0:
                layer.decompose(layer.dense())
                forgotten.append(s)
            layer.draw(self._generator)
            for p in forgotten:
                optimizer.state.pop(p, None)

    # ---- the end

    def finish(self) -> None:
        """Lets go of the optimizer and puts the original modules back, with the weights as trained.

        Weights are new parameters, biases the same; an optimizer that trains on is made anew.
        """
        self.detach()
        for name in self._sites:
            set_module(self.model, name, self._layer(name).to_dense())

    # ---- resume

    def state_dict(self) -> dict[str, Tensor | int]:
        """What an exact resume needs besides the model and the optimizer."""
        return {"steps": self.steps, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Takes up what :meth:`state_dict` gave.

        In this order: ``SparseSpectralTraining(model, …)`` with the same options, this, ``model.load_state_dict``, the
        optimizer, its ``load_state_dict``, :meth:`attach`. Raises InputError once it is attached, MismatchError for
        something else than such a state.
        """
        if self._handles:
            raise InputError("sparse spectral training is attached to an optimizer; load its state before that.")
        steps, generator = state.get("steps"), state.get("generator")
        if set(state) != {"steps", "generator"} or not isinstance(steps, int) or not isinstance(generator, Tensor):
            raise MismatchError(
                "the state of sparse spectral training has steps (an int) and generator (a tensor); "
                f"got {sorted(state)}."
            )
        self.steps = steps
        self._generator.set_state(generator.cpu().clone())

    def _layer(self, name: str) -> SpectralLinear:
        layer = get_module(self.model, name)
        if not isinstance(layer, SpectralLinear):
            raise EckartError(f"{name} is a {type(layer).__name__} now; its singular vectors are gone.")
        return layer

    def _trained(self, name: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        layer = self._layer(name)
        return layer.u, layer.v, layer.s


# ---- the claim

RANK, STEPS, PERIOD, RATE = 8, 120, 20, 3e-2


class _Adapted(nn.Module):
    """A frozen weight with a trained low-rank addend B A, B zero at first: the layer of LoRA and ReLoRA."""

    def __init__(self, layer: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.bias = layer.bias
        self.register_buffer("weight", layer.weight.detach().clone())
        self.b = nn.Parameter(torch.zeros(layer.out_features, RANK))
        self.a = nn.Parameter(torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.get_buffer("weight"), self.bias) + linear(linear(x, self.a), self.b)

    @torch.no_grad()
    def merge(self, generator: torch.Generator) -> None:
        self.get_buffer("weight").add_(self.b @ self.a)
        self.b.zero_()
        self.a.copy_(torch.randn(self.a.shape, generator=generator) / self.a.shape[1] ** 0.5)


def _adapted(*, merging: bool) -> float:
    """Held-out loss with adapters of the same rank; ``merging``: merged and begun anew every PERIOD steps."""
    model, generator = untrained(), torch.Generator().manual_seed(0)
    layers = []
    for name in ("mix", "up", "down", "head"):
        layers.append(_Adapted(model.get_submodule(name), generator))  # type: ignore[arg-type]
        set_module(model, name, layers[-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    taken = 0

    def merge(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if merging and taken % PERIOD == 0:
            for layer in layers:
                layer.merge(generator)
                optimizer.state.pop(layer.a)
                optimizer.state.pop(layer.b)

    optimizer.register_step_post_hook(merge)
    train(model, optimizer, STEPS, seed=0)
    return held_out_loss(model)


def _spectral(rank: int) -> float:
    model = untrained()
    engine = SparseSpectralTraining(model, rank=rank, period=PERIOD, warmup=PERIOD // 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    engine.attach(optimizer)
    train(model, optimizer, STEPS, seed=0)
    engine.finish()
    return held_out_loss(model)


def _run_claim() -> Verdict:
    full = untrained()
    train(full, torch.optim.AdamW(full.parameters(), lr=RATE, weight_decay=0.0), STEPS, seed=0)
    figures = {
        "all weights": held_out_loss(full),
        "SST": _spectral(RANK),
        "ReLoRA*": _adapted(merging=True),
        "LoRA": _adapted(merging=False),
    }
    return Verdict(
        held=figures["SST"] < min(figures["ReLoRA*"], figures["LoRA"]),
        figures=figures,
        note=f"held-out nats per byte after {STEPS} steps from random weights, rank {RANK} of 96 to 128, AdamW at 0.03",
    )


METHOD = Technique(
    name="sst",
    summary="trains all singular values and, at a time, a few drawn singular vectors: full rank, little state",
    paper=Paper(
        authors="J. Zhao, Y. Zhang, X. Li, H. Liu, C. V. Cannistraci",
        title="Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks",
        year=2025,
        link="https://arxiv.org/abs/2405.15481",
    ),
    entry=SparseSpectralTraining,
    claim=Claim(
        statement="Trained from random weights at the same rank, its loss is below that of LoRA and of ReLoRA*.",
        source="abstract, and the tables on OPT and LLaMA",
        run=_run_claim,
    ),
)
