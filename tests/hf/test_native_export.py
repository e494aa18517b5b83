"""Evenly narrower models as plain checkpoints: the config is found, the rest is refused with every reason."""

from __future__ import annotations

import json
import re

import factored_tiny_models as tiny
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import nn

from eckart.checkpoint import Manifest, inspect_folder
from eckart.errors import EckartError, InputError
from eckart.hf import native
from eckart.hf.registry import prepare_for_saving
from eckart.layers import describe, narrow_layer
from fresh_python import TRANSFORMERS, run

TEXT = tiny.TEXT
MODELS = {
    **tiny.MODELS,
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**TEXT, intermediate_size=24, num_key_value_heads=2)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**TEXT, intermediate_size=24, num_key_value_heads=2)),
    "gemma": lambda: tf.GemmaForCausalLM(
        tf.GemmaConfig(**TEXT, intermediate_size=24, num_key_value_heads=2, head_dim=4)
    ),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**TEXT, intermediate_size=24, head_dim=4)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**TEXT, intermediate_size=24, head_dim=4)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**TEXT, intermediate_size=24)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**TEXT, intermediate_size=24, pad_token_id=0)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**TEXT, ffn_dim=24, word_embed_proj_dim=16)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT, intermediate_size=24)),
    "gpt_neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            vocab_size=61,
            hidden_size=16,
            num_layers=2,
            attention_types=[[["global", "local"], 1]],
            num_heads=4,
            intermediate_size=24,
        )
    ),
    "gptj": lambda: tf.GPTJForCausalLM(
        tf.GPTJConfig(vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_inner=24, rotary_dim=4)
    ),
    "roberta": lambda: tf.RobertaModel(tf.RobertaConfig(**TEXT, intermediate_size=24)),
    "xlm-roberta": lambda: tf.XLMRobertaModel(tf.XLMRobertaConfig(**TEXT, intermediate_size=24)),
    "electra": lambda: tf.ElectraModel(tf.ElectraConfig(**TEXT, embedding_size=16, intermediate_size=24)),
    "mpnet": lambda: tf.MPNetModel(tf.MPNetConfig(**TEXT, intermediate_size=24)),
    "deberta-v2": lambda: tf.DebertaV2Model(tf.DebertaV2Config(**TEXT, intermediate_size=24)),
    "distilbert": lambda: tf.DistilBertModel(
        tf.DistilBertConfig(vocab_size=61, dim=16, n_heads=4, n_layers=2, hidden_dim=24)
    ),
    "deit": lambda: tf.DeiTModel(
        tf.DeiTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            image_size=16,
            patch_size=4,
        )
    ),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=61,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
        )
    ),
}
# Families by the names of the two sides of their MLPs.
INPUTS = r"gate_proj|(?<!gate_)up_proj|mlp\.fc1|layers\.\d+\.fc1|c_fc|fc_in|dense_h_to_4h|intermediate\.dense|lin1|\.wi"
OUTPUTS = r"down_proj|mlp\.fc2|layers\.\d+\.fc2|mlp\.c_proj|fc_out|dense_4h_to_h|\d\.output\.dense|lin2|\.wo"


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def cut(model, name, rows=None, columns=None):
    """Keep some output and input features of an nn.Linear or Conv1D."""
    layer = model.get_submodule(name)
    conv1d = type(layer).__name__ == "Conv1D"
    W = layer.weight.detach().T if conv1d else layer.weight.detach()
    bias = layer.bias
    rows = range(W.shape[0]) if rows is None else rows
    columns = range(W.shape[1]) if columns is None else columns
    W = W[list(rows)][:, list(columns)].contiguous()
    new = type(layer)(W.shape[0], W.shape[1]) if conv1d else nn.Linear(W.shape[1], W.shape[0], bias=bias is not None)
    new.weight = nn.Parameter((W.T if conv1d else W).contiguous())
    if bias is not None:
        new.bias = nn.Parameter(bias.detach()[list(rows)])
    model.set_submodule(name, new.eval())


def narrow_mlps(model, width, only=lambda name: True):
    for name, _ in list(model.named_modules()):
        if not only(name):
            continue
        if re.search(f"({INPUTS})$", name):
            cut(model, name, rows=range(width))
        elif name.endswith("gate_up_proj"):
            half = model.get_submodule(name).out_features // 2
            cut(model, name, rows=[*range(width), *range(half, half + width)])
        elif re.search(f"({OUTPUTS})$", name):
            cut(model, name, columns=range(width))


def narrow_heads(model, heads, kv_heads, size):
    for name, module in list(model.named_modules()):
        if name.endswith("self_attn"):
            cut(model, f"{name}.q_proj", rows=range(heads * size))
            for part in "kv":
                cut(model, f"{name}.{part}_proj", rows=range(kv_heads * size))
            cut(model, f"{name}.o_proj", columns=range(heads * size))
            module.num_key_value_groups = heads // kv_heads


