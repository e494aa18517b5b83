r"""Learning rate and momentum from the curvature of batches, by stochastic Lanczos, as training goes on.

*What it does.* Looks at the Hessian of the loss of a few training batches through a few dozen products with it, and
gives the learning rate and momentum that are best for a quadratic with these extreme eigenvalues; and carries a rate
to another batch size.

*Formula.* Of a quadratic with eigenvalues in [λₙ, λ₁], κ = λ₁/λₙ, heavy-ball descent w ← w − η∇L + β(w − w′) goes
fastest with η = 4/(√λ₁ + √λₙ)² and β = ((√κ − 1)/(√κ + 1))²: its error falls by √β per step. λ₁ is the mean over the
batches of the largest Ritz value; batches look sharper than all data, and it is on batches that the steps are taken. λₙ
is the smallest positive Ritz value that rounding cannot explain, at least ``floor``·λ₁. With the critical batch size b*
of :func:`eckart.landscape.learning_rate_by_batch`, a batch of B shows λ₁(1 + b*/B), so the rate of SGD goes as 1/(1 +
b*/B), linear in B below b* and flat near 2/λ₁ above it; that of Adam as the root of it.

*Cost.* 2 · ``steps`` gradients per batch, every time it is measured; ``steps`` vectors of memory, and the graph of one
batch.

*When it does not help.* On networks, as it stands. On the regression of the claim 100 steps leave 2e-4 of the error
where the best rate without momentum leaves half. On the byte classifier the same formulas diverge (training loss 4.1
after 150 steps of batches of 128): with β near 1 heavy ball runs at 2(1 + β)/λ₁, the edge of stability, and curvature
rises under it. At a quarter of the rate it ends at 0.71, where six pairs of rate and momentum tried by hand have a
median of 0.68 and a best of 0.64: the claim fails. λₙ means little there: the floor decides β.

*Departs from the paper in.* The middle part of the paper was not at hand; its abstract describes a learner of rate and
momentum by stochastic Lanczos quadrature without formulas, and the ones above are Polyak's. The Hessian of a network
has small and negative eigenvalues, where κ says nothing: ``floor`` is ours, and caps β (at 0.88 for 0.001). For batch
sizes the paper gives the two powers; here b* joins them to the flat part.

*Reference.* D. Granziol, S. Zohren, S. Roberts, “Learning Rates as a Function of Batch Size: A Random Matrix Theory
Approach to Neural Network Training”, 2020, https://arxiv.org/abs/2006.09092; B. T. Polyak, “Some methods of speeding up
the convergence of iteration methods”, 1964.

*Example.*

>>> import torch
>>> from eckart.landscape import matrix_operator
>>> H = torch.diag(torch.linspace(1.0, 100.0, 60, dtype=torch.float64))
>>> rates = operator_rates([matrix_operator(H)], steps=60)
>>> round(rates.learning_rate, 6), round(rates.momentum, 4)  # 4/(10 + 1)², (9/11)²
(0.033058, 0.6694)
>>> w = torch.nn.Parameter(torch.zeros(1))
>>> optimizer = torch.optim.SGD([w], lr=1.0)
>>> rates.put(optimizer)
>>> round(optimizer.param_groups[0]["momentum"], 4)
0.6694
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eckart.errors import InputError, problems, unknown
from eckart.landscape.batch_size import POWERS, RateRule
from eckart.landscape.curvature import ModelLoss, Operator, matrix_operator, model_hessian
from eckart.landscape.lanczos import lanczos
from eckart.landscape.probes import interval, probe_vectors
from eckart.landscape.trial import byte_kinds, classifier
from eckart.records import Claim, Finding, Paper, Technique, Verdict


@dataclass(frozen=True, kw_only=True)
class LanczosRates:
    """Rates for heavy-ball descent, and what they come from."""

    learning_rate: float
    """η."""
    momentum: float
    """β in [0, 1)."""
    largest: Finding
    """λ₁, the mean over batches with its 95 % interval; None of one batch."""
    smallest: float
    """λₙ as it was used."""
    floored: bool
    """λₙ is ``floor``·λ₁: nothing positive above it was seen, or it was smaller."""
    notes: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """√β: by how much the error of the quadratic falls per step, in the long run."""
        return math.sqrt(self.momentum)

    def put(self, optimizer: torch.optim.Optimizer, *, scale: float = 1.0) -> None:
        """Sets ``lr`` (times ``scale`` > 0) and ``momentum`` of every group; a scheduler made earlier overwrites lr.

        Raises InputError for an optimizer whose groups have no ``momentum``, or that damps it or looks ahead
        (Nesterov): their best rates are others. Nothing is changed then.
        """
        if not math.isfinite(scale) or scale <= 0:
            raise InputError(f"LanczosRates.put: scale is a positive number; got {scale!r}.")
        wrong = [
            f"group {place}: {fault}" for place, group in enumerate(optimizer.param_groups) for fault in _faults(group)
        ]
        if wrong:
            raise InputError(problems("LanczosRates.put: the rates are for SGD with heavy-ball momentum", wrong))
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(scale * self.learning_rate)
            else:
                group["lr"] = scale * self.learning_rate
            group["momentum"] = self.momentum


def _faults(group: dict[str, Any]) -> list[str]:
    found = []
    if "momentum" not in group:
        found.append("it has no momentum; scale the rate of Adam and its kin with batch_scaled_rate")
    if group.get("nesterov"):
        found.append("nesterov=True")
    if group.get("dampening"):
        found.append(f"dampening={group['dampening']}")
    return found


def lanczos_rates(
    model: nn.Module,
    batch_losses: Sequence[ModelLoss],
    *,
    steps: int = 20,
    floor: float = 1e-3,
    seed: int = 0,
) -> LanczosRates:
    """Rates for training ``model`` from here on batches like these.

    ``batch_losses``: the losses of a few batches of the size that is trained on, as functions of the model (of a copy
    of it): ``lambda m: cross_entropy(m(x), y)``. ``steps`` of Lanczos from one start each. ``floor`` in (0, 1]: least
    λₙ/λ₁. To learn on the fly, measure again every few hundred steps and :meth:`LanczosRates.put` the result.

    Raises InputError for no batches, options out of range or curvature that is nowhere positive, and what
    :func:`eckart.landscape.hessian_spectrum` raises.
    """
    if callable(batch_losses) or not batch_losses:
        raise InputError("lanczos_rates: expected the losses of at least one batch, as a sequence of functions.")
    operators, notes = [], dict[str, None]()
    for loss in batch_losses:
        operator, said = model_hessian(model, loss)
        operators.append(operator)
        notes |= dict.fromkeys(said)
    return operator_rates(operators, steps=steps, floor=floor, seed=seed, notes=tuple(notes))


def operator_rates(
    operators: Sequence[Operator],
    *,
    steps: int = 20,
    floor: float = 1e-3,
    seed: int = 0,
    notes: tuple[str, ...] = (),
) -> LanczosRates:
    """:func:`lanczos_rates` for Hessians given as operators, one per batch."""
    found = []
    if not operators:
        found.append("expected at least one operator")
    if not isinstance(floor, (int, float)) or not 0 < floor <= 1:
        found.append(f"floor is a share in (0, 1]; got {floor!r}")
    if found:
        raise InputError(problems("lanczos_rates", found))
    tops, lows = [], []
    for place, operator in enumerate(operators):
        run = lanczos(operator, probe_vectors(operator, 1, seed + place)[0], steps)
        top = float(run.nodes[-1])
        noise = math.sqrt(operator.size) * torch.finfo(operator.dtype).eps * float(run.nodes.abs().max())
        tops.append(top)
        lows += [float(node) for node in run.nodes if float(node) > noise]
    largest = interval("largest_eigenvalue", tops)
    top = float(largest)
    if top <= 0:
        raise InputError(f"lanczos_rates: the largest eigenvalue is {top:.3g}; it has to be positive.")
    low = min(lows)
    floored = low < floor * top
    low = max(low, floor * top)
    high_root, low_root = math.sqrt(top), math.sqrt(min(low, top))
    return LanczosRates(
        learning_rate=4 / (high_root + low_root) ** 2,
        momentum=((high_root - low_root) / (high_root + low_root)) ** 2,
        largest=largest,
        smallest=min(low, top),
        floored=floored,
        notes=(*largest.notes, *notes),
    )


def batch_scaled_rate(
    learning_rate: float, from_batch: float, to_batch: float, critical: float | Finding, optimizer: RateRule = "sgd"
) -> float:
    """A rate that is good at one batch size, carried to another: ((1 + b*/from)/(1 + b*/to))^p.

    p is 1 for "sgd" and ½ for "adam". ``critical``: b* > 0, such as :func:`eckart.landscape.learning_rate_by_batch`
    finds; far below it this is :func:`eckart.landscape.scaled_learning_rate`, above it the rate stays. Raises
    InputError for values that are not positive, a Finding without a value, or another optimizer.
    """
    found = [
        f"{name} is a positive number; got {value!r}"
        for name, value in (
            ("learning_rate", learning_rate),
            ("from_batch", from_batch),
            ("to_batch", to_batch),
            ("critical", float(critical)),
        )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0
    ]
    if optimizer not in POWERS:
        found.append(unknown("optimizer", str(optimizer), POWERS))
    if found:
        raise InputError(problems("batch_scaled_rate", found))
    ratio = (1 + float(critical) / from_batch) / (1 + float(critical) / to_batch)
    return learning_rate * math.pow(ratio, POWERS[optimizer])


CLAIM_STEPS = 150
CLAIM_BATCH = 128
CLAIM_SCALE = 0.25
CLAIM_GRID = tuple((lr, momentum) for lr in (0.1, 0.3, 1.0) for momentum in (0.0, 0.9))


def _on_a_quadratic() -> dict[str, float]:
    """Linear regression on bits of source text: shares of the error left by 100 steps."""
    X = byte_kinds(400, 0)[0].double()
    H = X.T @ X / X.shape[0]
    values = torch.linalg.eigvalsh(H)
    rates = operator_rates([matrix_operator(H)], steps=64, floor=1e-6)
    plain = 2 / float(values[0] + values[-1])
    left = {}
    for name, rate, momentum in (("plain", plain, 0.0), ("heavy ball", rates.learning_rate, rates.momentum)):
        delta = torch.ones(64, dtype=torch.float64)
        start, velocity = delta.norm(), torch.zeros_like(delta)
        for _ in range(100):
            velocity = momentum * velocity + H @ delta
            delta = delta - rate * velocity
        left[f"regression, {name}: error left"] = float(delta.norm() / start)
    return left


def _trained(rate: tuple[float, float] | float) -> float:
    """The training loss of a byte classifier after SGD with (rate, momentum), or learned on the fly times a scale."""
    x, y = byte_kinds(4096, 0)
    model = classifier(16, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)

    def loss_of(picked: Tensor) -> ModelLoss:
        return lambda m: cross_entropy(m(x[picked]), y[picked])

    if isinstance(rate, tuple):
        optimizer.param_groups[0] |= {"lr": rate[0], "momentum": rate[1]}
    for step in range(CLAIM_STEPS):
        if isinstance(rate, float) and step % 50 == 0:
            picked = torch.randint(0, 4096, (4, CLAIM_BATCH), generator=torch.Generator().manual_seed(step))
            lanczos_rates(model, [loss_of(one) for one in picked]).put(optimizer, scale=rate)
        loss = loss_of(torch.randint(0, 4096, (CLAIM_BATCH,), generator=generator))(model)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    with torch.no_grad():
        return float(cross_entropy(model(x), y))


def _run_claim() -> Verdict:
    figures = _on_a_quadratic()
    grid = sorted(_trained(rates) for rates in CLAIM_GRID)
    figures |= {
        "network, best of 6 rates": grid[0],
        "network, median of 6 rates": (grid[2] + grid[3]) / 2,
        "network, on the fly, scale 1": _trained(1.0),
        f"network, on the fly, scale {CLAIM_SCALE}": (learned := _trained(CLAIM_SCALE)),
    }
    faster = figures["regression, heavy ball: error left"] < figures["regression, plain: error left"]
    return Verdict(
        held=faster and learned < 1.1 * grid[0],
        figures=figures,
        note=f"training loss after {CLAIM_STEPS} steps of SGD, batches of {CLAIM_BATCH} of a byte classifier",
    )


METHOD = Technique(
    name="lanczos-rates",
    summary="learning rate and momentum of SGD from the curvature of batches, measured on the fly",
    paper=Paper(
        authors="D. Granziol, S. Zohren, S. Roberts",
        title="Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training",
        year=2020,
        link="https://arxiv.org/abs/2006.09092",
    ),
    entry=lanczos_rates,
    claim=Claim(
        statement="On a quadratic the measured rates leave less error than the best rate without momentum; a network "
        "trained with a quarter of the rate, measured every 50 steps, ends within 10 % of the best of 6 tried by hand.",
        source="abstract: a learner of rate and momentum on the fly that avoids multiple evaluations, with good "
        "preliminary results",
        run=_run_claim,
    ),
)
