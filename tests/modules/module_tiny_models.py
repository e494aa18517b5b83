"""Tiny models in float64, a few batches for each, and the moments that those give."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as tf
from torch import Tensor, nn

from eckart.apply.units import prepare_units, units_of
from eckart.arch import find_sites, site_matrices
from eckart.modules import PreparedUnit, get_module_method, narrow_sites, replace_narrow
from eckart.moments import Moments, collect, sampled_targets
from eckart.records import Site

TEXT = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 20}
LLAMA |= {"tie_word_embeddings": False}
BERT = {**TEXT, "num_attention_heads": 2, "intermediate_size": 20, "max_position_embeddings": 32}
PHI3 = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 24, "intermediate_size": 20}
PHI3 |= {"max_position_embeddings": 32, "original_max_position_embeddings": 32}
PHI3 |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
GPT2 = {"vocab_size": 30, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 20}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 30, "d_model": 16, "d_ff": 20, "d_kv": 6, "num_layers": 2, "num_heads": 3}
OPT = {**TEXT, "num_attention_heads": 2, "ffn_dim": 20, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
VIT |= {"image_size": 8, "patch_size": 4, "num_labels": 5}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "llama with biases": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**PHI3)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**VIT)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
}


def build(name: str) -> nn.Module:
    """Random biases and norms too, so that nothing is 0 or 1 by chance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().double().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.4)
            else:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def batches(name: str, count: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        if name == "vit":
            found.append({"pixel_values": torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)})
            continue
        ids = torch.randint(3, 30, (4, 9), generator=generator)
        found.append({"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)[:, :5]} if name == "t5" else {}))
    return found


def outputs(name: str, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batches(name, 1, seed=7)[0]).logits


def calibrated(name: str, model: nn.Module, sites: Sequence[Site]) -> Moments:
    return collect(model, batches(name), sites, loss=sampled_targets, gradients="full", seed=0)


class Case:
    """A model with everything that its units need."""

    def __init__(self, name: str, method: str = "modules", parts: tuple[str, ...] | None = None) -> None:
        self.name, self.model = name, build(name)
        self.sites = find_sites(self.model)
        self.by_name = {site.name: site for site in self.sites}
        self.moments = calibrated(name, self.model, self.sites)
        self.units = units_of(self.model, self.sites, parts)
        self.method = get_module_method(method)
        self.cut = prepare_units(
            self.model, self.units, self.sites, self.moments, self.method, self.method.options(parts=parts)
        )
        self.exact = outputs(name, self.model)

    def of_each_kind(self) -> dict[str, PreparedUnit]:
        """The last unit of every kind."""
        last = {part.unit.kind: name for name, part in self.cut.items()}
        return {name: self.cut[name] for name in last.values()}

    def narrowed(self, parts: dict[str, int]) -> Tensor:
        """Outputs with the layers of these units at these widths."""
        model = copy.deepcopy(self.model)
        pieces = [piece for unit, width in parts.items() for piece in self.cut[unit].cut(width)]
        for site, narrow in narrow_sites(model, self.by_name, pieces).items():
            replace_narrow(model, self.by_name[site], narrow)
        return outputs(self.name, model)

    def stood_in(self, parts: dict[str, int]) -> Tensor:
        """Outputs of the dense model with the stand-ins written into its weights."""
        model = copy.deepcopy(self.model)
        for unit, width in parts.items():
            site, dense, bias = self.cut[unit].stand_in(width)
            weights = site_matrices(model, self.by_name[site])[0]
            with torch.no_grad():
                weights["weight"].copy_(dense)
                if bias is not None:
                    weights["bias"].copy_(bias)
        return outputs(self.name, model)


def some_widths(prepared: PreparedUnit) -> list[int]:
    """The least, some, and all but the last."""
    full, step = prepared.unit.full_rank, prepared.unit.step
    return sorted({step, full // 2 // step * step, full // 3 // step * step or step, full - step})
