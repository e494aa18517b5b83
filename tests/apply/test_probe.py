"""Probes leave the model as it was, and never make a plan worse on what they measure."""

from __future__ import annotations

import os
from itertools import count

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.functional import normalize

from eckart.apply.bits import BITS
from eckart.apply.choices import Table
from eckart.apply.decide import rest_of
from eckart.apply.prepare import prepare_sites
from eckart.apply.probe import refine
from eckart.apply.units import prepare_units, units_of
from eckart.arch import find_sites
from eckart.compression import get_method
from eckart.hf.distance import distance_from_now
from eckart.hf.models import wrap_model
from eckart.modules import obs
from eckart.moments import collect, sampled_targets
from eckart.planning import solve_groups
from eckart.records import Budget, silent

BERT = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 24, "max_position_embeddings": 16, "pad_token_id": 0}


def ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 30, (3, 7), generator=torch.Generator().manual_seed(seed))


def masked(seed: int = 0) -> dict[str, Tensor]:
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": ids(seed), "attention_mask": mask}


def bert(head: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = tf.BertConfig(**BERT)
    model = tf.BertForMaskedLM(config) if head else tf.BertModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def table() -> Table:
    model = bert()
    sites = find_sites(model)
    moments = collect(model, [masked(1), masked(2)], sites, loss=sampled_targets, gradients="full")
    kfac = get_method("kfac")
    units = units_of(model, sites, None)
    return Table(
        model=model,
        sites=sites,
        moments=moments,
        prepared=prepare_sites(model, sites, moments, kfac, kfac.options()),
        units={each.unit.name: each for each in units},
        cut=prepare_units(model, units, sites, moments, obs.METHOD, obs.Options()),
        forms=("dense", "lowrank", "pivoted", "narrow"),
        bits=BITS,
        rank_multiple=1,
        min_rank=1,
    )


@pytest.mark.parametrize("bytes_", [False, True], ids=["parameters", "bytes"])
def test_weights_come_back_bit_for_bit_and_the_best_stays(table: Table, bytes_: bool) -> None:
    groups, rest = table.groups(), rest_of(table.model, table.sites)
    dense = sum(c.choices.whole.bytes for g in groups for c in g.alternatives[0]) + rest.bytes
    budget = Budget(bytes=dense // 2) if bytes_ else Budget(keep=0.5)
    before = {name: tensor.clone() for name, tensor in table.model.state_dict().items()}
    distance = distance_from_now(wrap_model(table.model), [masked(3)])
    first = solve_groups(groups, budget, rest)
    _, at_first = refine(table, groups, first, budget, rest, distance, 0, silent)
    chosen, found = refine(table, groups, first, budget, rest, distance, 2, silent)
    assert 0 < found <= at_first
    assert refine(table, groups, chosen, budget, rest, distance, 0, silent)[1] == found
    after = table.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert distance() == pytest.approx(0.0, abs=1e-7)
    column = "bytes" if bytes_ else "parameters"
    full = sum(getattr(c.choices.whole, column) for g in groups for c in g.alternatives[0])
    limit = dense // 2 - rest.bytes if bytes_ else full // 2
    assert sum(getattr(choice.size, column) for _, choice in chosen) <= limit


@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_weights_come_back_where_measuring_fails(table: Table, fails_at: int) -> None:
    groups, rest = table.groups(), rest_of(table.model, table.sites)
    budget, calls = Budget(keep=0.5), count()
    before = {name: tensor.clone() for name, tensor in table.model.state_dict().items()}

    def distance() -> float:
        if next(calls) == fails_at:
            raise RuntimeError("out of memory")
        return 1.0

    with pytest.raises(RuntimeError, match="out of memory"):
        refine(table, groups, solve_groups(groups, budget, rest), budget, rest, distance, 2, silent)
    after = table.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_probe_that_finds_nothing_better_keeps_what_was_chosen(table: Table) -> None:
    groups, rest = table.groups(), rest_of(table.model, table.sites)
    budget, calls = Budget(keep=0.5), count()
    first = solve_groups(groups, budget, rest)
    chosen, found = refine(table, groups, first, budget, rest, lambda: float(next(calls)), 2, silent)
    assert chosen is first
    assert found == 0.0


def test_distance_is_the_divergence_of_a_naive_twin() -> None:
    model, other = bert(), bert()
    batches = [masked(1), {"input_ids": ids(2)}]
    distance = distance_from_now(wrap_model(model), batches)
    assert distance() == pytest.approx(0.0, abs=1e-7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        total, places = 0.0, 0
        for batch in batches:
            p = other(**batch).logits.double().softmax(-1)
            q = model(**batch).logits.double().softmax(-1)
            at = batch.get("attention_mask", torch.ones(3, 7)).bool()
            total += float((p * (p / q).log()).sum(-1)[at].sum())
            places += int(at.sum())
    assert places == 39
    assert distance() == pytest.approx(total / places, rel=1e-4)


def test_distance_of_embeddings_is_one_less_their_cosine() -> None:
    model, other = bert(head=False), bert(head=False)
    distance = distance_from_now(wrap_model(model), [masked(1)])
    assert distance() == pytest.approx(0.0, abs=1e-7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        mask = masked(1)["attention_mask"].unsqueeze(-1)
        pooled = [normalize((m(**masked(1)).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)
                  for m in (model, other)]  # fmt: skip
    cosine = (pooled[0] * pooled[1]).sum(-1).mean()
    assert distance() == pytest.approx(float(1 - cosine), rel=1e-3)
