"""Tiny saved models with byte tokenizers, for runs from folder to folder."""

from __future__ import annotations

from pathlib import Path

import pytest

tf = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import torch  # noqa: E402

TEXT = {"vocab_size": 257, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
DEEP = {**TEXT, "intermediate_size": 48, "num_hidden_layers": 4}
GROUPED = {**DEEP, "num_key_value_heads": 2}

MIXED = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "llama-tied-bf16": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, tie_word_embeddings=True)).bfloat16(),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, head_dim=8)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **GROUPED, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
        )
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=257, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    ),
    "bert": lambda: tf.BertModel(tf.BertConfig(**DEEP, pad_token_id=0)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, num_local_experts=3)),
    "qwen2-moe": lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**MIXED, shared_expert_intermediate_size=32)),
    "qwen3-moe-bf16": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**MIXED, head_dim=8)).bfloat16(),
    "bert-mlm": lambda: tf.BertForMaskedLM(tf.BertConfig(**DEEP, pad_token_id=0)),
}


def byte_tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, **{letter: i for i, letter in enumerate(alphabet, start=1)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def save(model: torch.nn.Module, folder: Path, **how: object) -> Path:
    """A saved model whose maps are large enough to matter, with its tokenizer."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder, **how)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tiny(name: str, folder: Path, **how: object) -> Path:
    torch.manual_seed(0)
    return save(MODELS[name](), folder, **how)


TEXTS = tuple(f"Sentence number {n} says that {n * n} is a square." for n in range(200))
ASKED = {
    "data": TEXTS,
    "samples": 16,
    "length": 32,
    "batch_size": 8,
    "keep": 0.5,
    "forms": ("dense", "lowrank", "pivoted"),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
