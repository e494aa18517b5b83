"""Tiny models with random weights, and a plain truncated SVD that puts factored layers into them."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor, nn

from eckart.forms import Form, LowRank, Pivoted
from eckart.layers import layer_from_forms, tie_to
from eckart.records import Site

TEXT = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}


def llama(tied: bool = False, **extra) -> nn.Module:
    config = tf.LlamaConfig(**TEXT, intermediate_size=24, num_key_value_heads=2, tie_word_embeddings=tied, **extra)
    return tf.LlamaForCausalLM(config)


def qwen3() -> nn.Module:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**TEXT, intermediate_size=24, num_key_value_heads=2, head_dim=8))


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=61, n_embd=16, n_layer=3, n_head=4, n_positions=40))


def bert() -> nn.Module:
    return tf.BertForMaskedLM(tf.BertConfig(**TEXT, intermediate_size=24, max_position_embeddings=40))


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def vit() -> nn.Module:
    return tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=24,
            image_size=16,
            patch_size=4,
        )
    )


def mixtral() -> nn.Module:
    return tf.MixtralForCausalLM(
        tf.MixtralConfig(**TEXT, intermediate_size=24, num_key_value_heads=2, num_local_experts=3)
    )


MODELS = {
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "qwen3": qwen3,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "mixtral": mixtral,
}


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def inputs(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 61, (2, 9), generator=generator)
    if model.config.model_type == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    return {"input_ids": ids}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(**inputs(model))
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def truncate(weight: Tensor, rank: int, kind: str, bias: Tensor | None = None) -> Form:
    """A rank-k matrix near W in the form asked for; pivots are the first rows, which serves for tests."""
    W = weight.detach().double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    bias = None if bias is None else bias.detach()
    left, right = U[:, :rank] * S[:rank], Vh[:rank]
    if kind == "lowrank":
        return LowRank(a=right, b=left, bias=bias)
    order = torch.randperm(W.shape[0], generator=torch.Generator().manual_seed(rank))
    approx = left @ right
    kept, rest = order[:rank], order[rank:]
    T = left[rest] @ torch.linalg.pinv(left[kept])
    index = torch.empty_like(order)
    index[order] = torch.arange(len(order))
    return Pivoted(a=approx[kept], b=T, index=index, bias=bias)


def factor_linear(model: nn.Module, name: str, rank: int, kind: str) -> None:
    module = model.get_submodule(name)
    conv1d = type(module).__name__ == "Conv1D"
    W = module.weight.T if conv1d else module.weight
    site = Site(name=name, kind="conv1d" if conv1d else "linear", out_features=W.shape[0], in_features=W.shape[1])
    model.set_submodule(name, layer_from_forms(site, module, [truncate(W, rank, kind, module.bias)]))


def factor_experts(model: nn.Module, name: str, rank: int, kind: str) -> None:
    owner, _, weight = name.rpartition(".")
    module = model.get_submodule(owner)
    W = getattr(module, weight)
    site = Site(name=name, kind="experts", out_features=W.shape[1], in_features=W.shape[2], slices=len(W))
    model.set_submodule(owner, layer_from_forms(site, module, [truncate(w, rank, kind) for w in W]))


def factor_embedding(model: nn.Module, name: str, rank: int, kind: str, tied: tuple[str, ...] = ()) -> None:
    module = model.get_submodule(name)
    W = module.weight.T
    site = Site(name=name, kind="embedding", out_features=W.shape[0], in_features=W.shape[1], tied=tied)
    table = layer_from_forms(site, module, [truncate(W, rank, kind)])
    model.set_submodule(name, table)
    for other in tied:
        model.set_submodule(other, tie_to(table, name, model.get_submodule(other)))


def factor(model: nn.Module, kinds: tuple[str, ...] = ("lowrank", "pivoted")) -> int:
    """Factor every map inside of the blocks, ranks and forms changing from layer to layer; leave some dense."""
    count = 0
    for name, module in list(model.named_modules()):
        inside = any(part.isdigit() for part in name.split("."))
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if inside and linear:
            count += 1
            if count % 5 == 0:
                continue
            factor_linear(model, name, rank=1 + count % 7, kind=kinds[count % len(kinds)])
        elif name.endswith("mlp.experts"):
            factor_experts(model, f"{name}.gate_up_proj", rank=3 + count % 3, kind=kinds[count % len(kinds)])
            if count % 2:
                factor_experts(model, f"{name}.down_proj", rank=2, kind=kinds[-1])
    return count
