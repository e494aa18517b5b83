"""Models with quantised layers, of Eckart's and of torchao's, through save_pretrained and from_pretrained."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess

import pytest
import torch
import transformers as tf
from factored_tiny_models import MODELS, build, factor, factor_embedding, inputs, output
from torch import nn

import eckart  # noqa: F401
from eckart.arch import model_size
from eckart.checkpoint import Manifest, inspect_folder
from eckart.errors import EckartError, FileError, InputError
from eckart.hf import torchao as room
from eckart.hf.quantizer import EckartConfig, densify
from eckart.hf.registry import prepare_for_saving
from eckart.hf.remote_code import export_dense, export_remote_code
from eckart.hf.torchao import quantise_torchao
from eckart.layers import QuantisedEmbedding, QuantisedLinear, describe, is_factored, quantise_layer
from eckart.linalg import round_groups
from fresh_python import TRANSFORMERS, run

NAMES = pytest.mark.parametrize("name", list(MODELS))
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
TABLES = {
    "llama": "model.embed_tokens",
    "llama-tied": "model.embed_tokens",
    "gpt2": "transformer.wte",
    "bert": "bert.embeddings.word_embeddings",
    "t5": "shared",
}


def built(name: str, dtype: torch.dtype) -> nn.Module:
    """A tiny model as from_pretrained builds it: buffers, such as rotary frequencies, stay in float32."""
    model = build(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def quantised(name: str, dtype: torch.dtype = torch.float32, table: bool = False) -> nn.Module:
    """A model with factored layers, quantised ones, ones with a repair, and factored ones with quantised factors."""
    model = built(name, dtype)
    factor(model)
    if table:
        quantise_layer(model, TABLES[name], bits=4, group=8)
    blocks = [(n, m) for n, m in model.named_modules() if any(p.isdigit() for p in n.split("."))]
    dense = [n for n, m in blocks if type(m) is nn.Linear or type(m).__name__ == "Conv1D"]
    whole = [n for n in dense if n.rpartition(".")[2] not in ("a", "b")]
    factors = [n for n in dense if n not in whole]
    for count, child in enumerate(factors[: 2 * len(factors) // 3]):
        quantise_layer(model, child, bits=(4, 8)[count % 2], group=(None, 3)[count // 2 % 2])
    for count, child in enumerate(whole):
        if count % 2:
            layer = model.get_submodule(child)
            weight = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
            rounded = round_groups(weight, bits=4, group=5)
            U, S, Vh = torch.linalg.svd((weight - rounded.dense()).float().detach(), full_matrices=False)
            model.set_submodule(child, QuantisedLinear.from_linear(layer, rounded, (Vh[:2], U[:, :2] * S[:2])))
        else:
            quantise_layer(model, child, bits=(2, 4, 8)[count % 3], group=6)
    assert factors or name == "mixtral"
    assert sum(entry["kind"] == "quantised" for entry in describe(model).values()) > 3
    prepare_for_saving(model)
    return model.eval()


def load(model, path, **kwargs):
    """Load in the class of ``model``, and insist that nothing was missing, unexpected or reshaped."""
    loaded, info = type(model).from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return loaded


@NAMES
def test_save_load_save_load_changes_nothing(name, tmp_path):
    model = quantised(name)
    model.save_pretrained(tmp_path / "one")
    state = inspect_folder(tmp_path / "one")
    assert state.whole, state.problems
    once = load(model, tmp_path / "one")
    assert torch.equal(output(once), output(model))
    assert describe(once) == describe(model)
    assert model_size(once) == model_size(model)
    once.save_pretrained(tmp_path / "two")
    twice = load(model, tmp_path / "two", device_map="cpu")
    assert torch.equal(output(twice), output(model))
    read = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "two")]
    assert read[0] == read[1]
    assert read[0]["quantization_config"]["requires"] == ["quantised"]
    assert torch.equal(output(copy.deepcopy(twice)), output(model))


@NAMES
def test_shards_and_bfloat16(name, tmp_path):
    model = quantised(name, torch.bfloat16)
    if name == "vit":
        model.vit.embeddings.to(torch.float32)  # its inputs are float32
        model = model.float()
        prepare_for_saving(model)
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert inspect_folder(tmp_path).whole
    loaded = load(model, tmp_path, dtype="auto")
    if name == "t5":  # transformers keeps its wo in float32
        loaded = loaded.to(torch.bfloat16)
    assert torch.equal(output(loaded), output(model))
    if name != "vit":
        scales = {t.dtype for key, t in loaded.state_dict().items() if key.endswith("scale")}
        assert scales == {torch.bfloat16}


@pytest.mark.parametrize("name", list(TABLES))
def test_quantised_tables_stay_tied(name, tmp_path):
    model = quantised(name, table=True)
    model.save_pretrained(tmp_path)
    assert inspect_folder(tmp_path).whole
    loaded = load(model, tmp_path)
    assert torch.equal(output(loaded), output(model))
    table = loaded.get_submodule(TABLES[name])
    assert isinstance(table, QuantisedEmbedding)
    tied = [m for m in loaded.modules() if getattr(m, "table_name", None) == TABLES[name]]
    assert len(tied) == {"llama": 0, "t5": 3}.get(name, 1)
    assert all(m.table is table for m in tied)
    expected = output(loaded)
    loaded.dequantize()
    assert not any(is_factored(m) for m in loaded.modules())
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in build(name).named_parameters()]
    torch.testing.assert_close(output(loaded), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lowrank", "pivoted"])
def test_quantised_factors_of_a_tied_table(kind, tmp_path):
    model = build("llama-tied")
    factor_embedding(model, TABLES["llama-tied"], 6, kind, ("lm_head",))
    before = model_size(model)
    for child in "ab":
        quantise_layer(model, f"{TABLES['llama-tied']}.{child}", bits=8)
    after = model_size(model)
    assert (after.parameters, after.macs) == (before.parameters, before.macs)
    assert after.bytes < before.bytes / 2 + sum(p.nbytes for n, p in model.named_parameters() if "layers" in n)
    prepare_for_saving(model)
    model.save_pretrained(tmp_path)
    assert inspect_folder(tmp_path).whole
    loaded = load(model, tmp_path)
    assert torch.equal(output(loaded), output(model))
    loaded.dequantize()
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-4, atol=1e-5)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@NAMES
def test_dequantize_and_dense_export(name, tmp_path):
    model = quantised(name)
    model.save_pretrained(tmp_path / "m")
    Manifest(base="toy", fingerprint="f", modules=describe(model)).write(tmp_path / "m")
    loaded = load(model, tmp_path / "m")
    loaded.dequantize()
    assert not any(is_factored(m) for m in loaded.modules())
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in build(name).named_parameters()]
    assert all(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-4, atol=1e-5)
    export_dense(tmp_path / "m", tmp_path / "dense")
    dense = load(model, tmp_path / "dense")
    assert torch.equal(output(dense), output(loaded))
    with pytest.raises(InputError, match="of kind 'quantised'"):
        export_remote_code(tmp_path / "m", tmp_path / "remote")


def foreign(path, cls: str, before: str = "sys.modules['eckart'] = None") -> subprocess.CompletedProcess[str]:
    code = f"import sys; {before}\nimport transformers as tf\ntf.{cls}.from_pretrained({str(path)!r})\nprint('LOADED')"
    return run(code, loaded=TRANSFORMERS)


def test_without_eckart_loading_fails(tmp_path):
    model = build("gpt2")
    quantise_layer(model, "transformer.h.1.mlp.c_fc", bits=8)
    prepare_for_saving(model)
    model.save_pretrained(tmp_path)
    done = foreign(tmp_path, "AutoModelForCausalLM")
    assert "LOADED" not in done.stdout
    assert "mismatch" in done.stderr.lower()


def test_earlier_versions_are_told_what_they_lack(monkeypatch):
    config = quantised("llama").config.quantization_config.to_dict()
    monkeypatch.setattr("eckart.hf.quantizer.FEATURES", frozenset())
    with pytest.raises(FileError, match="requires quantised"):
        EckartConfig.from_dict(config)


def test_a_head_checkpoint_in_the_bare_model_and_back(tmp_path):
    model = quantised("llama")
    model.save_pretrained(tmp_path / "head")
    bare = tf.AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(output(bare), model.model(**inputs(model)).last_hidden_state)
    bare.save_pretrained(tmp_path / "bare")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    assert torch.equal(again.model(**inputs(model)).last_hidden_state, output(bare))


def test_a_folder_that_lost_its_integers(tmp_path):
    from safetensors.torch import load_file, save_file

    model = quantised("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n, entry in describe(model).items() if entry["kind"] == "quantised")
    del tensors[f"{name}.codes"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (problem,) = inspect_folder(tmp_path).problems
    assert f"{name}.codes" in problem


def test_an_adapter_on_other_layers_trains_through_quantised_ones():
    peft = pytest.importorskip("peft")
    model = build("llama")
    for n, module in list(model.named_modules()):
        if type(module) is nn.Linear and "mlp" in n:
            quantise_layer(model, n, bits=4, group=8)
    before = output(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    ids = inputs(model)["input_ids"]
    adapted(input_ids=ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if "lora" in n}
    assert len(grads) == 6
    assert all(g is not None and g.abs().sum() > 0 for g in grads.values())
    assert not torch.equal(output(adapted), before)


@needs_torchao
@pytest.mark.parametrize("config", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gpt2", "bert", "t5"])
def test_torchao_on_factored_layers(name, dtype, config, tmp_path):
    model = built(name, dtype)
    factor(model)
    dense = model_size(model)
    names = quantise_torchao(model, config)
    assert any(n.endswith(".b") for n in names)
    assert "lm_head" not in names
    small = model_size(model)
    assert (small.parameters, small.macs) == (dense.parameters, dense.macs)
    assert small.bytes < dense.bytes
    model.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    state = inspect_folder(tmp_path / "one")
    assert state.whole, state.problems
    loaded = load(model, tmp_path / "one", dtype="auto")
    assert model_size(loaded) == small
    if name == "t5":
        loaded = loaded.to(dtype)
    assert torch.equal(output(loaded), output(model))
    loaded.save_pretrained(tmp_path / "two")
    again = load(model, tmp_path / "two", dtype="auto", device_map="cpu")
    if name == "t5":
        again = again.to(dtype)
    assert torch.equal(output(again), output(model))
    read = json.loads((tmp_path / "two" / "config.json").read_text())["quantization_config"]
    assert read["requires"] == ["torchao"]
    assert loaded.is_quantized
    assert loaded.hf_quantizer.is_trainable == loaded.hf_quantizer.inner.is_trainable


@needs_torchao
def test_torchao_beside_quantised_layers_of_eckarts_and_back_to_dense(tmp_path):
    model = quantised("llama")
    quantise_torchao(model, "int8")
    model.save_pretrained(tmp_path / "m")
    Manifest(base="toy", fingerprint="f", modules=describe(model)).write(tmp_path / "m")
    loaded = load(model, tmp_path / "m")
    assert loaded.config.quantization_config.requires == ["quantised", "torchao"]
    assert torch.equal(output(loaded), output(model))
    done = foreign(tmp_path / "m", "LlamaForCausalLM")
    assert "LOADED" not in done.stdout
    assert "mismatch" in done.stderr.lower()
    export_dense(tmp_path / "m", tmp_path / "dense")
    dense = load(model, tmp_path / "dense")
    torch.testing.assert_close(output(dense), output(model), rtol=1e-3, atol=1e-4)
    assert densify(loaded) > 0
    assert prepare_for_saving(loaded) == {}
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in build("llama").named_parameters()]


@needs_torchao
def test_torchao_in_the_bare_model_and_back_and_under_an_adapter(tmp_path):
    model = build("llama")
    factor(model)
    quantise_torchao(model, "int8")
    model.save_pretrained(tmp_path / "head")
    with pytest.raises(InputError, match="torchao has quantised"):
        export_remote_code(tmp_path / "head", tmp_path / "remote")
    bare = tf.AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(output(bare), model.model(**inputs(model)).last_hidden_state)
    bare.save_pretrained(tmp_path / "bare")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    assert torch.equal(again.model(**inputs(model)).last_hidden_state, output(bare))
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj.a", "q_proj.b"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(load(model, tmp_path / "head"), config)
    ids = inputs(model)["input_ids"]
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora" in n)
    expected = output(adapted)
    torch.testing.assert_close(output(adapted.merge_and_unload()), expected, rtol=0, atol=0.01)


@needs_torchao
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_torchao_leaves_factored_tables_alone(name, tmp_path):
    model = build(name)
    factor_embedding(model, TABLES[name], 6, "lowrank", ("lm_head",) if name == "llama-tied" else ())
    factor(model)
    names = quantise_torchao(model, "int8")
    assert names
    assert not any(n.startswith(TABLES[name]) for n in names)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(load(model, tmp_path)), output(model))


@needs_torchao
def test_layers_that_torchao_quantised_before(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = build("llama")
    factor(model)
    quantize_(model.model, Int8WeightOnlyConfig(), lambda m, _: isinstance(m, nn.Linear) and m.in_features > 1)
    prepare_for_saving(model)
    with pytest.raises(InputError, match="quantise_torchao"):
        model.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="already"):
        quantise_layer(model, "model.layers.0.mlp.down_proj.a", bits=4)
    expected = output(model)
    names = quantise_torchao(model, Int8WeightOnlyConfig())
    assert len(names) > 10
    assert torch.equal(output(model), expected)
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(output(load(model, tmp_path / "m")), expected)


@needs_torchao
def test_what_torchao_cannot_do_is_refused(monkeypatch):
    model = build("llama")
    with pytest.raises(InputError, match="TorchAoConfig"):
        quantise_torchao(model)
    factor(model)
    with pytest.raises(InputError, match="int8-dynamic"):
        quantise_torchao(model, "int3")
    quantise_torchao(model)
    written = model.config.quantization_config.to_dict()
    assert json.loads(json.dumps(written))["inner"]["quant_method"] == "torchao"
    with pytest.raises(FileError, match="'awq'"):
        EckartConfig(inner={"quant_method": "awq"})
    monkeypatch.setattr("eckart.hf.quantizer.is_torchao_available", lambda: False)
    monkeypatch.setattr(room, "is_torchao_available", lambda: False)
    with pytest.raises(FileError, match="pip install torchao"):
        EckartConfig.from_dict(written)
    with pytest.raises(EckartError, match="pip install torchao"):
        quantise_torchao(model)
