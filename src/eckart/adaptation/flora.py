r"""FLoRA: a change of low Tucker rank, one factor for each direction of the weight.

*What it does.* Treats the weight of a convolution as the tensor that it is, outputs × channels × kernel, and trains a
small core of the same order with one thin factor per direction, so that the kernel's own shape costs a few numbers
instead of multiplying the rank's.

*Formula.* ΔW = s · G ×₁ P_out ×₂ P_in ×₃ K₁ ×₄ K₂ …, with a core G (r_out × r_in × q₁ × q₂ …) = 0 at the start, P_out
(out × r_out), P_in (channels × r_in) and K_i (kernelᵢ × qᵢ) normal with variance 1 / (2 · columns). r_out and r_in are
the rank, at most out and channels; qᵢ is ``kernel_rank``, at most the kernel's size. For linear maps ΔW = s P_out G
P_inᵀ.

*Cost.* r (out + channels) + q Σ kernel + r² Π q numbers to train, against r (out + channels · Π kernel) of LoRA; for a
3 × 3 kernel about a fifth. Runs as the LoRA that it is: B = s P_out as a 1 × 1 convolution after A = G ×₂ P_in ×₃ K₁ …
as one with the kernel of the base.

*When it does not help.* Linear maps: there it is a LoRA with an r × r matrix in between, the same set of changes with
r² more numbers. 1 × 1 convolutions likewise. On the claim's problem, a map that reads 8 positions × 16 channels, it
falls behind LoRA by 0.4 % of the held-out loss with as many numbers (1.894 against 1.889 nats): the eight positions are
all different, and two columns do not tell them apart.

*Departs from the paper in.* The dense ΔW is never formed for the forward pass, and it merges and exports, as exact
LoRA; the official code does neither. Grouped convolutions have a core and factors for each group; the official code's
shapes fail on them. An embedding is treated as the matrix it is; the official one adds one vector to all entries. s is
1 by default; the official example takes 4.

*Reference.* C. Si, X. Wang, X. Yang, Z. Xu, Q. Li, J. Dai, Y. Qiao, X. Yang, W. Shen, “FLoRA: Low-Rank Core Space for
N-dimension”, 2024, https://arxiv.org/abs/2405.14739.

*Example.*

>>> import torch
>>> layout = Layout(name="conv", kind="conv", out_features=32, in_features=16 * 9, kernel=(3, 3))
>>> delta = FloraDelta(layout, 4, Options(kernel_rank=2))
>>> delta.start(Source(layout=layout, weight=torch.ones(1, 32, 16 * 9)))
>>> delta.parameter_count(), 4 * (32 + 16 * 9)  # of LoRA at the same rank
(268, 704)
>>> delta.fill(G=torch.ones(1, 4, 4, 2, 2))
>>> int(torch.linalg.matrix_rank(delta.delta()[0].reshape(32 * 16, 9)))  # rank one in each direction of the kernel
1
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eckart.adaptation.lora import METHOD as LORA
from eckart.adaptation.method import AdaptMethod, Delta, Layout, Source
from eckart.adaptation.trial import MAPS, means
from eckart.errors import InputError, problems
from eckart.evidence.network import CONTEXT
from eckart.records import Claim, Paper, Verdict


@dataclass(frozen=True, kw_only=True)
class Options:
    """The kernel's share of the core, and how strongly the change acts."""

    kernel_rank: int = 2
    """q, columns of the factor for each direction of a kernel, at least 1; at most the kernel's size is used."""
    scale: float = 1.0
    """s, above 0."""

    def __post_init__(self) -> None:
        wrong = []
        if not isinstance(self.kernel_rank, int) or isinstance(self.kernel_rank, bool) or self.kernel_rank < 1:
            wrong.append(f"kernel_rank is an int of at least 1; got {self.kernel_rank!r}")
        if not 0 < self.scale < math.inf:
            wrong.append(f"scale is a number above 0; got {self.scale!r}")
        if wrong:
            raise InputError(problems("method 'flora'", wrong))


class FloraDelta(Delta):
    """ΔW = s · G ×₁ Out ×₂ In ×₃ K0 ×₄ K1 …; one core and set of factors per slice."""

    G: Tensor
    Out: Tensor
    In: Tensor

    def __init__(self, layout: Layout, rank: int, options: Options) -> None:
        super().__init__(layout, rank, options)
        channels = layout.in_features // math.prod(layout.kernel)
        outer, inner = min(rank, layout.out_features), min(rank, channels)
        across = tuple(min(options.kernel_rank, size) for size in layout.kernel)
        self.trained("G", layout.slices, outer, inner, *across)
        self.trained("Out", layout.slices, layout.out_features, outer)
        self.trained("In", layout.slices, channels, inner)
        for i, (size, columns) in enumerate(zip(layout.kernel, across, strict=True)):
            self.trained(f"K{i}", layout.slices, size, columns)

    def start(self, source: Source) -> None:
        generator = source.generator()
        for name, factor in self.named_parameters():
            if name != "G":
                draw = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
                self.fill(**{name: draw / math.sqrt(2 * factor.shape[-1])})

    def factors(self) -> tuple[Tensor, Tensor]:
        A = torch.einsum("soi...,sci->soc...", self.G, self.In)
        for i in range(len(self.layout.kernel)):
            along = torch.einsum("s...q,skq->s...k", A.movedim(3 + i, -1), getattr(self, f"K{i}"))
            A = along.movedim(-1, 3 + i)
        B = self.Out if self.options.scale == 1 else self.options.scale * self.Out
        return B, A.reshape(*A.shape[:2], self.layout.in_features)


class _Positions(FloraDelta):
    """The map of the claim's network that reads 8 embeddings side by side, as a convolution over them."""

    def __init__(self, layout: Layout, rank: int, options: Options) -> None:
        super().__init__(replace(layout, kind="conv", kernel=(CONTEXT,)), rank, options)

    def delta(self) -> Tensor:
        dense: Tensor = super().delta()  # (1, out, channels · positions)
        # The network has positions outside, convolutions inside.
        return dense.reshape(*dense.shape[:2], -1, CONTEXT).mT.reshape(dense.shape)


def _run_claim() -> Verdict:
    mix = tuple(site for site in MAPS if site.name == "mix")
    tensor = replace(METHOD, delta=_Positions)
    ours, lora = means(tensor, rank=8, sites=mix), means(LORA, rank=8, sites=mix)
    same = means(LORA, rank=5, sites=mix)
    return Verdict(
        held=ours.train < same.train and ours.after < same.after and ours.parameters < same.parameters,
        figures=ours.figures("FLoRA") | same.figures("LoRA, rank 5") | lora.figures("LoRA, rank 8"),
        note="nats per byte; only the map that mixes 8 positions × 16 channels; best learning rate by training loss, "
        "mean of 3 seeds",
    )


METHOD = AdaptMethod(
    name="flora",
    summary="Tucker factors and a core: convolutions keep their shape (exact LoRA)",
    paper=Paper(
        authors="C. Si, X. Wang, X. Yang, Z. Xu, Q. Li, J. Dai, Y. Qiao, X. Yang, W. Shen",
        title="FLoRA: Low-Rank Core Space for N-dimension",
        year=2024,
        link="https://arxiv.org/abs/2405.14739",
    ),
    options=Options,
    delta=FloraDelta,
    exact=True,
    claim=Claim(
        statement="On a map with a kernel, the loss after adaptation is lower than that of a LoRA with more numbers "
        "to train that treats it as a matrix, in training and on held-out text.",
        source="abstract: keeping the structure of the space beats compressing it into two dimensions",
        run=_run_claim,
    ),
)
