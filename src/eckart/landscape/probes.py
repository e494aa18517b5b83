"""Random vectors to look at a matrix with, and intervals of what they see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from scipy.stats import t as student
from torch import Tensor

from eckart.errors import InputError
from eckart.landscape.curvature import Operator
from eckart.records import Finding

ProbeKind = Literal["rademacher", "gaussian"]


def probe_vectors(operator: Operator, count: int, seed: int, kind: ProbeKind = "rademacher") -> list[Tensor]:
    """``count`` random (D,) with E v vᵀ = I, drawn on the CPU by ``seed``. Raises InputError for other kinds."""
    if kind not in ("rademacher", "gaussian"):
        raise InputError(f"probes are 'rademacher' or 'gaussian'; got {kind!r}.")
    generator = torch.Generator().manual_seed(seed)

    def one() -> Tensor:
        if kind == "gaussian":
            return torch.randn(operator.size, generator=generator, dtype=torch.float64)
        return torch.randint(0, 2, (operator.size,), generator=generator).double() * 2 - 1

    return [one().to(operator.device, operator.dtype) for _ in range(count)]


def interval(name: str, values: Sequence[float], unit: str = "") -> Finding:
    """The mean of independent estimates, and the half width of its 95 % interval (Student's t); None for one alone."""
    numbers = torch.tensor(list(values), dtype=torch.float64)
    n = numbers.numel()
    half = None
    notes: tuple[str, ...] = ()
    if n > 1:
        half = float(student.ppf(0.975, n - 1)) * float(numbers.std()) / math.sqrt(n)
    else:
        notes = ("one probe: no interval",)
    return Finding(name=name, value=float(numbers.mean()), uncertainty=half, n=n, unit=unit, notes=notes)
