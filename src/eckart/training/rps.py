r"""STABLE-RPS: the weights of many layers read from one short trained vector, through a random map.

*What it does.* Trains a model of n weights out of |M| < n numbers. Every weight is a scaled, signed entry of the
memory M, and which one is a function of a seed, so that a checkpoint holds M, the seed and what is not shared
(biases, norms). It needs no data and no look at the model before training.

*Formula.* W_i = λ_t s(i) M[h(i)] with s(i) = ±1 and λ_t = std of tensor t at initialisation / std of M.
RandomFold: all weights are laid end to end, cut into partitions of |M|, and h permutes each one. So every
entry is used ⌊n/|M|⌋ or ⌈n/|M|⌉ times, and |M| = n is a signed permutation: the original model. Gradient
scaling: ∂loss/∂M_j is divided by Σ_{i→j} λ_i². With R the map from M to W, RᵀR is the diagonal of those sums,
and the step of SGD in the weights is −η R (RᵀR)⁻¹ Rᵀ G: the dense step, projected onto the weights that can be
shared. It does not depend on the std of M, and for |M| = n it is the dense step.

*Cost.* A gather of n entries in every forward pass and a scatter in every backward pass. On disk |M| numbers;
in memory |M| numbers, n int32 for the map, which is rebuilt from the seed, and the weights of the layer at work.
No multiply-add is saved. Building the map sorts n hashes: about 0.1 s per million weights.

*When it does not help.* Where training memory or speed is what is short: only the file, the optimiser's state and
the communication of gradients shrink. On trained weights: folding them averages unrelated numbers
(``start="project"`` does it, and it ruins a model at any memory < 1); take a decomposition. With Adam the gradient
scaling cancels, as any constant factor per entry does, and the step in the weights is λ_t · lr; so the std of M
defaults to the mean one of the weights, which makes λ_t ≈ 1.

*Departs from the paper in.* Σ λ² follows from the projection above. The authors' code (FakeRoast) has five
scalers, among them this one, but the name that should select it selects its square root. There the index and the
signs are saved as parameters, which undoes the compression on disk, and its Pareto mapper rotates partitions where
RandomFold permutes them. The map comes from a hash that does not depend on torch's generators.

*Reference.* A. Desai, A. Shrivastava, “In defense of parameter sharing for model-compression”, 2023,
https://arxiv.org/abs/2310.11611; ROAST: A. Desai, K. Zhou, A. Shrivastava, “Hardware-Aware Compression with Random
Operation Access Specific Tile (ROAST) Hashing”, 2023.

*Example.*

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
>>> shared = StableRPS(model, memory=0.1, seed=7)
>>> {name: tuple(value.shape) for name, value in shared.state_dict().items()}  # doctest: +NORMALIZE_WHITESPACE
{'memory': (90,), 'seed': (), 'scales': (2,), 'model.0.bias': (30,), 'model.2.bias': (10,)}
>>> shared(torch.ones(1, 20)).shape, shared.model[0].weight.shape
(torch.Size([1, 10]), torch.Size([30, 20]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from eckart.arch import find_sites, get_module, site_module
from eckart.errors import InputError, NotFiniteError, problems
from eckart.evidence import learned_problem
from eckart.evidence.network import CONTEXT
from eckart.evidence.trial import ByteModel, held_out_loss, train, untrained
from eckart.linalg.hashed import check_seed, gaussians, permutation, random_bits
from eckart.records import Claim, Paper, Technique, Verdict

SIGNS, VALUES, PARTITIONS = 0, 1, 2
"""Streams of the seed: signs, first values of the memory, and from here on one per partition."""


def random_fold(n: int, size: int, seed: int) -> Tensor:
    """(n,) int32 codes of RandomFold: weight i is sign(c_i) · M[|c_i| − 1] for a memory of ``size`` entries.

    Raises InputError unless 1 ≤ size ≤ n and size < 2³¹.
    """
    if not 1 <= size <= n or size >= 2**31:
        raise InputError(f"a memory for {n} weights has 1 to {min(n, 2**31 - 1)} entries; got {size}.")
    codes = torch.empty(n, dtype=torch.int32)
    for partition, start in enumerate(range(0, n, size)):
        length = min(size, n - start)
        codes[start : start + length] = permutation(seed, size, PARTITIONS + partition)[:length].int() + 1
    negative = torch.from_numpy((random_bits(seed, n, SIGNS) & 1).astype("bool"))
    return torch.where(negative, -codes, codes)


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradients[0] * factor, None


@dataclass(frozen=True)
class _Segment:
    """Where one tensor lies in the flattened weights."""

    start: int
    shape: tuple[int, ...]
    homes: tuple[tuple[str, str], ...]
    """(module, parameter) of every place that holds it; more than one where it is tied."""

    @property
    def stop(self) -> int:
        return self.start + torch.Size(self.shape).numel()


class _View(nn.Module):
    """A parametrisation without a parameter of its own: the weight is read from the engine's memory."""

    def __init__(self, engine: StableRPS, tensor: int) -> None:
        super().__init__()
        self.engine = (engine,)  # in a tuple, so that the engine does not become a child of its own child
        self.tensor = tensor

    def forward(self) -> Tensor:
        return self.engine[0].generate(self.tensor)

    def right_inverse(self, weight: Tensor) -> tuple[()]:
        return ()


