r"""SAID: one short vector for the whole model, spread over all layers by a random map.

*What it does.* Trains d numbers that all layers share, and one scale per layer: the fewest to send and to keep of all
methods here, a few hundred for a model of any size.

*Formula.* ΔW_l = λ_l √(D_l / D) P_l θ, θ (d,) = 0 and λ_l = 1 at the start, P_l (D_l × d) a random map with columns of
norm 1 for the D_l entries of layer l and D = Σ D_l. The square root gives the columns of all P_l together norm 1, so
that a step of length ε moves the model by about ε. ``projection`` is ``one-hot`` (exactly orthonormal columns),
``fastfood`` or ``dense``, of :mod:`eckart.landscape.projections`. The rank of every layer is d.

*Cost.* d numbers and one per layer to train; a file holds θ once for each layer. P is made again from the seed: 12
bytes per entry of W and one pass over them per use for one-hot, O(D_l log D_l) work for Fastfood, D_l · d of both for
dense. ΔW is dense while it acts. Under FSDP the model is one unit, ``fully_shard(model)``: blocks that are spread
apart cannot share a parameter.

*When it does not help.* Where a LoRA of rank 1 can be afforded: it has about as many numbers per layer as this has for
the model. Random directions know nothing of the weights or the data. The claim does not hold on its problem: 200
numbers regain 24 % of what full fine-tuning gains. With 1536 numbers, those of a LoRA of rank 1 there, it regains 47 %,
and LoRA 45 %. Intrinsic dimension falls as models grow, and that network is tiny.

*Departs from the paper in.* Circulated code multiplies the transform by 1/√n in the backward pass alone, so the
gradient of a tensor with n padded entries comes out n times too small and large layers hardly count; here autograd
gives the exact transpose. It also leaves each layer's map with columns of norm 1, which makes the whole √(number of
layers) too long. One-hot maps are not in the paper; they are what K. Li et al. (“Uni-LoRA”, 2025) find as good and
cheaper. Biases and norms are not moved.

*Reference.* A. Aghajanyan, L. Zettlemoyer, S. Gupta, “Intrinsic Dimensionality Explains the Effectiveness of Language
Model Fine-Tuning”, 2020, https://arxiv.org/abs/2012.13255.

*Example.*

>>> import torch
>>> layouts = [Layout(name=name, kind="linear", out_features=8, in_features=6) for name in ("up", "down")]
>>> deltas = [SaidDelta(layout, 5, Options()) for layout in layouts]
>>> for delta, layout in zip(deltas, layouts):
...     delta.start(Source(layout=layout, weight=torch.ones(1, 8, 6)))
>>> share(deltas)
>>> deltas[0].fill(theta=torch.tensor([1.0, 0, 0, 0, 0]))
>>> moved = torch.cat([delta.delta().flatten() for delta in deltas])
>>> round(float(moved.detach().norm()), 6)
1.0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from eckart.adaptation.lora import METHOD as LORA
from eckart.adaptation.method import AdaptMethod, Delta, Layout, Source
from eckart.adaptation.trial import adapted, fine_tuned
from eckart.errors import InputError, problems
from eckart.landscape import Projection, projection
from eckart.landscape.projections import ProjectionKind
from eckart.records import Claim, Paper, Verdict

DIMENSION = 256
"""d where no rank is given, and every layer has as many entries."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The random map, and whether layers have a scale."""

    projection: ProjectionKind = "one-hot"
    """``one-hot``, ``fastfood`` or ``dense``."""
    scales: bool = True
    """One trained factor per layer."""

    def __post_init__(self) -> None:
        wrong = []
        if self.projection not in get_args(ProjectionKind):
            wrong.append(f"projection is one of {', '.join(get_args(ProjectionKind))}; got {self.projection!r}")
        if not isinstance(self.scales, bool):
            wrong.append(f"scales is True or False; got {self.scales!r}")
        if wrong:
            raise InputError(problems("method 'said'", wrong))


