"""Sparse Spectral Training, against dense gradients and a naive twin."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.training import SparseSpectralTraining
from eckart.training.sst import SpectralLinear


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 5, bias=False), Conv1D(7, 5)).to(dtype)


Loop = Callable[[nn.Module, torch.optim.Optimizer, int, int], None]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(start, stop):
        optimizer.zero_grad()
        model(gaussian(6, 9, seed=step, dtype=dtype)).square().mean().backward()
        optimizer.step()


def layers(model: nn.Module) -> list[SpectralLinear]:
    return [m for m in model.modules() if isinstance(m, SpectralLinear)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str
)
def test_outputs_stay_and_come_back(dtype: torch.dtype, tolerance: float) -> None:
    model = network(dtype)
    twin, names = copy.deepcopy(model), list(model.state_dict())
    x = gaussian(2, 3, 9, dtype=dtype)
    engine = SparseSpectralTraining(model, rank=2)
    assert len(layers(model)) == 3
    torch.testing.assert_close(model(x), twin(x), atol=tolerance, rtol=tolerance)
    engine.finish()
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear, Conv1D]
    assert list(model.state_dict()) == names
    for new, old in zip(model.parameters(), twin.parameters(), strict=True):
        assert new.dtype == dtype
        torch.testing.assert_close(new, old, atol=tolerance, rtol=tolerance)


def test_gradients_are_the_enhanced_ones() -> None:
    """∂u = D v, ∂v = Dᵀ u, ∂σ_i = u_iᵀ D v_i with the gradient D of the dense weight, and the right one of x."""
    dense = nn.Linear(9, 12).double()
    x = gaussian(4, 9).requires_grad_()
    y = gaussian(4, 12, seed=1)
    (dense(x) * y).sum().backward()
    D, dx = dense.weight.grad, x.grad.clone()
    model = nn.Sequential(copy.deepcopy(dense))
    SparseSpectralTraining(model, rank=3)
    layer = layers(model)[0]
    x.grad = None
    (model(x) * y).sum().backward()
    U, V = layer._whole()
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(layer.u.grad, D @ layer.v)
    torch.testing.assert_close(layer.v.grad, D.T @ layer.u)
    torch.testing.assert_close(layer.s.grad, ((D @ V) * U).sum(0))
    torch.testing.assert_close(layer.bias.grad, y.sum(0))


def test_training_is_that_of_the_naive_twin() -> None:
    """Whole U, Σ, V; SGD on the drawn columns by the dense gradient; warm-up, length 1, SVD at every second drawing."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    W = model[0].weight.detach().clone()
    engine = SparseSpectralTraining(model, rank=2, period=3, svd_every=2, warmup=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    engine.attach(optimizer)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    V = Vh.T
    for step in range(9):
        chosen = engine.active()["0"]
        x = gaussian(5, 6, seed=step)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        D = 2 * (x @ ((U * S) @ V.T).T).T @ x
        scale = 0.3 * min(1.0, (step % 3 + 1) / 3)
        u, v, s = U[:, chosen] - scale * D @ V[:, chosen], V[:, chosen] - scale * D.T @ U[:, chosen], (D @ V * U).sum(0)
        S = S - scale * s
        U[:, chosen], V[:, chosen] = u / u.norm(dim=0), v / v.norm(dim=0)
        torch.testing.assert_close(layers(model)[0].dense(), (U * S) @ V.T)
        if step == 5:
            U, S, Vh = torch.linalg.svd((U * S) @ V.T, full_matrices=False)
            V = Vh.T
            torch.testing.assert_close(layers(model)[0].s.detach(), S)
    assert engine.steps == 9


def test_state_of_new_columns_is_dropped_and_others_kept() -> None:
    model = network()
    engine = SparseSpectralTraining(model, rank=2, period=3, svd_every=2, warmup=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine.attach(optimizer)
    layer = layers(model)[0]
    steps(model, optimizer, 0, 3)
    assert layer.u not in optimizer.state
    assert layer.v not in optimizer.state
    assert int(optimizer.state[layer.s]["step"]) == 3  # no SVD yet
    steps(model, optimizer, 3, 6)
    assert layer.s not in optimizer.state
    assert int(optimizer.state[layer.bias]["step"]) == 6
    U, V = layer._whole()
    torch.testing.assert_close(U.T @ U, torch.eye(9, dtype=torch.float64))  # after the SVD
    torch.testing.assert_close(V.T @ V, torch.eye(9, dtype=torch.float64))


def test_large_singular_values_are_drawn_more_often() -> None:
    model = nn.Sequential(nn.Linear(20, 20, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([100.0, *[1.0] * 19])))
    SparseSpectralTraining(model, rank=1)
    layer = layers(model)[0]
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(20)
    for _ in range(600):
        layer.draw(generator)
        counts[layer.active] += 1
    share = 0.5 * (1 / 20 + 100 / 119)
    assert abs(float(counts[0]) / 600 - share) < 0.07  # 3.5 standard errors
    assert int((counts > 0).sum()) == 20


def test_zero_weight_is_trained() -> None:
    model = nn.Sequential(nn.Linear(5, 4)).double()
    nn.init.zeros_(model[0].weight)
    engine = SparseSpectralTraining(model, rank=2, period=2, warmup=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    engine.attach(optimizer)
    for step in range(4):
        optimizer.zero_grad()
        (model(gaussian(6, 5, seed=step)) - 1).square().mean().backward()
        optimizer.step()
    engine.finish()
    assert bool(model[0].weight.any())


@pytest.mark.parametrize("cut", [4, 6, 9])
def test_resume_is_exact(cut: int) -> None:
    def made() -> tuple[nn.Module, SparseSpectralTraining, torch.optim.Optimizer]:
        model = network()
        engine = SparseSpectralTraining(model, rank=2, period=3, svd_every=2, warmup=2)
        return model, engine, torch.optim.AdamW(model.parameters(), lr=0.01)

    whole, engine, optimizer = made()
    engine.attach(optimizer)
    steps(whole, optimizer, 0, cut)
    saved = copy.deepcopy((whole.state_dict(), engine.state_dict(), optimizer.state_dict()))
    steps(whole, optimizer, cut, 12)
    model, other, second = made()
    other.load_state_dict(saved[1])
    model.load_state_dict(saved[0])
    second.load_state_dict(saved[2])
    other.attach(second)
    steps(model, second, cut, 12)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_llama_with_tied_head_trains() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )
    engine = SparseSpectralTraining(model, rank=0.25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine.attach(optimizer)
    tokens = torch.randint(0, 32, (2, 8))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    engine.finish()
    assert losses[-1] < losses[0]
    assert not layers(model)


def test_autocast_gives_its_dtype() -> None:
    model = network(torch.float32)
    SparseSpectralTraining(model, rank=2, exclude=["3"])
    with torch.autocast("cpu", torch.bfloat16):
        out = model(gaussian(3, 9, dtype=torch.float32))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layers(model)[0].u.grad.dtype == torch.float32


# ---- bad input


def test_wrong_options_are_named_all_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)rank.*period.*warmup.*seed.*svd_every"):
        SparseSpectralTraining(network(), rank=0, period=0, warmup=-1, seed=-1, svd_every=0)
    with pytest.raises(InputError, match="share"):
        SparseSpectralTraining(network(), rank=1.5)
    with pytest.raises(InputError, match="below period"):
        SparseSpectralTraining(network(), rank=1, period=5, warmup=5)


def test_sites_that_cannot_be_taken_are_named_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Linear(3, 8), nn.Linear(8, 8)).double()
    model[2].weight.requires_grad_(False)
    with pytest.raises(InputError, match=r"(?s)0: conv.*2: its weight is frozen.*1: rank 4 is above its 3"):
        SparseSpectralTraining(model, rank=4)
    assert [type(m) for m in model] == [nn.Conv1d, nn.Linear, nn.Linear]
    model[1].weight.data[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="1"):
        SparseSpectralTraining(model, rank=2, include=["1"])


def test_optimizer_has_to_hold_the_columns() -> None:
    model = network()
    before = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = SparseSpectralTraining(model, rank=2)
    with pytest.raises(InputError, match="make it after"):
        engine.attach(before)
    with pytest.raises(InputError, match="LBFGS"):
        engine.attach(torch.optim.LBFGS(model.parameters()))
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(InputError, match="attached already"):
        engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(InputError, match="before that"):
        engine.load_state_dict(engine.state_dict())
    engine.detach()
    with pytest.raises(MismatchError, match="steps"):
        engine.load_state_dict({"steps": 3})


def test_divergence_is_named() -> None:
    model = network()
    engine = SparseSpectralTraining(model, rank=2, period=1, warmup=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine.attach(optimizer)
    model(gaussian(2, 9)).square().sum().backward()
    layers(model)[0].s.grad[0] = torch.nan
    with pytest.raises(NotFiniteError, match="0"):
        optimizer.step()
