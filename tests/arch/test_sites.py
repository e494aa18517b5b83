from __future__ import annotations

from collections import Counter

import pytest
import torch
from arch_tiny_models import MODELS, build, minilm
from torch import nn

from eckart.arch import find_blocks, find_sites, skipped_sites
from eckart.errors import InputError

# family: (sites per block, weight parameters of all sites)
ATTENTION = 16 * 16 * 2 + 8 * 16 * 2  # q and o, k and v
EXPECTED = {
    "llama": (7, 2 * (ATTENTION + 3 * 16 * 24)),
    "llama-tied": (7, 2 * (ATTENTION + 3 * 16 * 24)),
    "qwen3": (7, 2 * (ATTENTION + 3 * 16 * 24)),
    "gpt2": (4, 2 * 12 * 16 * 16),
    "bert": (6, 2 * (4 * 16 * 16 + 2 * 16 * 32)),
    "vit": (6, 2 * (4 * 16 * 16 + 2 * 16 * 32)),
    "mixtral": (6, 2 * (ATTENTION + 3 * 3 * 16 * 24)),
    "gpt-oss": (4, 2 * ATTENTION),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_sites_of_a_family(name: str) -> None:
    per_block, parameters = EXPECTED[name]
    sites = find_sites(build(name))
    assert Counter(site.depth for site in sites) == {0: per_block, 1: per_block}
    assert sum(site.weight_parameters for site in sites) == parameters
    assert len({(site.role, site.depth) for site in sites}) == len(sites)
    assert not any(site.tied for site in sites)


def test_t5_keeps_encoder_and_decoder_apart() -> None:
    sites = find_sites(build("t5"))
    assert len(sites) == 2 * 6 + 2 * 10
    roles = {site.role for site in sites}
    assert {"encoder.layer.0.SelfAttention.q", "decoder.layer.1.EncDecAttention.k"} <= roles
    assert len({(site.role, site.depth) for site in sites}) == len(sites)


def test_minilm_encoder() -> None:
    sites = find_sites(minilm())
    assert len(sites) == 36
    assert sum(site.weight_parameters for site in sites) == 10_616_832
    assert [site.depth for site in sites] == [depth for depth in range(6) for _ in range(6)]
    assert sites[0].name == "encoder.layer.0.attention.self.query"
    assert sites[0].role == "attention.self.query"
    assert all(site.bias for site in sites)


@pytest.mark.parametrize("name", MODELS)
def test_sites_come_in_model_order_and_fit_their_parameters(name: str) -> None:
    model = build(name)
    order = [module for module, _ in model.named_modules()]
    sites = find_sites(model, embeddings=True, head=True)
    at = [order.index(s.name.rpartition(".")[0] if s.kind == "experts" else s.name) for s in sites]
    assert at == sorted(at)
    numels = {key: p.numel() for key, p in model.named_parameters(remove_duplicate=False)}
    for site in sites:
        key = site.name if site.kind == "experts" else f"{site.name}.weight"
        assert site.weight_parameters == numels[key]


def test_shapes_are_out_by_in() -> None:
    gpt2 = {site.role: site for site in find_sites(build("gpt2"), embeddings=True)}
    assert (gpt2["attn.c_attn"].out_features, gpt2["attn.c_attn"].in_features) == (48, 16)
    assert gpt2["attn.c_attn"].kind == "conv1d"
    assert (gpt2["transformer.wte"].out_features, gpt2["transformer.wte"].in_features) == (16, 40)
    mixtral = {site.role: site for site in find_sites(build("mixtral"))}
    experts = mixtral["mlp.experts.gate_up_proj"]
    assert (experts.kind, experts.slices, experts.out_features, experts.in_features) == ("experts", 3, 48, 16)


def test_embeddings_and_heads_only_when_asked_for() -> None:
    bert = build("bert")
    plain = {site.name for site in find_sites(bert)}
    with_embeddings = {site.name for site in find_sites(bert, embeddings=True)} - plain
    with_head = {site.name for site in find_sites(bert, head=True)} - plain
    tables = {f"bert.embeddings.{table}_embeddings" for table in ("word", "position", "token_type")}
    assert with_embeddings == tables
    assert with_head == {"cls.predictions.transform.dense", "bert.embeddings.word_embeddings"}
    assert {s.name for s in find_sites(build("vit"), embeddings=True)} - {s.name for s in find_sites(build("vit"))} == {
        "vit.embeddings.patch_embeddings.projection"
    }


def test_a_tied_head_and_its_table_are_one_site() -> None:
    for flags in ({"embeddings": True}, {"head": True}, {"embeddings": True, "head": True}):
        sites = [site for site in find_sites(build("llama-tied"), **flags) if site.depth is None]
        assert [(site.name, site.kind, site.tied) for site in sites] == [
            ("model.embed_tokens", "embedding", ("lm_head",))
        ]
    untied = [site for site in find_sites(build("llama"), embeddings=True, head=True) if site.depth is None]
    assert [(site.name, site.tied) for site in untied] == [("model.embed_tokens", ()), ("lm_head", ())]
    t5 = next(site for site in find_sites(build("t5"), embeddings=True) if site.name == "shared")
    assert t5.tied[:2] == ("encoder.embed_tokens", "decoder.embed_tokens")


def test_patterns() -> None:
    model = build("bert")

    def names(**patterns: list[str]) -> list[str]:
        return [site.name.removeprefix("bert.encoder.layer.") for site in find_sites(model, **patterns)]

    assert names(include=["attention.self.query"]) == ["0.attention.self.query", "1.attention.self.query"]
    assert names(include=["bert.encoder.layer.1.*"], exclude=["attention.*"]) == [
        "1.intermediate.dense",
        "1.output.dense",
    ]
    assert names(include=[r"re:layer\.0\..*\.(key|value)$"]) == [
        "0.attention.self.key",
        "0.attention.self.value",
    ]
    # A tail starts at a dot: "self.query" is one, "elf.query" is none.
    assert names(include=["self.query"]) == ["0.attention.self.query", "1.attention.self.query"]
    with pytest.raises(InputError, match=r"unknown layer pattern 'elf\.query'"):
        names(include=["elf.query"])


def test_all_bad_patterns_are_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        find_sites(build("bert"), include=["atention.self.query", "re:("], exclude=["transform.dense"])
    message = str(caught.value)
    assert "3 problems" in message
    assert "Did you mean 'attention.self.query'" in message
    assert "not a regular expression" in message
    assert "matches cls.predictions.transform.dense, which is left out by default. Ask for it with head=True" in message


def test_patterns_that_leave_nothing() -> None:
    with pytest.raises(InputError, match="leave none of the 12 sites"):
        find_sites(build("bert"), exclude=["*"])


class OwnForward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.own = OwnForward(4, 4)
        self.empty = nn.Linear(0, 4)
        self.row = nn.Linear(4, 1)
        self.integer = nn.Linear(4, 4)
        self.integer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        self.lazy = nn.LazyLinear(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.upward = nn.ConvTranspose1d(4, 4, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:Lazy modules")
def test_what_is_left_alone_has_a_reason() -> None:
    model = nn.Sequential(Block(), Block())
    assert [site.role for site in find_sites(model)] == 2 * ["plain", "grouped"]
    grouped = next(site for site in find_sites(model) if site.role == "grouped")
    assert (grouped.slices, grouped.out_features, grouped.in_features) == (2, 4, 18)
    reasons = {name.removeprefix("0."): reason for name, reason in skipped_sites(model) if name.startswith("0.")}
    expected = {
        "own": "OwnForward has a forward of its own",
        "empty": "empty",
        "row": "rank is 1",
        "integer": "int8",
        "lazy": "no shape yet",
        "attention": "without calling",
        "attention.out_proj": "without calling",
        "reflect": "padding mode is 'reflect'",
        "upward": "ConvTranspose1d is not handled",
        "normed": "parametrised",
        "depthwise": "rank is 1",
    }
    assert reasons.keys() == expected.keys()
    for name, words in expected.items():
        assert words in reasons[name]
    with pytest.raises(InputError, match=r"'own' matches 0\.own, which is left alone: OwnForward"):
        find_sites(model, include=["own"])


def test_expert_layouts_that_are_not_known_are_left_alone() -> None:
    skipped = dict(skipped_sites(build("gpt-oss")))
    assert skipped["model.layers.0.mlp.experts"] == "GptOssExperts stores its weights (experts, in, out)"


def test_a_weight_shared_with_a_module_that_is_left_alone_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), OwnForward(4, 4), nn.Linear(4, 4))
    model[0].weight = model[1].weight
    assert [site.name for site in find_sites(model)] == ["2"]
    assert dict(skipped_sites(model))["0"] == "it shares its weight with 1, which is left alone"


def test_layers_that_are_compressed_already_are_left_alone() -> None:
    class Factored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(2, 4)

        def to_dense(self) -> nn.Module:
            raise NotImplementedError

    model = nn.Sequential(nn.Linear(4, 4), Factored())
    assert [site.name for site in find_sites(model)] == ["0"]
    assert skipped_sites(model) == [("1", "it is compressed already")]


def test_blocks() -> None:
    assert [(b.name, b.depth, b.label) for b in find_blocks(build("t5"))] == [
        ("encoder.block.0", 0, "encoder"),
        ("encoder.block.1", 1, "encoder"),
        ("decoder.block.0", 0, "decoder"),
        ("decoder.block.1", 1, "decoder"),
    ]
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert find_blocks(plain) == ()
    assert [(site.name, site.role, site.depth) for site in find_sites(plain)] == [
        ("0", "0", None),
        ("2", "2", None),
    ]
    # Leaves in a list are no blocks, nor is a list of modules that are all different.
    assert find_blocks(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])) == ()
    assert find_blocks(nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.TransformerEncoderLayer(4, 2)])) == ()


def test_names_that_begin_alike_are_told_apart() -> None:
    """Block 1 is no prefix of block 10."""
    model = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(12))
    assert [site.depth for site in find_sites(model)] == list(range(12))
