"""SAF and MESA, against the divergence written out and a store of whole logits."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.training import MESA, SAF


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def divergence(old: Tensor, z: Tensor, T: float) -> Tensor:
    p, q = (old.double() / T).softmax(1), (z.double() / T).softmax(1)
    return T**2 * (p * (p / q).log()).sum(1)


# ---- SAF


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_loss_is_the_divergence_from_the_logits_of_that_sample_epochs_ago(dtype: torch.dtype) -> None:
    saf = SAF(samples=12, classes=6, start_epoch=0, epochs_ago=2, dtype="fp16", weight=0.7, temperature=3.0)
    seen = []
    for epoch in range(5):
        z = (3 * gaussian(12, 6, seed=epoch)).to(dtype)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(epoch))
        for index in order.split(4):
            found = saf(z[index], index)
            assert found.ndim == 0
            if epoch < 2:
                assert float(found) == 0
            else:
                wanted = 0.7 * divergence(seen[epoch - 2][index], z[index], 3.0).mean()
                torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=1e-3)
        seen.append(z)
        saf.next_epoch()


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_store_keeps_the_largest_and_the_mass_of_the_others(dtype: str) -> None:
    z = 4 * gaussian(5, 40)
    saf = SAF(samples=5, classes=40, top=4, epochs_ago=1, dtype=dtype)  # type: ignore[arg-type]
    saf(z, torch.arange(5))
    found, kept = saf._read(0, torch.arange(5)).double(), z.topk(4, dim=1).indices
    p, q = (z / 5).softmax(1), (found / 5).softmax(1)
    torch.testing.assert_close(q.gather(1, kept), p.gather(1, kept), rtol=0.02, atol=1e-4)
    torch.testing.assert_close(q.sum(1) - q.gather(1, kept).sum(1), 1 - p.gather(1, kept).sum(1), rtol=0.02, atol=1e-4)
    assert ((found == found.gather(1, found.argmin(1, keepdim=True))).sum(1) >= 36).all()


def test_size_of_the_store() -> None:
    saf = SAF(samples=1000, classes=1000, top=20, epochs_ago=3)
    assert saf.nbytes == 3 * 1000 * (21 + 2 + 20 * 4 + 4)
    assert saf.nbytes < 3 * 1000 * 1000 * 4 / 30


def test_gradient_reaches_the_logits_and_starts_late() -> None:
    saf = SAF(samples=4, classes=3, epochs_ago=1, start_epoch=2)
    index = torch.arange(4)
    for epoch in range(4):
        z = gaussian(4, 3, seed=epoch, dtype=torch.float32).requires_grad_()
        saf(z, index).backward()
        assert z.grad is not None
        assert bool(z.grad.any()) is (epoch >= 2)
        saf.next_epoch()


def test_samples_that_were_not_seen_add_nothing() -> None:
    saf = SAF(samples=4, classes=3, epochs_ago=1, start_epoch=0, weight=1.0, dtype="fp16")
    z, later = gaussian(4, 3), gaussian(4, 3, seed=1)
    saf(z[:2], torch.tensor([0, 1]))
    saf.next_epoch()
    found = saf(later, torch.arange(4))
    torch.testing.assert_close(found, divergence(z[:2], later[:2], 5.0).sum() / 4, rtol=0.01, atol=1e-4)
    saf.next_epoch()
    saf.next_epoch()  # an epoch without any: what is stored is too old
    assert float(saf(later, torch.arange(4))) == 0


def test_saf_resumes() -> None:
    def run(saf: SAF, start: int, stop: int) -> list[float]:
        found = []
        for epoch in range(start, stop):
            found.append(float(saf(gaussian(6, 3, seed=epoch), torch.arange(6))))
            saf.next_epoch()
        return found

    saf = SAF(samples=6, classes=3, start_epoch=1, epochs_ago=2)
    run(saf, 0, 3)
    state = copy.deepcopy(saf.state_dict())
    other = SAF(samples=6, classes=3, start_epoch=1, epochs_ago=2)
    other.load_state_dict(state)
    assert run(other, 3, 6) == run(saf, 3, 6)
    with pytest.raises(MismatchError, match="values"):
        SAF(samples=7, classes=3, epochs_ago=2).load_state_dict(state)
    with pytest.raises(MismatchError, match="epoch is missing"):
        other.load_state_dict({})


def test_saf_extreme_logits() -> None:
    saf = SAF(samples=2, classes=4, epochs_ago=1, start_epoch=0, top=2)
    z = torch.tensor([[1e6, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    saf(z, torch.arange(2))
    saf.next_epoch()
    assert abs(float(saf(z, torch.arange(2)))) < 1e-3


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: s(torch.ones(2, 3), None), InputError, "index of every sample"),
        (lambda s: s(torch.ones(2, 3), torch.ones(2)), InputError, "float32"),
        (lambda s: s(None, torch.arange(2)), InputError, "logits"),
        (lambda s: s(torch.ones(2, 3, dtype=torch.int64), torch.arange(2)), InputError, "int64"),
        (lambda s: s(torch.ones(2, 4), torch.arange(2)), InputError, r"\(n, 3\)"),
        (lambda s: s(torch.ones(2, 3), torch.arange(3)), InputError, r"\(3,\)"),
        (lambda s: s(torch.ones(2, 3), torch.tensor([0, 9])), InputError, "from 0 to 4; got 0 to 9"),
        (lambda s: s(torch.full((1, 3), torch.nan), torch.arange(1)), NotFiniteError, "NaN"),
    ],
)
def test_saf_bad_input(call: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(SAF(samples=5, classes=3))  # type: ignore[operator]


def test_wrong_options_are_named_all_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)weight.*temperature.*start_epoch.*samples.*classes.*epochs_ago.*dtype"):
        SAF(samples=0, classes=0, weight=-1, temperature=0, start_epoch=-1, epochs_ago=0, dtype="int2")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="top"):
        SAF(samples=1, classes=3, top=4)
    with pytest.raises(InputError, match=r"(?s)weight.*decay"):
        MESA(nn.Linear(2, 2), weight=-1, decay=1.0)
    with pytest.raises(InputError, match=r"nn\.Module"):
        MESA(None)  # type: ignore[arg-type]


# ---- MESA


def test_mesa_is_the_divergence_from_the_average() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    mesa = MESA(model, decay=0.9, start_epoch=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    stop = mesa.attach(optimizer)
    twin = [p.detach().clone() for p in model.parameters()]
    x = gaussian(6, 4)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        twin = [0.9 * a + 0.1 * p.detach() for a, p in zip(twin, model.parameters(), strict=True)]
    for mine, wanted in zip(mesa.average.parameters(), twin, strict=True):
        torch.testing.assert_close(mine.detach(), wanted)
        assert not mine.requires_grad
    z = model(x)
    assert float(mesa(z, x).detach()) == 0  # too early
    mesa.next_epoch()
    loss = mesa(z, x)
    torch.testing.assert_close(loss.detach(), 0.8 * divergence(mesa.average(x), z.detach(), 5.0).mean())
    loss.backward()
    assert all(p.grad is None for p in mesa.average.parameters())
    stop()
    before = mesa.average[0].weight.clone()
    optimizer.step()
    assert torch.equal(mesa.average[0].weight, before)


def test_mesa_resumes_and_refuses_another_model() -> None:
    mesa = MESA(nn.Linear(2, 3))
    mesa.next_epoch()
    other = MESA(nn.Linear(2, 3))
    other.load_state_dict(mesa.state_dict())
    assert other.epoch == 1
    assert torch.equal(other.average.weight, mesa.average.weight)
    with pytest.raises(MismatchError, match=r"weight: shape \(3, 2\)"):
        MESA(nn.Linear(2, 4)).load_state_dict(mesa.state_dict())


def test_mesa_takes_outputs_with_logits_and_names_those_without() -> None:
    class Wrapped(nn.Module):
        def __init__(self, field: str) -> None:
            super().__init__()
            self.linear, self.field = nn.Linear(2, 3), field

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(**{self.field: self.linear(x)})

    x = torch.ones(4, 2)
    model = Wrapped("logits")
    assert float(MESA(model, start_epoch=0)(model(x), x).detach()) < 1e-6
    other = Wrapped("hidden")
    with pytest.raises(InputError, match="model's output has to be logits"):
        MESA(other, start_epoch=0)(torch.ones(4, 3), x)
    with pytest.raises(InputError, match="inputs that they came from"):
        MESA(model, start_epoch=0)(torch.ones(5, 3), x)
