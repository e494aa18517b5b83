"""Masks: the file, whose they are, and zeros that stay zero under every optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Adafactor as HFAdafactor

from eckart.errors import FileError, InputError, MismatchError, NotFiniteError
from eckart.optim import Dion, GaLore, Muon
from eckart.prune import MaskSet, keep_zero


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8)).to(dtype)


def random_masks(model: nn.Module, density: float = 0.3, seed: int = 0) -> MaskSet:
    draw = torch.Generator().manual_seed(seed)
    return MaskSet(
        {n: torch.rand(p.shape, generator=draw) < density for n, p in model.named_parameters() if p.ndim > 1}
    )


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "adamw-fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
    "adafactor-hf": lambda m: HFAdafactor(m.parameters(), lr=0.01, relative_step=False, beta1=0.9),
    "muon-torch": lambda m: torch.optim.Muon(matrices(m), lr=0.01),
    "muon": lambda m: Muon(matrices(m), lr=0.01),
    "galore": lambda m: GaLore(matrices(m), lr=0.01, rank=4),
    "dion": lambda m: Dion(matrices(m), lr=0.01, rank=4),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2),
}


OURS = {"muon", "galore", "dion"}
"""A thousand steps of these are in ``benchmarks/prune_training.py``."""


def train(model: nn.Module, optimizer: Any, steps: int, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    X = torch.randn(32, 12, generator=draw).to(dtype)
    Y = torch.randn(32, 8, generator=draw).to(dtype)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(X) - Y).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        closure()
        optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()


def step_often(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps on a few gradients in turn, without the cost of computing them."""
    draw = torch.Generator().manual_seed(1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    pool = [[torch.randn(p.shape, generator=draw) for p in parameters] for _ in range(7)]
    for step in range(steps):
        for parameter, gradient in zip(parameters, pool[step % 7], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])
def test_no_pruned_weight_leaks_in_a_thousand_steps(name: str) -> None:
    model = nn.Sequential(nn.Linear(12, 16, bias=False))
    masks = random_masks(model)
    optimizer = OPTIMIZERS[name](model)
    step_often(model, optimizer, 3)  # the optimizer has seen the dense weights, and remembers them
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    keep_zero(masks, model, optimizer)
    assert masks.leaks(model) == {}
    step_often(model, optimizer, 200 if name in OURS else 1000)
    assert masks.leaks(model) == {}
    for key, mask in masks.items():
        moved = (model.get_parameter(key) != before[key])[mask]
        assert moved.float().mean() > 0.9  # the others train on


def test_flat_state_of_lbfgs_does_not_leak_either() -> None:
    model = network()
    masks, optimizer = random_masks(model), OPTIMIZERS["lbfgs"](model)
    keep_zero(masks, model, optimizer)
    train(model, optimizer, 20)
    assert not masks.leaks(model)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adafactor-hf", "muon-torch"])
def test_stale_state_is_zeroed_at_once_where_it_has_the_shape(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 3)
    masks = random_masks(model)
    with keep_zero(masks, model, optimizer):
        seen = 0
        for key, mask in masks.items():
            for value in optimizer.state[model.get_parameter(key)].values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    assert (value[~mask] == 0).all()
                    assert (value[mask] != 0).any()
                    seen += 1
        assert seen >= 2


def test_masking_gradients_alone_would_leak_under_muon() -> None:
    model = network()
    masks = random_masks(model)
    masks.apply(model)
    optimizer = torch.optim.Muon(matrices(model), lr=0.01)
    for key, mask in masks.items():
        model.get_parameter(key).register_hook(lambda g, mask=mask: g * mask)
    train(model, optimizer, 1)
    assert sum(masks.leaks(model).values()) > 100


def test_signed_codes_are_zeroed_and_unsigned_ones_left_alone() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model.get_parameter("0.weight")
    optimizer.state[weight] = {
        "int8": torch.ones_like(weight, dtype=torch.int8),
        "uint8": torch.ones_like(weight, dtype=torch.uint8),  # 0 means something else there
        "bf16": torch.ones_like(weight, dtype=torch.bfloat16),
        "row": torch.ones(16),
        "step": torch.tensor(3.0),
    }
    masks = random_masks(model)
    keep_zero(masks, model, optimizer)
    gone, state = ~masks["0.weight"], optimizer.state[weight]
    assert (state["int8"][gone] == 0).all()
    assert (state["bf16"][gone] == 0).all()
    assert (state["uint8"] == 1).all()
    assert (state["row"] == 1).all()
    assert state["step"] == 3


def test_remove_lets_go_and_twice_is_fine() -> None:
    model = network()
    masks, optimizer = random_masks(model), torch.optim.AdamW(model.parameters())
    held = keep_zero(masks, model, optimizer)
    held.remove()
    held.remove()
    train(model, optimizer, 2)
    assert masks.leaks(model)
    with keep_zero(masks, model, optimizer):
        train(model, optimizer, 2)
        assert not masks.leaks(model)


