"""Every preset, step by step, against its paper's formula written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from eckart import optim

MUON = (3.4445, -4.7750, 2.0315)
STEPS = 8
SHAPES = [(6, 10), (10, 6), (7, 7)]


def gradients(shape: tuple[int, int], seed: int = 1) -> list[Tensor]:
    """Noise around a slowly turning matrix of low rank, as gradients are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    left, right = normal(shape[0], 2), normal(2, shape[1])
    return [left @ right + 0.2 * k * normal(*shape) for k in range(1, STEPS + 1)]


def start(shape: tuple[int, int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


Steps = Iterator[Tensor]


def adam(
    M: Tensor, V: Tensor, G: Tensor, t: int, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """New moments and the direction of step ``t`` (from 1)."""
    M = betas[0] * M + (1 - betas[0]) * G
    V = betas[1] * V + (1 - betas[1]) * G * G
    return M, V, (M / (1 - betas[0] ** t)) / ((V / (1 - betas[1] ** t)).sqrt() + eps)


def orthogonalised(X: Tensor) -> Tensor:
    """Five quintic steps on the singular values."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    S = S / S.square().sum().sqrt()
    for _ in range(5):
        S = MUON[0] * S + MUON[1] * S**3 + MUON[2] * S**5
    return (U * S) @ Vh


def cosines(n: int) -> Tensor:
    Q = torch.tensor(
        [[math.sqrt(2 / n) * math.cos(math.pi * (2 * j + 1) * k / (2 * n)) for k in range(n)] for j in range(n)],
        dtype=torch.float64,
    )
    Q[:, 0] /= math.sqrt(2)
    return Q


def leading(G: Tensor, r: int) -> Tensor:
    """Right singular vectors, each with its largest entry positive, since kept moments depend on the signs."""
    V = torch.linalg.svd(G, full_matrices=False).Vh[:r].T
    return V * V.gather(0, V.abs().argmax(0, keepdim=True)).sign()


def top(scores: Tensor, r: int) -> Tensor:
    return scores.topk(r).indices.sort().values


def flipped(step: Callable[..., Steps]) -> Callable[..., list[Tensor]]:
    """Twins project on the right of tall matrices; wide and square ones are turned on the way in and out."""

    def run(W: Tensor, grads: list[Tensor], **options: object) -> list[Tensor]:
        if W.shape[0] > W.shape[1]:
            return [X.clone() for X in step(W.clone(), grads, **options)]
        return [X.T.clone() for X in step(W.T.clone(), [G.T for G in grads], **options)]

    return run


@flipped
def galore(
    W: Tensor,
    grads: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rank: int,
    gap: int,
    scale: float,
) -> Steps:
    M = V = torch.zeros(W.shape[0], rank, dtype=W.dtype)
    for t, G in enumerate(grads, 1):
        if (t - 1) % gap == 0:
            Q = leading(G, rank)
        M, V, N = adam(M, V, G @ Q, t, betas, eps)
        W = W - lr * weight_decay * W - lr * scale * N @ Q.T
        yield W


@flipped
def fira(
    W: Tensor,
    grads: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    rank: int,
    gap: int,
    scale: float,
    growth: float,
) -> Steps:
    M = V = torch.zeros(W.shape[0], rank, dtype=W.dtype)
    before = None
    for t, G in enumerate(grads, 1):
        if (t - 1) % gap == 0:
            Q = leading(G, rank)
        R = G @ Q
        M, V, N = adam(M, V, R, t, betas, eps)
        phi = N.norm(dim=1, keepdim=True) / (R.norm(dim=1, keepdim=True) + 1e-8)
        S = phi * (G - R @ Q.T)
        if before is not None and S.norm() > growth * before:
            S = S * (growth * before / S.norm())
        before = S.norm()
        W = W - lr * (scale * N @ Q.T + scale * S)
        yield W


@flipped
def dct_adamw(
    W: Tensor,
    grads: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rank: int,
    gap: int,
) -> Steps:
    n = W.shape[1]
    M = V = torch.zeros(W.shape[0], rank, dtype=W.dtype)
    E, Q = torch.zeros_like(W), None
    for t, G in enumerate(grads, 1):
        A = G + E
        if (t - 1) % gap == 0:
            chosen = top((A @ cosines(n)).abs().sum(0), rank)
            new = cosines(n)[:, chosen]
            if Q is not None:
                M, V = M @ (Q.T @ new), V @ (Q.T @ new).abs()
            Q = new
        a = A @ Q
        E = A - a @ Q.T
        M, V, N = adam(M, V, a, t, betas, eps)
        W = (1 - lr * weight_decay) * W - lr * N @ Q.T
        yield W


@flipped
def trion(
    W: Tensor, grads: list[Tensor], lr: float, momentum: float, weight_decay: float, rank: int, factor: float
) -> Steps:
    n = W.shape[1]
    B = torch.zeros_like(W)
    for G in grads:
        B = B + G
        Q = cosines(n)[:, top((B @ cosines(n)).abs().sum(0), rank)]
        b = B @ Q
        B = B - (1 - momentum) * b @ Q.T
        W = (1 - lr * weight_decay) * W - lr * factor * orthogonalised(b) @ Q.T
        yield W


@flipped
def frugal(
    W: Tensor, grads: list[Tensor], lr: float, betas: tuple[float, float], eps: float, rank: int, gap: int, sign: float
) -> Steps:
    """Moments of columns that stay chosen stay, others begin anew; whole matrices of moments make that plain."""
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    for t, G in enumerate(grads, 1):
        if (t - 1) % gap == 0:
            at = top(G.square().sum(0), rank)
            out = torch.ones(W.shape[1], dtype=torch.bool)
            out[at] = False
            M[:, out], V[:, out] = 0, 0
        m, v, N = adam(M[:, at], V[:, at], G[:, at], t, betas, eps)
        M[:, at], V[:, at] = m, v
        U = sign * G.sign()
        U[:, at] = N
        W = W - lr * U
        yield W


def muon(
    W: Tensor, grads: list[Tensor], lr: float, momentum: float, nesterov: bool, weight_decay: float, factor: float
) -> Steps:
    B = torch.zeros_like(W)
    for G in grads:
        B = momentum * B + G
        W = (1 - lr * weight_decay) * W - lr * factor * orthogonalised(G + momentum * B if nesterov else B)
        yield W


def auon(W: Tensor, grads: list[Tensor], lr: float, momentum: float, gamma: float, hybrid: bool) -> Steps:
    B = torch.zeros_like(W)
    for G in grads:
        B = momentum * B + (1 - momentum) * G
        X = momentum * B + (1 - momentum) * G
        if hybrid:
            Y = X / X.norm()
            R = Y @ Y.T
            X = MUON[0] * Y + (MUON[1] * R + MUON[2] * R @ R) @ Y
        else:
            X = X / X.norm()
        W = W - lr * X / (gamma * X).cosh().square().mean().sqrt()
        yield W


@flipped
def apollo(
    W: Tensor,
    grads: list[Tensor],
    projections: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    scale: float,
    growth: float,
    mini: bool,
) -> Steps:
    """``projections``: (n, r) of each step."""
    M = V = torch.zeros(W.shape[0], projections[0].shape[1], dtype=W.dtype)
    before = None
    for t, (G, P) in enumerate(zip(grads, projections, strict=True), 1):
        R = G @ P
        M, V, N = adam(M, V, R, t, betas, eps)
        s = N.norm() / R.norm() if mini else N.norm(dim=1, keepdim=True) / R.norm(dim=1, keepdim=True)
        U = s * G
        if before is not None and U.norm() > growth * before:
            U = U * (growth * before / U.norm())
        before = U.norm()
        W = W - lr * scale * U
        yield W


def dion(W: Tensor, grads: list[Tensor], first: Tensor, lr: float, momentum: float, weight_decay: float) -> Steps:
    """``first``: the orthonormal (m, r) that the power iteration starts from."""
    B, P = torch.zeros_like(W), first
    for G in grads:
        B = B + G
        P = torch.linalg.qr(B @ (B.T @ P)).Q
        R = B.T @ P
        B = B - (1 - momentum) * P @ R.T
        factor = math.sqrt(W.shape[0] / W.shape[1])
        W = (1 - lr * weight_decay) * W - lr * factor * P @ (R / R.norm(dim=0)).T
        yield W


def projected(W: Tensor, G: Tensor, U: Tensor, delta: float, ratio: float) -> tuple[Tensor, float]:
    """Step and factor of the decay: channel view first, then the whole layer, and neither where no cosine is small."""
    for view in (W.shape[0], 1):
        w, g, u = W.reshape(view, -1), G.reshape(view, -1), U.reshape(view, -1)
        cosine = (w * g).sum(1).abs() / (w.norm(dim=1) * g.norm(dim=1))
        if float(cosine.max()) < delta / math.sqrt(w.shape[1]):
            along = w / w.norm(dim=1, keepdim=True)
            return (u - along * (along * u).sum(1, keepdim=True)).reshape(W.shape), ratio
    return U, 1.0


def adamp(
    W: Tensor,
    grads: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    delta: float,
    wd_ratio: float,
) -> Steps:
    M = V = torch.zeros_like(W)
    for t, G in enumerate(grads, 1):
        M, V, U = adam(M, V, G, t, betas, eps)
        U, factor = projected(W, G, U, delta, wd_ratio)
        W = (1 - lr * weight_decay * factor) * W - lr * U
        yield W


def sgdp(
    W: Tensor,
    grads: list[Tensor],
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    delta: float,
    wd_ratio: float,
) -> Steps:
    B = torch.zeros_like(W)
    for G in grads:
        B = momentum * B + G
        U, factor = projected(W, G, G + momentum * B if nesterov else B, delta, wd_ratio)
        W = (1 - lr * weight_decay * factor) * W - lr * U
        yield W


def diffgrad(W: Tensor, grads: list[Tensor], lr: float, betas: tuple[float, float], eps: float) -> Steps:
    M = V = before = torch.zeros_like(W)
    for t, G in enumerate(grads, 1):
        M, V, U = adam(M, V, G, t, betas, eps)
        W = W - lr * torch.sigmoid((before - G).abs()) * U
        before = G
        yield W


BETAS, EPS = (0.8, 0.95), 1e-8
Case = tuple[Callable[[list[Tensor]], torch.optim.Optimizer], Callable[..., list[Tensor]]]


def plain(step: Callable[..., Steps]) -> Callable[..., list[Tensor]]:
    return lambda W, grads, **options: [X.clone() for X in step(W.clone(), grads, **options)]


CASES: dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[[Tensor, list[Tensor]], list[Tensor]]]] = {
    "galore": (
        lambda p: optim.GaLore(p, 0.1, BETAS, EPS, 0.1, rank=3, every=3, scale=0.5),
        lambda W, Gs: galore(W, Gs, lr=0.1, betas=BETAS, eps=EPS, weight_decay=0.1, rank=3, gap=3, scale=0.5),
    ),
    "fira": (
        lambda p: optim.Fira(p, 0.1, BETAS, EPS, rank=3, every=3, scale=0.5, growth=1.05),
        lambda W, Gs: fira(W, Gs, lr=0.1, betas=BETAS, eps=EPS, rank=3, gap=3, scale=0.5, growth=1.05),
    ),
    "dct every step": (
        lambda p: optim.DCTAdamW(p, 0.1, BETAS, EPS, 0.1, rank=3, feedback="fp32"),
        lambda W, Gs: dct_adamw(W, Gs, lr=0.1, betas=BETAS, eps=EPS, weight_decay=0.1, rank=3, gap=1),
    ),
    "dct every third": (
        lambda p: optim.DCTAdamW(p, 0.1, BETAS, EPS, 0.1, rank=3, every=3, feedback="fp32"),
        lambda W, Gs: dct_adamw(W, Gs, lr=0.1, betas=BETAS, eps=EPS, weight_decay=0.1, rank=3, gap=3),
    ),
    "frugal": (
        lambda p: optim.Frugal(p, 0.1, BETAS, EPS, rank=3, every=3, sign_scale=0.3),
        lambda W, Gs: frugal(W, Gs, lr=0.1, betas=BETAS, eps=EPS, rank=3, gap=3, sign=0.3),
    ),
    "diffgrad": (
        lambda p: optim.DiffGrad(p, 0.1, BETAS, EPS),
        lambda W, Gs: plain(diffgrad)(W, Gs, lr=0.1, betas=BETAS, eps=EPS),
    ),
    "adamp": (
        lambda p: optim.AdamP(p, 0.1, BETAS, EPS, 0.1, delta=2.0, wd_ratio=0.3),
        lambda W, Gs: plain(adamp)(W, Gs, lr=0.1, betas=BETAS, eps=EPS, weight_decay=0.1, delta=2.0, wd_ratio=0.3),
    ),
}
for nesterov in (True, False):
    CASES[f"muon nesterov={nesterov}"] = (
        lambda p, n=nesterov: optim.Muon(p, 0.1, 0.9, n, 0.1),
        lambda W, Gs, n=nesterov: plain(muon)(
            W, Gs, lr=0.1, momentum=0.9, nesterov=n, weight_decay=0.1, factor=math.sqrt(max(1, W.shape[0] / W.shape[1]))
        ),
    )
    CASES[f"sgdp nesterov={nesterov}"] = (
        lambda p, n=nesterov: optim.SGDP(p, 0.01, 0.9, n, 0.1, delta=2.0, wd_ratio=0.3),
        lambda W, Gs, n=nesterov: plain(sgdp)(
            W, Gs, lr=0.01, momentum=0.9, nesterov=n, weight_decay=0.1, delta=2.0, wd_ratio=0.3
        ),
    )
for hybrid in (True, False):
    CASES[f"auon hybrid={hybrid}"] = (
        lambda p, h=hybrid: optim.AuON(p, 0.1, 0.9, hybrid=h),
        lambda W, Gs, h=hybrid: plain(auon)(W, Gs, lr=0.1, momentum=0.9, gamma=1.5, hybrid=h),
    )
FACTORS: dict[str, Callable[[int, int], float]] = {
    "muon": lambda m, n: math.sqrt(max(1, m / n)),
    "spectral": lambda m, n: math.sqrt(m / n),
    "rms": lambda m, n: 0.2 * math.sqrt(max(m, n)),
}
for kind, factor in FACTORS.items():
    CASES[f"trion {kind}"] = (
        lambda p, k=kind: optim.Trion(p, 0.1, 0.9, 0.1, rank=3, scale=k),
        lambda W, Gs, f=factor: trion(W, Gs, lr=0.1, momentum=0.9, weight_decay=0.1, rank=3, factor=f(*W.shape)),
    )


def steps_of(make: Callable[..., torch.optim.Optimizer], W: Tensor, grads: list[Tensor]) -> list[Tensor]:
    p = torch.nn.Parameter(W.clone())
    optimizer, found = make([p]), []
    for G in grads:
        p.grad = G.clone()
        optimizer.step()
        assert torch.equal(p.grad, G)  # released AuON and torch's Muon write into gradients or momenta
        found.append(p.detach().clone())
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_every_step_is_that_of_the_formula(name: str, shape: tuple[int, int]) -> None:
    make, twin = CASES[name]
    W, grads = start(shape), gradients(shape)
    for found, expected in zip(steps_of(make, W, grads), twin(W, grads), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # 1e-8 is added to some norms


def test_the_twins_of_the_radial_projection_reach_all_three_cases() -> None:
    """Projected by channel, by layer, and not at all: otherwise the cases above would test less than they say."""
    W, G = start((4, 6)), gradients((4, 6))[0]
    by_channel = G - (G * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W
    assert projected(W, by_channel, W, 0.1, 0.3)[0].norm() < 1e-12
    by_layer = G - (G * W).sum() / W.square().sum() * W
    left, ratio = projected(W, by_layer, W.clone(), 0.1, 0.3)
    assert (float(left.norm()) < 1e-12, ratio) == (True, 0.3)
    assert projected(W, W, G, 0.1, 0.3) == (G, 1.0)


@pytest.mark.parametrize("view", ["channel", "layer", "none"])
@pytest.mark.parametrize("rule", ["adamp", "sgdp"])
def test_radial_projection_with_the_delta_of_the_paper(rule: str, view: str) -> None:
    W, raw = start((4, 6)), gradients((4, 6))[0]
    G = {
        "channel": raw - (raw * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W,
        "layer": raw - (raw * W).sum() / W.square().sum() * W,
        "none": raw,
    }[view]
    if rule == "adamp":
        found = steps_of(lambda p: optim.AdamP(p, 0.1, BETAS, EPS, 0.1), W, [G])
        options = {"betas": BETAS, "eps": EPS}
        expected = plain(adamp)(W, [G], lr=0.1, weight_decay=0.1, delta=0.1, wd_ratio=0.1, **options)
    else:
        found = steps_of(lambda p: optim.SGDP(p, 0.1, 0.9, True, 0.1), W, [G])
        expected = plain(sgdp)(W, [G], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, delta=0.1, wd_ratio=0.1)
    torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mini", [True, False])
def test_apollo_is_its_formula_for_the_projections_of_its_seeds(mini: bool, shape: tuple[int, int]) -> None:
    W, grads = start(shape), gradients(shape)
    p = torch.nn.Parameter(W.clone())
    optimizer = optim.Apollo([p], 0.1, BETAS, EPS, mini=mini, every=3, growth=1.05, **({} if mini else {"rank": 3}))
    rank, side = (1, 3)[not mini], min(shape)
    found, projections = [], []
    for G in grads:
        p.grad = G.clone()
        optimizer.step()
        found.append(p.detach().clone())
        seed = int(optimizer.state[p]["seed"][0])
        drawn = torch.randn(side, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        projections.append(drawn / math.sqrt(rank))
    assert [bool((projections[t] == projections[t + 1]).all()) for t in range(5)] == [True, True, False, True, True]
    scale = math.sqrt(128) if mini else 1.0
    expected = apollo(
        W, grads, projections=projections, lr=0.1, betas=BETAS, eps=EPS, scale=scale, growth=1.05, mini=mini
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)  # 1e-8 is added to norms


@pytest.mark.parametrize("shape", SHAPES)
def test_dion_is_its_formula_from_the_same_start(shape: tuple[int, int]) -> None:
    W, grads = start(shape), gradients(shape)
    p = torch.nn.Parameter(W.clone())
    optimizer = optim.Dion([p], 0.1, 0.9, 0.1, rank=3)
    p.grad = grads[0].clone()
    optimizer.step()
    # One power step leads from any basis of the start to the same span, which is all that the first step depends on.
    first = optimizer.state[p]["basis"][0]
    W1, B = p.detach().clone(), grads[0] - 0.1 * first @ (first.T @ grads[0])
    R = grads[0].T @ first
    factor = math.sqrt(shape[0] / shape[1])
    torch.testing.assert_close(W1, 0.99 * W - 0.1 * factor * first @ (R / R.norm(dim=0)).T)
    torch.testing.assert_close(optimizer.state[p]["feedback"][0], B)
    rest = [grads[1] + 0.0, *grads[2:]]
    expected = plain(dion)(W1, [B + rest[0], *rest[1:]], first=first, lr=0.1, momentum=0.9, weight_decay=0.1)
    for G, one in zip(rest, expected, strict=True):
        p.grad = G.clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), one, rtol=1e-4, atol=1e-4)  # a power step mixes in 1e-6 of the old basis
