"""Every trainable parameter goes into one group, by the type of its module, with the splits that configs state."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import pytest
import torch
import transformers as tf
from torch import nn

from eckart.errors import InputError
from eckart.layers import FactoredLinear
from eckart.optim import ParamGroups, param_groups

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
}
GQA = {**SMALL, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 40, "n_positions": 8, "n_embd": 24, "n_layer": 2, "n_head": 4}


def roles(groups: list[dict[str, Any]]) -> dict[str, str]:
    return {name: group["role"] for group in groups for name in group["param_names"]}


def splits(groups: list[dict[str, Any]]) -> dict[str, tuple[int, ...]]:
    return {name: group["split"] for group in groups if group["split"] for name in group["param_names"]}


def check(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Every trainable parameter once, under a name of its own; flags and decay follow the role."""
    names = [name for group in groups for name in group["param_names"]]
    params = [id(p) for group in groups for p in group["params"]]
    assert sorted(params) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert model.get_parameter(name) is p
        assert group["matrix"] is (group["role"] in ("linear", "conv", "experts"))
        if group["role"] in ("embedding", "norm", "bias", "other"):
            assert group["weight_decay"] == 0.0
    assert len(names) == len(set(names))


def test_llama_with_its_head_tied_and_not() -> None:
    for tied in (False, True):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**GQA, tie_word_embeddings=tied))
        groups = param_groups(model, weight_decay=0.1)
        check(model, groups)
        by_role = roles(groups)
        assert by_role["model.embed_tokens.weight"] == "embedding"
        assert by_role.get("lm_head.weight") == (None if tied else "head")
        assert by_role["model.layers.0.self_attn.k_proj.weight"] == "linear"
        assert by_role["model.layers.1.input_layernorm.weight"] == "norm"
        assert {g["weight_decay"] for g in groups if g["matrix"] or g["role"] == "head"} == {0.1}


def test_gpt2_splits_its_columns() -> None:
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, add_cross_attention=True))
    groups = param_groups(model)
    check(model, groups)
    assert splits(groups)["transformer.h.0.attn.c_attn.weight"] == (24, 24, 24)
    assert splits(groups)["transformer.h.1.crossattention.c_attn.weight"] == (24, 24)
    assert len(splits(groups)) == 4
    assert all(g["transposed"] for g in groups if g["role"] == "linear")
    assert roles(groups)["transformer.wpe.weight"] == "embedding"
    assert not splits(param_groups(model, split=False))
    assert all("weight_decay" not in g for g in groups if g["matrix"])  # the optimizer's own


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GQA, pad_token_id=0)), (24, 12, 12)),
        (lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL)), (6,) * 12),
        (lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=40, hidden_size=24, n_layer=2, n_head=4)), (6,) * 12),
        (lambda: tf.FalconForCausalLM(tf.FalconConfig(**SMALL, multi_query=True)), (24, 6, 6)),
        (
            lambda: tf.FalconForCausalLM(tf.FalconConfig(**SMALL, num_kv_heads=2, new_decoder_architecture=True)),
            (12, 6, 6) * 2,
        ),
        (lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**GPT2, multi_query=True)), (24, 6, 6)),
        (lambda: tf.MptForCausalLM(tf.MptConfig(d_model=24, n_heads=4, n_layers=2, vocab_size=40)), (24, 24, 24)),
        (
            lambda: tf.DbrxForCausalLM(
                tf.DbrxConfig(
                    d_model=24, n_heads=4, n_layers=2, vocab_size=40,
                    attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
                    ffn_config={"ffn_hidden_size": 8, "moe_num_experts": 2},
                )
            ),
            (24, 12, 12),
        ),
        (
            lambda: tf.CodeGenForCausalLM(
                tf.CodeGenConfig(vocab_size=40, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
            ),
            None,
        ),
    ],
    ids=["phi3", "neox", "bloom", "falcon", "falcon-new", "bigcode", "mpt", "dbrx", "codegen"],
)  # fmt: skip
def test_fused_maps_by_config(model: Any, sizes: tuple[int, ...] | None) -> None:
    built = model()
    groups = param_groups(built)
    check(built, groups)
    assert set(splits(groups).values()) == ({sizes} if sizes else set())
    assert len(splits(groups)) == (2 if sizes else 0)


def test_the_blocks_of_a_split_are_the_maps_they_claim_to_be() -> None:
    """Zeroing the last block of each head of GPT-NeoX zeroes the values, and with them what attention gives."""
    torch.manual_seed(0)
    model = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL, attention_bias=False)).eval()
    (sizes,) = set(splits(param_groups(model)).values())
    attention = model.gpt_neox.layers[0].attention
    seen: list[torch.Tensor] = []
    attention.dense.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for kind, block in enumerate(attention.query_key_value.weight.split(sizes)):
            if kind % 3 == 2:
                block.zero_()
        model(torch.arange(5)[None])
    assert float(seen[0].abs().max()) == 0.0


