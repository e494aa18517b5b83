"""Dynamic Sparse Learning: tables and layers at one share throughout, exchanged by gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError
from eckart.prune.dsl import INTERVAL, dynamic_sparse_learning


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.users, self.items = nn.Embedding(30, 8), nn.Embedding(40, 8)
        self.mlp = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        self.to(dtype)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.mlp(torch.cat([self.users(pairs[:, 0]), self.items(pairs[:, 1])], 1))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pairs = torch.stack(
        [torch.randint(30, (200,), generator=generator), torch.randint(20, (200,), generator=generator)], 1
    )
    return pairs, torch.randint(2, (200,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_every_table_and_layer_keeps_its_share_at_every_step(kind: type, dtype: torch.dtype) -> None:
    model = Model(dtype)
    optimizer = kind(model.parameters(), lr=0.05)
    engine = dynamic_sparse_learning(model, steps=40, keep=0.25, interval=5)
    engine.attach(optimizer)
    pairs, labels = batch()
    start = {name: mask.clone() for name, mask in engine.masks.items()}
    assert set(start) == {"users.weight", "items.weight", "mlp.0.weight", "mlp.2.weight"}
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pairs), labels).backward()
        optimizer.step()
        for name, mask in engine.masks.items():
            assert int(mask.sum()) == int(0.25 * mask.numel())
            assert not (model.get_parameter(name) != 0)[~mask].any()
    changed = {name: int((mask & ~start[name]).sum()) for name, mask in engine.masks.items()}
    assert changed["users.weight"] > 0
    assert changed["mlp.0.weight"] > 0
    assert engine.finish().density == pytest.approx(0.25)


def test_what_is_never_looked_up_never_grows() -> None:
    """Items 20 … 39 have no gradient; what they lose goes to items that are used."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    engine = dynamic_sparse_learning(model, steps=40, interval=4)
    engine.attach(optimizer)
    pairs, labels = batch()
    before = engine.masks["items.weight"].clone()
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pairs), labels).backward()
        optimizer.step()
    after = engine.masks["items.weight"]
    assert not (after & ~before)[20:].any()
    assert int(after[:20].sum()) > int(before[:20].sum())


def test_defaults_are_the_papers() -> None:
    long = dynamic_sparse_learning(Model(), steps=100_000)
    assert (long.keep, long.interval, long.action.fraction) == (0.5, INTERVAL, 0.5)
    short = dynamic_sparse_learning(Model(), steps=400)
    assert short.interval < 100


def test_bad_input() -> None:
    model = Model()
    model.users = nn.Embedding(30, 8, sparse=True)
    with pytest.raises(InputError, match="users"):
        dynamic_sparse_learning(model, steps=10)
    for options in ({"keep": 0.0}, {"keep": 1.5}, {"fraction": 0.0}, {"steps": 0}, {"exclude": ["nothing"]}):
        with pytest.raises(InputError):
            dynamic_sparse_learning(Model(), **{"steps": 10, **options})
