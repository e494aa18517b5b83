"""Several processes that work as one: who they are, what they tell each other, and exact sums.

Where ``torchrun`` (or anything that sets ``WORLD_SIZE``, ``RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``) starts
several processes, the verbs that share work join them in one group; call such a verb in every process. A
process that ends is noticed at the next exchange, a silent one after ``ECKART_TIMEOUT`` seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eckart.errors import EckartError, InputError
from eckart.moments.packed import packed, unpack_into

Group = Any
"""A process group; None is the default one."""

TIMEOUT = 3600.0
"""Seconds that a process waits for the others, unless ``ECKART_TIMEOUT`` says otherwise. Above the time by which
one can be ahead of another: a process that dies is noticed without it."""


def patience() -> timedelta:
    """How long to wait for another process. Raises InputError where ``ECKART_TIMEOUT`` is no number above 0."""
    text = os.environ.get("ECKART_TIMEOUT", str(TIMEOUT))
    try:
        wait = timedelta(seconds=float(text))
    except (ValueError, OverflowError):
        wait = timedelta()
    if wait <= timedelta():
        raise InputError(f"ECKART_TIMEOUT is a number of seconds above 0; got {text!r}.")
    return wait


def join() -> tuple[int, int]:
    """This process's rank and how many there are, joining the group that ``torchrun`` announces.

    Raises EckartError where the others do not come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        with answers("start"):
            dist.init_process_group("gloo", timeout=patience())
    return (dist.get_rank(), dist.get_world_size()) if processes() > 1 else (0, 1)


def processes() -> int:
    """How many processes work together; 1 where there is no group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def answers(what: str) -> Iterator[None]:
    """Around talking to the other processes: where they do not answer, an EckartError that says what was awaited."""
    try:
        yield
    except RuntimeError as error:
        rank = os.environ.get("RANK", "?")
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EckartError(
            f"process {rank} waited for the others to {what}, and one of them ended or said nothing for "
            f"{patience().total_seconds():g} s (ECKART_TIMEOUT). Its own messages say why; start all processes again. "
            f"[{first}]"
        ) from error


def cpu_group() -> Group:
    """A group that moves CPU tensors: the default one, or one of gloo beside NCCL."""
    return dist.new_group(backend="gloo", timeout=patience()) if dist.get_backend() == "nccl" else None


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
    return [json.loads(found[: int(size)].numpy().tobytes()) for found, size in zip(texts, sizes, strict=True)]


def add_up(tensors: Sequence[Tensor], group: Group) -> None:
    """Replaces each tensor, of one shape everywhere, by its sum over the processes."""
    for tensor in tensors:
        dist.all_reduce(tensor, group=group)


def add_up_symmetric(stack: Tensor, group: Group) -> None:
    """The same for symmetric matrices (…, d, d), of which only one triangle travels."""
    rows = packed(stack)
    dist.all_reduce(rows, group=group)
    unpack_into(stack, rows)
