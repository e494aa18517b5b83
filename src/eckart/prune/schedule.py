"""One engine for pruning in training: who goes (selector), when (curve), and what becomes of them (action)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.arch import check_finite, find_sites, model_size, site_module
from eckart.errors import BudgetError, InputError, MismatchError, NotFiniteError, problems, unknown
from eckart.prune.actions import Action, State, find_action
from eckart.prune.groups import GroupSet
from eckart.prune.masks import MaskSet, plain_optimizer, zero_state
from eckart.prune.patterns import Pattern, check_keep, count, parse_pattern
from eckart.prune.selectors import Allocation, Selector, erk_shares, find_selector
from eckart.prune.structure import Coupled, Elements, Shares, Structure, Target, Units, check_gradients
from eckart.records import Site

CURVES: dict[str, Callable[[float], float]] = {
    "cubic": lambda p: 1 - (1 - p) ** 3,
    "linear": lambda p: p,
    "one-shot": lambda p: 1.0,
}
"""Share of the way from dense to sparse, after a share p of the ramp."""
_CHOICES = ("global", "uniform", "erk")


@dataclass(frozen=True, kw_only=True)
class SparsityReport:
    """What a schedule left: counts and bytes, of what it prunes and of the whole model. Printed, it is in words."""

    densities: Mapping[str, float]
    """Share of each pruned parameter that stays."""
    kept: int
    """Weights under the masks that stay."""
    total: int
    """Weights under the masks."""
    model_parameters: int
    """Parameters of the whole model, biases and embeddings included; zeros count."""
    dense_bytes: int
    """The model's weights as any file format stores them: zeros take their full place."""
    packed_bytes: int
    """The same with the zeros left out and one bit per weight to say where they were: what a sparse file takes."""
    whole_groups: Mapping[str, tuple[int, int]]
    """By set of coupled groups or of whole rows: how many are zero, and how many there are. These can be cut out."""

    @property
    def density(self) -> float:
        """kept / total, in [0, 1]."""
        return self.kept / max(self.total, 1)

    def __str__(self) -> str:
        lines = [
            f"{self.kept:,} of {self.total:,} weights kept ({self.density:.2%}) in {len(self.densities)} tensors; "
            f"the model has {self.model_parameters:,} parameters.",
            f"Size: {self.dense_bytes:,} bytes as usual files store zeros; {self.packed_bytes:,} with a bit per weight "
            "and the zeros left out.",
        ]
        if self.whole_groups:
            gone = sum(n for n, _ in self.whole_groups.values())
            lines.append(
                f"Width: {gone:,} of {sum(n for _, n in self.whole_groups.values()):,} groups are zero. Cut out of the "
                "layers they make the model smaller and faster; as zeros they do neither."
            )
        else:
            lines.append(
                "Speed: none. Scattered zeros are multiplied like other numbers; rank and width make it faster."
            )
        return "\n".join(lines)