class StableRPS(nn.Module):
    """A model whose selected weights are views of one trained ``memory``; train and save it like any module.

    ``model`` is changed in place: its maps (see :func:`eckart.arch.find_sites` for ``include``, ``exclude``,
    ``embeddings``, ``head``) lose their weight and generate it when it is read. ``memory`` is the share of those
    weights that is stored, in (0, 1]. ``start="random"`` draws M; λ_t keeps each tensor's own std, so the model
    starts as it would have, up to the draw. ``start="project"`` takes the M nearest to the weights, which for
    memory = 1 is the model itself, to rounding. ``std`` is that of M (default: the root mean square of the
    tensors' own). The dtype and device are those of the first weight.

    ``load_state_dict`` takes over the seed of the file and rebuilds the map. Not known to Eckart's checkpoint
    loader: save the ``state_dict()`` with safetensors and build the engine again around a fresh model.

    Raises InputError for a share or std out of range, weights of different dtypes or devices and constant
    weights, which have no std; NotFiniteError for NaN or Inf.
    """

    seed: Tensor
    scales: Tensor
    codes: Tensor
    inverse: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        memory: float,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        embeddings: bool = False,
        head: bool = False,
        seed: int = 0,
        start: Literal["random", "project"] = "random",
        std: float | None = None,
        gradient_scaling: bool = True,
    ) -> None:
        super().__init__()
        check_seed(seed, "StableRPS")
        _check_options(memory, start, std)
        segments, weights = _collect(model, include, exclude, embeddings, head)
        deviations = torch.stack([w.detach().double().std().cpu() for w in weights])
        _check_weights(segments, weights, deviations)
        n = segments[-1].stop
        size = max(1, round(memory * n))
        counts = torch.tensor([w.numel() for w in weights], dtype=torch.float64)
        std = float(((deviations.square() * counts).sum() / n).sqrt()) if std is None else std
        first = weights[0]
        self.gradient_scaling = gradient_scaling
        self.segments = segments
        """The shared tensors, in the order in which they are laid end to end."""
        self.memory = nn.Parameter(first.new_empty(size))
        self.register_buffer("seed", torch.tensor(seed))
        self.register_buffer("scales", (deviations / std).to(first))
        self.register_buffer("codes", torch.empty(0, dtype=torch.int32, device=first.device), persistent=False)
        self.register_buffer("inverse", first.new_empty(0), persistent=False)
        self._rebuild()
        with torch.no_grad():
            if start == "random":
                self.memory.copy_(gaussians(seed, (size,), VALUES) * std)
            else:
                self.memory.copy_(self._nearest(weights))
        self._hollow(model)
        self.model = model
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def shared_weights(self) -> int:
        """n: weights that are generated."""
        return self.segments[-1].stop

    def generate(self, tensor: int) -> Tensor:
        """The tensor at this place of ``segments``, from the memory; gradients reach ``memory``."""
        segment = self.segments[tensor]
        codes = self.codes[segment.start : segment.stop]
        memory = self.memory
        if self.gradient_scaling:
            memory = _ScaledGradient.apply(memory, self.inverse)  # type: ignore[no-untyped-call]
        picked = memory.index_select(0, codes.abs() - 1)
        return (picked * codes.sign() * self.scales[tensor]).view(segment.shape)

    def to_dense(self) -> nn.Module:
        """The model with ordinary parameters again, equal to the generated ones; the engine is spent."""
        for tensor, segment in enumerate(self.segments):
            weight = nn.Parameter(self.generate(tensor).detach())
            for name, parameter in segment.homes:
                module = get_module(self.model, name)
                # Not remove_parametrizations: it edits the class, which copies of the module share.
                module.__class__ = parametrize.type_before_parametrizations(module)
                del module.parametrizations
                setattr(module, parameter, weight)
        return self.model

    def extra_repr(self) -> str:
        return f"memory={self.memory.numel()}, shared_weights={self.shared_weights}, seed={int(self.seed)}"

    def _rebuild(self) -> None:
        """Map and 1 / Σ λ² from seed and scales."""
        codes = random_fold(self.shared_weights, self.memory.numel(), int(self.seed))
        total = torch.zeros(self.memory.numel(), dtype=torch.float64)
        for segment, scale in zip(self.segments, self.scales.double().cpu(), strict=True):
            places = codes[segment.start : segment.stop].abs().long() - 1
            total += scale.square() * places.bincount(minlength=total.numel())
        self.codes = codes.to(self.memory.device)
        self.inverse = total.reciprocal().to(self.memory)

    def _nearest(self, weights: Sequence[Tensor]) -> Tensor:
        """(RᵀR)⁻¹ Rᵀ W: the memory whose weights are nearest to ``weights``."""
        total = torch.zeros_like(self.memory)
        for segment, weight, scale in zip(self.segments, weights, self.scales, strict=True):
            codes = self.codes[segment.start : segment.stop]
            total.index_add_(0, codes.abs() - 1, weight.detach().flatten() * codes.sign() * scale)
        return total * self.inverse

    def _hollow(self, model: nn.Module) -> None:
        for tensor, segment in enumerate(self.segments):
            for name, parameter in segment.homes:
                parametrize.register_parametrization(get_module(model, name), parameter, _View(self, tensor))


