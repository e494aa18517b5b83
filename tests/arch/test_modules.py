from __future__ import annotations

import pytest
from arch_tiny_models import build
from torch import nn

from eckart.arch import find_sites, get_module, set_module, site_module
from eckart.errors import InputError


def test_get_module() -> None:
    model = build("bert")
    assert get_module(model, "") is model
    query = get_module(model, "bert.encoder.layer.0.attention.self.query")
    assert query is model.bert.encoder.layer[0].attention.self.query
    with pytest.raises(InputError, match=r"Did you mean .*self\.query"):
        get_module(model, "bert.encoder.layer.0.attention.self.qwery")
    with pytest.raises(InputError, match="unknown module"):
        get_module(model, "bert.encoder.layer.0.attention.self.query.weight")


def test_set_module_replaces_every_name_of_a_module() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared), shared).eval()
    new = nn.Linear(4, 4)
    set_module(model, "2.0", new)
    assert model[0] is new
    assert model[2][0] is new
    assert model[3] is new
    assert not new.training


def test_set_module_refuses_the_model_itself_and_unknown_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(InputError, match="empty name"):
        set_module(model, "", nn.Linear(4, 4))
    with pytest.raises(InputError, match="unknown module '1'"):
        set_module(model, "1", nn.Linear(4, 4))


def test_site_module_of_experts_is_their_owner() -> None:
    model = build("mixtral")
    site = next(site for site in find_sites(model) if site.kind == "experts")
    assert site_module(model, site) is model.model.layers[0].mlp.experts
