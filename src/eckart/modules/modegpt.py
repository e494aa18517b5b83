r"""MoDeGPT: modules are decomposed as a whole, by what they do to their outputs; no gradients.

*What it does.* Three kinds of modules, three decompositions: the MLP by Nyström (neurons of high leverage stay, the
second map is refitted), queries and keys by CR (coordinates with large norms stay, rotary pairs whole), values and
outputs by a singular value decomposition per head.

*Formula.* MLP: scores [Σ (Σ + λI)⁻¹]_ii of the hidden activations, W₂′ = W₂ Σ_{:J} Σ_JJ⁻¹. Queries and keys:
‖S_q^½ e_i‖ · ‖S_k^½ e_i‖, summed over a rotary pair and over the heads of a group. Values: the decomposition of
the output's columns under the second moment of what they read.

*Cost.* One ``eigh`` and one Cholesky factorisation of size n for n neurons.

*When it does not help.* Leverage does not know what W₂ makes of a neuron: at 70 % kept the loss of the problem below
rises by .040 nats, with the scores of `modules` by .024. The claim did not hold here: whitened factors of the same size
cost .008 / .035 / .206 nats at 70 / 50 / 30 % kept, this .040 / .110 / .250. That MLP reads 96 features with 384
neurons and has little to spare; the paper's models have more. A baseline; take `modules`.

*Departs from the paper in.* The paper spreads sparsity over layers by softmax(−s/ε) of each block's influence; here
every layer gets the same share, and `modules` spends one budget in units of the loss instead. λ is ``ridge`` times the
mean of the diagonal of Σ. The paper decomposes W_v W_o under the moments of the block's input; here under those of the
heads' outputs, which weigh what attention makes of it, and coordinates are scored by the product of their mean squares
rather than of their roots for both. No official code was found.

*Reference.* C.-H. Lin, S. Gao, J. Smith, A. Patel, S. Tuli, Y. Shen, H. Jin, Y.-C. Hsu, “MoDeGPT: Modular Decomposition
for Large Language Model Compression”, 2024, https://arxiv.org/abs/2408.09632.

*Example.*

>>> import torch
>>> from eckart.modules.neurons import leverage_order
>>> leverage_order(torch.diag(torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)), 0.01).tolist()
[1, 2, 0]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eckart.compression import kfac, whitened
from eckart.errors import InputError
from eckart.modules.method import ModuleMethod, PreparedUnit
from eckart.modules.obs import check_parts
from eckart.modules.prepare import Scores, Weights, prepare_unit
from eckart.modules.trial import KEEPS, factored_rise, narrow_rise
from eckart.modules.units import UnitFacts
from eckart.moments import SiteMoments
from eckart.records import Claim, Paper, UnitKind, Verdict


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which parts become narrower, and the ridge of the leverage scores."""

    parts: tuple[UnitKind, ...] | None = None
    """neurons, values, queries; None: all of them."""
    ridge: float = 0.01
    """λ in multiples of the mean of the diagonal of Σ, above 0."""

    def __post_init__(self) -> None:
        check_parts("modegpt", self.parts)
        if isinstance(self.ridge, bool) or not isinstance(self.ridge, (int, float)) or not 0 < self.ridge < 1e6:
            raise InputError(f"method 'modegpt': the option ridge is a number above 0; got {self.ridge!r}.")


def _scores(options: Options) -> Scores:
    return Scores(metric=kfac.Options(), gradients=False, leverage=options.ridge, equal_heads=True)


def prepare(unit: UnitFacts, weights: Weights, moments: Mapping[str, SiteMoments], options: Options) -> PreparedUnit:
    """See :func:`eckart.modules.prepare_unit`."""
    return prepare_unit(unit, weights, moments, _scores(options))


def _run_claim() -> Verdict:
    nystroem = {keep: narrow_rise(_scores(Options()), keep) for keep in KEEPS}
    factors = {keep: factored_rise(lambda w, m: whitened.prepare(w, m, whitened.Options()), keep) for keep in KEEPS}
    figures = {}
    for keep in KEEPS:
        figures[f"modegpt: loss rise at keep {keep:g}"] = nystroem[keep]
        figures[f"whitened factors: loss rise at keep {keep:g}"] = factors[keep]
    return Verdict(
        held=all(nystroem[keep] < factors[keep] for keep in KEEPS),
        figures=figures,
        note="the MLP of the learned problem, 384 neurons; three calibration samples",
    )


METHOD = ModuleMethod(
    name="modegpt",
    summary="Nyström for the MLP, CR for queries and keys, SVD for values; no gradients, equal shares",
    paper=Paper(
        authors="C.-H. Lin et al.",
        title="MoDeGPT: Modular Decomposition for Large Language Model Compression",
        year=2024,
        link="https://arxiv.org/abs/2408.09632",
    ),
    needs=frozenset({"second"}),
    options=Options,
    loss_units=False,
    equal_heads=True,
    prepare=prepare,
    claim=Claim(
        statement="At equal parameters an MLP with 70, 50 and 30 % of its neurons, refitted, loses less than the same "
        "MLP with whitened factors.",
        source="Tables 1 and 2 of the paper: modules ahead of per-matrix SVD at every ratio",
        run=_run_claim,
    ),
)
