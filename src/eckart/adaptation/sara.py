r"""SaRA: train the smallest weights, which the model uses least.

*What it does.* Picks the entries of W that are nearest to zero and trains those alone, with a pull towards a matrix of
low rank. Half-way, those that have grown are left as they are, and training goes on with the ones that have not.

*Formula.* M = the entries with |w| < ``threshold``; ΔW = v on M and 0 elsewhere, v = 0 at the start. λ ‖(W + ΔW) ∘ M‖_*
is added to the loss, for one layer per step, each in turn; its gradient U Vᵀ is the polar factor, by products alone
(:func:`eckart.linalg.polar_factor`). After step ``reselect``, entries of M with |w + v| at or above the larger of
``threshold`` and the largest magnitude that was picked are frozen. A rank counts as in LoRA: rank r trains the r (out +
in) slices smallest entries of a layer; without one, r is the most whose entries all lie below the threshold.

*Cost.* As many numbers as LoRA of the same rank to train; their positions (8 bytes each) and first values (4) are saved
beside them. ΔW is dense while it acts: out · in multiply-adds per token, and a gradient of W's size that is formed and
picked from.

*When it does not help.* Speed and memory: sparse does not mean fast. Where it must ship as LoRA: ΔW has full rank;
merge it, or convert with a measured error. Layers without small entries are left out, with a warning. It trains what
matters least by construction. The claim does not hold on its problem: with LoRA's number of parameters the held-out
loss is 1.831 nats against LoRA's 1.820. Without the penalty and the new selection it is level with LoRA, at 1.819, so
there it is those two that cost.

*Departs from the paper in.* The official optimiser's packed values are the absolute ones of the weights, which flips
the sign of every small negative weight at the first step; here values keep their sign, and the first output is the
model's. It also takes the learning rate from the threshold, 10⁻³ e^(−350 τ), and restarts itself after the new
selection; here frozen entries are held whatever the optimiser's momentum does, and a restart is asked for: where
``eckart.hf.adapters.tuner.after_step`` returns True, ``optimizer.state.clear()`` makes it, and is left to the loop. One
layer at random per step is one in turn here, and needs that function. As official: λ = 5·10⁻⁴, the
new selection after 2500 steps, and no penalty where a side is 64 or less.

*Reference.* T. Hu, J. Zhang, R. Yi, H. Huang, Y. Wang, L. Ma, “SaRA: High-Efficient Diffusion Model Fine-tuning with
Progressive Sparse Low-Rank Adaptation”, 2024, https://arxiv.org/abs/2409.06633.

*Example.*

>>> import torch
>>> W = torch.tensor([[0.5, -0.001, 0.7], [0.002, 0.9, -0.6], [0.8, 0.003, -0.4], [0.3, 0.6, 0.004]])
>>> layout = Layout(name="up", kind="linear", out_features=4, in_features=3)
>>> delta = SaraDelta(layout, 1, Options(reselect=1))  # 7 entries
>>> delta.start(Source(layout=layout, weight=W[None]))
>>> delta.fill(values=torch.full((7,), 0.1))
>>> (delta.delta()[0] != 0).sum(1).tolist()
[2, 1, 2, 2]
>>> delta.after_step(1)  # 0.5 was the largest that was picked, and is 0.6 now
True
>>> int(delta.open.sum())
6
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.adaptation.lora import METHOD as LORA
from eckart.adaptation.method import AdaptMethod, Delta, Layout, Source
from eckart.adaptation.trial import adapted
from eckart.errors import EckartWarning, InputError, problems
from eckart.linalg import polar_factor
from eckart.records import Claim, Paper, Verdict

LEAST_SIDE = 64
"""The penalty leaves out matrices with a side of at most this."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which entries are trained, for how long, and how strongly their rank is held down."""

    threshold: float = 2e-3
    """τ, the magnitude below which entries count as unused, where no rank is given; above 0."""
    strength: float = 5e-4
    """λ of the nuclear norm, at least 0."""
    reselect: int = 2500
    """Steps after which entries that have grown are frozen, half of the training say; 0: never."""

    def __post_init__(self) -> None:
        wrong = []
        if not 0 < self.threshold < math.inf:
            wrong.append(f"threshold is a number above 0; got {self.threshold!r}")
        if not 0 <= self.strength < math.inf:
            wrong.append(f"strength is a number of at least 0; got {self.strength!r}")
        if not isinstance(self.reselect, int) or isinstance(self.reselect, bool) or self.reselect < 0:
            wrong.append(f"reselect counts steps from 0; got {self.reselect!r}")
        if wrong:
            raise InputError(problems("method 'sara'", wrong))


