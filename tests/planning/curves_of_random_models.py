"""Error curves of models that do not exist."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eckart.planning import Curve, choices_for
from eckart.records import FormKind, Site, Size

ALL: tuple[FormKind, ...] = ("dense", "lowrank", "pivoted")
REST = Size(parameters=1000, bytes=4000, macs=77)


def random_curves(
    seed: int,
    sites: int = 6,
    *,
    largest: int = 12,
    forms: Sequence[FormKind] = ALL,
    rank_multiple: int = 1,
    min_rank: int = 1,
    spread: float = 3.0,
) -> list[Curve]:
    """Sites of random shapes with errors over ``spread`` decades, as tail sums of falling squares."""
    rng = np.random.default_rng(seed)
    curves = []
    for i in range(sites):
        m, n = (int(x) for x in rng.integers(2, largest + 1, 2))
        site = Site(
            name=f"block.{i // 2}.map{i % 2}",
            kind="linear",
            out_features=m,
            in_features=n,
            role=f"map{i % 2}",
            depth=i // 2,
        )
        squares = np.sort(rng.gamma(0.5, 1.0, min(m, n)))[::-1] * 10 ** rng.uniform(-spread, 0)
        errors = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
        choices = choices_for(site, errors, forms=forms, rank_multiple=rank_multiple, min_rank=min_rank)
        curves.append(Curve(site=site, choices=choices))
    return curves


def whole(curves: Sequence[Curve]) -> Size:
    """All sites dense."""
    return sum((c.choices.whole for c in curves), Size(parameters=0, bytes=0, macs=0))
