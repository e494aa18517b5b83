"""Block by block gives what the whole model in memory gives."""

from __future__ import annotations

import json

import pytest
import torch
from streamed_tiny_models import ASKED, MODELS, tf, tiny

import eckart


def in_memory(folder, **asked):
    """Without probes, which a model that memory does not hold cannot have."""
    return eckart.compress(folder, **asked, probe_rounds=0)


def outputs(folder) -> torch.Tensor:
    config = json.loads((folder / "config.json").read_text())
    model = getattr(tf, config["architectures"][0]).from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 33)[None])[0].float()


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
