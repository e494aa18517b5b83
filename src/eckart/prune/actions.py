"""What a schedule does to the weights that are to go: zero, shrink, fade, prox, regrow, freeze."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from eckart.errors import InputError, MismatchError, NotFiniteError, problems, unknown
from eckart.prune.envelope_prox import envelope_prox
from eckart.prune.patterns import count, highest
from eckart.prune.structure import Shares, Structure, Units

State = dict[str, Tensor | int]


class Engine(Protocol):
    """What an action may ask of the schedule and tell it."""

    structure: Structure
    keep: float
    begin: int
    end: int
    kept: Units
    """The units that are not held at zero."""

    def keep_at(self, step: int) -> float: ...
    def shares(self, keep: float) -> Shares: ...
    def is_event(self, step: int) -> bool: ...
    def scores(self) -> Units: ...
    def choose(self, keep: float, *, within: Mapping[str, Tensor] | None = None) -> Units: ...
    def hold(self, kept: Units) -> None: ...
    def learning_rate(self) -> float: ...
    def generator(self, step: int) -> torch.Generator: ...


class Action(ABC):
    """One way from a dense model to a sparse one. :meth:`step` is called after every optimizer step of the ramp."""

    curve: str | None = None
    """The curve by default; None where it has none, since it works towards the final share from the start."""
    by_interval = False
    """Whether it acts at intervals; the others act after every step."""

    def faults(self, engine: Engine) -> list[str]:
        """What is wrong with the options, each in a sentence."""
        return []

    @abstractmethod
    def step(self, engine: Engine, step: int) -> None:
        """Acts after optimizer step number ``step``, begin ≤ step < end; ``step`` 0 is the start."""

    def end(self, engine: Engine) -> Units:
        """The units that stay for good; called once, at the end of the ramp."""
        return engine.choose(engine.keep, within=engine.kept)

    def state_dict(self) -> State:
        """What an exact resume needs: tensors and ints."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Takes up what :meth:`state_dict` gave."""
        if state:
            raise MismatchError(problems(f"{type(self).__name__} has no such state", sorted(state)))


class Zero(Action):
    """The lowest are zero and stay so; more of them as the curve says. What is zero never comes back."""

    curve = "cubic"
    by_interval = True

    def step(self, engine: Engine, step: int) -> None:
        if engine.is_event(step):
            engine.hold(engine.choose(engine.keep_at(step), within=engine.kept))


class Shrink(Action):
    """Every step, the lowest are multiplied by a factor. They are picked anew each time: a weight can come back.

    With ``sample`` the line between the lowest and the others is estimated from so many scores of each set.
    """

    curve = "one-shot"

    def __init__(self, factor: float = 0.95, sample: int | None = None) -> None:
        self.factor, self.sample = factor, sample

    def faults(self, engine: Engine) -> list[str]:
        found = []
        if not 0 <= self.factor < 1:
            found.append(f"factor is in [0, 1); got {self.factor!r}")
        if self.sample is not None and (not isinstance(self.sample, int) or self.sample < 1):
            found.append(f"sample counts scores, an int of at least 1; got {self.sample!r}")
        if self.sample is not None and (engine.structure.local or not isinstance(engine.shares(engine.keep), Mapping)):
            found.append(
                "sample estimates one line per layer; it needs an allocation by layer, not 'global', and a pattern "
                "without counts per row"
            )
        return found

    def step(self, engine: Engine, step: int) -> None:
        chosen = engine.choose(engine.keep_at(step)) if self.sample is None else self._estimated(engine, step)
        engine.structure.scale({name: c.float().masked_fill(~c, self.factor) for name, c in chosen.items()})

    def _estimated(self, engine: Engine, step: int) -> Units:
        shares, generator = engine.shares(engine.keep_at(step)), engine.generator(step)
        chosen = {}
        for name, score in engine.scores().items():
            flat = score.reshape(-1)
            n = min(self.sample or 0, len(flat))
            drawn = flat[torch.randint(len(flat), (n,), generator=generator).to(flat.device)]
            k = max(1, count(shares[name] if isinstance(shares, Mapping) else shares, n))
            chosen[name] = score >= drawn.kthvalue(n - k + 1).values
        return chosen