def narrow_t5_heads(model, size):
    for name, module in list(model.named_modules()):
        if name.endswith(("SelfAttention", "EncDecAttention")):
            keep = [head * 4 + i for head in range(4) for i in range(size)]
            for part in "qkv":
                cut(model, f"{name}.{part}", rows=keep)
            cut(model, f"{name}.o", columns=keep)
            module.key_value_proj_dim, module.inner_dim = size, 4 * size


def output(model):
    torch.manual_seed(1)
    ids = torch.randint(3, 61, (2, 9))
    batch = (
        {"pixel_values": torch.randn(2, 3, 16, 16)} if model.main_input_name == "pixel_values" else {"input_ids": ids}
    )
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        return model(**batch)[0]


def equal(one, other):
    return torch.equal(output(one), output(other))


def written(model, tmp_path):
    config, reasons = native.native_config(model)
    assert reasons is None, reasons
    native.write_native(model, config, tmp_path)
    state = inspect_folder(tmp_path)
    assert state.whole, state.problems
    assert state.kind == "dense"
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return config, loaded.eval()


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mixtral"}))
def test_even_mlps_become_a_config(name):
    original, model = build(name), build(name)
    narrow_mlps(model, 13)
    config, reasons = native.native_config(model)
    assert reasons is None, reasons
    old, new = original.config.to_dict(), config.to_dict()
    changed = {key: value for key, value in new.items() if key not in ("architectures", "dtype") and old[key] != value}
    assert changed
    assert all(value == 13 for value in changed.values()), changed
    plain = type(model)(config).eval()
    plain.load_state_dict(model.state_dict())
    assert equal(plain, model)
    assert not equal(plain, original)


def test_the_table_and_these_models_are_the_same_families():
    assert {build(name).config.model_type for name in MODELS} - {"mixtral"} == set(native.FIELDS)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma"])
