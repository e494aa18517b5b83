"""save_pretrained → from_pretrained gives back the very same model."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import transformers as tf
from factored_tiny_models import (
    MODELS,
    build,
    factor,
    factor_embedding,
    factor_experts,
    factor_linear,
    inputs,
    llama,
    output,
)
from safetensors import safe_open

import eckart  # noqa: F401
from eckart.errors import FileError, InputError
from eckart.hf.quantizer import EckartConfig, EckartQuantizer, densify
from eckart.hf.registry import load_pretrained, prepare_for_saving, register
from eckart.layers import describe, is_factored

AUTO = {
    "llama": tf.AutoModelForCausalLM,
    "llama-tied": tf.AutoModelForCausalLM,
    "qwen3": tf.AutoModelForCausalLM,
    "gpt2": tf.AutoModelForCausalLM,
    "bert": tf.AutoModelForMaskedLM,
    "t5": tf.AutoModelForSeq2SeqLM,
    "vit": tf.AutoModelForImageClassification,
    "mixtral": tf.AutoModelForCausalLM,
}
NAMES = pytest.mark.parametrize("name", list(MODELS))


def compressed(name: str, kinds=("lowrank", "pivoted")):
    model = build(name)
    dense = output(model)
    factor(model, kinds)
    prepare_for_saving(model)
    assert not torch.equal(output(model), dense)
    return model


def load(cls, path, **kwargs):
    """Load, and insist that nothing was missing, unexpected or reshaped."""
    model, info = cls.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


@NAMES
def test_save_load_save_load_changes_nothing(name, tmp_path):
    model = compressed(name)
    model.save_pretrained(tmp_path / "one")
    once = load(AUTO[name], tmp_path / "one")
    assert torch.equal(output(once), output(model))
    assert describe(once) == describe(model)
    once.save_pretrained(tmp_path / "two")
    twice = load(AUTO[name], tmp_path / "two")
    assert torch.equal(output(twice), output(model))
    read = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "two")]
    assert read[0] == read[1]
    assert read[0]["quantization_config"]["quant_method"] == "eckart"


@NAMES
def test_shards_and_device_map(name, tmp_path):
    model = compressed(name)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(output(load(AUTO[name], tmp_path)), output(model))
    assert torch.equal(output(load(AUTO[name], tmp_path, device_map="cpu")), output(model))


@NAMES
def test_bfloat16(name, tmp_path):
    model = compressed(name)
    model.save_pretrained(tmp_path)
    loaded = load(AUTO[name], tmp_path, dtype=torch.bfloat16)
    floats = {p.dtype for n, p in loaded.named_parameters() if "wo" not in n}
    assert floats == {torch.bfloat16}
    if name == "vit":
        return
    reference = copy.deepcopy(model)
    kept = {n for n, p in loaded.named_parameters() if p.dtype == torch.float32}  # transformers keeps T5's wo so
    for n, parameter in reference.named_parameters():
        parameter.data = parameter.data if n in kept else parameter.data.to(torch.bfloat16)
    assert torch.equal(output(loaded), output(reference))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(output(load(AUTO[name], tmp_path / "again", dtype="auto")), output(loaded))


@NAMES
def test_disk_offload(name, tmp_path):
    model = compressed(name)
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    block = next(n for n, _ in model.named_modules() if n.split(".")[-1] == "1")
    device_map = {block: "disk"}
    for other, module in model.named_modules():
        parent = other.rpartition(".")[0]
        on_the_way = not parent or block.startswith(f"{parent}.")
        if other and on_the_way and not f"{block}.".startswith(f"{other}.") and parent != block:
            device_map[other] = "cpu"
        del module
    loaded = AUTO[name].from_pretrained(tmp_path / "m", device_map=device_map, offload_folder=tmp_path / "off")
    assert any(p.is_meta for p in loaded.parameters())
    torch.testing.assert_close(output(loaded), output(model), rtol=0, atol=5e-6)


@NAMES
def test_dequantize_gives_the_dense_architecture(name, tmp_path):
    model = compressed(name)
    model.save_pretrained(tmp_path / "m")
    loaded = load(AUTO[name], tmp_path / "m")
    expected = output(loaded)
    loaded.dequantize()
    assert not any(is_factored(m) for m in loaded.modules())
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in build(name).named_parameters()]
    torch.testing.assert_close(output(loaded), expected, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    torch.testing.assert_close(output(load(AUTO[name], tmp_path / "dense")), output(loaded), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["lowrank", "pivoted"])
@pytest.mark.parametrize("weights", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")])
def test_experts_alone(kind, weights, tmp_path):
    model = build("mixtral")
    for weight in weights:
        factor_experts(model, f"model.layers.1.mlp.experts.{weight}", 3, kind)
    entry = describe(model)["model.layers.1.mlp.experts"]
    assert set(entry["weights"]) == set(weights)
    prepare_for_saving(model)
    model.save_pretrained(tmp_path)
    loaded = load(tf.MixtralForCausalLM, tmp_path)
    assert torch.equal(output(loaded), output(model))
    experts = model.get_submodule("model.layers.1.mlp.experts")
    dense = experts.to_dense()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    ids, share = torch.tensor([[0, 2]] * 4 + [[1, 3]]), torch.rand(5, 2)
    with torch.no_grad():
        want = dense(x, ids.clamp(max=2), torch.where(ids < 3, share, 0))
        torch.testing.assert_close(experts(x, ids, share), want, rtol=1e-4, atol=1e-6)
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, ids, share), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["lowrank", "pivoted"])
@pytest.mark.parametrize("name", ["llama-tied", "bert"])
def test_an_untied_copy_of_a_tied_head(name, kind, tmp_path):
    model = build(name)
    head = "lm_head" if name == "llama-tied" else "cls.predictions.decoder"
    factor_linear(model, head, 5, kind)
    factor(model)
    prepare_for_saving(model)
    model.save_pretrained(tmp_path)
    loaded = load(AUTO[name], tmp_path)
    assert torch.equal(output(loaded), output(model))
    loaded.tie_weights()
    assert torch.equal(output(loaded), output(model))


@pytest.mark.parametrize("kind", ["lowrank", "pivoted"])
@pytest.mark.parametrize("name", ["llama-tied", "bert", "gpt2", "t5", "llama"])
def test_factored_tables_stay_tied(name, kind, tmp_path):
    model = build(name)
    table, tied = {
        "llama": ("model.embed_tokens", ()),
        "llama-tied": ("model.embed_tokens", ("lm_head",)),
        "bert": ("bert.embeddings.word_embeddings", ("cls.predictions.decoder",)),
        "gpt2": ("transformer.wte", ("lm_head",)),
        "t5": ("shared", ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")),
    }[name]
    factor_embedding(model, table, 6, kind, tied)
    factor(model)
    prepare_for_saving(model)
    model.save_pretrained(tmp_path)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert sum(any(n.endswith(f"{t}.a.weight") for t in (table, *tied)) for n in names) == 1
    loaded = load(AUTO[name], tmp_path)
    assert torch.equal(output(loaded), output(model))
    twin = copy.deepcopy(loaded)
    with torch.no_grad():
        twin.get_submodule(table).a.weight.zero_()
    assert torch.equal(output(loaded), output(model))
    if tied:
        assert twin.get_submodule(tied[-1]).table is twin.get_submodule(table)


def test_a_head_checkpoint_in_the_bare_model_and_back(tmp_path):
    model = compressed("llama")
    model.save_pretrained(tmp_path / "head")
    bare = tf.AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(output(bare), model.model(**inputs(model)).last_hidden_state)
    bare.save_pretrained(tmp_path / "bare")
    again, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert torch.equal(again.model(**inputs(model)).last_hidden_state, output(bare))
    model.model.save_pretrained(tmp_path / "inner")
    inner = load(tf.AutoModel, tmp_path / "inner")
    assert torch.equal(output(inner), output(bare))
    model.save_pretrained(tmp_path / "head2")
    assert torch.equal(output(load(tf.LlamaForCausalLM, tmp_path / "head2")), output(model))


def test_load_pretrained_takes_the_class_of_the_config(tmp_path):
    model = compressed("bert")
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert type(loaded) is tf.BertForMaskedLM
    assert not loaded.training
    assert torch.equal(output(loaded), output(model))
    assert load_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu").dtype == torch.bfloat16
    with pytest.raises(FileError, match=r"config\.json"):
        load_pretrained(tmp_path / "nothing")


def test_the_folder_follows_later_changes_of_the_model(tmp_path):
    model = compressed("llama")
    name = next(iter(describe(model)))
    model.set_submodule(name, model.get_submodule(name).to_dense())
    model.save_pretrained(tmp_path / "a")
    loaded = load(tf.LlamaForCausalLM, tmp_path / "a")
    assert torch.equal(output(loaded), output(model))
    assert name not in describe(loaded)
    densify(model)
    assert prepare_for_saving(model) == {}
    model.save_pretrained(tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())


def test_every_factored_weight_leaves_an_empty_tensor(tmp_path):
    model = compressed("llama")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name in describe(model):
            assert file.get_slice(f"{name}.weight").get_shape() == [0]


def test_registering_twice_and_loading_flags(tmp_path):
    register()
    register()
    model = compressed("llama")
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(tf.LlamaForCausalLM, tmp_path)
    assert loaded.is_quantized is False
    assert loaded.half().dtype == torch.float16
    assert loaded.float().dtype == torch.float32


def test_configs_of_the_future_and_wrong_ones_are_refused(tmp_path):
    assert EckartConfig({}, something_new=1).to_dict().keys() == {"quant_method", "format_version", "modules"}
    with pytest.raises(FileError, match="format version 2"):
        EckartConfig({}, format_version=2)
    with pytest.raises(FileError, match="requires residual"):
        EckartConfig({}, requires=["residual"])
    with pytest.raises(InputError, match=r"eckart\.compress"):
        EckartQuantizer(EckartConfig({}), pre_quantized=False)
    model = compressed("llama")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    modules = config["quantization_config"]["modules"]
    name = next(iter(modules))
    for change, message in (
        ({name: {**modules[name], "form": "tucker"}}, "unknown form 'tucker'"),
        ({"model.layers.0.input_layernorm": modules[name]}, "no linear map"),
        ({"model.nowhere": modules[name]}, "none of the factored modules"),
    ):
        config["quantization_config"]["modules"] = change
        path.write_text(json.dumps(config))
        with pytest.raises(FileError, match=message):
            tf.LlamaForCausalLM.from_pretrained(tmp_path)


def test_models_that_cannot_be_prepared():
    with pytest.raises(InputError, match="PreTrainedModel"):
        prepare_for_saving(torch.nn.Linear(2, 2))
    model = llama()
    model.hf_quantizer = object()
    with pytest.raises(InputError, match="one quantizer"):
        prepare_for_saving(model)