def _after_load(engine: StableRPS, _: object) -> None:
    engine._rebuild()


def _collect(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str], embeddings: bool, head: bool
) -> tuple[tuple[_Segment, ...], list[Tensor]]:
    segments: list[_Segment] = []
    weights: list[Tensor] = []
    for site in find_sites(model, include=include, exclude=exclude, embeddings=embeddings, head=head):
        owner = site.name.rpartition(".")[0] if site.kind == "experts" else site.name
        parameter = site.name.rpartition(".")[2] if site.kind == "experts" else "weight"
        weight = site_module(model, site).get_parameter(parameter)
        homes = tuple((name, parameter) for name in (owner, *site.tied))
        segments.append(_Segment(segments[-1].stop if segments else 0, tuple(weight.shape), homes))
        weights.append(weight)
    if not segments:
        raise InputError("StableRPS: the model has no map whose weight could be shared.")
    return tuple(segments), weights


def _check_options(memory: float, start: str, std: float | None) -> None:
    found = []
    if isinstance(memory, bool) or not isinstance(memory, (int, float)) or not 0 < memory <= 1:
        found.append(f"memory is the share of the weights that is stored, in (0, 1]; got {memory!r}")
    if start not in ("random", "project"):
        found.append(f"start is 'random' or 'project'; got {start!r}")
    if std is not None and not (isinstance(std, (int, float)) and 0 < std < float("inf")):
        found.append(f"std is a positive number or None; got {std!r}")
    if found:
        raise InputError(problems("StableRPS", found))


