"""M-FAC as an optimizer, against a dense inverse of the empirical Fisher matrix."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.optim import MFAC

SHAPES = ((3, 4), (4,), (2, 3, 2))


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(gaussian(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(SHAPES)]


def run(optimizer: torch.optim.Optimizer, steps: range, seed: int = 100) -> None:
    """Gradients are random, and not only noise: they point the same way a little."""
    for step in steps:
        for i, p in enumerate(q for group in optimizer.param_groups for q in group["params"]):
            p.grad = (gaussian(*p.shape, seed=seed + 10 * step + i) + 0.5 + 0.1 * p.detach().double()).to(p.dtype)
        optimizer.step()


def naive(
    params: list[Tensor],
    steps: int,
    *,
    lr: float,
    window: int,
    damping: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    blocks: str | int = "full",
    seed: int = 100,
) -> list[Tensor]:
    """The definition: F written down anew in every step from a list of gradients, its blocks inverted."""
    sizes = [p.numel() for p in params]
    w = torch.cat([p.detach().double().reshape(-1) for p in params])
    number = []
    for i, size in enumerate(sizes):
        inner = torch.arange(size)
        number.append(inner * 0 if blocks in ("full", "layer") else inner // int(blocks))
        number[-1] = number[-1] + (0 if blocks == "full" else 1000 * i)
    label = torch.cat(number)
    v = torch.zeros_like(w)
    seen: list[Tensor] = []
    for step in range(steps):
        parts = w.split(sizes)
        raw = [
            gaussian(*p.shape, seed=seed + 10 * step + i) + 0.5 + 0.1 * part.view(p.shape)
            for i, (p, part) in enumerate(zip(params, parts, strict=True))
        ]
        g = torch.cat([r.reshape(-1) for r in raw])
        if not decoupled:
            g = g + weight_decay * w
        seen = [*seen, g][-window:]
        F = sum(torch.outer(s, s) for s in seen) / window
        F = F * (label[:, None] == label) + damping * torch.eye(w.numel(), dtype=torch.float64)
        v = momentum * v + (1 - momentum) * torch.linalg.solve(F, g)
        w = w - lr * v - (lr * weight_decay * w if decoupled else 0)
    return [part.view(p.shape) for part, p in zip(w.split(sizes), params, strict=True)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.1},
    "decoupled decay": {"weight_decay": 0.1, "decoupled": True},
    "by layer": {"blocks": "layer", "momentum": 0.5},
    "blocks of five": {"blocks": 5},
    "blocks above and below the window": {"blocks": 9, "weight_decay": 0.01},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_are_those_of_the_dense_inverse(options: dict[str, Any]) -> None:
    params = parameters()
    expected = naive(params, 11, lr=0.01, window=7, damping=0.05, **options)
    run(MFAC(params, lr=0.01, window=7, damping=0.05, **options), range(11))
    torch.testing.assert_close([p.detach() for p in params], expected)


@pytest.mark.parametrize(
    ("dtype", "buffer", "tolerance"),
    # 7 digits in float32; a buffer in bfloat16 rounds every gradient to 3; weights in bfloat16 to 3 as well
    [(torch.float32, None, 1e-4), (torch.float32, torch.bfloat16, 3e-2), (torch.bfloat16, None, 3e-2)],
)
@pytest.mark.parametrize("blocks", ["full", "layer", 5])
def test_narrow_dtypes_stay_near(
    dtype: torch.dtype, buffer: torch.dtype | None, tolerance: float, blocks: str | int
) -> None:
    params = parameters(dtype)
    expected = naive(params, 9, lr=0.003, window=4, damping=0.1, blocks=blocks)
    optimizer = MFAC(params, lr=0.003, window=4, damping=0.1, blocks=blocks, buffer_dtype=buffer)
    run(optimizer, range(9))
    torch.testing.assert_close([p.detach().double() for p in params], expected, rtol=tolerance, atol=tolerance)
    assert optimizer.state[params[0]]["gradients"].dtype == (buffer or torch.float32)


def test_the_example_of_one_gradient() -> None:
    """F⁻¹g = m g/(mλ + ‖g‖²) while the window holds one."""
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = MFAC([p], lr=1.0, window=5, damping=0.1)
    p.grad = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(p.detach(), -5 * p.grad / (0.5 + 25))


# ---- masks


def test_a_mask_leaves_the_rest_of_the_weights_alone_and_out_of_the_window() -> None:
    w = gaussian(12)
    keep = gaussian(12, seed=1) > 0
    dense, sparse = nn.Parameter(w.clone()), nn.Parameter(w[keep].clone())
    one = MFAC([dense], lr=0.1, window=3, damping=0.1, momentum=0.9, weight_decay=0.1, mask=[keep])
    other = MFAC([sparse], lr=0.1, window=3, damping=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(5):
        dense.grad = gaussian(12, seed=step + 5)
        sparse.grad = dense.grad[keep].clone()
        one.step()
        other.step()
    torch.testing.assert_close(dense.detach()[keep], sparse.detach(), rtol=0, atol=0)
    assert torch.equal(dense.detach()[~keep], w[~keep])
    assert one.state[dense]["gradients"].shape == (3, int(keep.sum()))


@pytest.mark.parametrize("blocks", ["full", "layer", 3])
def test_nonzero_keeps_zeros_zero(blocks: str | int) -> None:
    params = parameters()
    with torch.no_grad():
        zeros = [(p > 0).logical_not() for p in params]
        for p, zero in zip(params, zeros, strict=True):
            p[zero] = 0
    run(MFAC(params, lr=0.05, window=3, damping=0.1, blocks=blocks, mask="nonzero", momentum=0.9), range(6))
    for p, zero in zip(params, zeros, strict=True):
        assert (p.detach()[zero] == 0).all()
        assert (p.detach()[~zero] != 0).all()


# ---- what optimizers have to do


CASES: dict[str, Callable[[list[nn.Parameter]], MFAC]] = {
    "full": lambda p: MFAC(p, lr=0.01, window=4, damping=0.1, momentum=0.9),
    "layer, bfloat16 buffer": lambda p: MFAC(
        p, lr=0.01, window=4, damping=0.1, blocks="layer", buffer_dtype=torch.bfloat16
    ),
    "blocks": lambda p: MFAC(p, lr=0.01, window=4, damping=0.1, blocks=5, weight_decay=0.1),
    "nonzero": lambda p: MFAC(p, lr=0.01, window=4, damping=0.1, mask="nonzero"),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_equal(make: Callable[[list[nn.Parameter]], MFAC], dtype: torch.dtype) -> None:
    params = parameters(dtype)
    with torch.no_grad():
        params[0][0] = 0
    optimizer = make(params)
    run(optimizer, range(6))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(twins)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, range(6, 12))
    run(resumed, range(6, 12))
    for p, twin in zip(params, twins, strict=True):
        assert torch.equal(p, twin)
    for state in optimizer.state.values():
        assert all(isinstance(v, (Tensor, int)) for v in state.values())


def test_state_of_others_is_refused() -> None:
    params = parameters()
    ours = MFAC(params, window=4)
    run(ours, range(2))
    adam = torch.optim.Adam(params)
    run(adam, range(1))
    with pytest.raises(MismatchError, match="window 4 here"):
        ours.load_state_dict(adam.state_dict())
    with pytest.raises(MismatchError, match=r"window 5 here; \['4'\]"):
        MFAC(params, window=5).load_state_dict(ours.state_dict())
    with pytest.raises(MismatchError, match="block"):
        MFAC(params, window=4, blocks="layer").load_state_dict(ours.state_dict())
    with pytest.raises(MismatchError, match="parameter 0"):
        MFAC([params[1], params[0], params[2]], window=4).load_state_dict(ours.state_dict())


def test_deepcopy_goes_on_alike() -> None:
    params = parameters()
    optimizer = MFAC(params, lr=0.01, window=3, damping=0.1, nonfinite="skip")
    run(optimizer, range(4))
    twin = copy.deepcopy(optimizer)
    run(optimizer, range(4, 7))
    run(twin, range(4, 7))
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def test_closure_is_called_with_gradients() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = MFAC([p], lr=0.1, window=2, damping=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 4.0
    assert float(p.detach()) < 2.0


def test_nonfinite_gradients_raise_or_are_skipped_and_counted() -> None:
    for way in ("raise", "skip"):
        params = parameters()
        optimizer = MFAC(params, lr=0.01, window=3, damping=0.1, nonfinite=way)
        run(optimizer, range(2))
        before = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()["state"]))
        for p in params:
            p.grad = torch.ones_like(p)
        params[1].grad[0] = torch.nan
        if way == "raise":
            with pytest.raises(NotFiniteError, match="1 of 3"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.param_groups[0]["skipped"] == 1
        torch.testing.assert_close(
            ([p.detach() for p in params], optimizer.state_dict()["state"]), before, rtol=0, atol=0
        )


def test_groups_have_their_own_numbers_and_schedulers_work() -> None:
    params = parameters()
    groups = [{"params": params[:1], "lr": 0.0}, {"params": params[1:]}]
    optimizer = MFAC(groups, lr=0.1, window=3, damping=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = [p.detach().clone() for p in params]
    run(optimizer, range(1))
    scheduler.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    assert optimizer.param_groups[1]["lr"] == 0.05
    optimizer.param_groups[0]["damping"] = 0.2
    with pytest.raises(InputError, match="one damping"):
        run(optimizer, range(1, 2))


@pytest.mark.parametrize("blocks", ["full", "layer"])
def test_parameters_without_a_gradient_stay_and_new_ones_may_come(blocks: str) -> None:
    params = parameters()
    optimizer = MFAC(params[:2], lr=0.1, window=3, damping=0.1, blocks=blocks)
    before = params[1].detach().clone()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    optimizer.step()
    assert torch.equal(params[1], before)
    optimizer.add_param_group({"params": params[2:]})
    run(optimizer, range(3))
    assert all(bool(torch.isfinite(p).all()) for p in params)
    assert optimizer.state[params[2]]["step"] == (5 if blocks == "full" else 3)


def test_without_any_gradient_nothing_happens() -> None:
    params = parameters()
    optimizer = MFAC(params)
    optimizer.step()
    assert not optimizer.state


def test_bad_options_are_all_named() -> None:
    with pytest.raises(InputError) as caught:
        MFAC(
            parameters(),
            lr=-1,
            window=0,
            damping=0,
            momentum=1,
            weight_decay=-1,
            blocks=0,
            buffer_dtype=torch.int8,
            solve_dtype=torch.bfloat16,
            mask="zero",
            nonfinite="ignore",
        )
    for word in ("lr", "window", "damping", "momentum", "weight_decay", "blocks", "buffer", "solve", "mask", "nonf"):
        assert word in str(caught.value)


def test_bad_parameters_masks_and_gradients() -> None:
    with pytest.raises(InputError, match="complex"):
        MFAC([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(InputError, match="one for all groups"):
        MFAC([{"params": parameters(), "window": 3}])
    with pytest.raises(InputError, match="one mask"):
        MFAC(parameters(), mask=[None])
    with pytest.raises(InputError, match="mask 1"):
        MFAC(parameters(), mask=[None, torch.ones(4), None])
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="sparse=False"):
        MFAC(table.parameters()).step()
