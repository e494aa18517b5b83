"""Two processes with different batches have, together, the moments of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eckart.moments import Moments, collect
from eckart.records import Site

pytestmark = pytest.mark.filterwarnings("ignore::eckart.errors.EckartWarning")

SCRIPT = """
import os, sys
from pathlib import Path
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_distributed import BATCHES, collected
from eckart.errors import MismatchError

dist.init_process_group("gloo")
rank = dist.get_rank()
moments = collected(BATCHES[rank::2])
moments.all_reduce()
moments.save(Path(sys.argv[2]) / f"rank{rank}")
strange = collected(BATCHES[rank::2], fingerprint=f"model {rank}")
try:
    strange.all_reduce()
except MismatchError:
    (Path(sys.argv[2]) / f"refused{rank}").touch()
dist.destroy_process_group()
"""

SITES = tuple(
    Site(name=name, kind="linear", out_features=out, in_features=inn)
    for name, out, inn in (("a", 6, 5), ("b", 6, 5), ("rare", 5, 6), ("c", 4, 6))
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.rare = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x)) * self.b(x)
        if len(x) == 5:  # one batch, so that one process never comes here
            y = y + self.rare(y) @ torch.ones(5, 6, dtype=y.dtype)
        return self.c(y)


BATCHES = [
    torch.randn(rows, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    for rows in (4, 2, 6, 8, 4, 5)
]


def loss(outputs: Tensor, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    return (outputs.square().sum(-1) * batch[..., 0]).sum(), float(len(batch))


def collected(batches: list[Tensor], fingerprint: str = "f") -> Moments:
    torch.manual_seed(0)
    return collect(Model().double(), batches, SITES, loss=loss, fingerprint=fingerprint)


def test_alone_nothing_is_added() -> None:
    moments = collected(BATCHES)
    before = moments.site("a").second
    moments.all_reduce()
    assert torch.equal(moments.site("a").second, before)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), str(Path(__file__).parent), str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    whole = collected(BATCHES)
    for rank in (0, 1):
        found = Moments.load(tmp_path / f"rank{rank}")
        assert set(found.names()) == set(whole.names()) == {"a", "b", "c", "rare"}
        assert (found.tokens, found.units, found.meta["batches"]) == (whole.tokens, whole.units, 6)
        assert found.meta["tokens"] == whole.tokens
        for name in whole.names():
            for half in (None, "A", "B"):
                one, two = whole.site(name, half=half), found.site(name, half=half)
                assert one.count == two.count
                for part in ("mean", "second", "gradient", "fisher_rows", "fisher_columns"):
                    left, right = getattr(one, part), getattr(two, part)
                    assert float((left - right).norm() / left.norm()) < 1e-12
        assert (tmp_path / f"refused{rank}").exists()


def test_only_one_of_the_processes_reaches_every_site() -> None:
    parts = [collected(BATCHES[rank::2]) for rank in (0, 1)]
    assert "rare" not in parts[0].names()
    assert "rare" in parts[1].names()
