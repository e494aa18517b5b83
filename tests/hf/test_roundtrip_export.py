"""Exported folders: dense in plain transformers, remote code where Eckart does not exist."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from factored_tiny_models import build, factor, factor_embedding, factor_linear, inputs, output
from safetensors.torch import save_file

import eckart  # noqa: F401
from eckart.checkpoint import Manifest, inspect_folder
from eckart.errors import FileError, InputError
from eckart.hf.registry import prepare_for_saving
from eckart.hf.remote_code import export_dense, export_remote_code
from eckart.layers import describe, is_factored
from fresh_python import TRANSFORMERS, run


def save(model, path):
    prepare_for_saving(model)
    model.save_pretrained(path, max_shard_size="20KB")
    (path / "tokenizer.json").write_text("{}")
    Manifest(base="toy", fingerprint="f", modules=describe(model)).write(path)
    assert inspect_folder(path).whole, inspect_folder(path).problems
    return output(model)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert", "t5", "vit", "mixtral", "qwen3"])
def test_dense_export_is_a_plain_folder(name, tmp_path):
    model = build(name)
    factor(model)
    expected = save(model, tmp_path / "in")
    export_dense(tmp_path / "in", tmp_path / "out")
    state = inspect_folder(tmp_path / "out")
    assert state.whole, state.problems
    assert state.loads == "plain transformers"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert "as large" in (tmp_path / "out" / "README.md").read_text()
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not any(is_factored(m) for m in loaded.modules())
    torch.testing.assert_close(output(loaded), expected, rtol=1e-4, atol=1e-5)


def test_dense_export_keeps_an_untied_copy_untied(tmp_path):
    model = build("llama-tied")
    factor_linear(model, "lm_head", 5, "lowrank")
    expected = save(model, tmp_path / "in")
    export_dense(tmp_path / "in", tmp_path / "out")
    loaded = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(output(loaded), expected, rtol=1e-4, atol=1e-5)


def test_dense_export_ties_a_factored_table_again(tmp_path):
    model = build("llama-tied")
    factor_embedding(model, "model.embed_tokens", 6, "lowrank", ("lm_head",))
    expected = save(model, tmp_path / "in")
    export_dense(tmp_path / "in", tmp_path / "out")
    assert inspect_folder(tmp_path / "out").parameters == sum(p.numel() for p in build("llama-tied").parameters())
    loaded = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(output(loaded), expected, rtol=1e-4, atol=1e-5)


LOAD = """
import sys; sys.modules["eckart"] = None
import torch, transformers as tf
from safetensors.torch import load_file
folder, cls, key, again = sys.argv[1:5]
model, info = getattr(tf, cls).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
inputs = load_file(folder + "/../inputs.st")
want = load_file(folder + "/../want.st")["out"]
def logits(m):
    with torch.no_grad():
        return getattr(m(**inputs), key)
assert (logits(model) - want).abs().max() < 1e-6, (logits(model) - want).abs().max()
model.save_pretrained(again)
twice = getattr(tf, cls).from_pretrained(again, trust_remote_code=True)
assert (logits(twice) - logits(model)).abs().max() < 1e-6
print("EQUAL")
"""


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("llama", "AutoModelForCausalLM"),
        ("llama-tied", "AutoModelForCausalLM"),
        ("gpt2", "AutoModelForCausalLM"),
        ("bert", "AutoModelForMaskedLM"),
        ("t5", "AutoModelForSeq2SeqLM"),
        ("vit", "AutoModelForImageClassification"),
    ],
)
def test_remote_code_loads_without_eckart(name, cls, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    model = build(name)
    factor(model)
    if name == "llama-tied":
        factor_linear(model, "lm_head", 5, "pivoted")
    if name == "llama":
        factor_embedding(model, "model.embed_tokens", 6, "pivoted")
    save_file({"out": save(model, tmp_path / "in")}, tmp_path / "want.st")
    save_file({k: v.contiguous() for k, v in inputs(model).items()}, tmp_path / "inputs.st")
    export_remote_code(tmp_path / "in", tmp_path / "out")
    state = inspect_folder(tmp_path / "out")
    assert state.whole, state.problems
    assert state.kind == "remote-code"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "eckart." not in (tmp_path / "out" / "modeling_factored.py").read_text()
    done = run(LOAD, tmp_path / "out", cls, "logits", tmp_path / "again")
    assert "EQUAL" in done.stdout, done.stderr


def test_remote_code_without_trust_fails(tmp_path):
    model = build("llama")
    factor(model)
    save(model, tmp_path / "in")
    export_remote_code(tmp_path / "in", tmp_path / "out")
    for cls in ("AutoModelForCausalLM", "LlamaForCausalLM"):
        done = run(
            "import sys, transformers as tf; sys.modules['eckart'] = None;"
            f"tf.{cls}.from_pretrained(sys.argv[1], trust_remote_code=False); print('LOADED')",
            tmp_path / "out",
            loaded=TRANSFORMERS,
        )
        assert done.returncode != 0
        assert "LOADED" not in done.stdout


def test_what_cannot_be_exported_says_why(tmp_path):
    model = build("mixtral")
    factor(model)
    save(model, tmp_path / "moe")
    with pytest.raises(InputError, match="experts"):
        export_remote_code(tmp_path / "moe", tmp_path / "out")
    plain = build("llama")
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="loads in transformers as it is"):
        export_dense(tmp_path / "plain", tmp_path / "out")
    (tmp_path / "moe" / "tokenizer.json").unlink()
    with pytest.raises(FileError, match="not whole"):
        export_dense(tmp_path / "moe", tmp_path / "out")
    assert not (tmp_path / "out").exists()