class SaraDelta(Delta):
    """ΔW = ``values`` at the flat positions ``index``; where not ``open``, ``held`` instead."""

    values: Tensor
    index: Tensor
    origin: Tensor
    held: Tensor
    open: Tensor

    def __init__(self, layout: Layout, rank: int, options: Options) -> None:
        super().__init__(layout, rank, options)
        count = rank * layout.slices * (layout.out_features + layout.in_features)
        self.trained("values", count)
        self.fixed("index", count, dtype=torch.int64)
        self.fixed("origin", count)
        self.fixed("held", count)
        self.fixed("open", count, dtype=torch.bool)
        self.turn, self.layers, self.steps = 0, 1, 0

    @classmethod
    def fits(cls, layout: Layout, options: Options) -> str | None:
        if cls.most(layout, options) < 1:
            return f"its {layout.out_features} × {layout.in_features} entries are fewer than one rank trains"
        return None

    @classmethod
    def most(cls, layout: Layout, options: Options) -> int:
        m, n = layout.out_features, layout.in_features
        return m * n // (m + n)

    @classmethod
    def default_rank(cls, source: Source, options: Options) -> int:
        layout = source.layout
        small = int((source.weight.abs() < options.threshold).sum())
        found = small // (layout.slices * (layout.out_features + layout.in_features))
        if found == 0:
            warnings.warn(
                f"{layout.name}: {small} entries lie below the threshold {options.threshold:g}, too few to train; the "
                "layer is left out. Raise threshold, or give r.",
                EckartWarning,
                stacklevel=2,
            )
        return min(found, cls.most(layout, options))

    def start(self, source: Source) -> None:
        flat = source.weight.detach().flatten().float().cpu()
        index = flat.abs().argsort(stable=True)[: self.index.numel()].sort().values
        self.fill(index=index, origin=flat[index], open=torch.ones(index.shape, dtype=torch.bool))

    def change(self) -> Tensor:
        """(count,): what is added to each picked entry."""
        return torch.where(self.open, self.values, self.held)

    def delta(self) -> Tensor:
        s, m, n = self.layout.slices, self.layout.out_features, self.layout.in_features
        flat = self.values.new_zeros(s * m * n)
        return flat.index_put((self.index,), self.change()).view(s, m, n)

    def penalty(self) -> Tensor | None:
        s, m, n = self.layout.slices, self.layout.out_features, self.layout.in_features
        if self.options.strength == 0 or min(m, n) <= LEAST_SIDE or self.steps % self.layers != self.turn:
            return None
        flat = self.values.new_zeros(s * m * n)
        picked: Tensor = flat.index_put((self.index,), self.origin + self.change()).view(s, m, n)
        # ⟨U Vᵀ, X⟩ is ‖X‖_*, and its gradient with U Vᵀ held is U Vᵀ, that of the norm.
        strength: float = self.options.strength
        return strength * (polar_factor(picked.detach()) * picked).sum()

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        self.steps = step
        if not self.options.reselect or step != self.options.reselect:
            return False
        change = self.change()
        limit = self.origin.abs().max().clamp(min=self.options.threshold)
        self.fill(held=change, open=(self.origin + change).abs() < limit)
        return True


def take_turns(deltas: Sequence[Delta]) -> None:
    """One layer's penalty per step, those with large enough sides in order."""
    large = [d for d in deltas if min(d.layout.out_features, d.layout.in_features) > LEAST_SIDE]
    for place, delta in enumerate(large):
        if isinstance(delta, SaraDelta):
            delta.turn, delta.layers = place, len(large)


def _run_claim() -> Verdict:
    ours, lora = adapted(METHOD, rank=8, options=Options(reselect=75)), adapted(LORA, rank=8)
    free = adapted(METHOD, rank=8, options=Options(reselect=0, strength=0.0))
    return Verdict(
        held=ours.after < lora.after and ours.parameters <= lora.parameters,
        figures=ours.figures("SaRA") | free.figures("SaRA, without penalty and new selection") | lora.figures("LoRA"),
        note="nats per byte; best learning rate by training loss; the new selection half-way",
    )


METHOD = AdaptMethod(
    name="sara",
    summary="the smallest entries of the weight, held at low rank, narrowed half-way",
    paper=Paper(
        authors="T. Hu, J. Zhang, R. Yi, H. Huang, Y. Wang, L. Ma",
        title="SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
        year=2024,
        link="https://arxiv.org/abs/2409.06633",
    ),
    options=Options,
    delta=SaraDelta,
    exact=False,
    tie=take_turns,
    claim=Claim(
        statement="With as many numbers to train as LoRA, the held-out loss after adaptation is lower.",
        source="abstract: outperforms LoRA, keeping the model's generalisation ability",
        run=_run_claim,
    ),
)
