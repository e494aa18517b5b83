r"""SNNK: a thin layer of random features beside the map, not linear in its input.

*What it does.* Adds to the output of a layer what one trained matrix makes of a few fixed random ReLU features of its
input: a small neural network of which only the last matrix is trained.

*Formula.* y + C φ(x) with φ(x) = max(G x, ``floor``) / √m for m fixed normal directions G (m × in), orthogonal with
``orthogonal``, and C (out × m) = 0 at the start. The rank is m. An adapter Up ReLU(Down x) becomes Up Φ φ(x) where its
inner layer is replaced by φ(x)ᵀφ(w) for every row w of Down, φ(w) trained as Φ; Up Φ bundled into one matrix is C.

*Cost.* m · out numbers to train, half as many as a LoRA of rank m for a square layer; m · in saved beside them; the
multiply-adds of rank m.

*When it does not help.* Where the adapter must be merged or shipped as LoRA: it is no change of the weight, and both
are refused. It stays a part of the model for ever. Convolutions and embeddings are not served: φ needs one vector per
output. Directions are random and fixed, so that it takes more features than a trained adapter. The claim does not hold
on its problem: a fifth of the numbers of a bottleneck adapter brings 59 % of its gain, and as many numbers 85 %.

*Departs from the paper in.* Only the bundled form, which the paper recommends for adapters, and only its ReLU features:
the released sine and cosine adapter reads an attribute that nothing sets. Rows of G have variance 1/in rather than 1,
so that features of normalised inputs are of order 1/√m at every width; C takes up the factor. It lies beside any linear
layer that is targeted, with that layer's input; target the outputs of attention and MLP for the paper's places.

*Reference.* A. Sehanobish, K. Choromanski, Y. Zhao, A. Dubey, V. Likhosherstov, “Scalable Neural Network Kernels”,
2023, https://arxiv.org/abs/2310.13225.

*Example.*

>>> import torch
>>> layout = Layout(name="up", kind="linear", out_features=6, in_features=8)
>>> delta = SnnkDelta(layout, 4, Options())
>>> delta.start(Source(layout=layout, weight=torch.ones(1, 6, 8)))
>>> delta.fill(C=torch.ones(6, 4))
>>> x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
>>> bool(torch.allclose(delta(-x, x), -delta(x, x)))  # not linear
False
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from eckart.adaptation.method import AdaptMethod, Delta, Layout, Source
from eckart.adaptation.trial import adapted
from eckart.errors import InputError, problems
from eckart.records import Claim, Paper, Verdict


@dataclass(frozen=True, kw_only=True)
class Options:
    """The random features."""

    orthogonal: bool = True
    """Whether the random directions are orthogonal to each other."""
    floor: float = 0.0
    """c in max(G x, c); below 0 it lets some negative features through."""

    def __post_init__(self) -> None:
        wrong = []
        if not isinstance(self.orthogonal, bool):
            wrong.append(f"orthogonal is True or False; got {self.orthogonal!r}")
        if not math.isfinite(self.floor):
            wrong.append(f"floor is a finite number; got {self.floor!r}")
        if wrong:
            raise InputError(problems("method 'snnk'", wrong))


class SnnkDelta(Delta):
    """C max(G x, floor) / √m beside a layer."""

    linear = False
    C: Tensor
    G: Tensor

    def __init__(self, layout: Layout, rank: int, options: Options) -> None:
        super().__init__(layout, rank, options)
        self.trained("C", layout.out_features, rank)
        self.fixed("G", rank, layout.in_features)

    @classmethod
    def fits(cls, layout: Layout, options: Options) -> str | None:
        return _vectors(layout)

    def start(self, source: Source) -> None:
        self.fill(G=directions(self.rank, self.layout.in_features, self.options.orthogonal, source.generator()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        features = linear(x, self.G).clamp(min=self.options.floor)
        found: Tensor = linear(features, self.C) / math.sqrt(self.rank)
        return found


def directions(count: int, dimension: int, orthogonal: bool, generator: torch.Generator) -> Tensor:
    """(count, dimension) float64, count ≤ dimension: normal rows of expected norm 1, made orthogonal if asked."""
    G = torch.randn(count, dimension, generator=generator, dtype=torch.float64) / math.sqrt(dimension)
    if not orthogonal:
        return G
    norms: Tensor = torch.linalg.vector_norm(G, dim=1, keepdim=True)  # of the same law as before
    Q: Tensor = torch.linalg.qr(G.T).Q
    return Q.T * norms


def _vectors(layout: Layout) -> str | None:
    if layout.kind in ("linear", "conv1d"):
        return None
    reads = {"embedding": "an embedding reads entries", "experts": "fused experts read their inputs inside"}
    what = reads.get(layout.kind, "a convolution reads patches")
    return f"{what}, and the random features are those of one vector per output"


class _Bottleneck(Delta):
    """The adapter that the claim compares with: Up ReLU(Down x + b), all of it trained."""

    linear = False
    Down: Tensor
    b: Tensor
    Up: Tensor

    def __init__(self, layout: Layout, rank: int, options: Options) -> None:
        super().__init__(layout, rank, options)
        self.trained("Down", rank, layout.in_features)
        self.trained("b", rank)
        self.trained("Up", layout.out_features, rank)

    def start(self, source: Source) -> None:
        self.fill(Down=directions(self.rank, self.layout.in_features, False, source.generator()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return linear(relu(linear(x, self.Down, self.b)), self.Up)


def _run_claim() -> Verdict:
    adapter = adapted(replace(METHOD, delta=_Bottleneck), rank=8)
    ours = adapted(METHOD, rank=3)  # 3 · out against 8 · (in + out + 1): a fifth
    even = adapted(METHOD, rank=14)  # as many numbers as the adapter
    shares = {name: (t.before - t.after) / (adapter.before - adapter.after) for name, t in (("3", ours), ("14", even))}
    return Verdict(
        held=5 * ours.parameters <= adapter.parameters * 1.02 and shares["3"] >= 0.9,
        figures={f"SNNK, {m} features: share of the adapter's gain": share for m, share in shares.items()}
        | ours.figures("SNNK, 3 features")
        | even.figures("SNNK, 14 features")
        | adapter.figures("bottleneck adapter"),
        note="nats per byte; best learning rate by training loss",
    )


METHOD = AdaptMethod(
    name="snnk",
    summary="one trained matrix on fixed random ReLU features: not linear, cannot be merged",
    paper=Paper(
        authors="A. Sehanobish, K. Choromanski, Y. Zhao, A. Dubey, V. Likhosherstov",
        title="Scalable Neural Network Kernels",
        year=2023,
        link="https://arxiv.org/abs/2310.13225",
    ),
    options=Options,
    delta=SnnkDelta,
    exact=False,
    claim=Claim(
        statement="With a fifth of the numbers of a bottleneck adapter, at least 90 % of its gain on held-out text.",
        source="abstract: up to 5 times fewer trainable parameters at competitive accuracy",
        run=_run_claim,
    ),
)
