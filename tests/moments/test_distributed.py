"""Two processes with different batches have, together, the moments of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError
from eckart.moments import Moments, collect
from eckart.moments.collect import draws
from eckart.records import Site
from two_processes import two_processes

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
    two_processes(SCRIPT, tmp_path, Path(__file__).parent, tmp_path)
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


def drawn(outputs: Tensor, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    return (outputs * torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)).sum(), float(len(batch))


def with_draws(**how: object) -> Moments:
    torch.manual_seed(0)
    return collect(Model().double(), BATCHES, SITES, loss=drawn, fingerprint="f", probes=2, **how)


@pytest.mark.parametrize("shares", [2, 3])
def test_shares_have_the_draws_and_the_halves_of_the_whole(shares: int) -> None:
    whole = with_draws(seed=4)
    parts = [with_draws(seed=4, share=(i, shares)) for i in range(shares)]
    assert [part.meta["batches"] for part in parts] == [6 // shares] * shares
    together = parts[0]
    for part in parts[1:]:
        together = together.merge(part)
    assert (together.tokens, together.units) == (whole.tokens, whole.units)
    for name in whole.names():
        for half in ("A", "B"):
            one, two = whole.site(name, half=half), together.site(name, half=half)
            assert one.count == two.count
            for part in ("second", "gradient", "fisher_rows"):
                torch.testing.assert_close(getattr(one, part), getattr(two, part), rtol=1e-12, atol=1e-14)


def test_every_batch_and_every_seed_draws_anew() -> None:
    streams = [torch.randn(4, generator=draws(seed, batch)) for seed in range(3) for batch in range(3)]
    assert len({tuple(stream.tolist()) for stream in streams}) == 9
    assert torch.equal(streams[4], torch.randn(4, generator=draws(1, 1)))


def test_more_shares_than_batches_are_refused() -> None:
    with pytest.raises(InputError, match="7 processes cannot share 6 batches"):
        with_draws(share=(0, 7))


def test_equal_moments_have_equal_digests(tmp_path: Path) -> None:
    moments = with_draws()
    moments.save(tmp_path / "m")
    assert Moments.load(tmp_path / "m").digest() == moments.digest() == with_draws().digest()
    assert with_draws(seed=1).digest() != moments.digest()
    next(iter(moments.inputs.values())).total[0, 0, 0] += 1e-9
    assert Moments.load(tmp_path / "m").digest() != moments.digest()
