r"""Learning rates per layer from the tails of their spectra: heavier ones learn slower.

*What it does.* Turns the exponents of :func:`eckart.spectra.farms` into one factor per layer on the learning rate, to
be renewed every epoch.

*Formula.* f_l = lo + (hi − lo)(α_l − α_min)/(α_max − α_min); the rate of layer l is f_l times the global one. Layers
whose α cannot be measured get 1; where all α are equal, all get (lo + hi)/2.

*Cost.* That of the exponents: 25 windows a matrix.

*When it does not help.* On the small network of the claim it changes nothing that can be told from chance: mean
held-out loss 2.2857 nats per byte against 2.2878 at one rate, a gain of 0.002 ± 0.006 (standard error) over four seeds,
and in three of them a loss. So the claim is reported as failing here. The paper's gains are on deep image networks
trained for many epochs. Where layers of very different shape and role (head, embeddings) share one map of α, the map
mostly tells roles apart.

*Departs from the paper in.* Nothing in the map; α comes from windows (FARMS), as in the later paper, instead of whole
matrices. Their schedule (once per epoch, on top of a cosine) is left to the caller.

*Reference.* Y. Zhou, T. Pang, K. Liu, C. H. Martin, M. W. Mahoney, Y. Yang, “Temperature Balancing, Layer-wise Weight
Analysis, and Neural Network Training”, 2023, https://arxiv.org/abs/2312.00359.

*Example.*

>>> learning_rate_factors({"a": 2.0, "b": 3.0, "c": 2.5}, low=0.5, high=1.5)
{'a': 0.5, 'b': 1.5, 'c': 1.0}
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from eckart.errors import InputError
from eckart.evidence import learned_problem
from eckart.evidence.network import CONTEXT, forward, initial_parameters
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict
from eckart.spectra.windows import farms


def learning_rate_factors(
    alphas: Mapping[str, float | Finding], *, low: float = 0.5, high: float = 1.5
) -> dict[str, float]:
    """A factor on the learning rate of every layer: ``low`` for the heaviest tail, ``high`` for the lightest.

    ``alphas``: by name, ``alpha_farms`` of each layer, a number or the Finding; one without a value gets factor 1.
    Raises InputError unless 0 < low ≤ high.
    """
    if not 0 < low <= high < math.inf:
        raise InputError(f"learning_rate_factors: 0 < low ≤ high; got {low!r} and {high!r}.")
    known = {name: float(alpha) for name, alpha in alphas.items() if math.isfinite(float(alpha))}
    least, most = min(known.values(), default=0.0), max(known.values(), default=0.0)
    factors = {}
    for name in alphas:
        if name not in known:
            factors[name] = 1.0
        else:
            place = (known[name] - least) / (most - least) if most > least else 0.5
            factors[name] = low + (high - low) * place
    return factors


CLAIM_STEPS = 300
SEEDS = range(4)
_RENEWED = 50
_MAPS = ("mix", "up", "down", "head")


def _trained_loss(balanced: bool, seed: int) -> float:
    """Held-out loss of the byte model after a short training with SGD, one rate for all or balanced ones."""
    windows = learned_problem().calibration
    generator = torch.Generator().manual_seed(seed)
    parameters = {k: v.requires_grad_() for k, v in initial_parameters(generator).items()}
    groups = [{"params": [v], "name": k.removesuffix(".weight")} for k, v in parameters.items()]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    factors = dict.fromkeys(_MAPS, 1.0)
    for step in range(CLAIM_STEPS):
        if balanced and step % _RENEWED == 0:
            factors = learning_rate_factors({name: _alpha(parameters[f"{name}.weight"]) for name in _MAPS})
        for group in optimizer.param_groups:
            falling = 0.5 * (1 + math.cos(math.pi * step / CLAIM_STEPS))
            group["lr"] = 0.1 * falling * factors.get(group["name"], 1.0)
        sample = windows[torch.randint(0, windows.shape[0], (256,), generator=generator)].long()
        loss = cross_entropy(forward(parameters, sample[:, :CONTEXT]), sample[:, CONTEXT])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    with torch.no_grad():
        held_out = learned_problem().held_out.long()
        return float(cross_entropy(forward(parameters, held_out[:, :CONTEXT]), held_out[:, CONTEXT]))


def _alpha(W: Tensor) -> Finding:
    return farms(W)["alpha_farms"]


def _run_claim() -> Verdict:
    uniform = [_trained_loss(False, seed) for seed in SEEDS]
    balanced = [_trained_loss(True, seed) for seed in SEEDS]
    figures = {f"one rate, seed {seed}: held-out loss": value for seed, value in enumerate(uniform)}
    figures |= {f"balanced, seed {seed}: held-out loss": value for seed, value in enumerate(balanced)}
    gains = torch.tensor(uniform) - torch.tensor(balanced)
    mean, error = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
    figures |= {"mean gain": mean, "its standard error": error}
    return Verdict(held=mean > 2 * error, figures=figures, note="nats per byte, 300 steps of SGD")


METHOD = Diagnostic(
    name="learning-rates",
    summary="learning-rate factors per layer from their tail exponents (temperature balancing)",
    group="weights",
    paper=Paper(
        authors="Y. Zhou, T. Pang, K. Liu, C. H. Martin, M. W. Mahoney, Y. Yang",
        title="Temperature Balancing, Layer-wise Weight Analysis, and Neural Network Training",
        year=2023,
        link="https://arxiv.org/abs/2312.00359",
    ),
    entry=learning_rate_factors,
    claim=Claim(
        statement="A small network trained with SGD at balanced rates reaches a lower held-out loss than at one rate, "
        "in the mean over four seeds and by more than two standard errors.",
        source="Zhou et al. 2023: temperature balancing against one rate for all layers, tables of CIFAR and "
        "TinyImageNet",
        run=_run_claim,
    ),
)
