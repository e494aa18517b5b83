"""Block by block gives what the whole model in memory gives."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from streamed_tiny_models import ASKED, MODELS, tf, tiny

import eckart
from eckart.arch import model_size
from eckart.hf.models import load_model
from eckart.records import Budget
from eckart.streaming import passes


def in_memory(folder, **asked):
    """Without probes, which a model that memory does not hold cannot have."""
    return eckart.compress(folder, **asked, probe_rounds=0)


def outputs(folder) -> torch.Tensor:
    config = json.loads((folder / "config.json").read_text())
    model = getattr(tf, config["architectures"][0]).from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 33)[None])[0].float()


@pytest.mark.parametrize("samples", [24, 23], ids=["of one size", "the last one smaller"])
def test_more_than_ten_batches(tmp_path, samples):
    """Files list their tensors by name, ``10`` before ``2``: every batch must meet its own gradients."""
    asked = {**ASKED, "samples": samples, "batch_size": 2}
    folder = tiny("llama", tmp_path / "model")
    streamed = eckart.compress_stream(folder, tmp_path / "streamed", **asked)
    whole = in_memory(folder, **asked)
    assert streamed.plan.steps == whole.plan.steps
    for one, other in zip(streamed.outcome.layers, whole.outcome.layers, strict=True):
        assert one.form == other.form
        if one.form != "dense":
            assert one.held_out == pytest.approx(other.held_out, rel=1e-9)
            assert one.loss == pytest.approx(other.loss, rel=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_the_streamed_model_is_the_one_made_in_memory(name, tmp_path):
    folder = tiny(name, tmp_path / "model")
    streamed = eckart.compress_stream(folder, tmp_path / "streamed", **ASKED)
    whole = in_memory(folder, **ASKED)
    eckart.save(whole, tmp_path / "whole")

    assert streamed.plan.steps == whole.plan.steps
    assert streamed.plan.fingerprint == whole.plan.fingerprint
    for field in ("sites_before", "sites_after", "model_before", "model_after", "budget"):
        assert getattr(streamed.outcome, field) == getattr(whole.outcome, field), field
    # The streamed figures are those of the factors before they are rounded to the dtype of the weights.
    rounding = 1e-3 if name.endswith("bf16") else 1e-7
    for one, other in zip(streamed.outcome.layers, whole.outcome.layers, strict=True):
        assert (one.site, one.form, one.rank, one.before, one.after) == (
            other.site, other.form, other.rank, other.before, other.after,
        )  # fmt: skip
        assert one.predicted == pytest.approx(other.predicted, abs=rounding)
        if other.form != "dense":
            assert one.held_out == pytest.approx(other.held_out, rel=1e-9)
            assert one.loss == pytest.approx(other.loss, rel=1e-9)

    a, b = outputs(tmp_path / "streamed"), outputs(tmp_path / "whole")
    tolerance = 3e-2 if name.endswith("bf16") else 1e-5
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
    one, other = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("streamed", "whole"))
    assert one == other
    state = eckart.doctor(tmp_path / "streamed")
    assert state.whole, state.problems
    assert state.notes == ()
    written = {path.name for path in (tmp_path / "whole").iterdir()} - {"model.safetensors"}
    assert written <= {path.name for path in (tmp_path / "streamed").iterdir()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("method", ["whitened", "fwsvd", "svd", "asvd"])
def test_methods_that_need_less(method, tmp_path):
    """Whitened runs forward only as far as its last map, fwsvd takes Fisher sums, svd no data at all."""
    folder = tiny("llama", tmp_path / "model")
    asked = {**ASKED, "method": method, "exclude": ["layers.3.*", "layers.1.*"]}
    if method == "svd":
        asked = {name: asked[name] for name in ("method", "keep", "exclude")}
    streamed = eckart.compress_stream(folder, tmp_path / "streamed", **asked)
    whole = in_memory(folder, **asked)
    assert streamed.plan.steps == whole.plan.steps
    eckart.save(whole, tmp_path / "whole")
    torch.testing.assert_close(outputs(tmp_path / "streamed"), outputs(tmp_path / "whole"), rtol=1e-4, atol=1e-5)


def test_probes_shards_and_a_dense_result(tmp_path):
    folder = tiny("llama", tmp_path / "model", max_shard_size="20KB")
    asked = {**ASKED, "probes": 2, "gradients": "full"}
    streamed = eckart.compress_stream(folder, tmp_path / "small", **asked, max_shard_size="12KB")
    assert streamed.plan.steps == in_memory(folder, **asked).plan.steps
    sizes = [path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors")]
    assert len(sizes) > 5
    assert eckart.doctor(tmp_path / "small").whole
    outputs(tmp_path / "small")

    eckart.compress_stream(folder, tmp_path / "same", **{**ASKED, "keep": 1.0, "forms": ("dense",)})
    torch.testing.assert_close(outputs(tmp_path / "same"), outputs(folder), rtol=0, atol=0)
    assert "quantization_config" not in json.loads((tmp_path / "same" / "config.json").read_text())


@pytest.mark.parametrize("kept", ["lowrank", "one by one", "few"])
def test_experts_a_few_at_a_time(kept, tmp_path, monkeypatch):
    """The moments of one expert after the other, and those of all others together, give the same result."""
    folder = tiny("qwen2-moe", tmp_path / "model")
    asked = {**ASKED, "forms": ("dense", "lowrank")} if kept == "lowrank" else ASKED
    whole = eckart.compress_stream(folder, tmp_path / "whole", **asked)
    collected = []
    usual = passes.collect_segment
    monkeypatch.setattr(passes, "SPARE", 40_000 if kept == "few" else -(10**9))
    monkeypatch.setattr(
        passes, "collect_segment", lambda *a, **k: collected.append(list(k["experts"].values())) or usual(*a, **k)
    )
    parts = eckart.compress_stream(folder, tmp_path / "parts", **asked)
    assert {len(chosen) for group in collected for chosen in group} >= {1}
    assert parts.plan.steps == whole.plan.steps
    for one, other in zip(parts.outcome.layers, whole.outcome.layers, strict=True):
        assert one.predicted == pytest.approx(other.predicted, rel=1e-6, abs=1e-9)
        assert one.held_out == (None if other.held_out is None else pytest.approx(other.held_out, rel=1e-6))
    torch.testing.assert_close(outputs(tmp_path / "parts"), outputs(tmp_path / "whole"), rtol=1e-4, atol=1e-4)


def test_what_stays_keeps_its_name_in_the_files(tmp_path):
    folder = tiny("mixtral", tmp_path / "model")
    eckart.compress_stream(folder, tmp_path / "out", **{**ASKED, "keep": 0.9}, include=["self_attn.*"])
    before = set(load_file(folder / "model.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name for name in before if "self_attn" not in name} <= set(index)
    assert {name for name in index if "experts" in name} <= before


@pytest.mark.parametrize(
    ("name", "bits"),
    [("llama-tied-bf16", None), ("gpt2", (8,)), ("qwen2-moe", (8,))],
    ids=["default", "gpt2", "experts"],
)
def test_numbers_in_few_bits(name, bits, tmp_path):
    folder = tiny(name, tmp_path / "model")
    model = load_model(folder).model
    # Two blocks beside two that stay as they are.
    blocks = sum(p.nbytes for key, p in model.named_parameters() if re.search(r"\.[03]\.", key))
    kept = model_size(model).bytes - int((0.7 if bits is None else 0.6) * blocks)
    asked = {**ASKED, "bits": bits, "keep": None, "budget": Budget(bytes=kept), "exclude": ["*.1.*", "*.2.*"]}
    streamed = eckart.compress_stream(folder, tmp_path / "streamed", **asked)
    whole = in_memory(folder, **asked)
    eckart.save(whole, tmp_path / "whole")
    assert streamed.plan.steps == whole.plan.steps
    assert any(step.bits for step in streamed.plan.steps)
    assert streamed.outcome.sites_after == whole.outcome.sites_after
    assert streamed.outcome.model_after == whole.outcome.model_after
    for one, other in zip(streamed.outcome.layers, whole.outcome.layers, strict=True):
        assert (one.bits, one.repair, one.rank, one.after) == (other.bits, other.repair, other.rank, other.after)
        # What rounding the factors adds is interpolated between a few ranks, and a share of another norm.
        assert one.loss == (None if other.loss is None else pytest.approx(other.loss, rel=0.3, abs=1e-6))
        assert one.predicted == pytest.approx(other.predicted, rel=0.5, abs=1e-2)
    tolerance = 3e-2 if name.endswith("bf16") else 1e-4
    a, b = outputs(tmp_path / "streamed"), outputs(tmp_path / "whole")
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
    one, other = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("streamed", "whole"))
    assert one == other
    assert eckart.doctor(tmp_path / "streamed").whole


@pytest.mark.parametrize(("name", "method"), [("llama", "modules"), ("gpt2", "modules"), ("bert-mlm", "modegpt")])
def test_narrower_blocks_become_a_plain_checkpoint(name, method, tmp_path):
    folder = tiny(name, tmp_path / "model")
    asked = {**ASKED, "method": method, "keep": 0.8}
    streamed = eckart.compress_stream(folder, tmp_path / "streamed", **asked)
    whole = in_memory(folder, **{**asked, "allocation": "uniform"})
    eckart.save(whole, tmp_path / "whole")
    assert streamed.plan.steps == whole.plan.steps
    assert streamed.plan.totals.objective == pytest.approx(whole.plan.totals.objective)
    for one, other in zip(streamed.outcome.layers, whole.outcome.layers, strict=True):
        assert (one.site, one.form, one.rank, one.before, one.after) == (
            other.site, other.form, other.rank, other.before, other.after,
        )  # fmt: skip
        assert one.predicted == pytest.approx(other.predicted, abs=1e-7)
        assert one.held_out == (None if other.held_out is None else pytest.approx(other.held_out, rel=1e-9))
        assert one.loss == (None if other.loss is None else pytest.approx(other.loss, rel=1e-9))
    a, b = outputs(tmp_path / "streamed"), outputs(tmp_path / "whole")
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    one, other = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("streamed", "whole"))
    assert one == other
    if method == "modules":
        assert "quantization_config" not in one
