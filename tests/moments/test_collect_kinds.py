"""Convolutions, embeddings, transformers' Conv1D, encoders with padding, encoder-decoders, experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart.arch import find_sites, site_matrices
from eckart.errors import EckartWarning, InputError
from eckart.moments import collect, sampled_targets
from eckart.records import Site

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::eckart.errors.EckartWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def cubes(outputs: Any, batch: Any, generator: torch.Generator) -> tuple[Tensor, float]:
    """Deterministic; padding does not enter."""
    y = outputs if isinstance(outputs, Tensor) else outputs[0]
    weights = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype).cos()
    per_token = (weights * (y + 0.1 * y**3)).sum(-1)
    if isinstance(batch, dict) and per_token.shape == batch["attention_mask"].shape:
        per_token = per_token * batch["attention_mask"]
    return per_token.sum(), float(y.shape[0])


CONVS = [
    (nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2, dilation=1), (3, 4, 7, 6)),
    (nn.Conv2d(4, 4, (3, 2), groups=4, padding=(0, 1), stride=(1, 2), dilation=(2, 1)), (3, 4, 7, 6)),
    (nn.Conv2d(3, 5, 3, padding=2, padding_mode="circular"), (2, 3, 6, 6)),
    (nn.Conv2d(3, 5, 4, padding="same", bias=False), (2, 3, 6, 5)),
    (nn.Conv2d(3, 5, 2, padding="valid"), (3, 6, 5)),
    (nn.Conv1d(4, 6, 3, groups=2, padding=1, dilation=2, padding_mode="reflect"), (3, 4, 9)),
    (nn.Conv1d(4, 6, 5, stride=2, padding=3), (4, 4, 9)),
]


@pytest.mark.parametrize(("conv", "shape"), CONVS)
def test_convolutions(conv: nn.Conv1d | nn.Conv2d, shape: tuple[int, ...]) -> None:
    """Forward: mean output = W · mean input. Backward: the gradient of the weight of one position is g xᵀ."""
    model = nn.Sequential(conv).double()
    kernel = conv.weight[0, 0].numel()
    site = Site(
        name="0",
        kind="conv",
        out_features=conv.out_channels // conv.groups,
        in_features=conv.in_channels // conv.groups * kernel,
        slices=conv.groups,
    )
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = collect(model, [x], [site], loss=cubes)
    image = x if x.ndim == conv.weight.ndim else x[None]
    y = model(image).detach().requires_grad_()
    cubes(y if x.ndim == image.ndim else y[0], x, torch.Generator())[0].backward()
    weights = conv.weight.detach().reshape(conv.groups, -1, kernel * conv.in_channels // conv.groups)
    bias = torch.zeros(conv.out_channels).double() if conv.bias is None else conv.bias.detach()
    outputs = y.detach().transpose(0, 1).flatten(1).unflatten(0, (conv.groups, -1))  # (groups, out, N)
    gradients = y.grad.transpose(0, 1).flatten(1).unflatten(0, (conv.groups, -1))
    n = outputs.shape[-1]
    for group in range(conv.groups):
        found = moments.site("0", slice=group)
        W, centred = weights[group], outputs[group] - bias.unflatten(0, (conv.groups, -1))[group][:, None]
        assert found.count == n
        torch.testing.assert_close(W @ found.mean, centred.mean(1))
        torch.testing.assert_close(W @ found.second @ W.T, centred @ centred.T / n)
        torch.testing.assert_close(found.gradient, gradients[group] @ gradients[group].T / n)
    one = collect(model, [image[:1, ..., :]], [site], loss=cubes)
    assert one.site("0").count == n // image.shape[0]


def test_convolutions_pair_inputs_with_gradients() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=2, padding=1).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    site = Site(name="0", kind="conv", out_features=3, in_features=18, slices=2)
    moments = collect(nn.Sequential(conv), [x], [site], loss=cubes)
    y = conv(x).detach().requires_grad_()
    cubes(y, x, torch.Generator())[0].backward()
    rows, columns = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 18, dtype=torch.float64)
    for b in range(3):
        for i in range(5):
            for j in range(5):
                for group in range(2):
                    patch = nn.functional.pad(x, (1, 1, 1, 1))[b, 2 * group : 2 * group + 2, i : i + 3, j : j + 3]
                    square = torch.outer(y.grad[b, 3 * group : 3 * group + 3, i, j], patch.flatten()).square()
                    rows[group] += square.sum(1) / 75
                    columns[group] += square.sum(0) / 75
    for group in range(2):
        torch.testing.assert_close(moments.site("0", slice=group).fisher_rows, rows[group])
        torch.testing.assert_close(moments.site("0", slice=group).fisher_columns, columns[group])


def test_unfolding_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1)).double()
    x = torch.randn(5, 4, 5, 5, dtype=torch.float64)
    site = Site(name="0", kind="conv", out_features=3, in_features=18, slices=2)
    whole = collect(model, [x], [site], loss=cubes)
    monkeypatch.setattr("eckart.moments.rows.CHUNK_NUMBERS", 2 * 25 * 36)
    pieces = collect(model, [x], [site], loss=cubes)
    for half in ("A", "B"):
        for name in ("second", "gradient", "fisher_rows", "fisher_columns"):
            a, b = (getattr(moments.site("0", slice=1, half=half), name) for moments in (whole, pieces))
            torch.testing.assert_close(a, b)
        assert whole.site("0", half=half).count == pieces.site("0", half=half).count == {"A": 75, "B": 50}[half]


def test_embeddings_have_frequencies() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 3)).double()
    ids = torch.tensor([[0, 1, 1, 6], [1, 2, 0, 0], [6, 6, 3, 1]])
    site = Site(name="0", kind="embedding", out_features=3, in_features=7)
    found = collect(model, [ids], [site], loss=cubes).site("0")
    frequencies = torch.bincount(ids.flatten(), minlength=7) / 12
    torch.testing.assert_close(found.second, frequencies.double())
    assert found.second is found.mean
    y = model(ids).detach().requires_grad_()
    cubes(y, ids, torch.Generator())[0].backward()
    g = y.grad.reshape(12, 3)
    torch.testing.assert_close(found.gradient, g.T @ g / 12)
    torch.testing.assert_close(found.fisher_rows, g.square().mean(0))
    one_hot = nn.functional.one_hot(ids.flatten(), 7).double()
    torch.testing.assert_close(found.fisher_columns, (one_hot.T @ g.square().sum(1)) / 12)


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
    )
    return transformers.BertModel(config).double()


def padded(fill: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 31, (4, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([9, 4, 7, 2])[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, fill), "attention_mask": mask}


def test_padding_does_not_matter() -> None:
    model = bert()
    sites = find_sites(model, embeddings=True, include=("*",))
    one, two = (collect(model, [padded(fill)], sites, loss=cubes) for fill in (0, 17))
    masked = [site for site in sites if site.kind == "linear" and "pooler" not in site.name]
    assert len(masked) >= 12
    for site in masked:
        a, b = one.site(site.name), two.site(site.name)
        assert a.count == 22
        torch.testing.assert_close(a.second, b.second, rtol=1e-12, atol=0)
        torch.testing.assert_close(a.gradient, b.gradient, rtol=1e-9, atol=1e-18)
    words = one.site("embeddings.word_embeddings")
    assert words.count == 22
    torch.testing.assert_close(words.second, two.site("embeddings.word_embeddings").second)


def test_padded_batches_equal_single_sentences() -> None:
    model = bert()
    sites = find_sites(model)
    batch = padded(0)
    together = collect(model, [batch], sites, loss=cubes)
    singles = [
        {name: value[i : i + 1, : int(batch["attention_mask"][i].sum())] for name, value in batch.items()}
        for i in range(4)
    ]
    apart = collect(model, singles, sites, loss=cubes)
    for site in sites:
        for half in ("A", "B"):
            a, b = together.site(site.name, half=half), apart.site(site.name, half=half)
            assert a.count == b.count
            torch.testing.assert_close(a.second, b.second)
            torch.testing.assert_close(a.gradient, b.gradient)
            torch.testing.assert_close(a.fisher_columns, b.fisher_columns)
    assert together.tokens == apart.tokens == 22


def test_query_key_and_value_share() -> None:
    moments = collect(bert(), [padded(0)], find_sites(bert()), gradients="none")
    name = "encoder.layer.1.attention.self."
    assert {moments.input_of[name + part] for part in ("query", "key", "value")} == {name + "query"}
    assert len(moments.inputs) == 8


def test_a_mask_that_fits_nothing_is_told() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(3, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.map(x.reshape(-1, 2, 3))

    batch = {"x": torch.randn(2, 4, 3), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])}
    site = Site(name="map", kind="linear", out_features=3, in_features=3)
    with pytest.warns(EckartWarning, match="mask does not fit the input of 1 sites, as map"):
        moments = collect(Windows(), [batch], [site], gradients="none")
    assert moments.site("map").count == 8
    assert moments.site("map", half="A").count == 4


def test_flattened_tokens_are_masked() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(3, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.map(x.reshape(-1, 3)).view_as(x)

    x = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    site = Site(name="map", kind="linear", out_features=3, in_features=3)
    moments = collect(Flat(), [{"x": x, "attention_mask": mask}], [site], gradients="none")
    torch.testing.assert_close(moments.site("map", half="B").mean, x[1, :2].double().mean(0))
    torch.testing.assert_close(moments.site("map").mean, x[mask == 1].double().mean(0))


def test_gpt2_uses_its_conv1d() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=23, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).double()
    ids = torch.randint(0, 23, (3, 10), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sites = find_sites(model)
    assert {site.kind for site in sites} == {"conv1d"}
    moments = collect(model, [batch], sites, loss=cubes)
    site = next(site for site in sites if site.name.endswith("1.mlp.c_fc"))
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        seen.append((args[0], output))

    model.eval().get_submodule(site.name).register_forward_hook(keep)
    cubes(model(**batch), batch, torch.Generator())[0].backward()
    x, y = seen[0]
    x, g = x.detach().reshape(30, -1), y.grad.reshape(30, -1)
    found = moments.site(site.name)
    torch.testing.assert_close(found.second, x.T @ x / 30)
    torch.testing.assert_close(found.gradient, g.T @ g / 30)
    W = site_matrices(model, site)[0]["weight"].detach()
    bias = site_matrices(model, site)[0]["bias"].detach()
    torch.testing.assert_close(W @ found.mean + bias, y.detach().reshape(30, -1).mean(0))


@pytest.mark.parametrize("decoder_length", [6, 4])
@pytest.mark.parametrize("with_mask", [True, False])
def test_encoder_decoders_use_both_masks(decoder_length: int, with_mask: bool) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=23, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).double()
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 3:] = 0
    decoder_mask = torch.ones(2, decoder_length, dtype=torch.long)
    decoder_mask[1, 1:] = 0
    batch = {
        "input_ids": torch.randint(1, 23, (2, 6), generator=generator),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(1, 23, (2, decoder_length), generator=generator),
    }
    if with_mask:
        batch["decoder_attention_mask"] = decoder_mask
    sites = find_sites(model)
    moments = collect(model, [batch], sites, loss=sampled_targets)
    decoded = int(decoder_mask.sum()) if with_mask else 2 * decoder_length
    assert moments.units == decoded
    for site in sites:
        crossed = site.name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        expected = 9 if site.name.startswith("encoder") or crossed else decoded
        assert moments.site(site.name).count == expected, site.name
    assert moments.meta["unmasked"] == []


def test_a_decoder_without_encoder_uses_the_mask() -> None:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=23,
        hidden_size=8,
        num_hidden_layers=1,
        ffn_dim=12,
        num_attention_heads=2,
        max_position_embeddings=16,
        word_embed_proj_dim=8,
    )
    model = transformers.OPTForCausalLM(config)
    batch = {"input_ids": torch.randint(4, 23, (2, 5)), "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])}
    moments = collect(model, [batch], find_sites(model), loss=sampled_targets)
    assert {moments.site(name).count for name in moments.names()} == {7}


EXPERTS = 12


def mixture() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=23,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    model = transformers.MixtralForCausalLM(config).double().eval()
    model.set_experts_implementation("eager")  # the default, grouped_mm, takes no float64
    return model


def expert_calls(model: nn.Module, batch: dict[str, Tensor]) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Inputs and output gradients of every expert, token by token from the definition."""
    experts = model.model.layers[0].mlp.experts
    calls: list[tuple[str, int, int, Tensor, Tensor]] = []

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for t in range(len(hidden)):
            total = torch.zeros_like(hidden[t])
            for s in range(index.shape[1]):
                e = int(index[t, s])
                inner = experts.gate_up_proj[e] @ hidden[t]
                gate, up = inner.chunk(2)
                middle = nn.functional.silu(gate) * up
                out = experts.down_proj[e] @ middle
                for name, x, y in (("gate_up_proj", hidden[t], inner), ("down_proj", middle, out)):
                    y.retain_grad()
                    calls.append((name, e, t, x.detach(), y))
                total = total + weights[t, s] * out
            rows.append(total)
        return torch.stack(rows)

    experts.forward = forward
    cubes(model(**batch), batch, torch.Generator())[0].backward()
    del experts.forward
    keep = batch["attention_mask"].flatten()
    found: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for name in ("gate_up_proj", "down_proj"):
        for e in range(EXPERTS):
            mine = [(x, y.grad) for n, i, t, x, y in calls if (n, i) == (name, e) and keep[t]]
            if mine:
                found[name, e] = (torch.stack([x for x, _ in mine]), torch.stack([g for _, g in mine]))
    return found


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_experts_one_by_one(implementation: str) -> None:
    model = mixture()
    model.set_experts_implementation(implementation)
    ids = torch.randint(0, 23, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    sites = [site for site in find_sites(model) if site.kind == "experts"]
    assert len(sites) == 2
    moments = collect(model, [batch], sites, loss=cubes)
    assert "forward" not in model.model.layers[0].mlp.experts.__dict__
    expected = expert_calls(model, batch)
    counts = []
    for site in sites:
        part = site.name.rpartition(".")[2]
        mine = [expected[part, e] for e in range(EXPERTS) if (part, e) in expected]
        pooled_x, pooled_g = torch.cat([x for x, _ in mine]), torch.cat([g for _, g in mine])
        assert len(pooled_x) == 16
        for e in range(EXPERTS):
            x, g = expected.get((part, e), (pooled_x[:0], pooled_g[:0]))
            found = moments.site(site.name, slice=e)
            counts.append(len(x))
            assert found.count == len(x)
            assert found.tokens_per_unit == len(x) / 2
            share = len(x) / (len(x) + site.in_features)
            n = max(len(x), 1)
            torch.testing.assert_close(found.second, share * x.T @ x / n + (1 - share) * pooled_x.T @ pooled_x / 16)
            torch.testing.assert_close(found.gradient, share * g.T @ g / n + (1 - share) * pooled_g.T @ pooled_g / 16)
            own = (g.square() * x.square().sum(1, keepdim=True)).sum(0) / n
            pooled = (pooled_g.square() * pooled_x.square().sum(1, keepdim=True)).mean(0)
            torch.testing.assert_close(found.fisher_rows, share * own + (1 - share) * pooled)
    assert 0 in counts, "the seed leaves no expert without a token; choose another"


def test_experts_without_a_mask_count_every_token() -> None:
    model = mixture()
    sites = [site for site in find_sites(model) if site.kind == "experts"]
    ids = torch.randint(0, 23, (3, 5), generator=torch.Generator().manual_seed(0))
    moments = collect(model, [{"input_ids": ids}], sites, gradients="none")
    for site in sites:
        assert sum(moments.site(site.name, slice=e).count for e in range(EXPERTS)) == 30
        halves = moments.inputs[site.name].count.sum(1)
        assert halves.tolist() == [20, 10]


def test_strange_experts_are_refused_and_put_back() -> None:
    model = mixture()
    experts = model.model.layers[0].mlp.experts

    def strange(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return hidden

    experts.forward = strange
    sites = [site for site in find_sites(model) if site.kind == "experts"]
    ids = torch.randint(0, 23, (2, 5))
    with pytest.raises(InputError, match="compute something else"):
        collect(model, [{"input_ids": ids}], sites, loss=sampled_targets)
    assert experts.forward is strange
