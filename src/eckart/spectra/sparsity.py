r"""How much to prune from each layer, from the tails of their spectra: lighter ones lose more.

*What it does.* Turns the exponents of :func:`eckart.spectra.farms` into one sparsity per layer that meets a sparsity of
the whole model.

*Formula.* r_l = (1 − ε) + 2ε (α_l − α_min)/(α_max − α_min), then s_l = min(c r_l, 0.99) with c such that
Σ n_l s_l = S Σ n_l over layers of n_l weights. Layers whose α cannot be measured get r = 1.

*Cost.* That of the exponents: 25 windows a matrix.

*When it does not help.* On the learned maps of the claim it does harm: pruned by magnitude to 50, 60 and 70 % zeros,
the loss rises by 0.210, 0.434 and 1.343 nats per byte with these shares and by 0.123, 0.322 and 0.532 with equal ones;
the head has the lightest tail and is what can least be spared. The claim is reported as failing here. The paper
averages α over blocks of a deep language model, where all blocks have the same role. Measure before you trust it;
``eckart plan`` spreads a budget by measured losses instead.

*Departs from the paper in.* The published code averages α over the layers of a block first and cuts off at 1 without
giving the excess to the others; here each map stands for itself (average beforehand if you wish) and the total is met
exactly, or an error says that it cannot be.

*Reference.* H. Lu, Y. Zhou, S. Liu, Z. Wang, M. W. Mahoney, Y. Yang, “AlphaPruning: Using Heavy-Tailed Self
Regularization Theory for Improved Layer-wise Pruning of Large Language Models”, 2024, https://arxiv.org/abs/2410.10912.

*Example.*

>>> pruning_ratios({"a": 2.0, "b": 3.0}, {"a": 100, "b": 100}, sparsity=0.5, spread=0.2)
{'a': 0.4, 'b': 0.6}
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import cross_entropy

from eckart.errors import InputError, problems
from eckart.evidence import learned_problem
from eckart.evidence.network import CONTEXT, forward
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict
from eckart.spectra.windows import farms

MOST = 0.99
"""No layer is pruned by more."""


def pruning_ratios(
    alphas: Mapping[str, float | Finding], parameters: Mapping[str, int], *, sparsity: float, spread: float = 0.3
) -> dict[str, float]:
    """The share of zeros for every layer, in [0, 0.99], so that together they have ``sparsity``.

    ``alphas``: by name, ``alpha_farms`` of each layer, a number or the Finding. ``parameters``: weights of each.
    ``sparsity``: share of zeros in all of them, in (0, 0.99]. ``spread``: ε, in [0, 1); the published runs on language
    models use 0.1 to 0.3. Raises InputError for options out of range and names without a number of parameters.
    """
    found = []
    if not 0 < sparsity <= MOST:
        found.append(f"sparsity is a share in (0, {MOST}]; got {sparsity!r}")
    if not 0 <= spread < 1:
        found.append(f"spread is in [0, 1); got {spread!r}")
    if lost := [name for name in alphas if not parameters.get(name, 0) > 0]:
        found.append(f"no number of parameters for {', '.join(map(str, lost[:5]))}")
    if found:
        raise InputError(problems("pruning_ratios", found))
    known = {name: float(alpha) for name, alpha in alphas.items() if math.isfinite(float(alpha))}
    least, most = min(known.values(), default=0.0), max(known.values(), default=0.0)
    shares = dict.fromkeys(alphas, 1.0)
    for name, alpha in known.items():
        if most > least:
            shares[name] = 1 - spread + 2 * spread * (alpha - least) / (most - least)
    return _scaled(shares, parameters, sparsity)


def _scaled(shares: Mapping[str, float], parameters: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """min(c r, 0.99) with the wanted total: layers that reach the ceiling are set aside until c fits the rest."""
    capped: set[str] = set()
    while True:
        wanted = sparsity * sum(parameters[name] for name in shares) - MOST * sum(parameters[name] for name in capped)
        c = wanted / max(sum(parameters[name] * r for name, r in shares.items() if name not in capped), 1e-300)
        over = {name for name, r in shares.items() if name not in capped and c * r > MOST}
        if not over:
            return {name: MOST if name in capped else round(c * r, 12) for name, r in shares.items()}
        capped |= over


_MAPS = ("mix", "up", "down", "head")


def _pruned_loss(ratios: Mapping[str, float]) -> float:
    """Held-out loss of the learned network with each map pruned by magnitude to its own share of zeros."""
    problem = learned_problem()
    pruned = dict(problem.parameters)
    for name, ratio in ratios.items():
        pruned[f"{name}.weight"] = _by_magnitude(pruned[f"{name}.weight"], ratio)
    held_out = problem.held_out.long()
    return float(cross_entropy(forward(pruned, held_out[:, :CONTEXT]), held_out[:, CONTEXT]))


def _by_magnitude(W: Tensor, ratio: float) -> Tensor:
    gone = round(ratio * W.numel())
    return W * (W.abs() > W.abs().flatten().kthvalue(gone).values) if gone else W


def _run_claim() -> Verdict:
    problem = learned_problem()
    weights = {name: problem.weights(name)["weight"] for name in _MAPS}
    alphas = {name: farms(W)["alpha_farms"] for name, W in weights.items()}
    sizes = {name: W.numel() for name, W in weights.items()}
    figures = {f"{name}: alpha_farms": float(alpha) for name, alpha in alphas.items()}
    held = True
    for sparsity in (0.5, 0.6, 0.7):
        equal = _pruned_loss(dict.fromkeys(_MAPS, sparsity)) - problem.loss
        ours = _pruned_loss(pruning_ratios(alphas, sizes, sparsity=sparsity)) - problem.loss
        figures |= {f"{sparsity:.0%}, equal: loss rise": equal, f"{sparsity:.0%}, by α: loss rise": ours}
        held = held and ours < equal
    return Verdict(held=held, figures=figures, note="nats per byte; 4 learned maps pruned by magnitude, no retraining")


METHOD = Diagnostic(
    name="pruning-ratios",
    summary="sparsity per layer from their tail exponents (AlphaPruning)",
    group="weights",
    paper=Paper(
        authors="H. Lu, Y. Zhou, S. Liu, Z. Wang, M. W. Mahoney, Y. Yang",
        title="AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large "
        "Language Models",
        year=2024,
        link="https://arxiv.org/abs/2410.10912",
    ),
    entry=pruning_ratios,
    claim=Claim(
        statement="Pruned by magnitude to 50, 60 and 70 % zeros, learned maps lose less with shares by their exponents "
        "than with equal ones.",
        source="Lu et al. 2024, tables of perplexity: layer-wise ratios by α against uniform ones",
        run=_run_claim,
    ),
)
