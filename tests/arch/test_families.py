"""Every fact about a family is proved: the changes that it allows leave the outputs of a model as they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.arch import (
    MLP,
    Attention,
    Rows,
    expand_kv,
    family_of,
    find_sites,
    find_units,
    get_module,
    head_columns,
    head_rows,
    rotary_pairs,
    set_module,
)

Model = nn.Module
TEXT = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {**TEXT, **HEADS, "head_dim": 6, "intermediate_size": 20, "tie_word_embeddings": False}
BERT = {**TEXT, "num_attention_heads": 2, "intermediate_size": 20, "max_position_embeddings": 32}
CROSS = {"is_decoder": True, "add_cross_attention": True}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": 8,
    "patch_size": 4,
}
GPT2 = {"vocab_size": 30, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 20}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
GEMMA = {**LLAMA, "query_pre_attn_scalar": 5, "sliding_window": 4}
T5 = {"vocab_size": 30, "d_model": 16, "d_ff": 20, "d_kv": 6, "num_layers": 2, "num_heads": 3}
BART = {"vocab_size": 30, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 20, "decoder_ffn_dim": 12}
DISTILBERT = {"vocab_size": 30, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 20, "max_position_embeddings": 32}
OPT = {**TEXT, "num_attention_heads": 2, "ffn_dim": 20, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
PHI3 = {**TEXT, **HEADS, "hidden_size": 24, "intermediate_size": 20, "max_position_embeddings": 32}
PHI3 |= {"original_max_position_embeddings": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
PHI = {**TEXT, **HEADS, "hidden_size": 24, "intermediate_size": 20, "rope_parameters": {"partial_rotary_factor": 0.67}}
PHI["rope_parameters"] |= {"rope_type": "default", "rope_theta": 1e4}
MOE = {"num_experts_per_tok": 2}

# name: (model, family, MLPs, attentions)
MODELS: dict[str, tuple[Callable[[], Model], str, int, int]] = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)), "llama", 2, 2),
    "llama with biases": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True)),
        "llama",
        2,
        2,
    ),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA, sliding_window=4)), "mistral", 2, 2),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA)), "qwen2", 2, 2),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA)), "qwen3", 2, 2),
    "gemma": (lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**LLAMA)), "gemma", 2, 2),
    "gemma2": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GEMMA)), "gemma2", 2, 2),
    "gemma3": (lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GEMMA)), "gemma3", 2, 2),
    "mixtral": (lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, **MOE, num_local_experts=3)), "mixtral", 0, 2),
    "qwen3_moe": (
        lambda: tf.Qwen3MoeForCausalLM(
            tf.Qwen3MoeConfig(**LLAMA, **MOE, num_experts=3, moe_intermediate_size=8, mlp_only_layers=[0])
        ),
        "qwen3_moe",
        1,
        2,
    ),
    "olmo2": (lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**LLAMA)), "olmo2", 2, 0),
    "phi": (lambda: tf.PhiForCausalLM(tf.PhiConfig(**PHI)), "phi", 2, 2),
    "phi with norms": (lambda: tf.PhiForCausalLM(tf.PhiConfig(**PHI, qk_layernorm=True)), "phi", 2, 2),
    "phi3": (lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**PHI3)), "phi3", 2, 2),
    "phi3 partial": (
        lambda: tf.Phi3ForCausalLM(
            tf.Phi3Config(**{**PHI3, "rope_parameters": {**PHI3["rope_parameters"], "partial_rotary_factor": 0.67}})
        ),
        "phi3",
        2,
        2,
    ),
    "gpt_neox": (
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT, num_attention_heads=2, intermediate_size=20)),
        "gpt_neox",
        2,
        0,
    ),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)), "gpt2", 2, 2),
    "gpt2 with cross attention": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, add_cross_attention=True)),
        "gpt2",
        2,
        4,
    ),
    "opt": (lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT)), "opt", 2, 2),
    "bart": (lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)), "bart", 4, 6),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)), "bert", 2, 2),
    "bert with cross attention": (lambda: tf.BertLMHeadModel(tf.BertConfig(**BERT, **CROSS)), "bert", 2, 4),
    "roberta": (lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**BERT)), "roberta", 2, 2),
    "electra": (
        lambda: tf.ElectraForMaskedLM(tf.ElectraConfig(**BERT, embedding_size=8)),
        "electra",
        2,
        2,
    ),
    "mpnet": (lambda: tf.MPNetForMaskedLM(tf.MPNetConfig(**BERT)), "mpnet", 2, 2),
    "distilbert": (lambda: tf.DistilBertForMaskedLM(tf.DistilBertConfig(**DISTILBERT)), "distilbert", 2, 2),
    "vit": (lambda: tf.ViTForImageClassification(tf.ViTConfig(**VIT)), "vit", 2, 2),
    "deit": (lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**VIT)), "deit", 2, 2),
    "dinov2": (lambda: tf.Dinov2Model(tf.Dinov2Config(**VIT, mlp_ratio=2)), "dinov2", 2, 2),
    "dinov2, gated": (
        lambda: tf.Dinov2Model(tf.Dinov2Config(**VIT, mlp_ratio=2, use_swiglu_ffn=True)),
        "dinov2",
        2,
        2,
    ),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), "t5", 4, 6),
    "t5, gated": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, feed_forward_proj="gated-gelu")),
        "t5",
        4,
        6,
    ),
}
WITH_MLP = [name for name, (_, _, mlps, _) in MODELS.items() if mlps]
WITH_ATTENTION = [name for name, (_, _, _, attentions) in MODELS.items() if attentions]
GATED = WITH_MLP[: WITH_MLP.index("phi")]
NORMED = ["qwen3", "gemma3", "qwen3_moe", "phi with norms"]
ROTARY = WITH_ATTENTION[: WITH_ATTENTION.index("gpt2")]
FIXED = ["phi3", "phi3 partial", "gpt2", "gpt2 with cross attention", "opt", "mpnet", "t5", "t5, gated"]
BIASED = ["llama with biases", "qwen2", "phi", *(n for n in WITH_ATTENTION if n not in ROTARY and n[:2] != "t5")]


def build(name: str) -> Model:
    """A model in float64 with random biases and norms, so that nothing is 0 or 1 by chance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name][0]().double().eval()
        model.set_experts_implementation("eager")  # grouped products have no float64
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.4)
            else:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def outputs(model: Model) -> Tensor:
    config = model.config
    ids = torch.randint(3, 30, (2, 7), generator=generator(), dtype=torch.long)
    if hasattr(config, "patch_size"):
        given = {"pixel_values": randn(2, 3, config.image_size, config.image_size)}
    elif config.is_encoder_decoder:
        given = {"input_ids": ids, "decoder_input_ids": ids.flip(0)[:, :5]}
    elif getattr(config, "add_cross_attention", False):
        given = {"input_ids": ids, "encoder_hidden_states": randn(2, 4, 16)}
    else:
        given = {"input_ids": ids}
    with torch.no_grad():
        found = model(**given)
    return found.logits if "logits" in found else found.last_hidden_state