def test_fewer_heads_become_a_config(name, tmp_path):
    model = build(name)
    kv = model.config.num_key_value_heads
    size = model.model.layers[0].self_attn.head_dim
    narrow_heads(model, 2, kv // 2, size)
    narrow_mlps(model, 11)
    config, loaded = written(model, tmp_path)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, kv // 2, size)
    assert config.intermediate_size == 11
    assert equal(loaded, model)


def test_narrower_heads_of_t5_become_a_config(tmp_path):
    model = build("t5")
    narrow_t5_heads(model, 3)
    config, loaded = written(model, tmp_path)
    assert config.d_kv == 3
    assert equal(loaded, model)


def test_dtype_ties_and_a_missing_pooler_stay(tmp_path):
    model = build("llama-tied").to(torch.bfloat16)
    narrow_mlps(model, 8)
    _, loaded = written(model, tmp_path / "tied")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    bare = tf.BertModel(tf.BertConfig(**TEXT, intermediate_size=24), add_pooling_layer=False).eval()
    narrow_mlps(bare, 8)
    config, reasons = native.native_config(bare)
    assert reasons is None
    assert config.intermediate_size == 8


def test_the_model_and_its_config_are_left_alone():
    model = build("llama")
    narrow_mlps(model, 8)
    before = model.config.to_dict()
    native.native_config(model)
    assert model.config.to_dict() == before


def refused(model):
    config, reasons = native.native_config(model)
    assert config is None
    return "\n".join(reasons)


def test_uneven_widths_are_refused_by_site():
    model = build("llama")
    narrow_mlps(model, 20)
    narrow_mlps(model, 13, only=lambda name: ".1." in name)
    words = refused(model)
    assert "model.layers.1.mlp.gate_proj has out 13, in 16: intermediate_size needs one width for all" in words
    assert "13 (2×) and 20 (4×)" in words
    assert "model.layers.1.mlp.down_proj.weight has shape (16, 13)" in words
    assert "layers.0" not in words


def test_factored_layers_are_refused_and_nothing_else():
    model = build("llama")
    tiny.factor_linear(model, "model.layers.0.mlp.up_proj", 3, "pivoted")
    tiny.factor_linear(model, "model.layers.1.self_attn.q_proj", 4, "lowrank")
    _, reasons = native.native_config(model)
    assert len(reasons) == 2
    assert "model.layers.0.mlp.up_proj is of kind linear (form pivoted, rank 3)" in reasons[0]


def test_narrowed_layers_are_plain_and_padded_ones_are_not():
    model = build("bert")
    for layer in range(3):
        for part, places in (("intermediate.dense", {"rows": 13}), ("output.dense", {"columns": 13})):
            name = f"bert.encoder.layer.{layer}.{part}"
            module = model.get_submodule(name)
            weight = module.weight.detach()[: places.get("rows"), : places.get("columns")]
            model.set_submodule(name, narrow_layer(module, weight, module.bias.detach()[: places.get("rows")]))
    assert {entry["kind"] for entry in describe(model).values()} == {"narrow"}
    config, reasons = native.native_config(model)
    assert reasons is None
    assert config.intermediate_size == 13
    name = "bert.encoder.layer.1.attention.self.value"
    module, kept = model.get_submodule(name), torch.tensor([1, 2, 5])
    rows = narrow_layer(module, module.weight.detach()[kept], module.bias.detach()[kept], rows=kept)
    model.set_submodule(name, rows)
    assert refused(model) == f"{name} is of kind linear (form rows, rank 3), which no config can say"


def test_parts_of_heads_are_refused():
    model = build("llama")
    for layer in range(3):
        cut(model, f"model.layers.{layer}.self_attn.q_proj", rows=range(14))
    assert "num_attention_heads needs a multiple of 4" in refused(model)


def test_an_unknown_family_and_foreign_modules_are_refused():
    model = build("mixtral")
    cut(model, "model.layers.0.self_attn.o_proj", rows=range(8))
    assert "model.layers.0.self_attn.o_proj.weight has shape (8, 16)" in refused(model)

    class Padded(nn.Linear):
        pass

    model = build("bert")
    name = "bert.encoder.layer.0.attention.self.query"
    model.set_submodule(name, Padded(16, 16))
    assert f"{name} is a Padded; BertForMaskedLM needs a Linear" in refused(model)
    model.bert.extra = nn.Linear(2, 2)
    assert "bert.extra.weight of shape (2, 2) has no place" in refused(model)
    with pytest.raises(InputError, match="PreTrainedModel"):
        native.native_config(nn.Linear(2, 2))


@pytest.fixture
def narrowed(tmp_path, monkeypatch):
    """A whole folder of Eckart's, and a narrow model in memory that stands for what it holds."""

    def make(name, change):
        model = build(name)
        tiny.factor(model)
        prepare_for_saving(model)
        model.save_pretrained(tmp_path / "in")
        (tmp_path / "in" / "tokenizer.json").write_text("{}")
        Manifest(base="toy", fingerprint="f", modules=describe(model)).write(tmp_path / "in")
        narrow = build(name)
        change(narrow)
        monkeypatch.setattr(native, "load_pretrained", lambda directory, dtype: narrow)
        return narrow, tmp_path / "in", tmp_path / "out"

    return make


LOAD = """
import sys; sys.modules["eckart"] = None
import torch, transformers as tf
from safetensors.torch import load_file
for name in sys.argv[2:]:
    folder = sys.argv[1] + "/" + name
    config = tf.AutoConfig.from_pretrained(folder)
    model = getattr(tf, config.architectures[0]).from_pretrained(folder)
    with torch.no_grad():
        found = model(**load_file(folder + "/../" + name + ".inputs.st")).logits
    assert torch.equal(found, load_file(folder + "/../" + name + ".want.st")["out"]), name
    print("EQUAL", name)
"""


def test_exported_folders_need_no_eckart(narrowed, tmp_path):
    names = ["llama", "gpt2", "bert", "t5", "vit"]
    for name in names:
        model, source, _ = narrowed(name, lambda model: narrow_mlps(model, 13))
        native.export_native(source, tmp_path / name)
        save_file({"out": tiny.output(model)}, tmp_path / f"{name}.want.st")
        save_file({k: v.contiguous() for k, v in tiny.inputs(model).items()}, tmp_path / f"{name}.inputs.st")
    done = run(LOAD, tmp_path, *names, loaded=TRANSFORMERS)
    assert done.stdout.split() == [word for name in names for word in ("EQUAL", name)], done.stderr


def test_export_takes_tokenizer_and_manifest_along(narrowed):
    _, source, out = narrowed("bert", lambda model: narrow_mlps(model, 13))
    native.export_native(source, out)
    config = json.loads((out / "config.json").read_text())
    assert config["intermediate_size"] == 13
    assert "quantization_config" not in config
    assert (out / "tokenizer.json").exists()
    assert Manifest.read(out).base == "toy"
    assert "plain transformers" in (out / "README.md").read_text()


def test_a_refused_export_says_why_and_leaves_nothing(narrowed):
    _, source, out = narrowed("bert", tiny.factor)
    with pytest.raises(InputError, match="--to dense") as error:
        native.export_native(source, out)
    assert str(error.value).count("of kind linear") > 3
    assert not out.exists()
    build("bert").save_pretrained(source.parent / "plain")
    with pytest.raises(InputError, match="loads in transformers as it is"):
        native.export_native(source.parent / "plain", out)


def test_equal_shapes_with_other_numbers_are_refused(narrowed):
    """A scale that no config says: the shapes are those of the family, the function is not."""

    def change(model):
        model.model.layers[0].self_attn.scaling *= 2

    _, source, out = narrowed("llama", change)
    with pytest.raises(EckartError, match="other logits"):
        native.export_native(source, out)
    assert not out.exists()
