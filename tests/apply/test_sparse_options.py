"""Zeros that are not stored: the layer, what the planner thinks it costs and loses, and the way to disk and back."""

from __future__ import annotations

import copy
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from torch import Tensor, nn

import eckart
from eckart.apply.bits import metric_of
from eckart.apply.sparse import KEEPS, fitted, kept_counts, rounded_fit, sparse_choices, sparse_size
from eckart.arch import find_sites, fingerprint, model_size, site_matrices
from eckart.checkpoint import inspect_folder
from eckart.compression import kfac
from eckart.errors import BudgetError, InputError
from eckart.layers import SparseLinear, describe, is_factored, layer_skeleton, unsupported
from eckart.linalg import round_groups
from eckart.moments import Moments, SiteMoments, collect, sampled_targets
from eckart.planning import Plan, Step
from eckart.planning.check import check
from eckart.records import Budget, FormKind, Site

LLAMA = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"intermediate_size": 48, "tie_word_embeddings": False}
IDS = torch.arange(3, 20).unsqueeze(0)
SPARSE = ("dense", "sparse")


@pytest.fixture(scope="module")
def known() -> tuple[nn.Module, Moments]:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 61, (16, 12), generator=generator)} for _ in range(2)]
    moments = collect(
        model, batches, find_sites(model), loss=sampled_targets, gradients="full", fingerprint=fingerprint(model)
    )
    return model, moments


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def drawn(m: int = 6, n: int = 21, kept: int = 8, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor]:
    """A linear map with zeros, and where they are not."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(n, m, dtype=dtype)
    mask = torch.rand(m, n, generator=generator).argsort(1) < kept
    with torch.no_grad():
        layer.weight.copy_(torch.randn(m, n, generator=generator) * mask)
    return layer, mask


# ---- the layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_layer_is_the_dense_one(dtype: torch.dtype) -> None:
    layer, mask = drawn(dtype=dtype)
    sparse = SparseLinear.from_linear(layer, layer.weight[mask].reshape(6, 8), mask)
    x = torch.randn(4, 21, dtype=dtype)
    assert torch.equal(sparse(x), layer(x))
    assert torch.equal(sparse.dense(), layer.weight)
    assert torch.equal(sparse.weight.detach() + 0, layer.weight)
    assert torch.equal(sparse.places(), mask)
    dense = sparse.to_dense()
    assert type(dense) is nn.Linear
    assert torch.equal(dense(x), layer(x))
    sparse.unpack()
    with torch.no_grad():
        assert torch.equal(sparse(x), layer(x))
    assert sparse.unpacked is not None
    assert "unpacked" not in sparse.state_dict()


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_a_skeleton_takes_the_state_dict(bits: int) -> None:
    layer, mask = drawn()
    values: Tensor | object = layer.weight.detach()[mask].reshape(6, 8)
    values = round_groups(values, bits=bits, group=4) if bits else values  # type: ignore[arg-type]
    sparse = SparseLinear.from_linear(layer, values, mask)  # type: ignore[arg-type]
    entry = json.loads(json.dumps(sparse.entry()))
    again = layer_skeleton(entry, nn.Linear(21, 6))
    again.load_state_dict(sparse.state_dict())
    x = torch.randn(3, 21)
    assert torch.equal(again(x), sparse(x))
    assert torch.equal(copy.deepcopy(sparse)(x), sparse(x))
    assert is_factored(sparse)
    assert "already" in str(unsupported(sparse))
    exact = layer.weight.detach()
    assert float((sparse.dense() - exact).norm()) <= {0: 0.0, 8: 0.01, 4: 0.2}[bits] * float(exact.norm())
    assert not sparse.dense()[~mask].any()


def test_conv1d_keeps_its_layout() -> None:
    layer = tf.pytorch_utils.Conv1D(6, 21)
    mask = torch.rand(6, 21, generator=torch.Generator().manual_seed(0)).argsort(1) < 5
    with torch.no_grad():
        layer.weight.mul_(mask.T)
    sparse = SparseLinear.from_linear(layer, layer.weight.T[mask].reshape(6, 5), mask)
    x = torch.randn(2, 21)
    torch.testing.assert_close(sparse(x), layer(x))
    assert tuple(sparse.weight.shape) == (21, 6)
    assert torch.equal(sparse.to_dense().weight, layer.weight)


def test_values_train_on_their_mask_and_nothing_stale_is_used() -> None:
    layer, mask = drawn()
    sparse = SparseLinear.from_linear(layer, layer.weight[mask].reshape(6, 8), mask)
    sparse.unpack()
    x, y = torch.randn(9, 21), torch.randn(9, 6)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1)
    before = float((sparse(x) - y).square().mean().detach())
    for _ in range(20):
        optimizer.zero_grad()
        (sparse(x) - y).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        after = float((sparse(x) - y).square().mean())
    assert after < 0.5 * before
    assert not sparse.dense()[~mask].any()


def test_what_a_layer_cannot_be() -> None:
    layer, mask = drawn()
    with pytest.raises(InputError, match=r"kept is in 1 … 21"):
        SparseLinear(21, 6, kept=22)
    uneven = mask.clone()
    uneven[0, int(mask[0].nonzero()[0])] = False
    with pytest.raises(InputError, match="as many weights; got from 7 to 8"):
        SparseLinear.from_linear(layer, torch.zeros(6, 8), uneven)
    with pytest.raises(InputError, match=r"expected shape \(6, 8\); got \(6, 9\)"):
        SparseLinear.from_linear(layer, torch.zeros(6, 9), mask)
    with pytest.raises(InputError, match="expected bool of shape"):
        SparseLinear.from_linear(layer, torch.zeros(6, 8), mask.T)


# ---- what it costs and loses


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("n", [16, 21, 300])
def test_sizes_are_those_of_the_layer(bits: int, n: int) -> None:
    site = Site(name="a", kind="linear", out_features=6, in_features=n)
    for kept in kept_counts(site):
        layer, mask = drawn(n=n, kept=kept)
        values: Tensor | object = layer.weight.detach()[mask].reshape(6, kept)
        values = round_groups(values, bits=bits, group=128) if bits else values  # type: ignore[arg-type]
        found = model_size(nn.Sequential(SparseLinear.from_linear(layer, values, mask)))  # type: ignore[arg-type]
        size = sparse_size(site, kept, bits, 4)
        assert (found.parameters - 6, found.bytes - 6 * 4, found.macs) == (size.parameters, size.bytes, size.macs)


def one(known: tuple[nn.Module, Moments], name: str = "model.layers.0.mlp.down_proj") -> tuple[Site, dict, SiteMoments]:
    model, moments = known
    site = next(site for site in find_sites(model) if site.name == name)
    return site, site_matrices(model, site)[0], moments.site(name)


def test_losses_are_the_objective_of_the_refitted_mask(known) -> None:
    site, weights, moments = one(known)
    whole = sparse_size(site, site.in_features, 0, 4)
    found = sparse_choices(site, weights, moments, (8, 4), 4, whole)
    assert len(found) == 3 * len(KEEPS)
    second, gradient, _ = kfac.metrics(weights, moments, kfac.Options())
    W = weights["weight"].double()
    for choice in found:
        fit = fitted(weights, moments, choice.rank, iterations=10)
        S = rounded_fit(fit, choice.bits) if choice.bits else fit.weight.double()
        loss = moments.loss_scale * float((gradient @ (W - S) @ second * (W - S)).sum())
        assert choice.loss == pytest.approx(loss, rel=1e-9)
        assert (fit.mask.sum(1) == choice.rank).all()
        assert not fit.weight[~fit.mask].any()
    plain = [choice.loss for choice in found if not choice.bits]
    assert plain == sorted(plain, reverse=True)
    masked = torch.where(fitted(weights, moments, 14).mask, W, 0)
    metric = metric_of(dict(weights), moments, kfac.Options())
    assert metric.loss(W - fitted(weights, moments, 14).weight.double()) < metric.loss(W - masked)


def test_keep_n_of_m_is_kept_in_every_group(known) -> None:
    site, weights, moments = one(known)
    fit = fitted(weights, moments, site.in_features // 2, of=4)
    assert (fit.mask.reshape(-1, 4).sum(1) == 2).all()
    fit = fitted(weights, moments, site.in_features // 4, of=8)
    assert (fit.mask.reshape(-1, 8).sum(1) == 2).all()


def test_all_kept_is_the_map(known) -> None:
    site, weights, moments = one(known)
    assert torch.equal(fitted(weights, moments, site.in_features).weight, weights["weight"])


# ---- one budget


def limit_of(model: nn.Module, share: float) -> int:
    """Bytes of a model whose maps take this share of theirs."""
    inside = sum(4 * site.weight_parameters for site in find_sites(model))
    return int(model_size(model).bytes - (1 - share) * inside)


# In 32 columns, 8 bits with a scale take .29 of float32: zeros are chosen below that.
@pytest.mark.parametrize(("bits", "share"), [((), 0.45), ((), 0.6), ((8,), 0.22)])
def test_the_budget_is_met_from_below_and_is_what_lies_on_disk(known, tmp_path, share, bits) -> None:
    model, moments = known
    sites, limit = find_sites(model), limit_of(model, share)
    made = eckart.compress(model, moments=moments, budget=Budget(bytes=limit), forms=SPARSE, bits=bits)
    forms = {layer.form for layer in made.outcome.layers}
    assert "sparse" in forms
    after = made.outcome.model_after.bytes
    assert after <= limit
    largest = max(4 * site.weight_parameters for site in sites)
    assert after > limit - 0.2 * largest
    assert made.plan.totals is not None
    assert made.plan.totals.model_after.bytes == after == model_size(made.model).bytes
    assert made.outcome.sites_after.macs == made.outcome.sites_before.macs
    assert made.outcome.predicted_loss is not None
    for layer in made.outcome.layers:
        if layer.form == "sparse":
            assert layer.held_out is not None
            assert 0 < layer.held_out < 1
    eckart.save(made, tmp_path / "out")
    stored = 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            stored += sum(opened.get_tensor(key).nbytes for key in opened.keys())  # noqa: SIM118
    assert stored == after


def test_a_saved_model_loads_unpacked_and_computes_the_same(known, tmp_path) -> None:
    model, moments = known
    budget = Budget(bytes=limit_of(model, 0.22))
    made = eckart.compress(model, moments=moments, budget=budget, forms=SPARSE, bits=(8,))
    assert any(layer.form == "sparse" and layer.bits for layer in made.outcome.layers)
    folder = eckart.save(made, tmp_path / "out")
    state = inspect_folder(folder).require_whole()
    assert state.kind == "eckart"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert "sparse" in config["requires"]
    again = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    layers = [layer for layer in again.modules() if isinstance(layer, SparseLinear)]
    assert layers
    assert all(layer.unpacked is not None for layer in layers)
    assert torch.equal(logits(again), logits(made.model))
    again.save_pretrained(tmp_path / "again")
    third = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(third), logits(made.model))
    assert describe(third) == describe(made.model)
    eckart.export(folder, "dense", tmp_path / "dense")
    dense = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert not describe(dense)
    torch.testing.assert_close(logits(dense), logits(made.model))
    assert "sparse" in (folder / "report.html").read_text()


def test_files_without_eckart_stop_and_are_seen_to_be_cut_short(known, tmp_path) -> None:
    model, moments = known
    made = eckart.compress(
        model, moments=moments, budget=Budget(bytes=int(0.75 * model_size(model).bytes)), forms=SPARSE, bits=()
    )
    folder = eckart.save(made, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    name = next(name for name, entry in config["quantization_config"]["modules"].items() if entry["kind"] == "sparse")
    with safe_open(folder / "model.safetensors", "pt") as opened:
        assert opened.get_tensor(f"{name}.weight").numel() == 0
    config["quantization_config"]["modules"]["model.layers.0.self_attn.rotary"] = {
        "kind": "sparse",
        "kept": 3,
        "bias": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert any("mask of sparse layers" in line for line in inspect_folder(folder).problems)


def test_probes_write_what_is_applied(known) -> None:
    """With data, sparse choices are measured; the model is put back."""
    model, _ = known
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(3, 61, (8, 12), generator=generator)} for _ in range(2)]
    before = logits(model)
    made = eckart.compress(
        model,
        data=data,
        budget=Budget(bytes=int(0.7 * model_size(model).bytes)),
        forms=SPARSE,
        bits=(),
        probe_rounds=1,
    )
    assert any(layer.form == "sparse" for layer in made.outcome.layers)
    assert torch.equal(logits(model), before)


def test_nothing_changes_for_those_who_do_not_ask(known) -> None:
    model, moments = known
    plan = eckart.plan(
        model, moments, budget=Budget(bytes=int(0.9 * model_size(model).bytes)), include=["layers.0.mlp.*"]
    )
    assert all(step.form != "sparse" and not step.of for step in plan.steps)
    assert "sparse" not in plan.dumps()


def test_sparse_joins_the_other_forms_and_is_never_worse(known) -> None:
    model, moments = known
    budget = Budget(bytes=int(0.9 * model_size(model).bytes))
    forms: tuple[FormKind, ...] = ("dense", "lowrank", "pivoted", "narrow")
    alone = {"budget": budget, "include": ["layers.0.mlp.*"], "bits": ()}
    without = eckart.plan(model, moments, forms=forms, **alone)
    with_ = eckart.plan(model, moments, forms=(*forms, "sparse"), **alone)
    assert any(step.form == "sparse" for step in with_.steps)
    assert without.totals is not None
    assert with_.totals is not None
    assert with_.totals.objective <= without.totals.objective


# ---- plans


def test_a_plan_goes_through_json_and_is_carried_out(known, tmp_path) -> None:
    model, moments = known
    limit = int(0.72 * model_size(model).bytes)
    plan = eckart.plan(model, moments, budget=Budget(bytes=limit), forms=SPARSE, bits=(8,))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    made = eckart.compress(model, moments=moments, plan=str(tmp_path / "plan.json"), certify=False)
    assert made.outcome.model_after.bytes <= limit
    data = plan.to_json()
    data["steps"] = [{"site": "model.layers.0.mlp.down_proj", "form": "sparse", "rank": 24, "of": 4, "keep": 2}]
    with pytest.raises(InputError, match="unknown key 'keep'"):
        Plan.from_json(data)
    del data["steps"][0]["keep"]
    made = eckart.compress(model, moments=moments, plan=Plan.from_json(data), certify=False)
    layer = made.model.model.layers[0].mlp.down_proj
    assert isinstance(layer, SparseLinear)
    assert (layer.places().reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"rank": 0}, "rank 0 is not from 1 to 48"),
        ({"rank": 49}, "rank 49 is not from 1 to 48"),
        ({"rank": 24, "of": 5}, "no such groups"),
        ({"rank": 25, "of": 4}, "no such groups"),
        ({"rank": 24, "bits": 3, "group": 4}, "bits is one of"),
        ({"rank": 24, "bits": 8}, "group counts the columns"),
        ({"rank": 24, "repair": 2, "bits": 8, "group": 4}, "repair is the rank of a correction beside a dense"),
        ({"form": "lowrank", "rank": 3, "of": 4}, "of is for the form sparse"),
    ],
    ids=str,
)
def test_plans_that_cannot_be(known, step, words) -> None:
    model, _ = known
    wrong = Step(**{"site": "model.layers.0.mlp.down_proj", "form": "sparse", "method": "kfac", **step})
    with pytest.raises(InputError, match=words):
        check(Plan(steps=(wrong,), method="kfac"), find_sites(model))


# ---- what is refused


@pytest.mark.parametrize(
    "how",
    [
        {"keep": 0.5},
        {"budget": Budget(parameters=10_000)},
        {"budget": Budget(macs=10_000)},
        {"budget": Budget(loss=0.1)},
        {"budget": Budget(bytes=60_000), "method": "modules"},
        {"budget": Budget(bytes=60_000), "method": "whitened", "allocation": "uniform", "bits": ()},
        {"budget": Budget(bytes=60_000), "allocation": "uniform", "bits": ()},
    ],
    ids=str,
)
def test_zeros_are_for_bytes(known, how) -> None:
    model, moments = known
    with pytest.raises(InputError, match="save bytes, no multiply-adds and no time"):
        eckart.compress(model, moments=moments, forms=SPARSE, **how)


def test_a_budget_that_no_share_meets(known) -> None:
    model, moments = known
    with pytest.raises(BudgetError):
        eckart.compress(model, moments=moments, forms=SPARSE, bits=(), budget=Budget(bytes=20_000))


def test_a_dry_run_says_that_zeros_come_later(known) -> None:
    model, _ = known
    budget = Budget(bytes=limit_of(model, 0.5))
    shown = eckart.preview(model, budget=budget, forms=SPARSE, bits=())
    assert any("zeros are chosen in the real run" in note for note in shown.notes)
    step = Step(site="model.layers.0.mlp.down_proj", form="sparse", rank=24, method="kfac")
    shown = eckart.preview(model, plan=Plan(steps=(step,), method="kfac"))
    assert shown.sites_before.bytes - shown.sites_after.bytes == 32 * (48 - 24) * 4 - 32 * 6


def test_a_plan_without_moments(known) -> None:
    model, _ = known
    step = Step(site="model.layers.0.mlp.down_proj", form="sparse", rank=24, method="kfac")
    with pytest.raises(InputError, match="moments"):
        eckart.compress(model, plan=Plan(steps=(step,), method="kfac"))
