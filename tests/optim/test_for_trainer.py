"""What the Trainer is handed: the class, its options, and the groups of a model if there is one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eckart.errors import InputError
from eckart.optim import OPTIMIZERS, Muon, for_trainer


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def test_without_a_model_only_class_and_options() -> None:
    assert for_trainer("muon", lr=0.1, weight_decay=0.2) == (Muon, {"lr": 0.1, "weight_decay": 0.2})


def test_with_a_model_routed_groups() -> None:
    net = model()
    cls, kwargs = for_trainer(
        "muon", model=net, lr=0.1, weight_decay=0.2, groups={"overrides": {"1.weight": {"lr": 0.5}}}
    )
    optimizer = cls(kwargs.pop("params"), **kwargs)
    by_name = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert by_name["1.weight"]["lr"] == 0.5
    assert by_name["1.weight"]["matrix"]
    assert by_name["1.weight"]["weight_decay"] == 0.2
    assert not by_name["3.weight"]["matrix"]
    assert by_name["3.weight"]["lr"] == 0.1
    assert by_name["0.weight"]["weight_decay"] == 0.0


def test_parameters_are_looked_up_when_the_optimizer_is_made() -> None:
    """As sharding puts others in their place between the two."""
    net = model()
    cls, kwargs = for_trainer("muon", model=net, lr=0.1)
    assert "linear" in repr(kwargs["params"])
    net[1].weight = nn.Parameter(torch.ones(4, 4))
    optimizer = cls(kwargs.pop("params"), **kwargs)
    assert any(p is net[1].weight for group in optimizer.param_groups for p in group["params"])


def test_faults_are_told_at_once_and_before_training() -> None:
    with pytest.raises(InputError) as caught:
        for_trainer("moun", params=[], groups={})
    for part in ("Did you mean 'muon'", "params would be taken", "give model too"):
        assert part in str(caught.value)
    others = [name for name, method in OPTIMIZERS.items() if not isinstance(method.entry, type)]
    with pytest.raises(InputError, match="no optimizer but"):
        for_trainer(others[0])
    with pytest.raises(InputError, match="nothing is trainable"):
        for_trainer("muon", model=model().requires_grad_(False))
    with pytest.raises(InputError, match="unknown parameter pattern"):
        for_trainer("muon", model=model(), groups={"overrides": {"nowhere": {}}})
