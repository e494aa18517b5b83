"""ONNX exports: the graph computes what the model does at any size, or nothing is left behind."""

from __future__ import annotations

import json
import sys

import factored_tiny_models as tiny
import numpy as np
import pytest
import tokenizers
import torch
import transformers as tf

from eckart.checkpoint import Manifest
from eckart.errors import EckartError, FileError, InputError
from eckart.hf import onnx as export_module
from eckart.hf.models import load_model
from eckart.hf.onnx import export_onnx
from eckart.hf.registry import prepare_for_saving
from eckart.hf.tasks import embed
from eckart.layers import describe
from eckart.layers.quantise import quantise_layer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    monkeypatch.setitem(tiny.TEXT, "num_hidden_layers", 1)


def save(model, folder):
    prepare_for_saving(model)
    model.save_pretrained(folder)
    if describe(model):
        Manifest(base="toy", fingerprint="f", modules=describe(model)).write(folder)
    return folder


def run(folder, batch):
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {k: v.numpy() for k, v in batch.items()}), strict=True))


def run_in_openvino(openvino, folder, batch):
    core = openvino.Core()
    # Where a CPU has bfloat16 products, OpenVINO takes them unless it is told otherwise, and is off by a hundredth.
    model = core.compile_model(str(folder / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    inputs = {name for port in model.inputs for name in port.get_names()}
    results = model({name: value.numpy() for name, value in batch.items() if name in inputs})
    return {name: results[port] for port in model.outputs for name in port.get_names()}


def note(folder):
    return json.loads((folder / "onnx.json").read_text())


def text(rows, length, padding=0):
    generator = torch.Generator().manual_seed(rows * length)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1:, :padding] = 0  # on the left, unlike the probes of the export
    return {"input_ids": torch.randint(3, 61, (rows, length), generator=generator), "attention_mask": mask}


def llama_with_a_tied_table():
    model = tiny.build("llama-tied")
    tiny.factor(model)
    tiny.factor_embedding(model, "model.embed_tokens", 6, "lowrank", ("lm_head",))
    return model


def bert_with_a_pivoted_table():
    model = tiny.build("bert")
    tiny.factor(model)
    tiny.factor_embedding(model, "bert.embeddings.word_embeddings", 6, "pivoted", ("cls.predictions.decoder",))
    return model


def mixtral():
    model = tiny.build("mixtral")
    tiny.factor(model)
    return model


def quantised_bert():
    model = tiny.build("bert")
    for name in ("query", "key", "value"):
        quantise_layer(model, f"bert.encoder.layer.0.attention.self.{name}", bits=4, group=8)
    return model


TEXT_MODELS = (llama_with_a_tied_table, bert_with_a_pivoted_table, mixtral)


@pytest.mark.parametrize("make", TEXT_MODELS)
def test_factored_models_of_text_compute_the_same_at_any_size(make, tmp_path):
    model = make()
    assert describe(model)
    out = export_onnx(save(model, tmp_path / "in"), tmp_path / "out")
    for batch in (text(4, 7), text(1, 1), text(3, 17, padding=5)):
        with torch.no_grad():
            wanted = model(**batch).logits
        found = torch.from_numpy(run(out, batch)["logits"])
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [*TEXT_MODELS, quantised_bert], ids=["llama", "bert", "mixtral", "bert in few bits"])
def test_openvino_computes_the_same(make, tmp_path):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install openvino")
    model = make()
    out = export_onnx(save(model, tmp_path / "in"), tmp_path / "out")
    for batch in (text(4, 7), text(1, 1), text(3, 17, padding=5)):
        with torch.no_grad():
            wanted = model(**batch).logits
        found = torch.from_numpy(run_in_openvino(openvino, out, batch)["logits"])
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-5)


def test_factored_convolutions(tmp_path):
    torch.manual_seed(0)
    config = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24, image_size=16, patch_size=4
    )
    model = tf.ViTModel(config).eval()
    factor_patches(model, "pivoted")
    out = export_onnx(save(model, tmp_path / "in"), tmp_path / "out")
    pixels = {"pixel_values": torch.randn(5, 3, 16, 16)}
    with torch.no_grad():
        wanted = model(**pixels)
    found = run(out, pixels)
    assert set(found) == {"last_hidden_state", "pooler_output"}
    torch.testing.assert_close(torch.from_numpy(found["pooler_output"]), wanted.pooler_output, rtol=1e-4, atol=1e-5)


