"""Units of a model: single weights or runs or rows by a pattern, or coupled groups; sums, choices, masks, scaling."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.errors import BudgetError, InputError, problems
from eckart.linalg import fold, matricize
from eckart.prune.groups import GroupSet, Part, check_groups
from eckart.prune.patterns import Pattern, check_fits, count, global_choice, highest
from eckart.prune.selectors import View
from eckart.records import SiteKind

Units = dict[str, Tensor]
"""One tensor per set of units, with one entry per unit."""
Shares = float | Mapping[str, float]
"""The share of weights that stays: of all sets together, or of each set by name."""


@dataclass(frozen=True)
class Target:
    """A weight that is pruned, and how it reads as (slices, out, in)."""

    name: str
    parameter: nn.Parameter
    kind: SiteKind
    slices: int

    def matrix(self, tensor: Tensor) -> Tensor:
        """(slices, out, in) of a tensor of the parameter's shape."""
        return matricize(tensor, self.kind, self.slices if self.kind == "conv" else 1)

    def folded(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`."""
        return fold(matrix, self.kind, self.parameter.shape)


class Structure(ABC):
    """Sets of units over the parameters of a model."""

    local: bool = False
    """Whether no budget can be shared between the sets."""
    sizes: dict[str, int]
    """Weights in one unit, by set."""
    parameters: dict[str, nn.Parameter]
    """What the units own, by name."""

    @abstractmethod
    def views(self) -> dict[str, View]:
        """What selectors see, by set; reads weights and gradients when asked."""

    @abstractmethod
    def whole(self) -> Units:
        """A bool per unit, all true."""

    @abstractmethod
    def spread(self, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One tensor per parameter, of its shape: the product of what its units say (for bools: and)."""

    @abstractmethod
    def choose_in(self, name: str, scores: Tensor, keep: float) -> Tensor:
        """One bool per unit of one set. Raises BudgetError where none would stay."""

    def choose(self, scores: Mapping[str, Tensor], keep: Shares, floor: int = 0) -> Units:
        """One bool per unit: by set where ``keep`` is a mapping, else one budget over all sets.

        Raises BudgetError, with every set that would be left empty.
        """
        if not isinstance(keep, Mapping):
            return global_choice(scores, self.sizes, keep, floor)
        chosen, faults = {}, []
        for name, score in scores.items():
            try:
                chosen[name] = self.choose_in(name, score, keep[name])
            except BudgetError as error:
                faults.append(f"{name}: {error}")
        if faults:
            raise BudgetError(problems("these layers would be left empty", faults))
        return chosen

    @torch.no_grad()
    def scale(self, factors: Mapping[str, Tensor]) -> None:
        """Multiplies the weights of every unit by its factor, in place."""
        for name, factor in self.spread(factors).items():
            parameter = self.parameters[name]
            parameter.mul_(factor.to(parameter.device, parameter.dtype))


class Elements(Structure):
    """The units of a pattern over weights; one set per weight, named as the parameter."""

    def __init__(self, targets: Sequence[Target], pattern: Pattern) -> None:
        """Raises InputError with every weight whose shape the pattern does not fit."""
        shapes = {t.name: tuple(t.matrix(t.parameter.detach()).shape) for t in targets}
        check_fits(pattern, shapes)
        self.pattern, self.local = pattern, pattern.local
        self.targets = {t.name: t for t in targets}
        self.parameters = {t.name: t.parameter for t in targets}
        self._shapes = shapes
        self._whole = {
            name: torch.ones_like(pattern.units(torch.empty(shape, device="meta")), dtype=torch.bool, device="cpu")
            for name, shape in shapes.items()
        }
        self.sizes = {name: math.prod(shapes[name]) // units.numel() for name, units in self._whole.items()}

    def views(self) -> dict[str, View]:
        return {name: self._view(target) for name, target in self.targets.items()}

    def _view(self, target: Target) -> View:
        weight, grad = target.parameter.detach(), target.parameter.grad

        def total(f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            wide = torch.promote_types(weight.dtype, torch.float32)
            g = weight.new_zeros(()).expand_as(weight) if grad is None else grad
            return self.pattern.units(f(target.matrix(weight).to(wide), target.matrix(g).to(wide)))

        return View(target.name, self.sizes[target.name], total, grad is not None)

    def whole(self) -> Units:
        return {name: u.to(self.parameters[name].device, copy=True) for name, u in self._whole.items()}

    def spread(self, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: self.targets[name].folded(self.pattern.spread(value, self._shapes[name]))
            for name, value in units.items()
        }

    def choose_in(self, name: str, scores: Tensor, keep: float) -> Tensor:
        pattern = self.pattern.at(keep)
        return pattern.choose(scores, None if pattern.share is not None else keep)


class Coupled(Structure):
    """Groups of weights of several parameters; one set per :class:`GroupSet`."""

    def __init__(self, model: nn.Module, sets: Sequence[GroupSet]) -> None:
        """Raises InputError with every set that does not fit the model."""
        check_groups(model, sets)
        every = dict(model.named_parameters(remove_duplicate=False))
        self.groups = {s.name: s for s in sets}
        self.parameters = {part.parameter: every[part.parameter] for s in sets for part in s.parts}
        self.sizes = {s.name: s.size(model) for s in sets}

    def views(self) -> dict[str, View]:
        return {name: self._view(group) for name, group in self.groups.items()}

    def _view(self, group: GroupSet) -> View:
        def total(f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            sums = [self._sum(group, part, f) for part in group.parts]
            return torch.stack([s.to(sums[0].device) for s in sums]).sum(0)

        has_gradient = all(self.parameters[part.parameter].grad is not None for part in group.parts)
        return View(group.name, self.sizes[group.name], total, has_gradient)

    def _sum(self, group: GroupSet, part: Part, f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        parameter = self.parameters[part.parameter]
        wide = torch.promote_types(parameter.dtype, torch.float32)
        rows = [
            t.detach().narrow(part.dim, part.start, group.count * part.size).movedim(part.dim, 0).to(wide)
            for t in (parameter, parameter if parameter.grad is None else parameter.grad)
        ]
        weight, grad = rows[0], rows[1] if parameter.grad is not None else torch.zeros_like(rows[0])
        return f(weight, grad).reshape(group.count, -1).sum(1)

    def whole(self) -> Units:
        return {
            name: torch.ones(g.count, dtype=torch.bool, device=self.parameters[g.parts[0].parameter].device)
            for name, g in self.groups.items()
        }

    def spread(self, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, value in units.items():
            for part in self.groups[name].parts:
                parameter = self.parameters[part.parameter]
                if part.parameter not in out:
                    out[part.parameter] = torch.ones(parameter.shape, dtype=value.dtype, device=parameter.device)
                rows = out[part.parameter].narrow(part.dim, part.start, len(value) * part.size)
                factor = value.to(parameter.device).repeat_interleave(part.size)
                rows.mul_(factor.reshape(-1, *[1] * (parameter.ndim - 1 - part.dim)))
        return out

    def choose_in(self, name: str, scores: Tensor, keep: float) -> Tensor:
        k = count(keep, scores.numel())
        if k == 0:
            raise BudgetError(f"keep={keep:g} of {scores.numel()} groups is less than one")
        return highest(scores, k)


def check_gradients(views: Mapping[str, View], what: str) -> None:
    """Raises InputError that names every set without a gradient."""
    if missing := [name for name, view in views.items() if not view.has_gradient]:
        raise InputError(
            problems(
                f"{what} needs gradients, and these have none; call it between backward() and zero_grad()", missing
            )
        )