def _check_weights(segments: Sequence[_Segment], weights: Sequence[Tensor], deviations: Tensor) -> None:
    first = weights[0]
    names = [segment.homes[0][0] for segment in segments]
    if broken := [name for name, w in zip(names, weights, strict=True) if not torch.isfinite(w).all()]:
        raise NotFiniteError(f"StableRPS: NaN or Inf in the weights of {', '.join(broken)}.")
    found = []
    for name, weight, deviation in zip(names, weights, deviations, strict=True):
        if weight.dtype != first.dtype or weight.device != first.device:
            found.append(f"{name} is {weight.dtype} on {weight.device}, {names[0]} {first.dtype} on {first.device}")
        if not deviation > 0:
            found.append(f"{name} has constant weights, so no std to scale the memory by; initialise or exclude it")
    if found:
        raise InputError(problems("StableRPS", found))


CLAIM_MAPS = ("mix", "up", "down", "head")
CLAIM_MEMORIES = (0.1, 0.0125)
CLAIM_STEPS = 150


class _Mask(nn.Module):
    """A parametrisation that keeps some weights and holds the others at zero."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.keep


def _pruned(scores: Mapping[str, Tensor], keep: float) -> ByteModel:
    """The untrained model with the ``keep`` share of weights that score highest over all maps."""
    model = untrained()
    everything = torch.cat([score.flatten() for score in scores.values()])
    threshold = everything.topk(round(keep * everything.numel())).values[-1]
    for name, score in scores.items():
        parametrize.register_parametrization(get_module(model, name), "weight", _Mask((score >= threshold).float()))
    return model


def _scores() -> dict[str, dict[str, Tensor]]:
    """Magnitude |w| and SNIP |w · ∂loss/∂w| at initialisation, the latter on 2048 predictions."""
    model, windows = untrained(), learned_problem().calibration
    picked = torch.randint(0, windows.shape[0], (2048,), generator=torch.Generator().manual_seed(0))
    sample = windows[picked].long()
    torch.autograd.backward(cross_entropy(model(sample[:, :CONTEXT]), sample[:, CONTEXT]))
    weights: dict[str, Any] = {name: get_module(model, name).weight for name in CLAIM_MAPS}
    return {
        "magnitude": {name: w.detach().abs() for name, w in weights.items()},
        "SNIP": {name: (w * w.grad).detach().abs() for name, w in weights.items()},
    }


def _trained_loss(model: nn.Module) -> float:
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05), CLAIM_STEPS, seed=0)
    return held_out_loss(model)


def _run_claim() -> Verdict:
    scores = _scores()
    figures = {"dense: held-out loss": _trained_loss(untrained())}
    held = True
    for keep in CLAIM_MEMORIES:
        losses = {name: _trained_loss(_pruned(score, keep)) for name, score in scores.items()}
        losses["STABLE-RPS"] = _trained_loss(StableRPS(untrained(), memory=keep, include=CLAIM_MAPS))
        figures |= {f"{name} at {keep:g}: held-out loss": value for name, value in losses.items()}
        held = held and losses["STABLE-RPS"] == min(losses.values())
    return Verdict(
        held=held,
        figures=figures,
        note="nats per byte; the masks of the pruned networks are not counted, nor the index that RPS rebuilds",
    )


METHOD = Technique(
    name="stable-rps",
    summary="weights as random signed reads of one short trained vector; a checkpoint is the vector and a seed",
    paper=Paper(
        authors="A. Desai, A. Shrivastava",
        title="In defense of parameter sharing for model-compression",
        year=2023,
        link="https://arxiv.org/abs/2310.11611",
    ),
    entry=StableRPS,
    claim=Claim(
        statement="Trained from scratch with 10 and 1.25 % of the numbers, the shared network reaches a lower "
        "held-out loss than networks pruned at initialisation to as many weights by magnitude and by SNIP.",
        source="abstract: RPS outperforms or matches MAG and SNIP across the entire compression range",
        run=_run_claim,
    ),
)
