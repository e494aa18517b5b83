"""How long a forward pass takes, beside the original's, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.evaluation.measured import Batch, Forward
from eckart.records import Latency, Progress, silent

BATCHES = (1, 32)
LENGTH = 64


def measure_latency(
    model: Forward,
    base: Forward,
    make_batch: Callable[[int, int], Batch],
    *,
    batch_sizes: Sequence[int] = BATCHES,
    length: int = LENGTH,
    rounds: int = 15,
    seconds: float = 4.0,
    warm_up: int = 2,
    progress: Progress = silent,
) -> tuple[Latency, ...]:
    """Median wall-clock seconds of a forward pass of both models, for each batch size.

    ``make_batch(rows, length)`` gives the input. The two take turns, and swap who goes first, so that a busy
    machine slows both alike. At most ``rounds`` rounds are timed, at least 3, stopping after ``seconds`` per
    batch size. The number of threads is left as it is; on CUDA each pass is waited for.

    Raises InputError for fewer than 3 rounds.
    """
    if rounds < 3 or warm_up < 0:
        raise InputError(f"a median needs at least 3 rounds and warm_up >= 0; got {rounds} and {warm_up}.")
    found = []
    for done, rows in enumerate(batch_sizes):
        progress("latency", done, len(batch_sizes))
        batch = make_batch(rows, length)
        for _ in range(warm_up):
            _seconds(model, batch)
            _seconds(base, batch)
        ours: list[float] = []
        theirs: list[float] = []
        start = time.perf_counter()
        while len(ours) < rounds and (len(ours) < 3 or time.perf_counter() - start < seconds):
            turns = [(model, ours), (base, theirs)]
            for forward, times in turns if len(ours) % 2 == 0 else reversed(turns):
                times.append(_seconds(forward, batch))
        found.append(Latency(batch=rows, length=length, model=statistics.median(ours), base=statistics.median(theirs)))
    progress("latency", len(batch_sizes), len(batch_sizes))
    return tuple(found)


def _seconds(forward: Forward, batch: Batch) -> float:
    _wait(batch)
    start = time.perf_counter()
    with torch.inference_mode():
        forward(batch)
    _wait(batch)
    return time.perf_counter() - start


def _wait(batch: Batch) -> None:
    tensor = batch if isinstance(batch, Tensor) else next(iter(batch.values()))
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