def matrix(model: Model, site: str) -> Tensor:
    """The weight (out, in) of a map, to write into."""
    module = get_module(model, site)
    weight = module.weight.data
    return weight.T if isinstance(module, Conv1D) else weight


def vector(model: Model, site: str) -> Tensor | None:
    """The bias (out,) of a map, to write into."""
    bias = get_module(model, site).bias
    return None if bias is None else bias.data


def left_multiply(model: Model, site: str, rows: slice, factor: Tensor) -> None:
    """These rows of weight and bias times a factor."""
    weight, bias = matrix(model, site), vector(model, site)
    weight[rows] = factor @ weight[rows]
    if bias is not None:
        bias[rows] = factor @ bias[rows]


def put_map(model: Model, site: str, weight: Tensor, bias: Tensor | None) -> None:
    """Another map of the same kind in its place."""
    out, columns = weight.shape
    if isinstance(get_module(model, site), Conv1D):
        new: nn.Module = Conv1D(out, columns).double()
        new.weight.data = weight.T.contiguous()
    else:
        new = nn.Linear(columns, out, bias=bias is not None).double()
        new.weight.data = weight
    if bias is not None:
        new.bias.data = bias
    set_module(model, site, new)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def query_heads(attention: Attention, kv_head: int) -> list[int]:
    return [head for head, kv in enumerate(expand_kv(attention)) if kv == kv_head]


def heads_of_keys(attention: Attention) -> Iterator[tuple[slice, list[slice]]]:
    """Rows of each head of keys, and of each head of queries that reads it."""
    d = attention.head_dim
    for kv in range(attention.kv_heads):
        queries = [head_rows(attention.query, head, d) for head in query_heads(attention, kv)]
        yield head_rows(attention.key, kv, d), queries


