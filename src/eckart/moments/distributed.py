"""Exact sums over the processes of ``torch.distributed``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any
"""A process group; None is the default one."""


def processes() -> int:
    """How many processes work together; 1 where there is no group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def cpu_group() -> Group:
    """A group that moves CPU tensors: the default one, or one of gloo beside NCCL."""
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None


def gather(value: Any, group: Group) -> list[Any]:
    """The JSON ``value`` of every process, in rank order. As bytes, since torch's own way is pickle."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(processes())]
    dist.all_gather(sizes, torch.tensor([text.numel()]), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: text.numel()] = text
    texts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(texts, padded, group=group)
    return [json.loads(bytes(found[: int(size)].tolist()).decode()) for found, size in zip(texts, sizes, strict=True)]


def add_up(tensors: Sequence[Tensor], group: Group) -> None:
    """Replaces each tensor, of one shape everywhere, by its sum over the processes."""
    for tensor in tensors:
        dist.all_reduce(tensor, group=group)
