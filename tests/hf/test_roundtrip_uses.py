"""A loaded model is an ordinary model: generated from, trained, adapted, compiled, exported, copied."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from factored_tiny_models import MODELS, TEXT, build, factor, inputs, output

import eckart  # noqa: F401
from eckart.hf.registry import prepare_for_saving

NAMES = pytest.mark.parametrize("name", list(MODELS))


@pytest.fixture
def loaded(tmp_path):
    def make(name: str):
        model = build(name)
        factor(model)
        prepare_for_saving(model)
        model.save_pretrained(tmp_path / name)
        return type(model).from_pretrained(tmp_path / name)

    return make


@pytest.fixture
def two_blocks(monkeypatch):
    """For what is traced, which takes a second a block; the forms of factors differ within a block already."""
    monkeypatch.setitem(TEXT, "num_hidden_layers", 2)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "t5", "mixtral"])
def test_generate(name, loaded):
    model = loaded(name)
    ids = inputs(model)["input_ids"]
    short = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    long = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(short, long)


@NAMES
def test_deepcopy(name, loaded):
    model = loaded(name)
    expected = output(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(output(twin), expected)


@NAMES
def test_compile_without_graph_breaks(name, two_blocks, loaded):
    model = loaded(name)
    expected = output(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(**inputs(model), use_cache=False) if name not in ("vit", "bert") else compiled(**inputs(model))
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5"])
def test_export(name, two_blocks, loaded):
    model = loaded(name)
    expected = output(model)
    extra = {} if name in ("vit", "bert") else {"use_cache": False}
    exported = torch.export.export(model, (), {**inputs(model), **extra}, strict=False)
    with torch.no_grad():
        found = exported.module()(**inputs(model), **extra)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)


class Sentences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 61, (9,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_trainer_changes_every_factor(name, loaded, tmp_path):
    model = loaded(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = tf.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
    )
    tf.Trainer(model=model, args=arguments, train_dataset=Sentences()).train()
    after = dict(model.named_parameters())
    factors = [n for n in before if ".a." in n or ".b." in n]
    assert factors
    same = [n for n in factors if torch.equal(before[n], after[n]) and after[n].numel()]
    assert not [n for n in same if "key" not in n]  # the bias of keys has no gradient: softmax ignores it
    model.eval()
    again = type(model).from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("targets", ["all-linear", r".*self_attn\.(q|v)_proj\.(a|b)"])
def test_peft_lora_on_the_factors(targets, loaded, tmp_path):
    peft = pytest.importorskip("peft")
    model = loaded("llama")
    expected = output(model)
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    changed = output(adapted)
    assert not torch.allclose(changed, expected)
    adapted(**inputs(model), labels=inputs(model)["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = peft.PeftModel.from_pretrained(loaded("llama"), tmp_path / "adapter")
    torch.testing.assert_close(output(fresh), changed, rtol=1e-5, atol=1e-6)
    merged = fresh.merge_and_unload()
    torch.testing.assert_close(output(merged), changed, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(output(again), output(merged))


def test_weight_peeks_cost_no_product(loaded, monkeypatch):
    model = loaded("t5")
    wo = model.get_submodule("encoder.block.0.layer.1.DenseReluDense.wo")

    def fail() -> torch.Tensor:
        raise AssertionError("the dense weight was built")

    monkeypatch.setattr(wo, "dense", fail)
    output(model)