def multiply_queries_and_keys(model: Model, attention: Attention, on_query: Tensor, on_key: Tensor) -> None:
    for key, queries in heads_of_keys(attention):
        left_multiply(model, attention.key.site, key, on_key)
        for query in queries:
            left_multiply(model, attention.query.site, query, on_query)


@pytest.mark.parametrize("name", MODELS)
def test_units_are_found(name: str) -> None:
    model = build(name)
    _, family, mlps, attentions = MODELS[name]
    units = find_units(model)
    assert family_of(model) == units.family == family
    assert (len(units.mlps), len(units.attentions)) == (mlps, attentions)
    blocks = 4 if family in ("bart", "t5") else 2
    without = (blocks - mlps) + (blocks if attentions == 0 else 0)
    assert len(units.skipped) == without
    assert all(reason.endswith("; factors only") for _, reason in units.skipped)
    modules = dict(model.named_modules())
    assert all(attention.name in modules for attention in units.attentions)
    assert [attention.cross for attention in units.attentions].count(True) == max(0, attentions - blocks)


def test_what_a_family_with_groups_holds() -> None:
    units = find_units(build("llama"))
    layer = "model.layers.1"
    assert units.attentions[1] == Attention(
        name=f"{layer}.self_attn",
        query=Rows(site=f"{layer}.self_attn.q_proj", stop=24),
        key=Rows(site=f"{layer}.self_attn.k_proj", stop=12),
        value=Rows(site=f"{layer}.self_attn.v_proj", stop=12),
        output=f"{layer}.self_attn.o_proj",
        heads=4,
        kv_heads=2,
        head_dim=6,
        rotary=True,
        rotary_dim=6,
        query_norm=None,
        key_norm=None,
        cross=False,
        depth=1,
    )
    assert units.mlps[1] == MLP(
        name=f"{layer}.mlp",
        inputs=(Rows(site=f"{layer}.mlp.gate_proj", stop=20), Rows(site=f"{layer}.mlp.up_proj", stop=20)),
        down=f"{layer}.mlp.down_proj",
        width=20,
        depth=1,
        gated=True,
    )


def test_fused_maps_are_rows_of_one_site() -> None:
    phi3, gpt2 = find_units(build("phi3")), find_units(build("gpt2"))
    spans = [
        (rows.start, rows.stop) for a in (phi3.attentions[0], gpt2.attentions[0]) for rows in (a.query, a.key, a.value)
    ]
    assert spans == [(0, 24), (24, 36), (36, 48), (0, 16), (16, 32), (32, 48)]
    assert phi3.mlps[0].inputs == tuple(
        Rows(site="model.layers.0.mlp.gate_up_proj", start=start, stop=start + 20) for start in (0, 20)
    )
    cross = find_units(build("gpt2 with cross attention")).attentions[1]
    assert (cross.query.site, cross.key.site) == (
        "transformer.h.0.crossattention.q_attn",
        "transformer.h.0.crossattention.c_attn",
    )
    assert (cross.key.start, cross.value.start) == (0, 16)


def test_an_mlp_of_the_block_itself_takes_its_name() -> None:
    assert [mlp.name for mlp in find_units(build("opt")).mlps] == [f"model.decoder.layers.{i}.mlp" for i in range(2)]


@pytest.mark.parametrize("name", WITH_MLP)
def test_neurons_may_change_places(name: str) -> None:
    model = build(name)
    before = outputs(model)
    mlps = find_units(model).mlps
    order = {mlp.name: torch.randperm(mlp.width, generator=generator()) for mlp in mlps}
    for mlp in mlps:
        for rows in mlp.inputs:
            left_multiply(
                model, rows.site, slice(rows.start, rows.stop), torch.eye(mlp.width).double()[order[mlp.name]]
            )
    assert not torch.allclose(outputs(model), before, atol=1e-3)
    for mlp in mlps:
        down = matrix(model, mlp.down)
        down.copy_(down[:, order[mlp.name]])
    assert same(outputs(model), before)


@pytest.mark.parametrize("name", [*GATED, "phi3", "dinov2, gated", "t5, gated"])
def test_the_gate_comes_first_and_the_rest_is_linear(name: str) -> None:
    """Scales and signs of the second input may move into ``down``; those of the gate may not."""
    for part in (0, 1):
        model = build(name)
        before = outputs(model)
        for mlp in find_units(model).mlps:
            assert mlp.gated
            scales, rows = randn(mlp.width), mlp.inputs[part]
            left_multiply(model, rows.site, slice(rows.start, rows.stop), scales.diag())
            down = matrix(model, mlp.down)
            down.copy_(down / scales)
        assert same(outputs(model), before) == (part == 1)