class Schedule:
    """Prunes the linear maps of a model, or coupled groups, while any PyTorch loop trains it.

    ::

        engine = Schedule(model, selector="global-mp", keep=0.1, action="zero", steps=2000)
        engine.attach(optimizer)  # any torch optimizer, made before or after
        ...  # train as ever
        report = engine.finish()

    The model keeps its parameters and their names. After each ``optimizer.step()`` a hook acts. In the ramp, from
    ``begin`` to ``end``, the action works towards ``keep``; at ``end`` what has to go is zero, and from then on held
    there, in weights and optimizer state, while the rest trains on. :attr:`masks` says at any time what is held.

    Maps with one input or one output only are left dense, as :func:`eckart.arch.find_sites` leaves them out.
    Steps are those of the optimizer, so gradient accumulation counts once. With DistributedDataParallel give the inner
    module; every process then does the same. Sharded parameters (FSDP) are not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        selector: str | Selector = "global-mp",
        keep: float | None = None,
        action: str | Action = "zero",
        steps: int,
        pattern: str | Pattern = "unstructured",
        groups: Sequence[GroupSet] = (),
        allocation: Allocation | Mapping[str, float] | None = None,
        begin: int = 0,
        end: int | None = None,
        interval: int | None = None,
        curve: str | None = None,
        floor: float | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        embeddings: bool = False,
        head: bool = False,
        seed: int = 0,
    ) -> None:
        """Checks everything and changes nothing.

        ``selector``: a name of ``SELECTORS`` or a :class:`Selector`. ``keep``: share of the weights that stay, in
        (0, 1]; "keep n of m" patterns have their own. ``action``: ``zero``, ``shrink`` (``iss``), ``fade``, ``prox``,
        ``regrow``, ``freeze``, or an :class:`Action` with options. ``steps``: optimizer steps of the whole training.

        ``pattern``: as :func:`parse_pattern` reads it. ``groups``: coupled groups instead of the maps that
        ``include`` and ``exclude`` choose as in :func:`eckart.arch.find_sites`, with ``embeddings`` and ``head``; a
        weight of two groups counts in both, and stays where both do, so fewer than ``keep`` of them may stay.
        ``allocation``: ``global``, ``uniform``, ``erk``, or a share per parameter (or layer) by name; by default the
        selector's. ``begin``, ``end``: the ramp, by default 0 and 3/4 of ``steps``; a selector that needs gradients
        begins after the first step. ``interval``: steps between two choices of zero and regrow, by default 100 or a
        tenth of the ramp. ``curve``: ``cubic``, ``linear``, ``one-shot``. ``floor``: share of all weights that each
        layer keeps at least, with a global allocation. ``seed``: of estimated thresholds.

        Raises InputError with all that is wrong: options, patterns that do not fit, frozen layers, maps that share a
        weight with another; BudgetError for a ``keep`` that cannot be met; NotFiniteError for NaN or Inf in weights.
        """
        selector, pattern, action = find_selector(selector), parse_pattern(pattern), find_action(action)
        faults = []
        for name, value, least in (("steps", steps, 1), ("begin", begin, 0), ("seed", seed, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                faults.append(f"{name} is an int of at least {least}; got {value!r}")
        for name, optional in (("interval", interval), ("end", end)):
            if optional is not None and (not isinstance(optional, int) or isinstance(optional, bool) or optional < 1):
                faults.append(f"{name} is an int of at least 1; got {optional!r}")
        if curve is not None and curve not in CURVES:
            faults.append(unknown("curve", curve, CURVES))
        elif curve is not None and action.curve is None:
            faults.append(f"{type(action).__name__} works towards keep from the start; it has no curve, got {curve!r}")
        if interval is not None and not action.by_interval:
            faults.append(f"{type(action).__name__} acts after every step; it has no interval, got {interval!r}")
        if floor is not None and not 0 <= floor < 1:
            faults.append(f"floor is a share in [0, 1); got {floor!r}")
        if groups and (include or exclude or embeddings or head):
            faults.append("give either groups or patterns of layers (include, exclude, embeddings, head), not both")
        if groups and str(pattern) != "unstructured":
            faults.append(f"coupled groups have no pattern; got {pattern}")
        keep = pattern.share if keep is None else keep
        if keep is None:
            faults.append("keep is missing: the share of weights that stay, in (0, 1]")
        elif pattern.share is not None and not math.isclose(keep, pattern.share):
            faults.append(f"pattern {pattern} keeps {pattern.share:g}; got keep={keep!r}")
        if faults or keep is None:
            raise InputError(problems("schedule", faults))
        self.keep = check_keep(keep)
        self.begin = max(begin, 1) if selector.needs_gradient else begin
        self.end = end if end is not None else max(self.begin + 1, (3 * steps) // 4)
        if not self.begin < self.end <= steps:
            raise InputError(f"schedule: expected begin < end ≤ steps; got {self.begin}, {self.end}, {steps}.")
        self.interval = interval or max(1, min(100, (self.end - self.begin) // 10))
        self.model, self.selector, self.action = model, selector, action
        self.steps = 0
        """Optimizer steps seen."""
        self.done = False
        """Whether the ramp is over and the masks are final."""
        self._curve = CURVES[curve or action.curve or "one-shot"]
        self._seed = seed
        self.structure: Structure = (
            Coupled(model, groups)
            if groups
            else _elements(
                model, pattern, find_sites(model, include=include, exclude=exclude, embeddings=embeddings, head=head)
            )
        )
        self._check_weights()
        self.kept: Units = self.structure.whole()
        self.allocation = _allocation(allocation or selector.allocation, self.structure, self.keep, pattern)
        if floor is not None and self.allocation != "global":
            raise InputError("schedule: floor needs allocation='global'; a share per layer is a floor already.")
        share = floor if floor is not None else selector.floor
        self._floor = math.ceil(share * sum(u.numel() * self.structure.sizes[n] for n, u in self.kept.items()))
        self._floor = max(self._floor, int(bool(groups)))
        if found := action.faults(self):
            raise InputError(problems(f"action {type(action).__name__}", found))
        self.structure.choose({n: k.float() for n, k in self.kept.items()}, self.shares(self.keep), self._floor)
        self._gone: list[tuple[nn.Parameter, Tensor]] = []
        self._begun = False
        self._optimizer: torch.optim.Optimizer | None = None
        self._handle: Any = None

    def _check_weights(self) -> None:
        parameters = self.structure.parameters
        wrong = [name for name, p in parameters.items() if not bool(torch.isfinite(p.detach()).all())]
        if wrong:
            raise NotFiniteError(problems("weights with NaN or Inf cannot be pruned", wrong))

    # ---- what is held

    @property
    def masks(self) -> MaskSet:
        """What stays and what is held at zero now, by parameter name; all true before anything is."""
        return MaskSet(self.structure.spread(self.kept))

    def hold(self, kept: Units) -> None:
        """Holds at zero every unit that is not kept, from now on. For actions."""
        self.kept = kept
        self._gone = [
            (self.structure.parameters[name], ~mask)
            for name, mask in self.structure.spread(kept).items()
            if not bool(mask.all())
        ]
        self._zero()

    @torch.no_grad()
    def _zero(self) -> None:
        for parameter, gone in self._gone:
            parameter.masked_fill_(gone.to(parameter.device), 0)
            if self._optimizer is not None:
                zero_state(self._optimizer, parameter, gone)

    # ---- what actions ask

    def keep_at(self, step: int) -> float:
        """The share that stays after this step, by the curve: 1 before ``begin``, ``keep`` from ``end`` on."""
        if step < self.begin:
            return 1.0
        way = 1.0 if step >= self.end else self._curve((step - self.begin) / (self.end - self.begin))
        return 1 - (1 - self.keep) * way

    def shares(self, keep: float) -> Shares:
        """The share of each set when a share ``keep`` of all stays; one number where the budget is global."""
        if not isinstance(self.allocation, Mapping):
            return keep
        rest = (1 - keep) / (1 - self.keep) if self.keep < 1 else 0.0
        return {name: 1 - (1 - share) * rest for name, share in self.allocation.items()}

    def is_event(self, step: int) -> bool:
        """Whether the interval is over at this step."""
        return (step - self.begin) % self.interval == 0

    def scores(self) -> Units:
        """The selector's scores now. Raises NotFiniteError with every layer whose scores hold NaN."""
        views = self.structure.views()
        if self.selector.needs_gradient:
            check_gradients(views, f"selector {self.selector.name}")
        scores = self.selector.score(views)
        if wrong := [name for name, score in scores.items() if bool(score.isnan().any())]:
            raise NotFiniteError(problems(f"weights or gradients hold NaN or Inf after step {self.steps}", wrong))
        return scores

    def choose(self, keep: float, *, within: Mapping[str, Tensor] | None = None) -> Units:
        """The units that stay where a share ``keep`` of all may; only units of ``within`` where it is given."""
        if keep >= 1:
            return self.structure.whole() if within is None else dict(within)
        scores = self.scores()
        if within is not None:
            scores = {name: score.masked_fill(~within[name], -math.inf) for name, score in scores.items()}
        chosen = self.structure.choose(scores, self.shares(keep), self._floor)
        return chosen if within is None else {name: units & within[name] for name, units in chosen.items()}

    def learning_rate(self) -> float:
        """Of the first parameter group of the optimizer, now."""
        return float(self._optimizer.param_groups[0]["lr"]) if self._optimizer is not None else 1.0

    def generator(self, step: int) -> torch.Generator:
        """Random numbers of this step, the same in every run."""
        return torch.Generator().manual_seed(self._seed * 1_000_003 + step)

    # ---- training

    def attach(self, optimizer: Any) -> None:
        """Acts after every step of ``optimizer`` until :meth:`detach`. What begins at step 0 begins now.

        Any torch optimizer, also wrapped by accelerate; what it remembers of zeroed weights is zeroed too. Raises
        InputError where the engine is attached already, or the optimizer lacks a weight that is trained and pruned.
        """
        if self._handle is not None:
            raise InputError("schedule: it is attached already; call detach() first.")
        plain = plain_optimizer(optimizer)
        owned = {id(p) for group in plain.param_groups for p in group["params"]}
        missing = [n for n, p in self.structure.parameters.items() if p.requires_grad and id(p) not in owned]
        if missing:
            raise InputError(problems("the optimizer does not train these parameters; exclude or freeze them", missing))
        self._optimizer = plain
        self._handle = plain.register_step_post_hook(lambda *_: self.step())
        if self.steps == self.begin == 0 and not self._begun:
            self._act()
        self._zero()

    def detach(self) -> None:
        """Lets go of the optimizer. Zeros stay in the weights; what trains on moves them."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._optimizer = None

    @torch.no_grad()
    def step(self) -> None:
        """After an optimizer step; the hook calls it. Loops without ``torch.optim`` call it themselves.

        Raises NotFiniteError, naming the layers, where weights or gradients that are looked at hold NaN or Inf.
        """
        self.steps += 1
        self._zero()  # before the action: what it lets go starts from zero
        if not self.done:
            self._act()

    @torch.no_grad()
    def _act(self) -> None:
        self._begun = True
        if self.begin <= self.steps < self.end:
            self.action.step(self, self.steps)
        elif self.steps >= self.end:
            self._harden()

    @torch.no_grad()
    def _harden(self) -> None:
        if not self.done:
            self.hold(self.action.end(self))
            self.done = True

    def finish(self) -> SparsityReport:
        """Ends the ramp where it is still going, lets go of the optimizer, and says what is left. See :attr:`masks`."""
        self._harden()
        self.detach()
        return self.report()

    def report(self) -> SparsityReport:
        """Counts and sizes as they are now."""
        masks, size = self.masks, model_size(self.model)
        left_out, bits = 0, 0
        for name, mask in masks.items():
            gone = mask.numel() - int(mask.sum())
            if gone:
                left_out += gone * self.structure.parameters[name].element_size()
                bits += -(-mask.numel() // 8)
        groups = {
            name: (units.numel() - int(units.sum()), units.numel())
            for name, units in self.kept.items()
            if isinstance(self.structure, Coupled)
            or str(getattr(self.structure, "pattern", "")) in ("outputs", "inputs")
        }
        return SparsityReport(
            densities=masks.densities(),
            kept=masks.kept(),
            total=masks.numel(),
            model_parameters=size.parameters,
            dense_bytes=size.bytes,
            packed_bytes=size.bytes - left_out + bits,
            whole_groups=groups,
        )

    # ---- resume

    def state_dict(self) -> State:
        """What an exact resume needs besides the model and the optimizer: ints and tensors, flat by name."""
        kept: State = {f"kept:{name}": units.clone() for name, units in self.kept.items()}
        action: State = {f"action:{name}": value for name, value in self.action.state_dict().items()}
        return {"steps": self.steps, "done": int(self.done), **kept, **action}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Takes up what :meth:`state_dict` gave, into an engine made with the same options, before :meth:`attach`.

        Raises InputError once it is attached, MismatchError with everything that is of other sets or shapes.
        """
        if self._handle is not None:
            raise InputError("schedule: it is attached to an optimizer; load its state before that.")
        sets = {f"kept:{name}": units for name, units in self.kept.items()}
        faults = [f"{key} is missing" for key in ({"steps", "done"} | set(sets)) - set(state)]
        for key, value in state.items():
            if key.startswith("kept:"):
                if key not in sets:
                    faults.append(f"{key} is of no set of this model")
                elif not isinstance(value, Tensor) or value.shape != sets[key].shape:
                    faults.append(f"{key} has another shape than the {tuple(sets[key].shape)} units here")
            elif key not in ("steps", "done") and not key.startswith("action:"):
                faults.append(f"{key} is unknown")
        if faults:
            raise MismatchError(problems("the state of the schedule does not fit", sorted(faults)))
        own = {key.removeprefix("action:"): value for key, value in state.items() if key.startswith("action:")}
        places = {name: units.device for name, units in self.kept.items()}
        self.action.load_state_dict(
            {k: v.to(places.get(k, v.device), copy=True) if isinstance(v, Tensor) else v for k, v in own.items()}
        )
        self.steps, self.done = int(state["steps"]), bool(int(state["done"]))
        self.hold({name: torch.as_tensor(state[f"kept:{name}"]).bool().to(u.device) for name, u in self.kept.items()})


