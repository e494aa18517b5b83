"""A small model with sites of several sizes, decomposed; what the tests of shared work compare."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from eckart.apply import PreparedSite, prepare_sites
from eckart.compression import get_method, options_for
from eckart.moments import Moments, collect
from eckart.records import Site
from fresh_python import Fresh

SIZES = ((16, 20), (20, 12), (12, 12), (12, 18), (18, 6))
SITES = tuple(
    Site(name=f"{i}", kind="linear", out_features=out, in_features=inn, bias=True) for i, (inn, out) in enumerate(SIZES)
)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(inn, out) for inn, out in SIZES])


def moments() -> Moments:
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(40, 16, generator=draw) for _ in range(4)]

    def loss(outputs: Tensor, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        return (outputs * torch.randn(outputs.shape, generator=generator)).sum(), float(len(batch))

    return collect(model(), batches, SITES, loss=loss, fingerprint="f")


def decomposed(crew: object = None) -> dict[str, PreparedSite]:
    method = get_method("kfac")
    return prepare_sites(model(), SITES, moments(), method, options_for(method, {}), crew=crew)


def assert_same(one: Mapping[str, PreparedSite], two: Mapping[str, PreparedSite]) -> None:
    """Bit for bit."""
    assert list(one) == list(two)
    for name, part in one.items():
        other = two[name]
        assert part.site == other.site
        assert torch.equal(part.errors, other.errors)
        for mine, theirs in zip(part.slices, other.slices, strict=True):
            assert type(mine) is type(theirs)
            for field in ("weight", "bias", "left", "right", "errors", "mean"):
                a, b = getattr(mine, field), getattr(theirs, field)
                assert (a is None and b is None) or torch.equal(a, b), field


def start(script: str, *arguments: object, processes: int = 1, **environment: object) -> list[Fresh]:
    """Processes that run ``script``, as a group where there are several, without torchrun to end them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    prelude = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n"
    started = []
    for rank in range(processes):
        group = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = {**(group if processes > 1 else {}), "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "", **environment}
        env = {**os.environ, **{name: str(value) for name, value in own.items()}}
        started.append(Fresh(prelude + script, *arguments, env=env))
    return started


def finished(started: Sequence[Fresh], timeout: float = 60.0, after: float = 10.0) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; those that stay ``after`` the first has ended are killed."""
    found = []
    for process in started:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        timeout = after
        found.append((process.returncode, out, err))
    return found
