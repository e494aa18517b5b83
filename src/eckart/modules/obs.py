r"""Narrower modules in units of the loss, Eckart's default: neurons, values and queries under one budget.

*What it does.* Makes blocks narrower instead of thinner: MLPs lose neurons, attention loses directions of its values
and coordinates of its queries and keys. What is left are dense maps of smaller shapes, which need no kernel; where
all MLPs get one width, a plain config describes them.

*Formula.* Neurons: the one without which the loss rises least goes first, (W₂ᵀ G W₂)_ii / [Σ⁻¹]_ii (optimal brain
surgery on whole columns), and W₂ is refitted, W₂ Σ_{:J} Σ_JJ⁻¹. Values: per head of values the weighted decomposition
of the output's columns under G and the Σ of the heads' outputs, then one refit over all heads. Queries and keys:
tr(G_q S_q) over the coordinates that go; whole rotary pairs where there are any, otherwise the directions of the
weighted decomposition of the identity under G_q and S_q. G and Σ are those of ``kfac``; all errors are predicted rises
of the loss.

*Cost.* Neurons: O(n³) for n neurons, in blocks. Values and queries: decompositions of head_dim × head_dim.

*When it does not help.* At mild ratios ranks lose less: in the claim below factors of the same size are ahead at 70 and
50 % kept (.008 against .024 nats, .032 against .068) and behind at 30 % (.195 against .185). Mixed with ranks under one
budget (``kfac``, whose plans contain narrow units) it is better than either. Queries and keys are the part that its
prediction fits worst: on MiniLM at 60 % removed the cosine was .882 with them and .887 without, before the probes of
``compress`` corrected it. Models without facts in ``eckart.arch`` get factors only.

*Departs from the paper in.* MoDeGPT (see `modegpt`) scores neurons by leverage, decomposes W_v W_o under the second
moment of the block's input and weighs no outputs. Here everything is weighed by gradients, values are decomposed under
the moments of what the output map reads, every head may keep another number of directions, and the second map is
refitted across heads. The value bias moves into the output's bias; the key bias is dropped where it cannot matter.
Heads that keep normalised queries and keys (Qwen3) keep their width.

*Reference.* B. Hassibi, D. Stork, “Second Order Derivatives for Network Pruning: Optimal Brain Surgeon”, 1992; C.-H.
Lin et al., “MoDeGPT: Modular Decomposition for Large Language Model Compression”, 2024, https://arxiv.org/abs/2408.09632.

*Example.*

>>> import torch
>>> from eckart.modules.neurons import errors_in_order, removal_order
>>> X = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.5], [1.0, 1.0, -1.0]], dtype=torch.float64)
>>> W = torch.ones(1, 3, dtype=torch.float64)
>>> order = removal_order(W, X.T @ X)  # two neurons are copies: one of them goes first, at no cost
>>> bool(errors_in_order(W, X.T @ X, order)[2] < 1e-4)
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eckart.compression import kfac
from eckart.compression.needs import option_flag, option_share
from eckart.errors import InputError, unknown
from eckart.modules.method import ModuleMethod, PreparedUnit
from eckart.modules.prepare import Scores, Weights, prepare_unit
from eckart.modules.trial import KEEPS, factored_rise, narrow_rise
from eckart.modules.units import ALL_KINDS, KNOWN_KINDS, UnitFacts
from eckart.moments import SiteMoments
from eckart.records import Claim, Paper, UnitKind, Verdict


def check_parts(method: str, parts: object, known: Sequence[UnitKind] = ALL_KINDS) -> None:
    """Raises InputError unless the option names kinds of units that go together."""
    if parts is None:
        return
    if not isinstance(parts, (list, tuple)) or not parts:
        raise InputError(
            f"method {method!r}: the option parts lists some of {', '.join(known)}, as in "
            f'["neurons", "values"]; got {parts!r}.'
        )
    for part in parts:
        if part not in known:
            raise InputError(unknown(f"part for method {method!r}", str(part), known))
    if "heads" in parts and {"values", "queries"} & set(parts):
        raise InputError(
            f"method {method!r}: heads leave whole, or become narrower; take heads, or values and queries."
        )


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which parts become narrower, and how far the two metrics are trusted."""

    parts: tuple[UnitKind, ...] | None = None
    """neurons, values, queries, heads; None: all but heads under a global budget, and under a uniform one those whose
    width a plain config can state (neurons). Heads exclude values and queries."""
    gradient_shrinkage: float = 0.5
    """γ, as in ``kfac``."""
    input_shrinkage: float | None = None
    """ρ, as in ``kfac``."""
    correct_bias: bool = True
    """As in ``kfac``."""
    refit: bool = True
    """Fit the map that reads the neurons or heads to those that stay; false: cut, and change nothing else."""

    def __post_init__(self) -> None:
        check_parts("modules", self.parts, KNOWN_KINDS)
        option_share("modules", "gradient_shrinkage", self.gradient_shrinkage)
        if self.input_shrinkage is not None:
            option_share("modules", "input_shrinkage", self.input_shrinkage)
        option_flag("modules", "correct_bias", self.correct_bias)
        option_flag("modules", "refit", self.refit)
        if not self.refit and (self.parts is None or set(self.parts) - {"neurons", "heads"}):
            raise InputError("method 'modules': refit=False is for parts among neurons and heads; name them in parts.")


def scores_of(options: Options) -> Scores:
    """The metrics of ``kfac`` with these options."""
    metric = kfac.Options(
        gradient_shrinkage=options.gradient_shrinkage,
        input_shrinkage=options.input_shrinkage,
        correct_bias=options.correct_bias,
    )
    return Scores(metric=metric, gradients=True, refit=options.refit)


def prepare(unit: UnitFacts, weights: Weights, moments: Mapping[str, SiteMoments], options: Options) -> PreparedUnit:
    """See :func:`eckart.modules.prepare_unit`."""
    return prepare_unit(unit, weights, moments, scores_of(options))


def _run_claim() -> Verdict:
    obs = {keep: narrow_rise(scores_of(Options()), keep) for keep in KEEPS}
    leverage = {
        keep: narrow_rise(Scores(metric=kfac.Options(), gradients=False, leverage=0.01), keep) for keep in KEEPS
    }
    factors = {keep: factored_rise(lambda w, m: kfac.prepare(w, m, kfac.Options()), keep) for keep in KEEPS}
    figures = {}
    for keep in KEEPS:
        figures[f"obs: loss rise at keep {keep:g}"] = obs[keep]
        figures[f"leverage (modegpt): loss rise at keep {keep:g}"] = leverage[keep]
        figures[f"kfac factors: loss rise at keep {keep:g}"] = factors[keep]
    return Verdict(
        held=all(obs[keep] < leverage[keep] for keep in KEEPS),
        figures=figures,
        note="the MLP of the learned problem, 384 neurons; three calibration samples",
    )


METHOD = ModuleMethod(
    name="modules",
    summary="narrower dense blocks, scored in units of the loss and refitted",
    paper=Paper(
        authors="C.-H. Lin et al.",
        title="MoDeGPT: Modular Decomposition for Large Language Model Compression",
        year=2024,
        link="https://arxiv.org/abs/2408.09632",
    ),
    needs=frozenset({"mean", "second", "gradient"}),
    options=Options,
    loss_units=True,
    equal_heads=False,
    prepare=prepare,
    claim=Claim(
        statement="With 70, 50 and 30 % of the neurons of an MLP kept, the held-out loss rises less than with "
        "leverage scores; factors of the same size are shown beside.",
        source="Eckart's own claim, against the scores of MoDeGPT",
        run=_run_claim,
    ),
)