class Fade(Action):
    """In each of several periods the lowest units are picked and fade to zero in equal steps over the period."""

    def __init__(self, periods: int = 10) -> None:
        self.periods = periods
        self._target: Units = {}
        """The units that stay when this period is over."""

    def faults(self, engine: Engine) -> list[str]:
        if not isinstance(self.periods, int) or not 1 <= self.periods <= max(1, engine.end - engine.begin):
            return [
                f"periods is an int from 1 to the {engine.end - engine.begin} steps of the ramp; got {self.periods!r}"
            ]
        return []

    def step(self, engine: Engine, step: int) -> None:
        length = (engine.end - engine.begin) // self.periods
        place = step - engine.begin
        period, t = min(place // length, self.periods - 1), place
        t -= period * length
        if period == self.periods - 1:
            length = engine.end - engine.begin - period * length
        if t == 0:
            if self._target:
                engine.hold(self._target)
            share = 1 - (1 - engine.keep) * (period + 1) / self.periods
            self._target = engine.choose(share, within=engine.kept)
        factor = (length - t - 1) / (length - t)
        engine.structure.scale(
            {name: kept.float().masked_fill(~kept & engine.kept[name], factor) for name, kept in self._target.items()}
        )

    def end(self, engine: Engine) -> Units:
        """The target of the last period; where the ramp was cut short, chosen now among those left."""
        kept = {n: k & self._target[n] for n, k in engine.kept.items()} if self._target else engine.kept
        return engine.choose(engine.keep, within=kept)

    def state_dict(self) -> State:
        return dict(self._target)

    def load_state_dict(self, state: State) -> None:
        self._target = {name: value for name, value in state.items() if isinstance(value, Tensor)}


class Prox(Action):
    """Every step, the proximal operator of λ times the group sparse envelope, λ = strength × learning rate."""

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def faults(self, engine: Engine) -> list[str]:
        found = []
        if not isinstance(self.strength, (int, float)) or not 0 < self.strength < math.inf:
            found.append(f"strength is a positive number; got {self.strength!r}")
        if engine.structure.local:
            found.append("the envelope counts over a layer or over all; a pattern with counts per row has none")
        return found

    def step(self, engine: Engine, step: int) -> None:
        structure, shares = engine.structure, engine.shares(engine.keep)
        norms = {name: view.weight_square().sqrt() for name, view in structure.views().items()}
        if wrong := [name for name, v in norms.items() if not bool(v.isfinite().all())]:
            raise NotFiniteError(problems(f"weights after step {step} hold NaN or Inf", wrong))
        strength = self.strength * engine.learning_rate()
        if isinstance(shares, Mapping):
            factors = {
                name: envelope_prox(v.reshape(-1), count(shares[name], v.numel()), strength).reshape(v.shape)
                for name, v in norms.items()
            }
        else:
            flat = torch.cat([v.reshape(-1) for v in norms.values()])
            parts = torch.split(
                envelope_prox(flat, count(shares, len(flat)), strength), [v.numel() for v in norms.values()]
            )
            factors = {name: f.reshape(v.shape) for (name, v), f in zip(norms.items(), parts, strict=True)}
        structure.scale(factors)


class Regrow(Action):
    """Sparse from the start: now and then a share of the kept are dropped, and as many grown by gradient.

    ``fraction`` of the kept at first, down to 0 along a cosine at the end of the ramp.
    """

    by_interval = True

    def __init__(self, fraction: float = 0.3) -> None:
        self.fraction = fraction

    def faults(self, engine: Engine) -> list[str]:
        found = []
        if not 0 < self.fraction < 1:
            found.append(f"fraction is a share in (0, 1); got {self.fraction!r}")
        if engine.structure.local:
            found.append("regrow drops and grows within a layer; it needs a pattern without counts per row")
        return found

    def step(self, engine: Engine, step: int) -> None:
        if step == engine.begin:
            engine.hold(engine.choose(engine.keep, within=engine.kept))
            return
        if not engine.is_event(step):
            return
        share = self.fraction / 2 * (1 + math.cos(math.pi * (step - engine.begin) / (engine.end - engine.begin)))
        magnitudes = engine.scores()
        views = engine.structure.views()
        if missing := [name for name, view in views.items() if not view.has_gradient]:
            raise InputError(problems("regrow needs gradients, and these weights have none", missing))
        grown = {}
        for name, kept in engine.kept.items():
            flat, active = magnitudes[name].reshape(-1), kept.reshape(-1)
            slope = views[name].gradient_square().reshape(-1)
            if not bool(slope.isfinite().all()):
                raise NotFiniteError(f"the gradient of {name} after step {step} holds NaN or Inf.")
            total = int(active.sum())
            staying = highest(flat.masked_fill(~active, -math.inf), total - int(share * total)) & active
            open_ = highest(slope.masked_fill(staying, -math.inf), total - int(staying.sum())) & ~staying
            grown[name] = (staying | open_).reshape(kept.shape)
        engine.hold(grown)

    def end(self, engine: Engine) -> Units:
        """The pattern as it is; where the ramp never began, the lowest go now."""
        return engine.kept if self._sparse(engine) else engine.choose(engine.keep)

    def _sparse(self, engine: Engine) -> bool:
        return not all(bool(k.all()) for k in engine.kept.values()) or engine.keep == 1


class Freeze(Action):
    """The zeros that the model has at the start stay zero; nothing else is chosen."""

    def step(self, engine: Engine, step: int) -> None:
        if step == engine.begin:
            engine.hold(self.end(engine))

    def end(self, engine: Engine) -> Units:
        if not all(bool(k.all()) for k in engine.kept.values()):
            return engine.kept
        return {name: view.weight_square() > 0 for name, view in engine.structure.views().items()}


ACTIONS: dict[str, type[Action]] = {
    "zero": Zero,
    "iss": Shrink,
    "shrink": Shrink,
    "fade": Fade,
    "prox": Prox,
    "regrow": Regrow,
    "freeze": Freeze,
}
"""The actions by name; ``iss`` and ``shrink`` are one. Options of their own are given to the class."""


def find_action(action: str | Action) -> Action:
    """A new action of that name with its defaults, or the one given. Raises InputError for unknown names."""
    if isinstance(action, Action):
        return action
    if action not in ACTIONS:
        raise InputError(unknown("action", str(action), ACTIONS))
    return ACTIONS[action]()
