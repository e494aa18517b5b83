"""The verbs on a small trained causal language model with a tied head."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import eckart
from eckart.arch import model_size
from eckart.verbs.models import as_loaded

transformers = pytest.importorskip("transformers")

FOLDER = Path(os.environ.get("ECKART_TESTBED", Path(__file__).parents[3] / "shared" / "testbed"))
pytestmark = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(), reason="no causal LM: set ECKART_TESTBED to a folder with one"
)


@pytest.fixture(scope="module")
def base():
    return as_loaded(FOLDER)


@pytest.fixture(scope="module")
def moments(base):
    return eckart.calibrate(base, str(FOLDER / "calib.txt"), samples=40, embeddings=True, head=True)


def test_a_fifth_can_go_for_little(base, moments):
    made = eckart.compress(base, moments=moments, keep=0.8)
    found = eckart.evaluate(made.loaded, base, str(FOLDER / "valid.txt"), samples=40, latency=False)
    assert found.metrics["loss_rise"].mean < 0.1
    assert found.metrics["kl"].mean > 0


def test_generate_after_save_and_load(base, moments, tmp_path):
    made = eckart.compress(base, moments=moments, keep=0.7)
    eckart.save(made, tmp_path / "small")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    prompt = base.tokenizer("import os\n", return_tensors="pt")
    ours = made.model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, model.generate(**prompt, max_new_tokens=8, do_sample=False))


def test_tied_embeddings_stay_tied(base, moments, tmp_path):
    made = eckart.compress(base, moments=moments, keep=0.7, embeddings=True, head=True)
    table = next(layer for layer in made.outcome.layers if layer.site.kind == "embedding")
    assert table.form != "dense"
    assert table.site.tied
    assert made.outcome.model_after == model_size(made.model)
    before, after = made.outcome.sites_before, made.outcome.sites_after
    assert before.macs - after.macs == made.outcome.model_before.macs - made.outcome.model_after.macs
    eckart.save(made, tmp_path / "tied")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    ids = torch.arange(2, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(made.model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_cheap_gradients_serve_the_default_method(base):
    moments = eckart.calibrate(base, str(FOLDER / "calib.txt"), samples=20, gradients="scale")
    made = eckart.compress(base, moments=moments, keep=0.8)
    assert made.outcome.predicted_loss > 0


def test_without_gradients_the_default_method_says_what_to_do(base):
    moments = eckart.calibrate(base, str(FOLDER / "calib.txt"), samples=20, gradients="none")
    with pytest.raises(eckart.InputError, match="gradients"):
        eckart.compress(base, moments=moments, keep=0.8)
    assert eckart.compress(base, moments=moments, keep=0.8, method="whitened").outcome.predicted_loss is None
