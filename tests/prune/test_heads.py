"""Whole heads: what leaves the function as it is, what is removed, refitted, and stated by a config."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from eckart.arch import find_sites, find_units, fingerprint, head_columns, head_rows, site_matrices
from eckart.errors import BudgetError, InputError, MismatchError, NotFiniteError
from eckart.hf.native import native_config, settle_native
from eckart.layers import describe
from eckart.modules import UnitFacts, get_module_method, prepare_unit
from eckart.modules.heads import PreparedHeads, group_columns, places, removal_order_of_groups
from eckart.modules.neurons import damped, errors_in_order, errors_without_refit
from eckart.modules.obs import Options, scores_of
from eckart.moments import Moments, collect, sampled_targets
from eckart.planning import Plan, Step
from eckart.planning.check import check
from eckart.prune.groups import find_groups
from eckart.prune.heads import prune_heads
from eckart.prune.widths import narrowed_widths, width_units

TEXT = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 20, "pad_token_id": 0}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "tie_word_embeddings": False}
PHI3 = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
PHI3 |= {"original_max_position_embeddings": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
GPT2 = {"vocab_size": 30, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 1}
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "llama with biases": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, attention_bias=True)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**TEXT, num_attention_heads=4)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, eos_token_id=2)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**PHI3)),
}
every = pytest.mark.parametrize("name", MODELS)
IDS = torch.randint(3, 30, (3, 9), generator=torch.Generator().manual_seed(7))
_BUILT: dict[str, tuple[nn.Module, Moments]] = {}


def built(name: str) -> tuple[nn.Module, Moments]:
    """A model of random weights in float64, and its moments; a copy of the model."""
    if name not in _BUILT:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = MODELS[name]().double().eval()
            for parameter in model.parameters():
                parameter.data += (0.4 if parameter.ndim > 1 else 0.3) * torch.randn_like(parameter)
        generator = torch.Generator().manual_seed(0)
        batches = [{"input_ids": torch.randint(3, 30, (4, 9), generator=generator)} for _ in range(2)]
        moments = collect(model, batches, find_sites(model), loss=sampled_targets, gradients="full", seed=0)
        moments.fingerprint = fingerprint(model)
        _BUILT[name] = model, moments
    model, moments = _BUILT[name]
    return copy.deepcopy(model), moments


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def attentions(model: nn.Module):
    return find_units(model).attentions


def maps(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {site.name: site_matrices(model, site)[0] for site in find_sites(model)}


# ---- what leaves the function as it is


@every
def test_heads_of_keys_and_values_may_change_places(name: str) -> None:
    model, _ = built(name)
    exact, weights = output(model), maps(model)
    for attention in attentions(model):
        group = attention.heads // attention.kv_heads
        order = torch.randperm(attention.kv_heads, generator=torch.Generator().manual_seed(1)).tolist()
        queries = [head * group + i for head in order for i in range(group)]
        for rows, heads in ((attention.query, queries), (attention.key, order), (attention.value, order)):
            found = places(head_rows(rows, head, attention.head_dim) for head in heads)
            for tensor in weights[rows.site].values():
                tensor[rows.start : rows.stop] = tensor[found].clone()
        columns = places(head_columns(attention, head) for head in queries)
        weights[attention.output]["weight"].copy_(weights[attention.output]["weight"][:, columns].clone())
    torch.testing.assert_close(output(model), exact)


@every
def test_queries_of_one_group_may_change_places(name: str) -> None:
    model, _ = built(name)
    exact, weights = output(model), maps(model)
    for attention in attentions(model):
        group = attention.heads // attention.kv_heads
        queries = [head * group + i for head in range(attention.kv_heads) for i in reversed(range(group))]
        found = places(head_rows(attention.query, head, attention.head_dim) for head in queries)
        for tensor in weights[attention.query.site].values():
            tensor[attention.query.start : attention.query.stop] = tensor[found].clone()
        columns = places(head_columns(attention, head) for head in queries)
        weights[attention.output]["weight"].copy_(weights[attention.output]["weight"][:, columns].clone())
    torch.testing.assert_close(output(model), exact)


@every
def test_heads_that_nobody_reads_go_without_a_trace(name: str) -> None:
    """Columns of zeros: the head is dead whatever it computes. Without a refit nothing else moves at all."""
    model, moments = built(name)
    weights = maps(model)
    dead = {}
    for i, attention in enumerate(attentions(model)):
        dead[attention.name] = i % attention.kv_heads
        weights[attention.output]["weight"][:, group_columns(attention)[dead[attention.name]]] = 0
    exact = output(model)
    moments = copy.copy(moments)
    moments.fingerprint = fingerprint(model)
    kv_heads = attentions(model)[0].kv_heads
    for refit in (False, True):
        pruned = copy.deepcopy(model)
        kept = prune_heads(pruned, moments, keep=(kv_heads - 1) / kv_heads, refit=refit)
        assert all(dead[attention] not in heads for attention, heads in kept.items())
        assert all(len(heads) == kv_heads - 1 for heads in kept.values())
        torch.testing.assert_close(output(pruned), exact)
        assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


@every
def test_what_is_left_computes_what_its_stand_in_does(name: str) -> None:
    model, moments = built(name)
    twin = copy.deepcopy(model)
    weights = maps(twin)
    prepared = narrowed_widths(model, moments, "heads", 0.5)
    assert len(prepared) == 2
    with torch.no_grad():
        for part, width in prepared.values():
            site, dense, bias = part.stand_in(width)
            weights[site]["weight"].copy_(dense)
            if bias is not None and "bias" in weights[site]:
                weights[site]["bias"].copy_(bias)
    torch.testing.assert_close(output(model), output(twin))


@every
def test_coupled_groups_without_a_reader_do_nothing(name: str) -> None:
    """Groups out of facts: with the columns of one group zero, its rows and biases may be anything."""
    model, _ = built(name)
    sets = find_groups(model, ("neurons", "heads"))
    assert len(sets) == 4
    parameters = dict(model.named_parameters())
    for group in sets:
        column = group.parts[-1]
        parameters[column.parameter].data.narrow(column.dim, column.start + column.size, column.size).zero_()
    exact = output(model)
    for group in sets:
        for part in group.parts[:-1]:
            parameters[part.parameter].data.narrow(part.dim, part.start + part.size, part.size).fill_(0.1)
    torch.testing.assert_close(output(model), exact)
    assert sum(group.size(model) * group.count for group in sets) >= sum(
        site.weight_parameters for site in find_sites(model)
    )


def test_everything_kept_is_the_model() -> None:
    model, moments = built("llama with biases")
    exact = output(model)
    prune_heads(model, moments, keep=1)
    torch.testing.assert_close(output(model), exact)


# ---- scores and the refit


def drawn(heads: int = 4, size: int = 3, out: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    n = heads * size
    X = torch.randn(80, n, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    target = torch.randn(out, n, generator=generator, dtype=torch.float64)
    return target, X.T @ X / 80, [torch.arange(i * size, (i + 1) * size) for i in range(heads)]


def refit_error(target: Tensor, second: Tensor, kept: Tensor) -> float:
    """min over X of tr((T − X_J) Σ (T − X_J)ᵀ), by the normal equations and in full."""
    fitted = torch.zeros_like(target)
    if len(kept):
        fitted[:, kept] = torch.linalg.solve(second[kept][:, kept], (target @ second[:, kept]).T).T
    return float(((target - fitted) @ second * (target - fitted)).sum())


@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_that_of_trying_every_head(seed: int) -> None:
    target, second, groups = drawn(seed=seed)
    left, gone = list(range(4)), []
    while left:
        rest = {i: [groups[j] for j in left if j != i] for i in left}
        costs = {
            i: refit_error(target, damped(second), torch.cat(r) if r else torch.empty(0, dtype=torch.long))
            for i, r in rest.items()
        }
        gone.append(min(left, key=costs.__getitem__))
        left.remove(gone[-1])
    assert list(removal_order_of_groups(target, second, groups)) == gone[::-1]


def test_groups_of_one_are_neurons() -> None:
    target, second, _ = drawn()
    singles = [torch.tensor([i]) for i in range(12)]
    order = removal_order_of_groups(target, second, singles)
    errors = errors_in_order(target, second, torch.tensor(order))
    assert sorted(order) == list(range(12))
    assert float(errors[0]) == pytest.approx(refit_error(target, damped(second), torch.empty(0, dtype=torch.long)))


def test_errors_without_a_refit_are_those_of_zeroed_columns() -> None:
    target, second, _ = drawn()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    errors = errors_without_refit(target, second, order)
    for k in range(13):
        delta = target.clone()
        delta[:, order[:k]] = 0
        assert float(errors[k]) == pytest.approx(float((delta @ second * delta).sum()), abs=1e-9)


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_losses_are_the_objective_of_what_is_applied(name: str, refit: bool) -> None:
    model, moments = built(name)
    units, sites = width_units(model, "heads")
    for unit in units:
        weights = {site: site_matrices(model, sites[site])[0] for site in unit.unit.sites}
        known = {site: moments.site(site) for site in unit.unit.sites}
        options = Options(parts=("heads",), refit=refit, input_shrinkage=0.0)
        part = get_module_method("modules").prepare(unit, weights, known, options)
        site = unit.facts.output  # type: ignore[union-attr]
        one = moments.site(site)
        assert one.second is not None
        assert one.gradient is not None
        centred = "bias" in weights[site] and one.covariance is not None
        second = one.covariance if centred else one.second
        gradient = 0.5 * (one.gradient + torch.diag(one.gradient.diagonal())) * one.loss_scale
        assert len(part.errors) == unit.unit.full_rank + 1
        assert abs(float(part.errors[-1])) < 1e-12
        for width in range(1, unit.unit.full_rank):
            delta = weights[site]["weight"] - part.stand_in(width)[1]
            loss = (gradient @ delta @ second * delta).sum()
            torch.testing.assert_close(part.errors[width], loss, rtol=1e-3, atol=1e-4 * float(part.errors[0]))


def test_a_refit_is_better_on_what_it_was_fitted_to_and_keeps_the_mean() -> None:
    model, moments = built("bert")
    units, sites = width_units(model, "heads")
    unit = units[0]
    weights = {site: site_matrices(model, sites[site])[0] for site in unit.unit.sites}
    known = {site: moments.site(site) for site in unit.unit.sites}
    with_, without = (
        prepare_unit(unit, weights, known, scores_of(Options(parts=("heads",), refit=refit))) for refit in (True, False)
    )
    assert isinstance(with_, PreparedHeads)
    assert isinstance(without, PreparedHeads)
    assert with_.order == without.order
    assert (with_.errors[1:-1] < without.errors[1:-1]).all()
    site, dense, bias = with_.stand_in(2)
    mean = known[site].mean
    assert mean is not None
    assert bias is not None
    torch.testing.assert_close(dense @ mean + bias, weights[site]["weight"] @ mean + weights[site]["bias"])


# ---- saved


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_equal_counts_are_a_plain_config(name: str, tmp_path) -> None:
    model, moments = built(name)
    prune_heads(model, moments, keep=0.5)
    assert settle_native(model)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (4, 2, 4)
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert not describe(again)
    torch.testing.assert_close(output(again), output(model))


def test_a_family_that_divides_its_width_by_its_heads_says_so() -> None:
    model, moments = built("bert")
    prune_heads(model, moments, keep=0.5)
    config, reasons = native_config(model)
    assert config is None
    assert "attention.self.query" in " ".join(reasons or ())
    assert not settle_native(model)


# ---- what is refused


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    model, moments = built("llama")
    exact = output(model)
    for keep in (0, 1.5, True, "half", float("nan")):
        with pytest.raises(InputError, match=r"keep is a share in \(0, 1\]"):
            prune_heads(model, moments, keep=keep)
    with pytest.raises(BudgetError, match=r"of 4 is less than one; take at least 0\.25"):
        prune_heads(model, moments, keep=0.2)
    other, _ = built("llama")
    other.lm_head.weight.data += 1
    with pytest.raises(MismatchError):
        prune_heads(other, moments, keep=0.5)
    with pytest.raises(InputError, match="no attention of this model can lose heads"):
        prune_heads(model, moments, keep=0.5, include=["mlp.*"])
    broken, _ = built("llama")
    broken.model.layers[0].self_attn.k_proj.weight.data[0, 0] = torch.nan
    stale = copy.copy(moments)
    stale.fingerprint = fingerprint(broken)
    with pytest.raises(NotFiniteError, match="k_proj"):
        prune_heads(broken, stale, keep=0.5)
    assert torch.equal(output(model), exact)


def test_a_model_that_is_not_known() -> None:
    with pytest.raises(InputError, match="no facts about this family"):
        width_units(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "heads")


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(InputError, match="heads leave whole"):
        Options(parts=("heads", "values"))
    with pytest.raises(InputError, match="refit=False is for parts among neurons and heads"):
        Options(refit=False)
    assert Options(parts=("heads", "neurons"), refit=False).refit is False


def test_a_plan_cannot_make_a_head_narrower_and_drop_it() -> None:
    model, _ = built("llama")
    sites = find_sites(model)
    units: list[UnitFacts] = []
    for kind in ("heads", "neurons"):
        units += width_units(model, kind)[0]  # type: ignore[arg-type]
    name = next(each.unit.name for each in units if each.unit.kind == "heads")
    steps = [
        Step(site=name, form="narrow", rank=2, method="modules", options={"parts": ["heads"]}),
        Step(site=name.replace("#heads", "#values"), form="narrow", rank=2, method="modules"),
    ]
    with pytest.raises(InputError, match=r"heads leave whole, so .*#values cannot become narrower too"):
        check(Plan(steps=tuple(steps), method="kfac"), sites, [each.unit for each in units])
    check(Plan(steps=tuple(steps[:1]), method="kfac"), sites, [each.unit for each in units])