class SaidDelta(Delta):
    """ΔW = scale · share · P θ, θ one Parameter for all layers once they are tied."""

    theta: nn.Parameter
    scale: Tensor
    seed: Tensor

    def __init__(self, layout: Layout, rank: int, options: Options) -> None:
        super().__init__(layout, rank, options)
        self.trained("theta", rank)
        if options.scales:
            self.trained("scale", 1)
        self.fixed("seed", 1, dtype=torch.int64)
        self.share = 1.0
        """√(D_l / D), from :func:`share`."""
        # In lists, so that they are no submodules and in no file.
        self._map: list[Projection] = []
        self._first: list[SaidDelta] = []

    @classmethod
    def most(cls, layout: Layout, options: Options) -> int:
        return layout.weight_parameters

    @classmethod
    def default_rank(cls, source: Source, options: Options) -> int:
        return min(DIMENSION, cls.most(source.layout, options))

    def start(self, source: Source) -> None:
        self.fill(seed=torch.randint(2**62, (1,), generator=source.generator()))
        if self.options.scales:
            self.fill(scale=torch.ones(1))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._map.clear()

    def parameter_count(self) -> int:
        """Without θ in all layers but the first, so that the layers' counts add up to what is trained."""
        shared = self.theta.numel() if self._first and self._first[0] is not self else 0
        return super().parameter_count() - shared

    def arrived(self) -> None:
        if self._first:
            self.theta = self._first[0].theta

    def map(self) -> Projection:
        """P_l, made from the seed when it is first needed."""
        if not self._map:
            self._make()
        return self._map[0]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _make(self) -> None:
        count = self.layout.weight_parameters
        made = projection(self.options.projection, count, self.rank, seed=int(self.seed))
        self._map.append(made.to(self.theta.device, self.theta.dtype))

    def _apply(self, *args: Any, **kwargs: Any) -> SaidDelta:
        self._map.clear()  # the device may change
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def delta(self) -> Tensor:
        flat: Tensor = self.map()(self.theta) * self.share
        if self.options.scales:
            flat = flat * self.scale
        return flat.view(self.layout.slices, self.layout.out_features, self.layout.in_features)


def share(deltas: Sequence[Delta]) -> None:
    """Give all layers one θ, and each the root of its share of the entries.

    Raises InputError where the layers differ in their dimension.
    """
    sizes = {delta.rank: delta.layout.name for delta in deltas}
    if len(sizes) > 1:
        listed = ", ".join(f"{name} has {rank}" for rank, name in sizes.items())
        raise InputError(f"method 'said': all layers share one vector, so they have one rank; {listed}.")
    total = sum(delta.layout.weight_parameters for delta in deltas)
    first = deltas[0] if deltas else None
    for delta in deltas:
        if isinstance(delta, SaidDelta) and isinstance(first, SaidDelta):
            delta.theta = first.theta
            delta._first = [first]
            delta.share = math.sqrt(delta.layout.weight_parameters / total)


CLAIM_DIMENSIONS = (200, 1532)
"""The paper's 200 numbers, and with four scales those of LoRA at rank 1."""


def _run_claim() -> Verdict:
    full, lora = fine_tuned(), adapted(LORA, rank=1)
    gain = full.before - full.after
    figures = full.figures("full") | lora.figures("LoRA, rank 1")
    figures |= {"LoRA, rank 1: share of the gain": (lora.before - lora.after) / gain}
    shares = {}
    for dimension in CLAIM_DIMENSIONS:
        ours = adapted(METHOD, rank=dimension)
        shares[dimension] = (ours.before - ours.after) / gain
        figures |= ours.figures(f"SAID, d = {dimension}")
        figures |= {f"SAID, d = {dimension}: share of the gain": shares[dimension]}
    return Verdict(
        held=shares[CLAIM_DIMENSIONS[0]] >= 0.9,
        figures=figures,
        note="nats per byte; best learning rate by training loss",
    )


METHOD = AdaptMethod(
    name="said",
    summary="one short vector shared by all layers through random maps: hundreds of numbers in all",
    paper=Paper(
        authors="A. Aghajanyan, L. Zettlemoyer, S. Gupta",
        title="Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
        year=2020,
        link="https://arxiv.org/abs/2012.13255",
    ),
    options=Options,
    delta=SaidDelta,
    exact=False,
    budgeted=False,
    tie=share,
    claim=Claim(
        statement="200 numbers for all maps together regain 90 % of what full fine-tuning gains on held-out text.",
        source="abstract: 200 parameters reach 90 % of the full performance of RoBERTa on MRPC",
        run=_run_claim,
    ),
)