@pytest.mark.parametrize("name", WITH_MLP)
def test_dead_neurons_can_be_cut_out(name: str) -> None:
    model = build(name)
    mlps = find_units(model).mlps
    assert all(mlp.gated == (name in (*GATED, "phi3", "phi3 partial") or "gated" in name) for mlp in mlps)
    for mlp in mlps:
        matrix(model, mlp.down)[:, 3::2] = 0
    before = outputs(model)
    for mlp in mlps:
        kept = torch.tensor([0, 1, *range(2, mlp.width, 2)])
        for site in dict.fromkeys(rows.site for rows in mlp.inputs):
            rows = torch.cat([kept + part.start for part in mlp.inputs if part.site == site])
            bias = vector(model, site)
            put_map(model, site, matrix(model, site)[rows], None if bias is None else bias[rows])
        put_map(model, mlp.down, matrix(model, mlp.down)[:, kept], vector(model, mlp.down))
    widths = [(a.width, b.width) for a, b in zip(mlps, find_units(model).mlps, strict=True)]
    assert all(narrow == wide // 2 + 1 for wide, narrow in widths)
    assert same(outputs(model), before)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_values_may_be_mixed_inside_of_their_head(name: str) -> None:
    model = build(name)
    before = outputs(model)
    attentions = find_units(model).attentions
    mixes = {}
    for attention in attentions:
        for kv in range(attention.kv_heads):
            mix = mixes[attention.name, kv] = randn(attention.head_dim, attention.head_dim, seed=kv)
            left_multiply(model, attention.value.site, head_rows(attention.value, kv, attention.head_dim), mix)
    assert not torch.allclose(outputs(model), before, atol=1e-3)
    for attention in attentions:
        output = matrix(model, attention.output)
        for head, kv in enumerate(expand_kv(attention)):
            columns = head_columns(attention, head)
            output[:, columns] = output[:, columns] @ mixes[attention.name, kv].inverse()
    assert same(outputs(model), before)


@pytest.mark.parametrize("name", [*BIASED, "phi with norms"])
def test_the_bias_of_values_moves_into_that_of_the_output(name: str) -> None:
    model = build(name)
    attentions = find_units(model).attentions
    before = outputs(model)
    for attention in attentions:
        weight, bias = matrix(model, attention.output), vector(model, attention.output)
        values = vector(model, attention.value.site)
        bias = torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.clone()
        for head, kv in enumerate(expand_kv(attention)):
            bias += (
                weight[:, head_columns(attention, head)] @ values[head_rows(attention.value, kv, attention.head_dim)]
            )
        put_map(model, attention.output, weight.clone(), bias)
    assert not torch.allclose(outputs(model), before, atol=1e-3)
    for attention in attentions:
        vector(model, attention.value.site)[attention.value.start : attention.value.stop] = 0
    assert same(outputs(model), before)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_a_direction_without_values_needs_no_columns(name: str) -> None:
    model = build(name)
    attentions = find_units(model).attentions
    full = outputs(model)
    for attention in attentions:
        d = attention.head_dim
        projection = torch.diag(torch.tensor([1.0] * (d - 2) + [0.0] * 2, dtype=torch.float64))
        for kv in range(attention.kv_heads):
            left_multiply(model, attention.value.site, head_rows(attention.value, kv, d), projection)
    before = outputs(model)
    assert not torch.allclose(before, full, atol=1e-3)
    for attention in attentions:
        for head in range(attention.heads):
            matrix(model, attention.output)[:, head_columns(attention, head)][:, -2:] = 100
    assert same(outputs(model), before)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_the_heads_of_a_group_can_be_cut_out(name: str) -> None:
    """Where the forward pass reads their number elsewhere it fails, and the facts are withdrawn."""
    model = build(name)
    attentions = find_units(model).attentions
    assert {attention.resizable for attention in attentions} == {name not in FIXED}
    for attention in attentions:
        for head in query_heads(attention, 1):
            matrix(model, attention.output)[:, head_columns(attention, head)] = 0
    before = outputs(model)
    for attention in attentions:
        kv = [head for head in range(attention.kv_heads) if head != 1]
        heads = [head for head in range(attention.heads) if expand_kv(attention)[head] != 1]
        kept: dict[str, list[Tensor]] = {}
        for rows, chosen in ((attention.query, heads), (attention.key, kv), (attention.value, kv)):
            numbers = torch.arange(rows.stop)
            kept.setdefault(rows.site, []).extend(numbers[head_rows(rows, head, attention.head_dim)] for head in chosen)
        for site, parts in kept.items():
            rows, bias = torch.cat(parts), vector(model, site)
            put_map(model, site, matrix(model, site)[rows], None if bias is None else bias[rows])
        columns = torch.cat([torch.arange(1000)[head_columns(attention, head)] for head in heads])
        put_map(model, attention.output, matrix(model, attention.output)[:, columns], vector(model, attention.output))
    found = find_units(model).attentions
    if name in FIXED:
        assert found == ()
        with pytest.raises((RuntimeError, ValueError)):
            outputs(model)
    else:
        assert [a.kv_heads + 1 for a in found] == [a.kv_heads for a in attentions]
        assert same(outputs(model), before)


@pytest.mark.parametrize("name", [name for name in WITH_ATTENTION if name not in NORMED])
def test_what_queries_and_keys_allow(name: str) -> None:
    """Any invertible map where positions turn nothing and no norm comes between; scaled turns of pairs else."""
    model = build(name)
    before = outputs(model)
    for attention in find_units(model).attentions:
        assert (attention.query_norm, attention.rotary) == (None, name in ROTARY)
        d, turning = attention.head_dim, attention.rotary_dim
        on_query, on_key = torch.eye(d).double(), torch.eye(d).double()
        free = randn(d - turning, d - turning)
        on_key[turning:, turning:] = free
        on_query[turning:, turning:] = torch.linalg.inv(free).T if free.numel() else free
        for index, pair in enumerate(rotary_pairs(attention)):
            angle, scale = torch.tensor(0.5 + index).double(), 1.5 + index
            turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
            at = torch.tensor(pair)
            on_query[at[:, None], at] = scale * turn
            on_key[at[:, None], at] = turn / scale
        multiply_queries_and_keys(model, attention, torch.eye(d).double(), on_key)
        assert not torch.allclose(outputs(model), before, atol=1e-4)
        multiply_queries_and_keys(model, attention, on_query, torch.eye(d).double())
        assert same(outputs(model), before)


@pytest.mark.parametrize("name", NORMED)
def test_what_norms_on_queries_and_keys_allow(name: str) -> None:
    """Weights and biases of the norms: a pair times s on one side and 1/s on the other."""
    model = build(name)
    before = outputs(model)
    for attention in find_units(model).attentions:
        scales = torch.linspace(0.5, 2, attention.head_dim).double()
        for low, high in rotary_pairs(attention):
            scales[high] = scales[low]
        scale_norm(get_module(model, attention.query_norm), scales)
        assert not torch.allclose(outputs(model), before, atol=1e-4)
        scale_norm(get_module(model, attention.key_norm), 1 / scales)
        rounding = 1e-5 if name == "gemma3" else 1e-10  # Gemma's norms multiply in float32
        assert torch.allclose(outputs(model), before, rtol=rounding, atol=rounding)


def scale_norm(norm: nn.Module, scales: Tensor) -> None:
    shift = 1.0 if type(norm).__name__ == "Gemma3RMSNorm" else 0.0
    norm.weight.data = scales * (norm.weight.data + shift) - shift
    if getattr(norm, "bias", None) is not None:
        norm.bias.data *= scales


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_pairs_allow_no_more(name: str) -> None:
    """Neither other pairs, nor pairs in other places, nor an orthogonal map of the whole head."""
    attention = find_units(build(name)).attentions[0]
    d, pairs = attention.head_dim, rotary_pairs(attention)
    swapped = torch.eye(d).double()
    for a, b in zip(pairs[0], pairs[1], strict=True):
        swapped[[a, b]] = swapped[[b, a]]
    angle = torch.tensor(0.7).double()
    neighbours = torch.eye(d).double()
    neighbours[:2, :2] = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    for orthogonal in (swapped, neighbours, torch.linalg.qr(randn(d, d)).Q):
        model = build(name)
        before = outputs(model)
        multiply_queries_and_keys(model, attention, orthogonal, orthogonal)
        assert not torch.allclose(outputs(model), before, atol=1e-5)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_a_pair_without_queries_needs_no_keys(name: str) -> None:
    """Zeros for queries, for keys, or for both come to the same; with norms, the zeros are in their weights."""
    found = []
    for sides in ((True, False), (False, True), (True, True)):
        model = build(name)
        for attention in find_units(model).attentions:
            scales = torch.ones(attention.head_dim).double()
            scales[list(rotary_pairs(attention)[1] if attention.rotary else (1,))] = 0
            one = torch.ones(attention.head_dim).double()
            on_query, on_key = (scales if side else one for side in sides)
            if attention.query_norm is None:
                multiply_queries_and_keys(model, attention, on_query.diag(), on_key.diag())
            else:
                scale_norm(get_module(model, attention.query_norm), on_query)
                scale_norm(get_module(model, attention.key_norm), on_key)
        found.append(outputs(model))
    assert not torch.allclose(found[0], outputs(build(name)), atol=1e-4)
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("name", BIASED)
def test_the_bias_of_keys_matters_only_where_positions_turn_it(name: str) -> None:
    model = build(name)
    attentions = find_units(model).attentions
    before = outputs(model)
    for attention in attentions:
        for key, _ in heads_of_keys(attention):
            vector(model, attention.key.site)[key][attention.rotary_dim :] += 3
    assert same(outputs(model), before)
    for attention in attentions:
        vector(model, attention.key.site)[attention.key.start : attention.key.stop] = 0
    assert same(outputs(model), before) == (name not in ROTARY)


@pytest.mark.parametrize("name", ["gemma2", "t5", "bart"])
def test_eager_attention_agrees(name: str) -> None:
    """Eager attention has the soft cap of Gemma 2. It rounds the softmax to float32, hence the tolerance."""
    model = build(name)
    model.set_attn_implementation("eager")
    before = outputs(model)
    for attention in find_units(model).attentions:
        d = attention.head_dim
        mix = randn(d, d)
        for kv in range(attention.kv_heads):
            left_multiply(model, attention.value.site, head_rows(attention.value, kv, d), mix)
        output = matrix(model, attention.output)
        for head in range(attention.heads):
            output[:, head_columns(attention, head)] = output[:, head_columns(attention, head)] @ mix.inverse()
        scale = 2.0 * torch.eye(d).double()
        multiply_queries_and_keys(model, attention, scale, scale.inverse())
    assert torch.allclose(outputs(model), before, rtol=1e-5, atol=1e-5)


def test_the_facts_hold_in_single_precision() -> None:
    """Tolerance: some hundred float32 roundings of numbers about 1."""
    model = build("llama").float()
    before = outputs(model)
    for attention in find_units(model).attentions:
        mix = torch.linalg.qr(randn(6, 6)).Q.float()
        for kv in range(attention.kv_heads):
            left_multiply(model, attention.value.site, head_rows(attention.value, kv, 6), mix)
        output = matrix(model, attention.output)
        for head in range(attention.heads):
            output[:, head_columns(attention, head)] = output[:, head_columns(attention, head)] @ mix.T
    assert torch.allclose(outputs(model), before, rtol=1e-4, atol=1e-4)


def test_helpers() -> None:
    attention = find_units(build("phi3 partial")).attentions[0]
    assert (attention.head_dim, attention.rotary_dim) == (6, 4)
    assert expand_kv(attention) == (0, 0, 1, 1)
    assert head_rows(attention.key, 1, 6) == slice(30, 36)
    assert head_columns(attention, 2) == slice(12, 18)
    assert rotary_pairs(attention) == ((0, 2), (1, 3))
    assert rotary_pairs(find_units(build("bert")).attentions[0]) == ()
    assert len(Rows(site="a", start=3, stop=8)) == 5


def test_an_unknown_family_has_no_units() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    units = find_units(model)
    assert family_of(model) is None
    assert (units.family, units.mlps, units.attentions) == ("", (), ())
    assert units.skipped == (("", "no facts about this family; factors only"),)


def test_weights_are_not_read() -> None:
    with torch.device("meta"):
        model = MODELS["t5"][0]()
    assert find_units(model) == find_units(build("t5"))


def test_only_units_of_the_given_sites() -> None:
    model = build("bert")
    units = find_units(model, find_sites(model, exclude=["*.0.attention.self.key", "*.1.output.dense"]))
    assert [a.depth for a in units.attentions] == [1]
    assert [mlp.depth for mlp in units.mlps] == [0]
    assert units.skipped == (
        (
            "bert.encoder.layer.0.attention",
            "bert.encoder.layer.0.attention.self.key cannot be taken: it is not among the sites",
        ),
        ("bert.encoder.layer.1", "bert.encoder.layer.1.output.dense cannot be taken: it is not among the sites"),
    )


def break_rows(model: Model) -> None:
    set_module(model, "model.layers.0.self_attn.v_proj", nn.Linear(16, 6))


def break_heads(model: Model) -> None:
    get_module(model, "model.layers.0.self_attn").head_dim = 5


def break_attributes(model: Model) -> None:
    del get_module(model, "model.layers.0.self_attn").head_dim


def break_groups(model: Model) -> None:
    get_module(model, "model.layers.0.self_attn").num_key_value_groups = 4


def break_sharing(model: Model) -> None:
    for part in "kv":
        set_module(model, f"model.layers.0.self_attn.{part}_proj", nn.Linear(16, 18))


def break_parameters(model: Model) -> None:
    get_module(model, "model.layers.0.self_attn").sinks = nn.Parameter(torch.zeros(4))


def break_parts(model: Model) -> None:
    del get_module(model, "model.layers.0.self_attn").o_proj


def break_kind(model: Model) -> None:
    set_module(model, "model.layers.0.self_attn.o_proj", nn.Conv1d(24, 16, 1))


def break_ties(model: Model) -> None:
    get_module(model, "model.layers.0.self_attn.k_proj").weight = get_module(
        model, "model.layers.1.self_attn.k_proj"
    ).weight


def break_precision(model: Model) -> None:
    get_module(model, "model.layers.0.self_attn.q_proj").to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_rows, "v_proj has 6 rows; expected 12"),
        (break_heads, "expected whole heads of 5 features"),
        (break_attributes, "a layout that is not known: 'LlamaAttention' object has no attribute 'head_dim'"),
        (break_groups, "num_key_value_groups is 4, but 4 heads of queries share 2"),
        (break_sharing, "4 heads of queries cannot share 3"),
        (break_parameters, "this LlamaAttention has further parameters: sinks"),
        (break_parts, "this LlamaAttention has no o_proj"),
        (break_kind, "o_proj is of kind 'conv'; expected a linear map"),
        (break_ties, "k_proj shares its weight with model.layers.1.self_attn.k_proj"),
        (break_precision, "q_proj cannot be taken: its weight is stored as float8_e4m3fn"),
    ],
)
def test_what_does_not_agree_is_skipped(damage: Callable[[Model], None], reason: str) -> None:
    model = build("llama")
    damage(model)
    units = find_units(model)
    found = dict(units.skipped)
    assert reason in found["model.layers.0.self_attn"]
    assert "model.layers.0.self_attn" not in [a.name for a in units.attentions]
    assert len(units.mlps) == 2