def factor_patches(model, kind):
    name = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d))
    module = model.get_submodule(name)
    W = module.weight.flatten(1)
    site = tiny.Site(name=name, kind="conv", out_features=W.shape[0], in_features=W.shape[1])
    form = tiny.truncate(W, 6, kind, module.bias)
    model.set_submodule(name, tiny.layer_from_forms(site, module, [form]))


def test_integer_weights_are_written_as_floats(tmp_path):
    model = tiny.build("llama-tied")
    tiny.factor_linear(model, "model.layers.0.mlp.down_proj", 8, "lowrank")
    for name in ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj.a", "model.embed_tokens"):
        quantise_layer(model, name, bits=4, group=8)
    batch = text(2, 5)
    with torch.no_grad():
        wanted = model(**batch).logits
    out = export_onnx(save(model, tmp_path / "in"), tmp_path / "out")
    torch.testing.assert_close(torch.from_numpy(run(out, batch)["logits"]), wanted, rtol=1e-4, atol=1e-5)
    export_module._use_floats(model)
    assert set(describe(model)) == {"model.layers.0.mlp.down_proj"}
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A plain BERT in bfloat16 as sentence-transformers keeps it, with a tokenizer that makes token types."""
    folder = tmp_path_factory.mktemp("models") / "sentences"
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, pad_token_id=0
    )
    tf.BertModel(config, add_pooling_layer=False).to(torch.bfloat16).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    (folder / "modules.json").write_text(
        json.dumps([{"path": "", "type": "models.Transformer"}, {"path": "1_Pooling", "type": "models.Pooling"}])
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    return folder


@pytest.fixture(scope="module")
def translated(sentences):
    """What torch's exporter makes of that model, for tests of what comes afterwards: it takes seconds."""
    made = []
    translate = export_module._translate

    def once(loaded, graph, batch, opset):
        assert (loaded.path, opset) == (sentences, None)
        made.extend([] if made else [translate(loaded, graph, batch, opset)])
        return made[0]

    return once


@pytest.fixture(scope="module")
def exported(sentences, translated, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "_translate", translated)
        return export_onnx(sentences, tmp_path_factory.mktemp("exports") / "float")


def test_sentence_models_pool_in_the_graph(sentences, exported):
    loaded = load_model(sentences, dtype="float32")
    batch = dict(loaded.tokenizer(["a b c", "b"], padding=True, return_tensors="pt"))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    found = run(exported, batch)
    assert set(found) == {"last_hidden_state", "sentence_embedding"}
    np.testing.assert_allclose(found["sentence_embedding"], embed(loaded, batch).numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found["sentence_embedding"], axis=1), 1, rtol=1e-5)


def test_the_folder_says_what_it_is(sentences, exported):
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert {"model.onnx", "onnx.json", "config.json", "tokenizer.json", "1_Pooling/config.json", "README.md"} <= names
    assert not any(name.endswith((".safetensors", ".data")) for name in names)
    said = note(exported)
    assert said["inputs"]["input_ids"] == {"type": "tensor(int64)", "shape": ["batch", "length"]}
    assert said["outputs"]["last_hidden_state"]["shape"] == ["batch", "length", 32]
    assert (said["task"], said["pooling"], said["quantised"]) == ("embedding", "cls", None)
    assert {tuple(check["shape"]) for check in said["checks"]} == {(2, 12), (3, 19), (1, 5)}
    assert 0 < said["relative_difference"] <= said["tolerance"] == 1e-4
    assert said["largest_difference"] == max(check["difference"] for check in said["checks"])


def test_opset_is_what_was_asked_for(sentences, exported, tmp_path):
    other = 18 if note(exported)["opset"] != 18 else 20
    out = export_onnx(sentences, tmp_path / "out", opset=other)
    graph = onnx.load(out / "model.onnx")
    assert next(entry.version for entry in graph.opset_import if entry.domain == "") == other == note(out)["opset"]