def test_experts_convolutions_and_strangers() -> None:
    mixtral = tf.MixtralForCausalLM(tf.MixtralConfig(**GQA, num_local_experts=3, num_experts_per_tok=2))
    groups = param_groups(mixtral)
    check(mixtral, groups)
    stacks = [n for n, role in roles(groups).items() if role == "experts"]
    assert len(stacks) == 4
    assert mixtral.get_parameter(stacks[0]).ndim == 3

    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.deep = nn.Conv1d(8, 8, 3, groups=8)
            self.cube = nn.Conv3d(1, 4, 3, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.attention = nn.MultiheadAttention(8, 2)
            self.factors = FactoredLinear(8, 8, 2)
            self.position = nn.Parameter(torch.zeros(1, 5, 8))
            self.temperature = nn.Parameter(torch.zeros(()))
            self.bags = nn.EmbeddingBag(9, 8)
            self.head = nn.Linear(8, 4)

    strange = Strange()
    groups = param_groups(strange)
    check(strange, groups)
    assert roles(groups) == {
        "stem.weight": "conv",
        "stem.bias": "bias",
        "deep.weight": "other",  # depthwise: vectors, one per channel
        "deep.bias": "bias",
        "cube.weight": "conv",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "attention.in_proj_weight": "linear",
        "attention.in_proj_bias": "bias",
        "attention.out_proj.weight": "linear",
        "attention.out_proj.bias": "bias",
        **{n: "bias" if n.endswith("bias") else "linear" for n, _ in strange.named_parameters() if "factors" in n},
        "position": "other",
        "temperature": "other",
        "bags.weight": "embedding",
        "head.weight": "head",
        "head.bias": "bias",
    }
    assert splits(groups) == {"attention.in_proj_weight": (8, 8, 8)}


def test_adapters_alone_are_routed() -> None:
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["ln_f"]))
    groups = param_groups(adapted)
    check(adapted, groups)
    assert set(roles(groups).values()) == {"linear", "norm"}
    assert not splits(groups)
    assert not any(g["transposed"] for g in groups)


def test_overrides_come_last_and_of_two_the_later_wins() -> None:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GQA))
    groups = param_groups(
        model,
        lr=0.1,
        other_lr=0.01,
        overrides={
            "re:layers\\.0.*proj": {"rank": 4, "lr": 0.2},
            "layers.0.mlp.*.weight": {"rank": 8},
            "lm_head.*": {"matrix": True},
        },
    )
    of = {name: group for group in groups for name in group["param_names"]}
    assert of["model.layers.0.mlp.up_proj.weight"]["rank"] == 8
    assert of["model.layers.0.self_attn.q_proj.weight"]["rank"] == 4
    assert of["model.layers.0.self_attn.q_proj.weight"]["lr"] == 0.2
    assert "rank" not in of["model.layers.1.mlp.up_proj.weight"]
    assert of["model.layers.1.mlp.up_proj.weight"]["lr"] == 0.1
    assert of["model.norm.weight"]["lr"] == 0.01
    assert of["lm_head.weight"]["matrix"]
    halves = param_groups(model, overrides={"q_proj.weight": {"split": [12, 12]}})
    assert splits(halves)["model.layers.1.self_attn.q_proj.weight"] == (12, 12)


def test_every_fault_is_told_at_once() -> None:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GQA))
    with pytest.raises(InputError) as caught:
        param_groups(
            model,
            lr=-1.0,
            scale="layerwise",
            overrides={"q_prj.weight": {}, "k_proj.weight": {"params": []}, "re:(": {}},
        )
    for part in ("q_prj", "k_proj", "regular expression", "lr is a number", "weight_decay", "base_width"):
        assert part in str(caught.value)
    with pytest.raises(InputError, match=r"unknown scale 'mpu'\. Did you mean 'mup'"):
        param_groups(model, scale="mpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="without scale"):
        param_groups(model, base_width=8)
    with pytest.raises(InputError, match="give width"):
        param_groups(nn.Linear(4, 4), scale="mup", lr=0.1, weight_decay=0.1, base_width=2)
    with pytest.raises(InputError, match="no parameters of the same name"):
        param_groups(model, scale="mup", lr=0.1, weight_decay=0.1, base_model=nn.Linear(2, 2))
    with pytest.raises(InputError, match="add up"):
        param_groups(model, overrides={"q_proj.weight": {"split": (12, 11)}})
    with pytest.raises(InputError, match="nothing is trainable"):
        param_groups(model.requires_grad_(False))


def test_the_table_shows_where_everything_went_and_optimizers_take_it() -> None:
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2))
    groups = param_groups(model, lr=0.01, weight_decay=0.1)
    lines = str(groups).splitlines()
    assert lines[0].split()[:2] == ["role", "rule"]
    assert len(lines) == 1 + len(groups)
    assert "24+24+24" in str(groups)
    assert repr(groups) == str(groups)
    assert isinstance(groups, ParamGroups)
    for cls in (torch.optim.AdamW, torch.optim.SGD):
        optimizer = cls(param_groups(model, lr=0.01, weight_decay=0.1))
        assert {group["lr"] for group in optimizer.param_groups} == {0.01}
        model(torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
        optimizer.step()
        assert optimizer.state_dict()["param_groups"][0]["param_names"]
