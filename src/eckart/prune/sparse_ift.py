r"""Sparse-IFT: larger sparse layers in the place of dense ones, for as many multiply-adds.

*What it does.* Replaces linear layers and convolutions, before training from scratch, by layers with more weights of
which a share s is zero, so that the multiply-adds stay what they were: wider ones, parallel ones, two in a row, or a
sparse one beside two thin dense ones. Masks that move during training, as RigL's, can then search among more weights.

*Formula.* For a layer of n inputs, k² places of the kernel (1 for linear layers), m outputs and sparsity s:

========== =========================================================== ==================================
wide       every hidden width × √(1/(1−s))                              density: old / new number of weights
parallel   y = Σ_i norm(W_i x), 1/(1−s) branches                        1−s in each
factorized y = V φ(norm(U x)), d = ⌈k²nm / ((1−s)(k²n + m))⌉ between    ≈ 1−s in both
doped      y = S x + V U x, rank r = ⌊s k²nm / (k²n + m)⌋               ≈ 1−s in S; U and V are dense
========== =========================================================== ==================================

*Cost.* The multiply-adds of the dense layer, in theory. Stored dense, as frameworks do, a wide or parallel layer costs
1/(1−s) times the memory and time of the dense one in training; parallel and doped layers become one dense layer of the
old size with :meth:`SparseIFT.bake`, linear factorized ones too.

*When it does not help.* Only some of the family do. On the claim's network (200 steps, mean of two seeds, nats per
byte, three maps transformed; dense 2.208): parallel with batch norms and s = 0.5 2.198 with RigL and 2.181 with
random masks held fixed, s = 0.75 2.211 and 2.186; factorized with norm and ReLU, s = 0.75, 2.207 and 2.192, but without
the norm 2.26 to 2.30; doped 2.24 to 2.28, worse than dense throughout
(factorized ones measured with PyTorch's plain start of V, smaller than the one used now).
Moving the masks did not pay in so few steps, and nothing of it is faster without sparse kernels.

*Departs from the paper in.* Wide models are exactly as dear as before: their first and last layers are sparse, too,
by the root of s, where the paper leaves them dense and wider. The densities fill the budget of the old layer to the
last weight, where the authors' code takes s as it is and a rounded rank. Branches get a batch norm each
and factorized layers a batch norm and ReLU in the middle for convolutions, as in the authors' code for ResNet; linear
layers get neither unless asked for, so that tokens work. Weights start with the variance of PyTorch's default divided
by the density, so that outputs start as large as a dense layer's; weight decay is the optimizer's (their code adds the
norm of V U to the loss). Parallel needs 1/(1−s) to be a whole number.

*Reference.* V. Thangarasa, S. Saxena, A. Gupta, S. Lie, “Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing
Training Efficiency”, 2023, https://arxiv.org/abs/2303.11525.

*Example.*

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
>>> ift = SparseIFT(model, "doped", sparsity=0.75, include=["0"])
>>> masks = ift.masks()  # random; keep_zero holds them, RigL moves them
>>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if "0." in name]
[('0.sparse.weight', (32, 64)), ('0.sparse.bias', (32,)), ('0.a.weight', (16, 64)), ('0.b.weight', (32, 16))]
>>> masks.kept() + 16 * (64 + 32) == 64 * 32
True
>>> masks.apply(model)
>>> x = torch.randn(5, 64)
>>> before = model(x)
>>> ift.bake(), bool(torch.allclose(model(x), before, atol=1e-5)), model[0]
(('0',), True, Linear(in_features=64, out_features=32, bias=True))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eckart.arch import find_sites, get_module, set_module
from eckart.errors import InputError, problems, unknown
from eckart.evidence.trial import held_out_loss, train, untrained
from eckart.prune.masks import MaskSet
from eckart.prune.rigl import rigl_training
from eckart.prune.schedule import Schedule
from eckart.records import Claim, Paper, Technique, Verdict

TRANSFORMATIONS = ("wide", "parallel", "factorized", "doped")

Layer = nn.Linear | nn.Conv2d

POINTWISE = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU),
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
"""What may stand between the layers of a model that becomes wider: it works for any width."""


class SparseIFT:
    """Transforms the layers of a model before it is trained, and folds them afterwards where that is possible.

    ::

        ift = SparseIFT(model, "doped", sparsity=0.75)  # new parameters: make the optimizer afterwards
        optimizer = torch.optim.AdamW(model.parameters())
        engine = ift.rigl(steps=10_000)  # moves the masks; keep_zero(ift.masks(), …) would keep them
        engine.attach(optimizer)
        …
        engine.finish()
        ift.bake()

    nn.Linear and nn.Conv2d without groups. The model is trained from scratch: what its weights were is lost.
    """

    def __init__(
        self,
        model: nn.Module,
        transformation: str,
        *,
        sparsity: float = 0.75,
        norm: bool | None = None,
        activation: bool | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        head: bool = False,
        seed: int = 0,
    ) -> None:
        """Replaces the chosen layers by new ones with random weights.

        ``transformation``: "wide", "parallel", "factorized" or "doped". ``sparsity``: s in (0, 1). ``norm``: a batch
        norm in each parallel branch or in the middle of factorized layers; ``activation``: a ReLU in the middle of
        factorized layers; None means for convolutions only. ``include``, ``exclude``, ``head``: as
        :func:`eckart.arch.find_sites` takes them. "wide" takes an nn.Sequential (of nn.Sequentials) whole, without
        patterns. ``seed`` draws the weights.

        Raises InputError with all that is wrong: options, layers of other kinds, tied weights, models that cannot
        become wider. Nothing is changed then.
        """
        faults = (
            [] if transformation in TRANSFORMATIONS else [unknown("transformation", transformation, TRANSFORMATIONS)]
        )
        if not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
            faults.append(f"sparsity is a share in (0, 1); got {sparsity!r}")
        elif transformation == "parallel" and abs(1 / (1 - sparsity) - round(1 / (1 - sparsity))) > 1e-6:
            near = max(2, round(1 / (1 - sparsity)))
            faults.append(
                f"parallel needs 1/(1 − sparsity) branches, a whole number; got {sparsity!r}. "
                f"With {near} branches it is {1 - 1 / near:.6g}"
            )
        if norm and transformation not in ("parallel", "factorized"):
            faults.append(f"norm is of parallel and factorized layers; {transformation} has no place for it")
        if activation and transformation != "factorized":
            faults.append(f"activation is of factorized layers; {transformation} has no place for it")
        if transformation == "wide" and (include or exclude or head):
            faults.append("wide takes the whole model, without include, exclude or head")
        if faults:
            raise InputError(problems("Sparse-IFT", faults))
        self.model, self.transformation, self.sparsity = model, transformation, float(sparsity)
        self.densities: dict[str, float] = {}
        """The share of weights that stay, by parameter name: what is sparse."""
        self._kept: dict[str, int] = {}
        self._names: tuple[str, ...] = ()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if transformation == "wide":
                self._widen()
            else:
                self._replace(_sites(model, include, exclude, head), norm, activation)

    def _replace(self, names: Sequence[str], norm: bool | None, activation: bool | None) -> None:
        planned: dict[str, ParallelSparse | FactorizedSparse | DopedSparse] = {}
        for name in names:
            layer: Any = get_module(self.model, name)
            convolution = isinstance(layer, nn.Conv2d)
            with_norm = convolution if norm is None else norm
            if self.transformation == "parallel":
                planned[name] = ParallelSparse(layer, round(1 / (1 - self.sparsity)), with_norm)
            elif self.transformation == "doped":
                planned[name] = DopedSparse(layer, self.sparsity)
            else:
                middle = convolution if activation is None else activation
                planned[name] = FactorizedSparse(layer, self.sparsity, with_norm, middle)
        for name, new in planned.items():
            set_module(self.model, name, new)
            for child, kept in new.kept.items():
                self._register(f"{name}.{child}", kept)
        self._names = tuple(planned)

    def _register(self, name: str, kept: int) -> None:
        """Notes that so many entries of a parameter stay."""
        weight = self.model.get_parameter(name)
        self._kept[name] = kept
        self.densities[name] = kept / weight.numel()

    def _widen(self) -> None:
        layers = _wide_plan(self.model, math.sqrt(1 / (1 - self.sparsity)))
        for name, layer, new in layers:
            set_module(self.model, name, new)
            if isinstance(new, Layer) and isinstance(layer, Layer):
                with torch.no_grad():
                    new.weight.mul_(math.sqrt(new.weight.numel() / layer.weight.numel()))
                self._register(f"{name}.weight", layer.weight.numel())

    def masks(self, seed: int = 0) -> MaskSet:
        """Random masks of exactly the budget, uniform within each parameter: a start for RigL, or static."""
        generator = torch.Generator().manual_seed(seed)
        masks = {}
        for name, kept in self._kept.items():
            weight = self.model.get_parameter(name)
            mask = torch.zeros(weight.numel(), dtype=torch.bool)
            mask[torch.randperm(weight.numel(), generator=generator)[:kept]] = True
            masks[name] = mask.reshape(weight.shape).to(weight.device)
        return MaskSet(masks)

    def rigl(self, steps: int, *, interval: int = 100, fraction: float = 0.3) -> Schedule:
        """A :class:`Schedule` that moves the masks as RigL does, each parameter with its density, for 3/4 of the steps.

        ``interval``: steps between moves; ``fraction`` of the kept that are dropped at first, down to 0 along a
        cosine. The defaults are the paper's. ``attach`` it to the optimizer.
        """
        total = sum(self.model.get_parameter(name).numel() for name in self._kept)
        return rigl_training(
            self.model,
            keep=sum(self._kept.values()) / total,
            steps=steps,
            fraction=fraction,
            interval=interval,
            allocation=self.densities,
            include=[name.removesuffix(".weight") for name in self._kept],
            embeddings=True,
            head=True,
        )

    @torch.no_grad()
    def bake(self) -> tuple[str, ...]:
        """Puts a plain layer of the old size where outputs stay the same to rounding; gives the names of those.

        Parallel layers become the sum of their branches, with the running statistics of their batch norms folded in
        (so it is the model of ``eval()``), doped ones S + V U, factorized ones V U where nothing is between. Factorized
        layers with a norm or ReLU stay, and wide layers are plain already. Masks of folded layers mean nothing
        any more; the optimizer is made anew to train on.
        """
        folded = []
        for name in self._names:
            layer = get_module(self.model, name)
            if isinstance(layer, (ParallelSparse, FactorizedSparse, DopedSparse)) and (dense := layer.folded()):
                set_module(self.model, name, dense)
                folded.append(name)
        for key in [key for key in self._kept if any(key.startswith(f"{name}.") for name in folded)]:
            del self._kept[key], self.densities[key]
        self._names = tuple(name for name in self._names if name not in folded)
        return tuple(folded)


class ParallelSparse(nn.Module):
    """y = Σ_i norm_i(W_i x): branches of the shape of ``layer``, sparse by their number."""

    def __init__(self, layer: Layer, branches: int, norm: bool) -> None:
        super().__init__()
        last_bias = not norm and layer.bias is not None
        self.branches = nn.ModuleList(_like(layer, bias=last_bias and i == 0) for i in range(branches))
        self.norms = nn.ModuleList(_norm(layer, layer.weight.shape[0]) for _ in range(branches if norm else 0))
        total = layer.weight.numel()
        counts = [total // branches + (i < total % branches) for i in range(branches)]
        self.kept = {f"branches.{i}.weight": kept for i, kept in enumerate(counts)}

    def forward(self, x: Tensor) -> Tensor:
        outputs = [branch(x) for branch in self.branches]
        if self.norms:
            outputs = [norm(y) for norm, y in zip(self.norms, outputs, strict=True)]
        return torch.stack(outputs).sum(0)

    def folded(self) -> Layer:
        first: Any = self.branches[0]
        dense: Layer = _like(first, bias=bool(self.norms) or first.bias is not None)
        dense.weight.zero_()
        shift = dense.weight.new_zeros(dense.weight.shape[0]) if first.bias is None else first.bias.clone()
        for i, branch in enumerate(self.branches):
            weight: Any = branch.weight
            if self.norms:
                norm: Any = self.norms[i]
                gain = norm.weight / (norm.running_var + norm.eps).sqrt()
                weight = weight * gain.reshape(-1, *[1] * (weight.ndim - 1))
                shift += norm.bias - gain * norm.running_mean
            dense.weight.add_(weight)
        if dense.bias is not None:
            dense.bias.copy_(shift)
        return dense


class FactorizedSparse(nn.Module):
    """y = V φ(norm(U x)) with more directions between than a thin factorization would have, both sparse."""

    def __init__(self, layer: Layer, sparsity: float, norm: bool, activation: bool) -> None:
        super().__init__()
        n, m, total = layer.weight[0].numel(), layer.weight.shape[0], layer.weight.numel()
        width = math.ceil(total / ((1 - sparsity) * (n + m)))
        self.a = _like(layer, out=width, bias=False)
        self.norm = _norm(layer, width) if norm else nn.Identity()
        self.activation = nn.ReLU() if activation else nn.Identity()
        self.b = _pointwise(layer, width, m, bias=layer.bias is not None)
        first = total * n // (n + m)
        self.kept = {"a.weight": first, "b.weight": total - first}
        with torch.no_grad():
            for factor, kept in ((self.a, first), (self.b, total - first)):
                factor.weight.mul_(math.sqrt(factor.weight.numel() / kept))
            # Each default factor leaves 1/3 of the variance; a norm makes up for the first, a ReLU takes half.
            self.b.weight.mul_(math.sqrt((1 if norm else 3) * (2 if activation else 1)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.activation(self.norm(self.a(x))))
        return y

    def folded(self) -> Layer | None:
        if not isinstance(self.norm, nn.Identity) or not isinstance(self.activation, nn.Identity):
            return None
        dense: Layer = _like(self.a, out=self.b.weight.shape[0], bias=self.b.bias is not None)
        dense.weight.copy_(_product(self.a, self.b))
        if dense.bias is not None and self.b.bias is not None:
            dense.bias.copy_(self.b.bias)
        return dense


class DopedSparse(nn.Module):
    """y = S x + V U x: a sparse layer beside a thin dense one."""

    def __init__(self, layer: Layer, sparsity: float) -> None:
        super().__init__()
        n, m, total = layer.weight[0].numel(), layer.weight.shape[0], layer.weight.numel()
        rank = math.floor(sparsity * total / (n + m))
        if rank == 0:
            raise InputError(f"doped: {m} × {n} weights leave no rank at sparsity {sparsity:g}; exclude the layer.")
        self.sparse = _like(layer, bias=layer.bias is not None)
        self.a = _like(layer, out=rank, bias=False)
        self.b = _pointwise(layer, rank, m, bias=False)
        self.kept = {"sparse.weight": total - rank * (n + m)}
        with torch.no_grad():
            # Default weights have variance 1/3 over the fan-in: V U gives (1/3)² of the inputs', S (1 − s)/3.
            self.b.weight.mul_(math.sqrt(3 * sparsity))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.sparse(x) + self.b(self.a(x))
        return y

    def folded(self) -> Layer:
        dense: Layer = _like(self.sparse, bias=self.sparse.bias is not None)
        dense.weight.copy_(self.sparse.weight + _product(self.a, self.b))
        if dense.bias is not None and self.sparse.bias is not None:
            dense.bias.copy_(self.sparse.bias)
        return dense


# ---- layers


def _like(layer: Any, *, out: int | None = None, inputs: int | None = None, bias: bool) -> Any:
    """A layer of the kind of ``layer`` with other widths, on its device and in its dtype, initialised by torch."""
    where = {"device": layer.weight.device, "dtype": layer.weight.dtype, "bias": bias}
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs or layer.in_features, out or layer.out_features, **where)
    return nn.Conv2d(
        inputs or layer.in_channels,
        out or layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        padding_mode=layer.padding_mode,
        **where,
    )


def _pointwise(layer: Layer, inputs: int, out: int, bias: bool) -> Any:
    """A map of channels alone."""
    if isinstance(layer, nn.Linear):
        return _like(layer, inputs=inputs, out=out, bias=bias)
    return nn.Conv2d(inputs, out, 1, bias=bias, device=layer.weight.device, dtype=layer.weight.dtype)


def _norm(layer: Layer, width: int) -> nn.Module:
    kind = nn.BatchNorm1d if isinstance(layer, nn.Linear) else nn.BatchNorm2d
    return kind(width, device=layer.weight.device, dtype=layer.weight.dtype)


def _product(a: Any, b: Any) -> Tensor:
    """V U in the shape of a weight."""
    product: Tensor = b.weight.flatten(1) @ a.weight.flatten(1)
    return product.reshape(-1, *a.weight.shape[1:])


def _sites(model: nn.Module, include: Sequence[str], exclude: Sequence[str], head: bool) -> tuple[str, ...]:
    found = find_sites(model, include=include, exclude=exclude, head=head)
    wrong = []
    for site in found:
        layer = get_module(model, site.name)
        if site.tied:
            wrong.append(f"{site.name}: it shares its weight with {', '.join(site.tied)}")
        elif type(layer) not in (nn.Linear, nn.Conv2d):
            wrong.append(f"{site.name}: expected nn.Linear or nn.Conv2d; it is {type(layer).__name__}")
        elif site.slices > 1:
            wrong.append(f"{site.name}: a convolution in groups")
    if wrong:
        raise InputError(problems("Sparse-IFT cannot transform these layers; exclude them", wrong))
    if not found:
        raise InputError("Sparse-IFT: the model has no linear map to transform.")
    return tuple(site.name for site in found)


def _leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _leaves(inner, f"{name}.{child}" if name else child)


def _wide_plan(model: nn.Module, factor: float) -> list[tuple[str, nn.Module, Any]]:
    """(name, old, new) of the layers and norms of a Sequential, every hidden width times ``factor``."""
    leaves = list(_leaves(model))
    layers = [name for name, leaf in leaves if type(leaf) in (nn.Linear, nn.Conv2d)]
    known = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, *POINTWISE)
    faults = [f"{name or 'the model'}: {type(leaf).__name__}" for name, leaf in leaves if type(leaf) not in known]
    faults += [f"{name}: in groups" for name, leaf in leaves if getattr(leaf, "groups", 1) != 1]
    if len({id(leaf) for _, leaf in leaves}) < len(leaves):
        faults.append("a layer occurs twice")
    if len(layers) < 2:
        faults.append(f"{len(layers)} layers have no width between them")
    if faults:
        raise InputError(problems("only an nn.Sequential of plain layers can become wider", faults))
    plan: list[tuple[str, nn.Module, Any]] = []
    old_width, new_width = 0, 0
    for name, leaf in leaves:
        if isinstance(leaf, Layer):
            old_in, old_out = leaf.weight.shape[1], leaf.weight.shape[0]
            # Behind a Flatten, every channel has several places.
            new_in = old_in if name == layers[0] else new_width * (old_in // old_width)
            new_out = old_out if name == layers[-1] else round(old_out * factor)
            plan.append((name, leaf, _like(leaf, inputs=new_in, out=new_out, bias=leaf.bias is not None)))
            old_width, new_width = old_out, new_out
        elif isinstance(leaf, (nn.BatchNorm1d, nn.BatchNorm2d)) and plan and leaf.num_features != new_width:
            wide = new_width * (leaf.num_features // old_width)
            norm = type(leaf)(wide, leaf.eps, leaf.momentum, leaf.affine, leaf.track_running_stats)
            plan.append((name, leaf, norm.to(plan[-1][2].weight)))
    return plan


CLAIM_STEPS, CLAIM_INTERVAL = 150, 15
CLAIM_MAPS = ("mix", "up", "down")


def _run_claim() -> Verdict:
    figures = {}
    for name in ("dense", "parallel"):
        model = untrained()
        ift = SparseIFT(model, name, sparsity=0.5, norm=True, include=CLAIM_MAPS) if name != "dense" else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
        if ift is not None:
            ift.rigl(CLAIM_STEPS, interval=CLAIM_INTERVAL).attach(optimizer)
        train(model, optimizer, CLAIM_STEPS, seed=0)
        if ift is not None:
            figures["parallel: share of the dense multiply-adds"] = ift.masks().kept() / sum(
                untrained().get_parameter(f"{site}.weight").numel() for site in CLAIM_MAPS
            )
            model.eval()
            ift.bake()
        figures[f"{name}: held-out loss"] = held_out_loss(model)
    return Verdict(
        held=figures["parallel: held-out loss"] < figures["dense: held-out loss"],
        figures=figures,
        note="nats per byte; two branches with half of the weights each, folded into one layer at the end",
    )


METHOD = Technique(
    name="sparse-ift",
    summary="wider, parallel, factorized or doped sparse layers for the multiply-adds of dense ones",
    paper=Paper(
        authors="V. Thangarasa, S. Saxena, A. Gupta, S. Lie",
        title="Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency",
        year=2023,
        link="https://arxiv.org/abs/2303.11525",
    ),
    entry=SparseIFT,
    claim=Claim(
        statement="Two parallel half-sparse branches, masks moved by RigL, end at a lower held-out loss than the dense "
        "layers of as many multiply-adds after as many steps.",
        source="abstract: better accuracy without changing training hyper-parameters, at the FLOPs of the dense model",
        run=_run_claim,
    ),
)