def test_other_disagreements_are_skipped() -> None:
    gpt2, opt, phi, gated = build("gpt2"), build("opt"), build("phi with norms"), build("llama")
    get_module(opt, "model.decoder.layers.1.self_attn").num_heads = 4
    get_module(phi, "model.layers.0.self_attn").rotary_ndims = 3
    set_module(phi, "model.layers.1.self_attn.k_layernorm", nn.LayerNorm(12))
    set_module(gpt2, "transformer.h.0.mlp.c_fc", Conv1D(21, 16))
    set_module(gated, "model.layers.0.mlp.up_proj", nn.Linear(16, 19))
    for model, name, reason in (
        (opt, "model.decoder.layers.1.self_attn", "num_heads says 4 heads, but the maps have 2 of 8 features"),
        (phi, "model.layers.0.self_attn", "3 of 6 features of a head turn; expected an even number of them"),
        (phi, "model.layers.1.self_attn", "k_layernorm has [12] weights; expected the 6 of one head"),
        (gpt2, "transformer.h.0.mlp", "transformer.h.0.mlp.c_fc has 21 rows; expected 20"),
        (gated, "model.layers.0.mlp", "model.layers.0.mlp.up_proj has 19 rows; expected 20"),
    ):
        assert dict(find_units(model).skipped)[name] == reason


def test_sites_without_facts_are_named() -> None:
    model = build("llama")
    get_module(model, "model.layers.1").adapter = nn.Linear(16, 4)
    assert find_units(model).skipped == (("model.layers.1", "no facts about adapter; factors only"),)
