"""Every preset of the table: bit-equal resume, refusal of another's checkpoint, tensors and plain values only."""

from __future__ import annotations

import inspect
import io
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from eckart.errors import MismatchError
from eckart.optim import OPTIMIZERS, Subspace

PRESETS: dict[str, Any] = {
    name: method.entry
    for name, method in OPTIMIZERS.items()
    if inspect.isclass(method.entry) and issubclass(method.entry, Subspace)
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def network(dtype: torch.dtype) -> nn.Module:
    """Matrices of three shapes, two of them equal, a convolution, a stack and vectors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 20), nn.Conv2d(4, 6, 3))
    model.register_parameter("stack", nn.Parameter(torch.randn(3, 8, 10)))
    return model.to(dtype)


def made(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """With ranks and refreshes that five steps see."""
    takes = inspect.signature(PRESETS[name].__init__).parameters
    small = {key: value for key, value in {"rank": 3, "every": 2}.items() if key in takes}
    return PRESETS[name](model.parameters(), **small, **options)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for i, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + i)
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """By torch's safe loading, which refuses objects."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRESETS)
def test_resume_is_equal_bit_by_bit(name: str, dtype: torch.dtype) -> None:
    whole, cut = network(dtype), network(dtype)
    optimizer = made(name, whole)
    steps(whole, optimizer, 0, 7)
    half = made(name, cut)
    steps(cut, half, 0, 3)
    weights, state = through_a_file(cut.state_dict()), through_a_file(half.state_dict())
    fresh = network(dtype)
    fresh.load_state_dict(weights)
    resumed = made(name, fresh)
    resumed.load_state_dict(state)
    steps(fresh, resumed, 3, 7)
    for one, other in zip(whole.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
    ours, theirs = optimizer.state_dict()["state"], resumed.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, state in ours.items():
        assert state.keys() == theirs[index].keys()
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(theirs[index][key])) for key in state)


@pytest.mark.parametrize("name", PRESETS)
def test_low_bit_state_resumes_too(name: str) -> None:
    whole, cut = network(torch.bfloat16), network(torch.bfloat16)
    options = {"state_dtype": "int8", "stochastic_rounding": True}
    optimizer = made(name, whole, **options)
    steps(whole, optimizer, 0, 5)
    half = made(name, cut, **options)
    steps(cut, half, 0, 2)
    resumed = made(name, cut, **options)
    resumed.load_state_dict(through_a_file(half.state_dict()))
    steps(cut, resumed, 2, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


@pytest.mark.parametrize("name", PRESETS)
def test_state_holds_tensors_alone_and_numbers_stand_in_the_groups(name: str) -> None:
    model = network(torch.float32)
    optimizer = made(name, model)
    steps(model, optimizer, 0, 1)
    for state in optimizer.state_dict()["state"].values():
        assert all(isinstance(value, (torch.Tensor, int)) for value in state.values())
    assert {"lr", "weight_decay", "betas", "eps"} <= set(optimizer.param_groups[0])


@pytest.mark.parametrize("name", PRESETS)
def test_refuses_the_checkpoint_of_every_other_preset(name: str) -> None:
    model = network(torch.float32)
    before = made(name, model)
    for other in PRESETS:
        if other == name:
            continue
        saved = made(other, network(torch.float32)).state_dict()
        with pytest.raises(
            MismatchError, match=f"saved by {PRESETS[other].__name__}; this is {PRESETS[name].__name__}"
        ):
            before.load_state_dict(saved)
    with pytest.raises(MismatchError, match="not of eckart"):
        before.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    assert not before.state


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_without_gradients_changes_nothing_and_later_ones_work(name: str) -> None:
    model = network(torch.float32)
    optimizer = made(name, model)
    kept = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # zero gradients: no NaN from norms
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    steps(model, optimizer, 0, 2)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))


def test_there_are_twelve_presets_with_names_of_their_own() -> None:
    names = [cls.__name__ for cls in PRESETS.values()]
    assert len(names) >= 12
    assert not any(a == b for a, b in itertools.combinations(names, 2))
