from __future__ import annotations

import copy

import pytest
import torch
from arch_tiny_models import MODELS, build
from torch import nn

from eckart.arch import find_sites, fingerprint
from eckart.errors import InputError


@pytest.mark.parametrize("name", MODELS)
def test_precision_does_not_matter_and_weights_do(name: str) -> None:
    model = build(name)
    mark = fingerprint(model)
    assert fingerprint(build(name)) == mark
    assert fingerprint(copy.deepcopy(model).to(torch.bfloat16)) == mark
    assert fingerprint(copy.deepcopy(model).to(torch.bfloat16).float()) == mark
    assert fingerprint(copy.deepcopy(model).double()) == mark
    assert fingerprint(build(name, seed=1)) != mark


def test_names_and_shapes_matter() -> None:
    linear = nn.Linear(4, 6, bias=False)
    turned = nn.Linear(6, 4, bias=False)
    turned.weight = nn.Parameter(linear.weight.detach().reshape(4, 6))
    marks = {fingerprint(m) for m in (nn.Sequential(linear), nn.Sequential(turned), nn.ModuleDict({"a": linear}))}
    assert len(marks) == 3


def test_sharing_does_not_matter() -> None:
    """Not the order in which the sharing modules are registered, nor whether equal weights are shared."""
    table, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = table.weight
    forth = nn.ModuleDict({"table": table, "head": head})
    back = nn.ModuleDict({"head": head, "table": table})
    assert fingerprint(forth) == fingerprint(back)
    untied = copy.deepcopy(forth)
    untied["head"].weight = nn.Parameter(untied["head"].weight.detach().clone())
    assert fingerprint(untied) == fingerprint(forth)


def test_layout_in_memory_does_not_matter() -> None:
    model = nn.Sequential(nn.Linear(40, 60))
    mark = fingerprint(model)
    model[0].weight = nn.Parameter(model[0].weight.detach().T.contiguous().T)
    assert not model[0].weight.is_contiguous()
    assert fingerprint(model) == mark


def test_only_the_given_sites_count() -> None:
    model = build("bert")
    sites = find_sites(model, include=["bert.encoder.layer.0.*"])
    mark = fingerprint(model, sites)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.mul_(2)
    assert fingerprint(model, sites) == mark
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias.add_(2)
    assert fingerprint(model, sites) != mark


def test_a_model_without_numbers() -> None:
    with pytest.raises(InputError, match="meta device"):
        fingerprint(nn.Linear(4, 4, device="meta"))
