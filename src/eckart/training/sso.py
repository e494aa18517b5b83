r"""Target-based surrogates (SSO): several steps of descent for one gradient of the loss with respect to the outputs.

*What it does.* Takes the gradient of the loss at the model's outputs once, and then several steps on a surrogate that
needs the model only. It pays where the loss is what costs: a simulator, labels that have to be asked for, a teacher.

*Formula.* With outputs z_t = f(θ_t) of the batch, n rows, and J = ∂ℓ/∂z at z_t, the surrogate is g_t(θ) = ⟨J, f(θ) −
z_t⟩ + ‖f(θ) − z_t‖²/(2 n η_t). Over outputs it is minimal at z_t − n η_t J: for ℓ a mean over rows, one gradient step
of length η_t on every row's loss. m inner steps of descent with an Armijo search (first length 10, halved until g falls
by 0.1 · length · ‖∇g‖², then doubled for the next step) or of another optimizer. η_t = η ("constant"), η/√t ("sqrt"),
or η T^{−t/T} for t = 1, 2, … ("exponential").

*Cost.* One evaluation of the loss and its gradient with respect to z, m backward passes through the model, and a
forward pass for each inner step and each length that is tried. State: nothing, or that of the inner optimizer.

*When it does not help.* Where a pass through the model costs as much as the loss does, which is the rule: m inner steps
then cost m steps of SGD. On linear models with features of scales 1 to 0.03, after 30 gradients of the loss and each at
its best rate: squared loss 0.007 with 20 inner steps, 0.071 with one, 0.124 with SGD; logistic loss 0.056, 0.126 and
0.091, so with one step SGD is better. η is as critical as a rate: squared loss diverges for η above twice 1/L (L:
curvature of the loss in the outputs), and logistic loss ends at 0.20 with η = 1. With noise in the batch the surrogate
is fitted to that batch, so a constant η stops at a distance from the minimum.

*Departs from the paper in.* In the authors' code their ``eta`` divides the linear term and the quadratic one has no ½,
so it is an inverse step (1000 is the default), and their mean is over entries of z; here η is the paper's. The search
starts again from ``length`` at each outer step, as theirs; its constants are ours. The closure has to compute the same
function of the weights whenever it is called: dropout and batch norms in training mode are noise to the search.

*Reference.* J. W. Lavington, S. Vaswani, R. Babanezhad, M. Schmidt, N. Le Roux, “Target-based Surrogates for Stochastic
Optimization”, ICML 2023, https://arxiv.org/abs/2302.02607.

*Example.*

>>> import torch
>>> X = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)  # curvatures 9 and 1
>>> y = torch.tensor([[3.0], [1.0]], dtype=torch.float64)
>>> model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
>>> _ = torch.nn.init.zeros_(model.weight)
>>> optimizer = TargetSurrogate(model.parameters(), eta=0.5, inner_steps=30)
>>> def closure():
...     z = model(X)
...     return (z - y).square().mean(), z  # the loss and the outputs that it was computed from
>>> losses = [float(optimizer.step(closure)) for _ in range(3)]
>>> [round(loss, 4) for loss in losses]  # η = 0.5: outputs go all the way in one step
[5.0, 0.0, 0.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eckart.errors import InputError, MismatchError, NotFiniteError, problems, unknown
from eckart.records import Claim, Paper, Technique, Verdict

SCHEDULES = ("constant", "sqrt", "exponential")
_ENOUGH, _TRIES, _FLAT = 0.1, 40, 1e-9
"""Share of the linear fall that is asked for, halvings before the step is given up, gradient norm that is none."""

Closure = Callable[[], tuple[Tensor, Tensor]]


class TargetSurrogate(torch.optim.Optimizer):
    """A torch optimizer whose ``step`` takes a closure that returns ``(loss, logits)``, without ``backward``.

    ::

        optimizer = TargetSurrogate(model.parameters(), eta=1.0, inner_steps=10)

        def closure():
            logits = model(x)
            return cross_entropy(logits, y), logits

        loss = optimizer.step(closure)

    The loss is a mean over the rows of the outputs (n, …). ``inner`` may be any torch optimizer over the same
    parameters; without it the inner steps are descent with an Armijo search. Each outer step counts in
    ``param_groups[0]["t"]``, so ``state_dict`` resumes the schedule. One parameter group: the search has one length.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        eta: float = 1.0,
        inner_steps: int = 10,
        schedule: Literal["constant", "sqrt", "exponential"] = "constant",
        total_steps: int | None = None,
        length: float = 10.0,
        inner: torch.optim.Optimizer | None = None,
    ) -> None:
        """``eta``: η > 0, the step in the outputs. ``inner_steps``: m ≥ 1. ``total_steps``: T, needed by the schedule
        "exponential" alone. ``length``: first length of the search, above 0; unused with ``inner``.

        Raises InputError for options out of range, all at once, and for an ``inner`` over other parameters.
        """
        faults = [
            f"{name} is a number above 0; got {value!r}"
            for name, value in (("eta", eta), ("length", length))
            if not isinstance(value, (int, float)) or not 0 < value < math.inf
        ]
        if not _count(inner_steps):
            faults.append(f"inner_steps is an int of at least 1; got {inner_steps!r}")
        if schedule not in SCHEDULES:
            faults.append(unknown("schedule", str(schedule), SCHEDULES))
        if (schedule == "exponential") is not (total_steps is not None):
            faults.append(f"total_steps goes with the exponential schedule and only there; got {total_steps!r}")
        elif total_steps is not None and not _count(total_steps):
            faults.append(f"total_steps is an int of at least 1; got {total_steps!r}")
        if faults:
            raise InputError(problems("target surrogate", faults))
        super().__init__(
            params,
            {
                "eta": eta,
                "inner_steps": inner_steps,
                "schedule": schedule,
                "total_steps": total_steps,
                "length": length,
                "t": 0,
            },
        )
        if len(self.param_groups) != 1:
            raise InputError(f"target surrogate: expected one parameter group; got {len(self.param_groups)}.")
        if inner is not None and not isinstance(inner, torch.optim.Optimizer):
            raise InputError(f"inner is a torch optimizer or None; got {type(inner).__name__}.")
        if inner is not None and {id(p) for g in inner.param_groups for p in g["params"]} != {
            id(p) for p in self._weights
        }:
            raise InputError("the inner optimizer has to hold the same parameters.")
        self.inner = inner

    @property
    def _weights(self) -> list[Tensor]:
        weights: list[Tensor] = self.param_groups[0]["params"]
        return weights

    def target_step(self) -> float:
        """η_t of the next step."""
        group = self.param_groups[0]
        t, eta = group["t"] + 1, float(group["eta"])
        if group["schedule"] == "sqrt":
            return eta / math.sqrt(t)
        if group["schedule"] == "exponential":
            return float(eta * group["total_steps"] ** (-t / group["total_steps"]))
        return eta

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One outer step. Returns the loss at its start, detached.

        Raises InputError without a closure, or where it returns anything but a scalar loss and the logits (n, …) that
        the loss was computed from; NotFiniteError for NaN or Inf in the loss or J. Weights are unchanged then.
        """
        if closure is None:
            raise InputError("target surrogate: step(closure) needs a closure that returns (loss, logits).")
        with torch.enable_grad():
            loss, z = _loss_and_logits(closure())
            (J,) = torch.autograd.grad(loss, z, retain_graph=True, allow_unused=True)
        if J is None:
            raise InputError(
                "target surrogate: the loss does not depend on the logits that the closure returned; return those that "
                "it was computed from, not a copy."
            )
        if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(J).all()):
            raise NotFiniteError("target surrogate: the loss or its gradient with respect to the logits is NaN or Inf.")
        start, weight = z.detach(), 1 / (2 * len(z) * self.target_step())

        def surrogate(f: Tensor) -> Tensor:
            if f.shape != start.shape:
                raise InputError(
                    f"target surrogate: the closure gave logits {tuple(f.shape)} after {tuple(start.shape)}; it has to "
                    "use one batch per step."
                )
            moved = f - start
            return (J * moved).sum() + weight * moved.square().sum()

        self._descend(closure, surrogate, z)
        self.param_groups[0]["t"] += 1
        return loss.detach()

    def _descend(self, closure: Closure, surrogate: Callable[[Tensor], Tensor], z: Tensor) -> None:
        group = self.param_groups[0]
        length = float(group["length"])
        for count in range(group["inner_steps"]):
            with torch.enable_grad():
                value = surrogate(z if count == 0 else _loss_and_logits(closure())[1])
                gradients = torch.autograd.grad(value, self._weights, allow_unused=True)
            if self.inner is not None:
                for p, g in zip(self._weights, gradients, strict=True):
                    p.grad = g
                self.inner.step()
                continue
            square = sum(float(g.square().sum()) for g in gradients if g is not None)
            if not math.sqrt(square) > _FLAT:
                return
            accepted = self._search(closure, surrogate, float(value.detach()), gradients, square, length)
            if accepted is None:
                return
            length = min(2 * accepted, float(group["length"]))

    @torch.no_grad()
    def _search(
        self,
        closure: Closure,
        surrogate: Callable[[Tensor], Tensor],
        value: float,
        gradients: tuple[Tensor | None, ...],
        square: float,
        length: float,
    ) -> float | None:
        """The first length that lowers the surrogate enough; None, and nothing moved, where none does."""
        starts = [p.clone() for p in self._weights]
        for _ in range(_TRIES):
            for p, start, g in zip(self._weights, starts, gradients, strict=True):
                if g is not None:
                    p.copy_(start - length * g)
            if float(surrogate(_loss_and_logits(closure())[1])) <= value - _ENOUGH * length * square:
                return length
            length /= 2
        for p, start in zip(self._weights, starts, strict=True):
            p.copy_(start)
        return None

    def state_dict(self) -> dict[str, Any]:
        """That of torch, with the inner optimizer's under ``"inner"`` where there is one."""
        state = super().state_dict()
        return state if self.inner is None else {**state, "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave; MismatchError where one has an inner optimizer and the other not."""
        if ("inner" in state_dict) is not (self.inner is not None):
            raise MismatchError("the state and this target surrogate differ in whether they have an inner optimizer.")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "inner"})
        if self.inner is not None:
            self.inner.load_state_dict(state_dict["inner"])


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _loss_and_logits(found: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(found, (tuple, list)) or len(found) != 2 or not all(isinstance(v, Tensor) for v in found):
        raise InputError(
            f"target surrogate: the closure has to return (loss, logits), two tensors; got {type(found).__name__}."
        )
    loss, z = found
    if loss.numel() != 1 or z.ndim == 0 or not z.is_floating_point():
        raise InputError(
            "target surrogate: the closure returns a scalar loss and floating-point logits (n, …); got shapes "
            f"{tuple(loss.shape)} and {tuple(z.shape)}, logits of {z.dtype}."
        )
    if torch.is_grad_enabled() and not (loss.requires_grad and z.requires_grad):
        raise InputError("target surrogate: loss or logits have no gradient; do not detach them or use no_grad.")
    return loss.reshape(()), z


# ---- the claim

ROWS, COLUMNS, BATCH, OUTER = 500, 20, 100, 30
RATES, ETAS = (0.3, 1.0, 10.0, 30.0, 100.0), (1.0, 8.0, 64.0)


def _problem(kind: str) -> tuple[Tensor, Tensor]:
    """Linear features with scales from 1 to 0.03, and labels of a linear model: ±1, or with noise."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(ROWS, COLUMNS, generator=generator) * torch.logspace(0, -1.5, COLUMNS)
    score = X @ torch.randn(COLUMNS, generator=generator) * 3 + 0.1 * torch.randn(ROWS, generator=generator)
    return X, (score if kind == "squared" else score.sign())


def _after(kind: str, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> float:
    """Mean loss over all rows after OUTER steps on batches, each one look at the loss."""
    X, y = _problem(kind)
    w = nn.Parameter(torch.zeros(COLUMNS))
    optimizer = make([w])
    generator = torch.Generator().manual_seed(1)

    def loss_of(z: Tensor, labels: Tensor) -> Tensor:
        each = (z - labels).square() / 2 if kind == "squared" else nn.functional.softplus(-labels * z)
        return each.mean()

    for _ in range(OUTER):
        rows = torch.randint(0, ROWS, (BATCH,), generator=generator)

        def closure(rows: Tensor = rows) -> tuple[Tensor, Tensor]:
            z = X[rows] @ w
            return loss_of(z, y[rows]), z

        if isinstance(optimizer, TargetSurrogate):
            optimizer.step(closure)
        else:
            optimizer.zero_grad()
            torch.autograd.backward(closure()[0])
            optimizer.step()
    with torch.no_grad():
        final = float(loss_of(X @ w, y))
        return final if final < 99.0 else 99.0  # also where it diverged to NaN


def _run_claim() -> Verdict:
    figures: dict[str, float] = {}
    held = True
    for kind in ("squared", "logistic"):
        best = min(_after(kind, lambda params, r=r: torch.optim.SGD(params, lr=r)) for r in RATES)  # type: ignore[misc]
        one, many = (
            min(
                _after(kind, lambda params, m=m, e=e: TargetSurrogate(params, eta=e, inner_steps=m))  # type: ignore[misc]
                for e in ETAS
            )
            for m in (1, 20)
        )
        figures |= {f"{kind}: SGD": best, f"{kind}: m = 1": one, f"{kind}: m = 20": many}
        held &= many < min(one, best)
    return Verdict(
        held=held,
        figures=figures,
        note=f"mean loss of all rows after {OUTER} gradients of the loss on batches of {BATCH}, each at the best of "
        f"{len(RATES)} rates or {len(ETAS)} η",
    )


METHOD = Technique(
    name="sso",
    summary="several cheap steps on a surrogate in the outputs for each costly gradient of the loss",
    paper=Paper(
        authors="J. W. Lavington, S. Vaswani, R. Babanezhad, M. Schmidt, N. Le Roux",
        title="Target-based Surrogates for Stochastic Optimization",
        year=2023,
        link="https://arxiv.org/abs/2302.02607",
    ),
    entry=TargetSurrogate,
    claim=Claim(
        statement="At equal numbers of gradients of the loss, 20 inner steps end below one inner step and below SGD, "
        "each at its best rate, for squared and logistic losses of a linear model.",
        source="experiments on supervised learning and imitation learning",
        run=_run_claim,
    ),
)
