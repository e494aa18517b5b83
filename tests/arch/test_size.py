from __future__ import annotations

import pytest
import torch
from arch_tiny_models import MODELS, build, minilm
from torch import nn

from eckart.arch import find_sites, model_size, site_size
from eckart.records import Size

ATTENTION = 16 * 16 * 2 + 8 * 16 * 2
MLP = 3 * 16 * 24
MACS = {
    "llama": 2 * (ATTENTION + MLP) + 40 * 16,
    "llama-tied": 2 * (ATTENTION + MLP) + 40 * 16,
    "qwen3": 2 * (ATTENTION + MLP) + 40 * 16,
    "gpt2": 2 * 12 * 16 * 16 + 40 * 16,
    "vit": 2 * (4 * 16 * 16 + 2 * 16 * 32) + 16 * 3 * 8 * 8 + 2 * 16,
    "mixtral": 2 * (ATTENTION + 3 * MLP + 3 * 16) + 40 * 16,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_bytes(name: str) -> None:
    model = build(name)
    size = model_size(model)
    assert size.parameters == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    assert size.bytes == sum(storages.values())


@pytest.mark.parametrize("name", MACS)
def test_multiply_adds(name: str) -> None:
    assert model_size(build(name)).macs == MACS[name]


def test_minilm() -> None:
    size = model_size(minilm())
    assert size == Size(parameters=22_713_216, bytes=4 * 22_713_216, macs=10_616_832 + 384 * 384)


def test_half_precision_halves_bytes() -> None:
    model = build("llama")
    before, after = model_size(model), model_size(model.to(torch.bfloat16))
    assert (after.parameters, after.macs) == (before.parameters, before.macs)
    assert after.bytes * 2 == before.bytes


def test_persistent_buffers_count_in_bytes_only() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    before = model_size(model)
    model.register_buffer("kept", torch.zeros(5, dtype=torch.int32))
    model.register_buffer("dropped", torch.zeros(7), persistent=False)
    after = model_size(model)
    assert (after.parameters, after.macs, after.bytes) == (before.parameters, before.macs, before.bytes + 20)


def test_factors_count_as_what_they_are() -> None:
    class Factored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 6)

    class FactoredExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_a, self.down_b = nn.Parameter(torch.zeros(3, 2, 8)), nn.Parameter(torch.zeros(3, 6, 2))

    assert model_size(Factored()) == Size(parameters=2 * 14 + 6, bytes=4 * 34, macs=2 * 14)
    assert model_size(FactoredExperts()) == Size(parameters=3 * 28, bytes=12 * 28, macs=3 * 28)


def test_a_layer_may_state_its_multiply_adds() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Identity())
    model[1].own_macs = 100
    assert model_size(model).macs == 106


def test_own_attention_and_convolutions() -> None:
    assert model_size(nn.MultiheadAttention(4, 2)).macs == 4 * 4 * 4
    assert model_size(nn.Conv2d(4, 8, 3, groups=2)).macs == 8 * 2 * 9
    assert model_size(nn.LayerNorm(8)).macs == 0


@pytest.mark.parametrize("name", MODELS)
def test_sites_never_cost_more_than_the_model(name: str) -> None:
    """What a planner takes as the rest of the model, biases with it, is exact."""
    model = build(name)
    sites = find_sites(model, embeddings=True, head=True)
    whole, taken = model_size(model), Size(parameters=0, bytes=0, macs=0)
    for site in sites:
        taken = taken + site_size(site, 4)
    weights = {id(p): p for p in model.parameters()}
    left = whole.parameters - taken.parameters
    assert 0 <= left < whole.parameters
    assert taken.parameters == sum(site.weight_parameters for site in sites)
    assert taken.bytes == 4 * taken.parameters
    assert 0 <= whole.macs - taken.macs <= sum(p.numel() for p in weights.values() if p.ndim > 1)


def test_what_a_tied_table_costs() -> None:
    tied, untied = build("llama-tied"), build("llama")
    (table,) = [s for s in find_sites(tied, embeddings=True) if s.kind == "embedding"]
    assert site_size(table, 2) == Size(parameters=640, bytes=1280, macs=640)
    (table,) = [s for s in find_sites(untied, embeddings=True) if s.kind == "embedding"]
    assert site_size(table, 2) == Size(parameters=640, bytes=1280, macs=0)
    t5 = next(s for s in find_sites(build("t5"), embeddings=True) if s.name == "shared")
    assert site_size(t5, 4, heads=0).macs == 0
