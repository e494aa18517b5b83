"""STABLE-RPS, against the dense matrix R of the sharing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers.pytorch_utils import Conv1D

from eckart.errors import InputError, NotFiniteError
from eckart.linalg.hashed import permutation
from eckart.training import StableRPS
from eckart.training.rps import PARTITIONS, random_fold


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator).to(dtype), torch.randn(8, 4, generator=generator).to(dtype))
        for _ in range(count)
    ]


def sgd(model: nn.Module, lr: float = 0.1, steps: int = 5) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x, y in batches(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model


def sharing(engine: StableRPS) -> Tensor:
    """R (n, |M|): the weights are R M."""
    R = torch.zeros(engine.shared_weights, engine.memory.numel(), dtype=torch.float64)
    for tensor, segment in enumerate(engine.segments):
        for i in range(segment.start, segment.stop):
            code = int(engine.codes[i])
            R[i, abs(code) - 1] = float(engine.scales[tensor]) * (1 if code > 0 else -1)
    return R


def flat(model: nn.Module) -> Tensor:
    return torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach()


# ---- the map


@pytest.mark.parametrize(("n", "size"), [(100, 7), (100, 33), (100, 100), (100, 1), (64, 16)])
def test_random_fold_permutes_every_partition(n: int, size: int) -> None:
    codes = random_fold(n, size, seed=3)
    places = codes.abs() - 1
    for partition, start in enumerate(range(0, n, size)):
        part = places[start : start + size]
        assert part.tolist() == permutation(3, size, PARTITIONS + partition)[: len(part)].tolist()
    loads = places.bincount(minlength=size)
    assert loads.sum() == n
    assert set(loads.tolist()) <= {n // size, -(-n // size)}


def test_random_fold_uses_both_signs_evenly_and_other_orders_per_partition() -> None:
    codes = random_fold(4000, 1000, seed=0)
    assert 1800 < int((codes > 0).sum()) < 2200
    parts = (codes.abs() - 1).reshape(4, 1000)
    assert not torch.equal(parts[0], parts[1])
    assert random_fold(8, 4, 0).tolist() == [-1, 4, 3, -2, -3, 2, 1, -4]  # files hold only the seed


@pytest.mark.parametrize("size", [0, 11, 2**31])
def test_random_fold_refuses_impossible_memories(size: int) -> None:
    with pytest.raises(InputError, match="entries"):
        random_fold(10, size, 0)


# ---- what the engine computes


def test_weights_are_scaled_signed_entries_of_the_memory() -> None:
    engine = StableRPS(network(), memory=0.3, seed=5)
    assert engine.memory.numel() == 30
    torch.testing.assert_close(flat(engine.model), sharing(engine) @ engine.memory.detach())
    x = batches(1)[0][0]
    first, second = engine.model[0], engine.model[2]
    expected = linear(torch.tanh(linear(x, first.weight, first.bias)), second.weight, second.bias)
    torch.testing.assert_close(engine(x), expected)


def test_random_start_keeps_the_spread_of_every_tensor() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 200), nn.Linear(200, 50)).double()
    with torch.no_grad():
        model[1].weight.mul_(30)
    spreads = [float(layer.weight.detach().std()) for layer in model]
    engine = StableRPS(model, memory=0.5)
    for layer, spread in zip(engine.model, spreads, strict=True):
        assert float(layer.weight.detach().std()) == pytest.approx(spread, rel=0.05)


def test_full_memory_projected_is_the_model_and_trains_as_it() -> None:
    """Pareto continuity: nothing compressed, nothing changed, not even the steps of SGD."""
    dense = network()
    engine = StableRPS(copy.deepcopy(dense), memory=1.0, start="project", std=0.01)
    torch.testing.assert_close(flat(engine.model), flat(dense))
    sgd(dense)
    sgd(engine)
    torch.testing.assert_close(flat(engine.model), flat(dense))


def test_projected_start_is_the_nearest_that_can_be_shared() -> None:
    dense = network()
    engine = StableRPS(copy.deepcopy(dense), memory=0.2, start="project")
    R = sharing(engine)
    nearest = torch.linalg.lstsq(R, flat(dense)[:, None]).solution[:, 0]
    torch.testing.assert_close(engine.memory.detach(), nearest)


def test_a_step_is_the_projected_dense_step() -> None:
    engine = StableRPS(network(), memory=0.2, std=0.03)
    before, R = flat(engine.model), sharing(engine)
    dense = network()
    with torch.no_grad():
        dense[0].weight.copy_(engine.model[0].weight)
        dense[2].weight.copy_(engine.model[2].weight)
    x, y = batches(1)[0]
    (dense(x) - y).square().mean().backward()
    G = torch.cat([dense[0].weight.grad.flatten(), dense[2].weight.grad.flatten()])
    sgd(engine, lr=0.1, steps=1)
    step = -0.1 * R @ torch.linalg.solve(R.T @ R, R.T @ G)
    torch.testing.assert_close(flat(engine.model) - before, step)


@pytest.mark.parametrize("scaling", [True, False])
def test_scaling_takes_the_spread_of_the_memory_out_of_the_training(scaling: bool) -> None:
    ends = [flat(sgd(StableRPS(network(), memory=0.2, std=std, gradient_scaling=scaling)).model) for std in (0.02, 0.2)]
    assert torch.allclose(*ends, atol=1e-10) is scaling


def test_every_kind_of_map_tied_weights_and_embeddings() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 6)
            self.conv = nn.Conv2d(1, 3, 2)
            self.conv1d = Conv1D(8, 6)
            self.linear = nn.Linear(8, 6)
            self.head = nn.Linear(6, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.linear(self.conv1d(self.embed(tokens)))
            return self.head(h) + self.conv(h[:, None]).sum()

    torch.manual_seed(0)
    with torch.no_grad():
        model = Model()
    nn.init.normal_(model.conv1d.weight)
    engine = StableRPS(model, memory=0.5, embeddings=True, head=True)
    assert engine.shared_weights == 20 * 6 + 3 * 4 + 6 * 8 + 8 * 6
    torch.testing.assert_close(engine.model.embed.weight, engine.model.head.weight)
    tokens = torch.arange(5)[None]
    engine(tokens).sum().backward()
    assert int((engine.memory.grad != 0).sum()) > 0.9 * engine.memory.numel()
    expected = engine(tokens)
    dense = engine.to_dense()
    assert dense.head.weight is dense.embed.weight
    torch.testing.assert_close(dense(tokens), expected)
    torch.testing.assert_close(embedding(tokens, dense.embed.weight), dense.embed(tokens))
    assert type(dense.conv) is nn.Conv2d
    assert {name for name, _ in dense.named_parameters()} == {name for name, _ in Model().named_parameters()}


# ---- as a module


def test_a_file_holds_memory_seed_scales_and_the_rest_and_rebuilds_the_map(tmp_path: Path) -> None:
    engine = sgd(StableRPS(network(), memory=0.2, seed=2**40 + 3))
    shapes = {name: tuple(tensor.shape) for name, tensor in engine.state_dict().items()}
    assert shapes == {"memory": (20,), "seed": (), "scales": (2,), "model.0.bias": (10,), "model.2.bias": (4,)}
    save_file(engine.state_dict(), tmp_path / "engine.safetensors")
    other = StableRPS(network(seed=9), memory=0.2, seed=1)
    other.load_state_dict(load_file(tmp_path / "engine.safetensors"))
    x = batches(1)[0][0]
    torch.testing.assert_close(other(x), engine(x), rtol=0, atol=0)
    torch.testing.assert_close(other.inverse, engine.inverse)


def test_copies_are_independent_also_of_to_dense() -> None:
    engine = StableRPS(network(), memory=0.2)
    clone = copy.deepcopy(engine)
    x = batches(1)[0][0]
    expected = engine(x)
    with torch.no_grad():
        clone.memory.zero_()
    torch.testing.assert_close(engine(x), expected)
    assert float(clone.model[0].weight.abs().sum()) == 0
    torch.testing.assert_close(engine.to_dense()(x), expected)
    assert float(clone.model[0].weight.abs().sum()) == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_other_precisions(dtype: torch.dtype, tolerance: float) -> None:
    """bfloat16 has 8 bits: memory, scales and biases are rounded by up to 0.4 % each."""
    engine = StableRPS(network(), memory=0.2)
    x = batches(1)[0][0]
    expected = engine(x)
    engine.to(dtype)
    assert engine.model[0].weight.dtype == dtype
    torch.testing.assert_close(engine(x.to(dtype)).double(), expected, atol=tolerance, rtol=tolerance)


def test_no_other_random_stream_is_touched() -> None:
    model = network()
    before = torch.get_rng_state()
    StableRPS(model, memory=0.2)(batches(1)[0][0])
    assert torch.equal(before, torch.get_rng_state())


# ---- what it refuses


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)memory.*start.*std"):
        StableRPS(network(), memory=0.0, start="zero", std=-1.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed"):
        StableRPS(network(), memory=0.5, seed=-1)


def test_weights_that_cannot_be_scaled_are_named() -> None:
    model = network()
    nn.init.zeros_(model[2].weight)
    model[0].float()
    with pytest.raises(InputError, match=r"(?s)2 is torch.float64.*2 has constant weights"):
        StableRPS(model, memory=0.5)
    broken = network()
    with torch.no_grad():
        broken[2].weight[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="of 2"):
        StableRPS(broken, memory=0.5)
    with pytest.raises(InputError, match="no map"):
        StableRPS(nn.Sequential(nn.LayerNorm(3)), memory=0.5)
