"""The layers that training-time methods leave, through save_pretrained and from_pretrained, over their table."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as tf
from factored_tiny_models import TEXT, build, inputs, output
from torch import nn

import eckart  # noqa: F401
from eckart.arch import find_sites, skipped_sites
from eckart.checkpoint import Manifest, inspect_folder
from eckart.errors import FileError, InputError
from eckart.hf.onnx import export_onnx
from eckart.hf.quantizer import EckartConfig, densify
from eckart.hf.registry import prepare_for_saving
from eckart.hf.remote_code import export_dense, export_remote_code
from eckart.layers import FACTORED, GroupSparseInt4, LR2VQConv2d, LR2VQLinear, SNNKLinear, describe
from eckart.training import TRAINING, bundle, group_sparsify, quantise_vectors
from fresh_python import TRANSFORMERS, run

PLAIN = {
    "trp": "its layers are those of a low-rank model, which other tests save",
    "maestro": "its layers are those of a low-rank model, which other tests save",
    "stable-rps": "one array stands for the weights of a whole model, which is a wrapper around it",
    **dict.fromkeys(
        ("sst", "orthogonal-convolution", "saf", "sso", "gradient-norm"),
        "leaves the layers of the model as they were",
    ),
}
"""Methods that leave no layer of their own."""


def sparse(model: nn.Module) -> None:
    group_sparsify(model, None, group=8, sparsity=0.4, per_row=False)


def coded(model: nn.Module) -> None:
    quantise_vectors(model, subvector=4, codes=12, dimension=2)


def kernels(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, block in list(model.named_modules()):
        if name.endswith(("mlp", "intermediate")):
            like = next(block.parameters())
            x = torch.randn(200, 16, generator=generator).to(like.dtype)
            model.set_submodule(name, bundle(block, x, features=30, kind="gelu"))


FORMS = {"gqsa": (sparse, GroupSparseInt4), "lr2vq": (coded, LR2VQLinear), "snnk": (kernels, SNNKLinear)}
CASES = [(method, name) for method in FORMS for name in ("llama", "gpt2", "bert", "llama-tied")]


def test_every_method_is_saved_or_says_why_not() -> None:
    assert {*FORMS, *PLAIN} == set(TRAINING)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[2, 2], layer_type="basic", num_labels=3)
    return tf.ResNetForImageClassification(config).eval()


def made(method: str, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = build(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    FORMS[method][0](model)
    return model.eval()


def load(model: nn.Module, path, **kwargs):
    loaded, info = type(model).from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return loaded.eval()


@pytest.mark.parametrize(("method", "name"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_loaded_model_computes_the_very_same(method, name, dtype, tmp_path) -> None:
    model = made(method, name, dtype)
    before = output(model)
    entries = prepare_for_saving(model)
    layers = [layer for layer in model.modules() if isinstance(layer, FORMS[method][1])]
    assert len(layers) == len(entries) > 2
    model.save_pretrained(tmp_path / "a")
    loaded = load(model, tmp_path / "a", dtype=dtype)
    assert describe(loaded) == entries
    assert torch.equal(output(loaded), before)
    kinds = {type(layer) for layer in loaded.modules() if isinstance(layer, FACTORED)}
    assert kinds == {FORMS[method][1]}
    loaded.save_pretrained(tmp_path / "b")
    again = load(model, tmp_path / "b", dtype=dtype)
    assert torch.equal(output(again), before)
    state = inspect_folder(tmp_path / "b")
    assert state.whole, state.problems


def test_convolutions(tmp_path) -> None:
    model = resnet()
    quantise_vectors(model, subvector=4, codes=10)
    assert any(isinstance(layer, LR2VQConv2d) for layer in model.modules())
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(pixel_values=x).logits
    prepare_for_saving(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load(model, tmp_path)(pixel_values=x).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("method", FORMS)
def test_what_learns_goes_on_learning(method, tmp_path) -> None:
    model = made(method, "llama")
    prepare_for_saving(model)
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path).train()
    batch = inputs(loaded)
    loaded(**batch, labels=batch["input_ids"]).loss.backward()
    layer = next(layer for layer in loaded.modules() if isinstance(layer, FORMS[method][1]))
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in layer.parameters())


@pytest.mark.parametrize("method", ["gqsa", "lr2vq"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_dense_form_is_of_the_class_that_was_there(method, name, tmp_path) -> None:
    model = made(method, name)
    before = output(model)
    classes = [type(module) for module in build(name).modules()]
    dense = copy.deepcopy(model)
    assert densify(dense) > 0
    assert [type(module) for module in dense.modules()] == classes
    torch.testing.assert_close(output(dense), before, rtol=1e-5, atol=1e-6)
    site = next(name for name, layer in model.named_modules() if isinstance(layer, FORMS[method][1]))
    assert model.get_submodule(site).weight.shape == dense.get_submodule(site).weight.shape


@pytest.mark.parametrize("method", FORMS)
def test_without_eckart_nothing_is_made_up(method, tmp_path) -> None:
    model = made(method, "llama")
    prepare_for_saving(model)
    model.save_pretrained(tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    ran = run(code, loaded=TRANSFORMERS)
    assert ran.returncode != 0
    assert "size mismatch" in ran.stderr or "mismatch" in ran.stderr
    ran = run(f"import eckart; {code}")
    assert ran.returncode == 0, ran.stderr


def test_older_versions_are_told(tmp_path) -> None:
    model = made("gqsa", "llama")
    prepare_for_saving(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["requires"] == ["coded"]
    with pytest.raises(FileError, match="requires woven"):
        EckartConfig(**{**written, "requires": ["woven"]})
    assert skipped_sites(model)
    with pytest.raises(InputError):
        find_sites(model, include=["mlp.up_proj"])


def test_exports(tmp_path) -> None:
    for method in ("lr2vq", "snnk"):
        model = made(method, "llama")
        prepare_for_saving(model)
        model.save_pretrained(tmp_path / method)
    with pytest.raises(InputError):
        export_remote_code(tmp_path / "lr2vq", tmp_path / "out")
    export_dense(tmp_path / "lr2vq", tmp_path / "dense")
    dense = load(model, tmp_path / "dense")
    torch.testing.assert_close(output(dense), output(load(model, tmp_path / "lr2vq")), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="no dense form"):
        export_dense(tmp_path / "snnk", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", FORMS)
def test_in_onnxruntime(method, tmp_path, monkeypatch) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setitem(TEXT, "num_hidden_layers", 1)  # the exporter takes ten seconds a block
    model = made(method, "llama")
    prepare_for_saving(model)
    model.save_pretrained(tmp_path / "in")
    Manifest(base="toy", fingerprint="f", modules=describe(model)).write(tmp_path / "in")
    export_onnx(tmp_path / "in", tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = inputs(model)["input_ids"]
    feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    found = torch.from_numpy(session.run(["logits"], feed)[0])
    torch.testing.assert_close(found, output(model), rtol=1e-4, atol=1e-5)


def test_a_block_on_features_has_to_know_what_it_replaces() -> None:
    model = made("snnk", "llama")
    layer = next(layer for layer in model.modules() if isinstance(layer, SNNKLinear))
    replaced = layer.replaces
    assert "down_proj.weight" in replaced
    layer.replaces = ()
    with pytest.raises(InputError, match=r"layer\.replaces"):
        prepare_for_saving(model)
    layer.replaces = replaced
    assert prepare_for_saving(model)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"kind": "group-sparse", "kept": 10**6, "group": 8, "bias": False}, "kept is in"),
        ({"kind": "vector-coded", "subvector": 5, "dimension": 2, "codes": 3, "bias": False}, "subvector divides"),
        ({"kind": "group-sparse", "group": 8, "bias": False}, "kept"),
    ],
)
def test_a_damaged_config(entry, words, tmp_path) -> None:
    model = made("gqsa", "llama")
    prepare_for_saving(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"] = entry
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match=words):
        type(model).from_pretrained(tmp_path)
