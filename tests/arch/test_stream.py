"""Facts about the residual stream are proved: channels change places, and what is zero carries nothing."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from eckart.arch import find_stream
from eckart.arch.stream import _STREAMS
from eckart.errors import InputError
from eckart.prune import Schedule, find_groups

TEXT = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1}
TEXT |= {"eos_token_id": 2, "max_position_embeddings": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {**TEXT, **HEADS, "head_dim": 6, "intermediate_size": 20, "tie_word_embeddings": False}
BERT = {**TEXT, "num_attention_heads": 2, "intermediate_size": 20}
GPT2 = {"vocab_size": 30, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 20}
PHI3 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "original_max_position_embeddings": 32}
PHI = {**TEXT, "num_attention_heads": 2, "intermediate_size": 20}
GEMMA = {**LLAMA, "query_pre_attn_scalar": 5, "sliding_window": 4}
DISTILBERT = {"vocab_size": 30, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 20, "max_position_embeddings": 32}
OPT = {**TEXT, "num_attention_heads": 2, "ffn_dim": 20, "word_embed_proj_dim": 16}
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, attention_bias=True)),
    "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**{**LLAMA, "tie_word_embeddings": True})),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**LLAMA)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GEMMA)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GEMMA)),
    "phi3": lambda: tf.Phi3ForCausalLM(
        tf.Phi3Config(**{**TEXT, **HEADS, **PHI3, "intermediate_size": 20, "tie_word_embeddings": False})
    ),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**PHI)),
    "phi-norms": lambda: tf.PhiForCausalLM(tf.PhiConfig(**PHI, qk_layernorm=True)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT)),
    "bert": lambda: tf.BertModel(tf.BertConfig(**BERT)),
    "bert-classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**BERT)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**DISTILBERT)),
    "llama-scores": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**LLAMA)),
}
IDS = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(7))


def built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().double().eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=IDS)
    return found[0] if not hasattr(found, "pooler_output") else found.pooler_output


def test_every_family_is_here() -> None:
    assert {name.partition("-")[0] for name in MODELS} == set(_STREAMS)


@pytest.mark.parametrize("name", MODELS)
def test_channels_change_places_together(name: str) -> None:
    model = built(name)
    stream, exact = find_stream(model), output(model)
    assert stream.width == 16
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter, dim in stream.parameters:
            value = model.get_parameter(parameter)
            value.copy_(value.index_select(dim, order))
    torch.testing.assert_close(output(model), exact, rtol=1e-5, atol=1e-5)  # RMS norms compute in float32


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert", "gpt2"])
def test_one_part_alone_changes_the_output(name: str) -> None:
    """So that the test above proves something of every part; shifts of all logits by one number cancel nowhere."""
    order = torch.arange(16).roll(1)
    for parameter, dim in find_stream(built(name)).parameters:
        model = built(name)
        exact = output(model)
        with torch.no_grad():
            value = model.get_parameter(parameter)
            value.copy_(value.index_select(dim, order))
        assert not torch.allclose(output(model), exact, rtol=1e-6, atol=1e-9), parameter


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3"])
def test_a_zero_channel_can_be_cut_out_before_rms_norms(name: str) -> None:
    model = built(name)
    (group,) = find_groups(model, ["residual"])
    kept = torch.tensor([i for i in range(16) if i not in (3, 8)])
    with torch.no_grad():
        for part in group.parts:
            value = model.get_parameter(part.parameter)
            value.index_fill_(part.dim, torch.tensor([3, 8]), 0.0)
        exact = output(model)
        for part in group.parts:
            module = model.get_submodule(part.parameter.rpartition(".")[0])
            value = model.get_parameter(part.parameter)
            value.data = value.data.index_select(part.dim, kept)
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon *= 16 / 14
                value.mul_((16 / 14) ** 0.5)
    torch.testing.assert_close(output(model), exact, rtol=1e-5, atol=1e-5)  # RMS norms compute in float32


def test_a_schedule_removes_channels_and_counts_them() -> None:
    model = built("llama-tied").float()
    (group,) = find_groups(model, ["residual"])
    assert group.count == 16
    stream = {id(model.get_parameter(part.parameter)) for part in group.parts}
    assert len(stream) == len(group.parts)  # the tied table once
    engine = Schedule(model, selector="magnitude", keep=0.5, steps=4, groups=[group])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine.attach(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    table = model.get_input_embeddings().weight
    gone = (table == 0).all(0)
    assert int(gone.sum()) == 8
    for part in group.parts:
        value = model.get_parameter(part.parameter).movedim(part.dim, 0)
        assert bool((value[gone] == 0).all()), part.parameter


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)), "cls.predictions.transform"),
        (lambda: tf.BertLMHeadModel(tf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)), "another seq"),
        (lambda: tf.OPTForCausalLM(tf.OPTConfig(**{**OPT, "word_embed_proj_dim": 8})), "project_in"),
        (lambda: tf.ViTModel(tf.ViTConfig(**{**BERT, "image_size": 8, "patch_size": 4})), "of vit; of llama"),
        (lambda: nn.Linear(4, 4), "of Linear; of llama"),
    ],
)
def test_what_is_not_known_is_refused_by_name(build: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        find_stream(build())  # type: ignore[operator]


def test_channels_are_taken_alone() -> None:
    with pytest.raises(InputError, match="residual channels overlap neurons"):
        find_groups(built("llama"), ["neurons", "residual"])
    with pytest.raises(InputError, match="Did you mean 'residual'"):
        find_groups(built("llama"), ["residuals"])
