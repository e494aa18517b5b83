"""The network of :mod:`eckart.evidence` trained under a schedule: what claims of pruning in training share."""

from __future__ import annotations

from typing import Any

import torch

from eckart.evidence.trial import ByteModel, held_out_loss, train, untrained
from eckart.prune.groups import GroupSet, chained
from eckart.prune.schedule import Schedule

MLP = ("up", "down")
"""The two maps of the network's MLP, which hold 73,728 of its 119,920 parameters."""
RATE = 0.01
"""Learning rate of AdamW, with which the network was trained plainly."""


def neurons(model: ByteModel) -> tuple[GroupSet]:
    """The 384 neurons of the MLP as coupled groups."""
    return (chained(model, *MLP),)


def pruned_training(
    steps: int, *, seed: int = 0, start: ByteModel | None = None, coupled: bool = False, **options: Any
) -> tuple[float, ByteModel]:
    """Held-out loss (nats per byte) and model after ``steps`` of AdamW under a :class:`Schedule` with ``options``.

    The maps of the MLP are pruned, or with ``coupled`` its neurons. About 7 ms per step on one thread.
    """
    model = untrained(seed) if start is None else start
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    target: dict[str, Any] = {"groups": neurons(model)} if coupled else {"include": MLP}
    engine = Schedule(model, steps=steps, **target, **options)
    engine.attach(optimizer)
    train(model, optimizer, steps, seed)
    engine.finish()
    return held_out_loss(model), model