def _elements(model: nn.Module, pattern: Pattern, sites: Sequence[Site]) -> Elements:
    """The weights of the sites by parameter name; a shared weight once."""
    if not sites:
        raise InputError("schedule: the model has no linear map to prune.")
    check_finite(model, sites)
    names = {id(p): name for name, p in model.named_parameters()}
    targets: dict[int, Target] = {}
    for site in sites:
        parameter = site_module(model, site).get_parameter(
            site.name.rpartition(".")[2] if site.kind == "experts" else "weight"
        )
        targets.setdefault(id(parameter), Target(names[id(parameter)], parameter, site.kind, site.slices))
    return Elements(tuple(targets.values()), pattern)


def _allocation(
    wanted: Allocation | Mapping[str, float], structure: Structure, keep: float, pattern: Pattern
) -> Allocation | Mapping[str, float]:
    """A share per set, or ``global``. Raises InputError with all that is wrong."""
    sets = list(structure.sizes)
    if isinstance(wanted, str):
        if wanted not in _CHOICES:
            raise InputError(unknown("allocation", wanted, _CHOICES))
        if wanted == "global":
            if structure.local:
                raise InputError(
                    f"pattern {pattern} has a count in every row, so that layers cannot share a budget. Take "
                    "allocation='uniform', or selector='magnitude'."
                )
            return wanted
        if wanted == "erk":
            if isinstance(structure, Coupled) or pattern.share is not None:
                raise InputError("allocation 'erk' is for single weights, not for coupled groups or keep n of m.")
            return erk_shares({n: tuple(p.shape) for n, p in structure.parameters.items()}, keep)
        return dict.fromkeys(sets, keep)
    if pattern.share is not None:
        raise InputError(f"pattern {pattern} has its own share; layers cannot have others.")
    shares = {name if name in structure.sizes else f"{name}.weight": value for name, value in wanted.items()}
    faults = [f"{name} is no set of this model" for name in shares if name not in structure.sizes]
    faults += [f"{name} has no share" for name in sets if name not in shares]
    faults += [f"{n}: a share is in (0, 1]; got {v!r}" for n, v in shares.items() if not 0 < v <= 1]
    if faults:
        raise InputError(problems("allocation", faults))
    total = sum(u.numel() * structure.sizes[n] for n, u in structure.whole().items())
    kept = sum(count(shares[n], u.numel()) * structure.sizes[n] for n, u in structure.whole().items())
    if kept > keep * total * (1 + 1e-9):
        raise BudgetError(f"the shares keep {kept:,} of {total:,} weights, more than keep={keep:g} allows.")
    return {name: float(shares[name]) for name in sets}