def test_the_wrapped_optimizer_of_accelerate() -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    wrapped = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.01))
    masks = random_masks(model)
    keep_zero(masks, model, wrapped)
    train(model, wrapped, 5)
    assert not masks.leaks(model)


def test_names_copies_pickles_and_saving_are_unharmed() -> None:
    model = network()
    names = list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks = random_masks(model)
    keep_zero(masks, model, optimizer)
    assert list(model.state_dict()) == names
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not masks.leaks(twin)
        assert type(twin[0]) is nn.Linear
    state = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, state)


# ---- the set itself


def test_zeros_of_a_model() -> None:
    model = network()
    nn.init.zeros_(model[0].bias)
    masks = random_masks(model)
    masks.apply(model)
    found = MaskSet.from_model(model)
    assert found.same(masks)
    assert list(found) == ["0.weight", "2.weight"]  # the bias of zeros is no pruned weight
    assert list(MaskSet.from_model(model, ["0.bias"])) == ["0.bias"]
    with pytest.raises(InputError, match="nothing"):
        MaskSet.from_model(model, ["nothing"])
    assert found.density() == found.kept() / (12 * 16 + 16 * 8)
    assert found.densities()["0.weight"] == pytest.approx(float(masks["0.weight"].float().mean()))
    assert MaskSet({}).density() == 1


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 16), (2, 3, 3, 3)], ids=str)
def test_the_file_gives_back_the_masks_at_a_bit_per_weight(shape: tuple[int, ...], tmp_path: Path) -> None:
    masks = MaskSet(
        {"w": torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5, "v": torch.ones(9).bool()}
    )
    masks.save(tmp_path / "m.safetensors")
    again = MaskSet.load(tmp_path / "m.safetensors")
    assert again.same(masks)
    assert list(again) == ["w", "v"]
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    large = MaskSet({"w": torch.ones(400, 400).bool()})
    large.save(tmp_path / "large")
    assert (tmp_path / "large").stat().st_size < 400 * 400 / 8 + 500


def test_masks_of_another_model_are_refused_with_every_name(tmp_path: Path) -> None:
    model = network()
    masks = random_masks(model)
    other = nn.Sequential(nn.Linear(12, 17), nn.GELU())
    before = other[0].weight.detach().clone()
    for act in (masks.check, masks.apply, lambda m: keep_zero(masks, m, torch.optim.SGD(m.parameters(), lr=0.1))):
        with pytest.raises(MismatchError) as error:
            act(other)
        assert "0.weight has shape (17, 12) in the model, (16, 12) in the masks" in str(error.value)
        assert "2.weight is no parameter" in str(error.value)
    assert torch.equal(other[0].weight, before)
    masks.apply(model)
    masks.save(tmp_path / "m", model)
    assert MaskSet.load(tmp_path / "m", model).same(masks)
    with pytest.raises(MismatchError, match="no parameter"):
        MaskSet.load(tmp_path / "m", other)
    with pytest.raises(MismatchError, match="other weights"):
        MaskSet.load(tmp_path / "m", network(seed=1))
    assert MaskSet.load(tmp_path / "m", network(seed=1), other_weights=True).same(masks)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    masks = random_masks(network())
    masks.save(tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-3])
    save_file({"w": torch.ones(3)}, tmp_path / "foreign")
    (tmp_path / "text").write_text("no tensors")
    for name in ("cut", "foreign", "text", "missing"):
        with pytest.raises(FileError):
            MaskSet.load(tmp_path / name)
    with pytest.raises(FileError):
        masks.save(tmp_path / "no" / "folder")
    masks.save(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == whole


def test_what_is_no_mask() -> None:
    with pytest.raises(InputError) as error:
        MaskSet({"a": torch.ones(2), "b": [True], "c": torch.ones(2).bool()})  # type: ignore[dict-item]
    assert "a: expected a bool tensor" in str(error.value)
    assert "b: " in str(error.value)
    assert "c: " not in str(error.value)


def test_tied_weights_have_one_mask_under_any_name() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    mask = torch.rand(9, 4) < 0.5
    for name in ("embed.weight", "head.weight"):
        masks = MaskSet({name: mask})
        keep_zero(masks, model, torch.optim.SGD(model.parameters(), lr=0.1)).remove()
        assert not masks.leaks(model)
    with pytest.raises(MismatchError, match="one tied weight with two masks"):
        MaskSet({"embed.weight": mask, "head.weight": mask}).check(model)
    assert len(MaskSet.from_model(model)) == 1


def test_nan_and_no_optimizer() -> None:
    model = network()
    masks = random_masks(model)
    with pytest.raises(InputError, match="expected a torch"):
        keep_zero(masks, model, "adam")
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"0\.weight"):
        keep_zero(masks, model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = network(dtype)
    masks, optimizer = random_masks(model), torch.optim.AdamW(model.parameters(), lr=0.01)
    keep_zero(masks, model, optimizer)
    train(model, optimizer, 5)
    assert not masks.leaks(model)
