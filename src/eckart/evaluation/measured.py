"""What the measures have in common: figures with what they mean and what speaks against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eckart.arch import model_size
from eckart.records import Evaluation, Interval, Latency

Batch = Mapping[str, Tensor] | Tensor
Forward = Callable[[Batch], Tensor]
"""A model as a function of a batch, without gradients: logits, or normalised embeddings."""

FEW = 50
"""Below this many sentences or windows an interval itself is not to be trusted."""

WEIGHT_FILES = (".safetensors", ".bin")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Figures of one task, without sizes and speed."""

    metrics: Mapping[str, Interval]
    protocol: Mapping[str, Any]
    warnings: tuple[str, ...] = field(default=())


def few_units(n: int, unit: str) -> list[str]:
    """The warning for a measurement on too little data, or nothing."""
    if n >= FEW:
        return []
    return [f"only {n} {unit}s were measured; below {FEW} the intervals are too optimistic. Give more data."]


def wide(metrics: Mapping[str, Interval], limits: Mapping[str, float]) -> list[str]:
    """Warnings for intervals that are wider than the limit of their figure."""
    return [
        f"{name} is known only to {metrics[name].low:.3f} … {metrics[name].high:.3f}; give more data."
        for name, limit in limits.items()
        if name in metrics and metrics[name].high - metrics[name].low > limit
    ]


def disk_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHT_FILES)


def finish(
    task: Any,
    measured: Measured,
    model: nn.Module,
    base: nn.Module,
    *,
    latency: tuple[Latency, ...] = (),
    model_folder: Path | None = None,
    base_folder: Path | None = None,
    protocol: Mapping[str, Any] | None = None,
) -> Evaluation:
    """The whole record: the figures and the sizes of both models, on disk too where folders are given."""
    folders = {"model": model_folder, "base": base_folder}
    return Evaluation(
        task=task,
        metrics=dict(measured.metrics),
        protocol={**measured.protocol, **(protocol or {})},
        model_size=model_size(model),
        base_size=model_size(base),
        disk_bytes={name: disk_bytes(folder) for name, folder in folders.items() if folder is not None},
        latency=latency,
        warnings=measured.warnings,
    )
