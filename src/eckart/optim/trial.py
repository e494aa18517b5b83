"""The small learned problem as optimizers see it: what their claims share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch

from eckart.evidence.trial import held_out_loss, train, untrained
from eckart.optim.routing import param_groups

STEPS = 150
RANK = 24
"""A quarter of the shorter side of the model's matrices."""
OTHER_LR = 0.01
"""For what is no matrix inside of the model, with AdamW; the learned problem's own rate."""

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def loss_after(make: Make, lr: float, *, steps: int = STEPS, seed: int = 0) -> float:
    """Held-out loss (nats per byte) of the model after ``steps`` steps, its matrices at ``lr``. About 1.5 s for 150."""
    model = untrained(seed)
    train(model, make(list(param_groups(model, lr=lr, other_lr=OTHER_LR))), steps, seed)
    return held_out_loss(model)


def best_loss(make: Make, lrs: Sequence[float], *, steps: int = STEPS, seeds: Sequence[int] = (0,)) -> float:
    """The least mean over ``seeds`` of :func:`loss_after` over the learning rates ``lrs``."""
    return min(fmean(loss_after(make, lr, steps=steps, seed=seed) for seed in seeds) for lr in lrs)
