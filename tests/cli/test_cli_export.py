"""`eckart export` to ONNX and to a native checkpoint, on tiny models in this process."""

from __future__ import annotations

import json
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import eckart  # noqa: E402
from eckart.hf import native, onnx  # noqa: E402
from eckart.hf.registry import prepare_for_saving  # noqa: E402
from eckart.layers import layer_skeleton  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def bert(width: int = 24) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=width
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def factored(tmp_path_factory):
    """A BERT with one factored layer."""
    folder = tmp_path_factory.mktemp("models") / "factored"
    model = bert()
    name = "encoder.layer.0.intermediate.dense"
    entry = {"kind": "linear", "form": "lowrank", "rank": 4, "bias": True}
    model.set_submodule(name, layer_skeleton(entry, model.get_submodule(name)))
    prepare_for_saving(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def graphs():
    """What torch's exporter made of the model of this file, by opset: it takes seconds."""
    return {}


@pytest.fixture
def translated(graphs, monkeypatch):
    translate = onnx._translate

    def once(loaded, graph, batch, opset):
        if opset not in graphs:
            graphs[opset] = translate(loaded, graph, batch, opset)
        return graphs[opset]

    monkeypatch.setattr(onnx, "_translate", once)


def test_onnx_prints_and_stores_the_difference(run, factored, translated, tmp_path):
    ran = run("export", factored, "--to", "onnx", "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    stored = json.loads((tmp_path / "out" / "onnx.json").read_text())
    assert said == {**stored, "folder": str(tmp_path / "out"), "to": "onnx", "bytes": said["bytes"]}
    assert list(said["inputs"]) == ["input_ids", "attention_mask"]
    # Again, in words, over the old folder, in another opset.
    ran = run("export", factored, "--to", "onnx", "-o", tmp_path / "out", "--overwrite", "--opset", "18")
    assert ran.code == 0, ran.err
    assert "outputs  last_hidden_state tensor(float) (batch × length × 16)" in ran.out
    assert "largest difference from torch" in ran.out
    assert json.loads((tmp_path / "out" / "onnx.json").read_text())["opset"] == 18


def test_a_tolerance_that_is_exceeded_leaves_nothing(run, factored, translated, tmp_path):
    ran = run("export", factored, "--to", "onnx", "-o", tmp_path / "out", "--tolerance", "1e-12")
    assert ran.code == 1
    assert "allowed is 1e-12" in ran.err
    assert ran.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_wrong_use(run, factored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    ran = run("export", factored, "--to", "onnx", "-o", tmp_path / "out", "--opset", "3", "--json")
    assert ran.code == 2
    assert "needs onnxscript: pip install 'eckart[onnx]'" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_factored_model_has_no_native_form(run, factored, tmp_path):
    ran = run("export", factored, "--to", "native", "-o", tmp_path / "out")
    assert ran.code == 2
    for words in ("encoder.layer.0.intermediate.dense is of kind linear", "rank 4", "--to dense"):
        assert words in ran.err
    assert list(tmp_path.iterdir()) == []


def test_native_writes_a_plain_model(run, factored, tmp_path, monkeypatch):
    """The folder stands for one whose model has narrower layers."""
    narrow = bert(24)
    small = bert(16)
    narrow.encoder.layer[0].intermediate.dense = small.encoder.layer[0].intermediate.dense
    narrow.encoder.layer[0].output.dense = small.encoder.layer[0].output.dense
    monkeypatch.setattr(native, "load_pretrained", lambda directory, dtype: narrow)
    ran = run("export", factored, "--to", "native", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "saved to" in ran.out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 16
    assert "quantization_config" not in config


def test_options_of_another_target_are_refused_by_the_verb_too(factored, tmp_path):
    with pytest.raises(eckart.InputError, match="opset: of no effect"):
        eckart.export(factored, "dense", tmp_path / "out", opset=20)