@pytest.mark.parametrize("limit", [export_module.LARGEST_FILE, 0])
def test_int8_has_a_scale_per_channel(sentences, exported, translated, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(export_module, "_translate", translated)
    monkeypatch.setattr(export_module, "LARGEST_FILE", limit)
    out = export_onnx(sentences, tmp_path / "out", quantise="int8")
    said = note(out)
    assert said["quantised"] == "int8"
    assert 1e-4 < said["relative_difference"] < 0.1
    graph = onnx.load(out / "model.onnx").graph
    kept = {w.name: w for w in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == 6
    for node in products:
        weight, zeros = (onnx.numpy_helper.to_array(kept[node.input[i]]) for i in (1, 3))
        assert weight.dtype == zeros.dtype == np.int8
        assert zeros.shape == weight.shape[1:]
        assert 32 < np.abs(weight.astype(int)).max() <= 64  # 7 bits: no product saturates, on any CPU
    size = sum(path.stat().st_size for path in out.glob("model.onnx*"))
    assert size < (exported / "model.onnx").stat().st_size
    assert {path.name for path in out.iterdir()} - {"model.onnx.data"} == {path.name for path in exported.iterdir()}


def test_large_weights_lie_beside_the_graph(sentences, exported, translated, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_translate", translated)
    monkeypatch.setattr(export_module, "LARGEST_FILE", 0)
    out = export_onnx(sentences, tmp_path / "out")
    assert (out / "model.onnx.data").stat().st_size > 30_000
    batch = {name: torch.ones(2, 3, dtype=torch.long) for name in note(out)["inputs"]}
    here, there = run(out, batch), run(exported, batch)
    np.testing.assert_array_equal(here["sentence_embedding"], there["sentence_embedding"])


def test_above_the_tolerance_nothing_is_left(sentences, translated, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_translate", translated)
    for quantise, tolerance in ((None, 1e-12), ("int8", 1e-3)):
        with pytest.raises(EckartError, match=f"differs from torch by .* allowed is {tolerance:.0e}"):
            export_onnx(sentences, tmp_path / "out", tolerance=tolerance, quantise=quantise)
        assert list(tmp_path.iterdir()) == []


def test_a_wrong_graph_is_refused(sentences, tmp_path, monkeypatch):
    """The model changes behind the exporter's back, as a faulty translation would."""
    translate = export_module._translate

    def faulty(loaded, graph, batch, opset):
        with torch.no_grad():
            loaded.model.encoder.layer[0].output.dense.weight.mul_(2)
        return translate(loaded, graph, batch, opset)

    monkeypatch.setattr(export_module, "_translate", faulty)
    with pytest.raises(EckartError, match="allowed is 1e-04"):
        export_onnx(sentences, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_of_fixed_size_is_refused(sentences, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_dimensions", lambda loaded, name: {})
    with pytest.raises(EckartError, match="does not run the graph"):
        export_onnx(sentences, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_bad_options_are_reported_at_once(sentences, tmp_path):
    with pytest.raises(InputError) as error:
        export_onnx(sentences, tmp_path / "out", opset=11, quantise="int4", tolerance=0)
    for words in ("opset goes from 18", "unknown quantisation 'int4'", "above 0; got 0"):
        assert words in str(error.value)


def test_a_missing_extra_names_the_pip_line(sentences, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"needs onnxruntime: pip install 'eckart\[onnx\]'"):
        export_onnx(sentences, tmp_path / "out")


def test_what_has_no_graph_says_why(sentences, tmp_path):
    tiny.build("t5").save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="two graphs"):
        export_onnx(tmp_path / "t5", tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="is a file"):
        export_onnx(tmp_path / "file", tmp_path / "out")
    with pytest.raises(FileError, match="is a file"):
        export_onnx(sentences, tmp_path / "file")
    with pytest.raises(FileError, match="not empty"):
        export_onnx(sentences, tmp_path / "t5")
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    (tmp_path / "t5" / "code.py").write_text("")
    (tmp_path / "t5" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(InputError, match="code of its own"):
        export_onnx(tmp_path / "t5", tmp_path / "out")
    assert not (tmp_path / "out").exists()
