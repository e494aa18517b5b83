"""Parts of the pipeline against slow, obvious twins in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eckart.linalg import dct_columns
from eckart.optim import (
    DCT,
    RULES,
    SVD,
    Adam,
    ChannelResidual,
    Clip,
    Feedback,
    Growth,
    Power,
    Radial,
    Rms,
    Rows,
    ScaledResidual,
    SignResidual,
    Subspace,
)
from eckart.optim.view import pieces

LR = 0.01


def gradients(*shape: int, steps: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def start(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def trained(shape: tuple[int, ...], given: list[Tensor], **options: object) -> Tensor:
    p = torch.nn.Parameter(start(*shape))
    optimizer = Subspace([p], LR, **options)  # type: ignore[arg-type]
    for G in given:
        p.grad = G.clone()
        optimizer.step()
    return p.detach()


class NaiveAdam:
    def __init__(self) -> None:
        self.m = self.v = 0.0
        self.t = 0

    def __call__(self, G: Tensor) -> Tensor:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * G
        self.v = 0.999 * self.v + 0.001 * G**2
        return (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)) ** 0.5 + 1e-8)


def test_full_adam_is_adamw_of_torch_with_and_without_the_pipeline() -> None:
    given = gradients(8, 12)
    q = torch.nn.Parameter(start(8, 12))
    reference = torch.optim.AdamW([q], LR, weight_decay=0.1)
    for G in given:
        q.grad = G.clone()
        reference.step()
    torch.testing.assert_close(trained((8, 12), given, weight_decay=0.1), q.detach(), rtol=1e-12, atol=1e-14)
    # A growth limit that never bites keeps it in the pipeline.
    piped = trained((8, 12), given, weight_decay=0.1, guards=Growth(1e9))
    torch.testing.assert_close(piped, q.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_svd_projects_on_the_shorter_side(shape: tuple[int, int]) -> None:
    given = gradients(*shape)
    W, rule = start(*shape), NaiveAdam()
    for t, G in enumerate(given):
        if t % 3 == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            Q = U[:, :2] if shape[0] <= shape[1] else Vh[:2].T
            # Singular vectors have no sign: make the largest entry positive, as ours.
            Q = Q * Q.gather(0, Q.abs().argmax(0, keepdim=True)).sign()
        if shape[0] <= shape[1]:
            W = (1 - LR * 0.1) * W - LR * Q @ rule(Q.T @ G)
        else:
            W = (1 - LR * 0.1) * W - LR * rule(G @ Q) @ Q.T
    found = trained(shape, given, subspace=SVD(rank=2, every=3), weight_decay=0.1)
    torch.testing.assert_close(found, W, rtol=1e-9, atol=1e-10)


def test_rows_keep_moments_of_rows_that_stay() -> None:
    given = gradients(7, 9)
    W, m, v = start(7, 9), torch.zeros(7, 9).double(), torch.zeros(7, 9).double()
    for t, G in enumerate(given, 1):
        chosen = G.square().sum(1).topk(3).indices
        fresh = torch.ones(7, dtype=torch.bool)
        fresh[chosen] = False
        m[fresh] = v[fresh] = 0.0  # what is not chosen is forgotten
        m[chosen] = 0.9 * m[chosen] + 0.1 * G[chosen]
        v[chosen] = 0.999 * v[chosen] + 0.001 * G[chosen] ** 2
        W[chosen] -= LR * (m[chosen] / (1 - 0.9**t)) / ((v[chosen] / (1 - 0.999**t)).sqrt() + 1e-8)
    found = trained((7, 9), given, subspace=Rows(rank=3, every=1))
    torch.testing.assert_close(found, W, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_dct_with_feedback(norm: str) -> None:
    given = gradients(8, 11)
    C = dct_columns(8, torch.arange(8), torch.float64)
    W, E = start(8, 11), torch.zeros(8, 11).double()
    m, v = torch.zeros(8, 11).double(), torch.zeros(8, 11).double()
    for t, G in enumerate(given, 1):
        X = G + 0.5 * E
        S = C.T @ X
        chosen = (S.abs() if norm == "l1" else S.square()).sum(1).topk(3).indices
        gone = [i for i in range(8) if i not in chosen.tolist()]
        m[gone] = v[gone] = 0.0
        m[chosen] = 0.9 * m[chosen] + 0.1 * S[chosen]
        v[chosen] = 0.999 * v[chosen] + 0.001 * S[chosen] ** 2
        U = (m[chosen] / (1 - 0.9**t)) / ((v[chosen] / (1 - 0.999**t)).sqrt() + 1e-8)
        W -= LR * C[:, chosen] @ U
        E = X - C[:, chosen] @ S[chosen]
    found = trained((8, 11), given, subspace=DCT(rank=3, norm=norm), feedback=Feedback("fp32", decay=0.5))  # type: ignore[arg-type]
    torch.testing.assert_close(found, W, rtol=1e-9, atol=1e-11)


def test_power_keeps_an_orthonormal_basis_that_converges_to_singular_vectors() -> None:
    G = start(12, 20) @ torch.diag(torch.linspace(3, 0.1, 20, dtype=torch.float64) ** 4)
    p = torch.nn.Parameter(start(12, 20))
    optimizer = Subspace([p], LR, subspace=Power(rank=3, every=1))
    for _ in range(60):
        p.grad = G.clone()
        optimizer.step()
    Q = optimizer.state[p]["basis"][0]
    torch.testing.assert_close(Q.T @ Q, torch.eye(3).double(), rtol=0, atol=1e-12)
    U = torch.linalg.svd(G).U[:, :3]
    assert torch.linalg.svdvals(U.T @ Q).min() > 1 - 1e-6


def test_rotated_first_moments_stand_for_the_same_matrix() -> None:
    given = gradients(5, 8, steps=2)
    p = torch.nn.Parameter(start(5, 8))
    optimizer = Subspace([p], LR, rule="momentum", momentum=0.5, subspace=SVD(rank=4, every=1), carry="rotate")
    bases, moments = [], []
    for G in given:
        p.grad = G.clone()
        optimizer.step()
        bases.append(optimizer.state[p]["basis"][0].clone())
        moments.append(optimizer.state[p]["momentum"][0].clone())
    expected = 0.5 * (bases[1].T @ bases[0]) @ moments[0] + bases[1].T @ given[1]
    torch.testing.assert_close(moments[1], expected, rtol=1e-10, atol=1e-12)


def test_restart_begins_moments_and_their_correction_anew() -> None:
    given = gradients(5, 8, steps=4)
    p = torch.nn.Parameter(start(5, 8))
    optimizer = Subspace([p], LR, subspace=SVD(rank=2, every=2), carry="restart")
    for G in given[:2]:
        p.grad = G.clone()
        optimizer.step()
    before = p.detach().clone()
    p.grad = given[2].clone()
    optimizer.step()
    Q = optimizer.state[p]["basis"][0]
    torch.testing.assert_close(p.detach(), before - LR * Q @ NaiveAdam()(Q.T @ given[2]), rtol=1e-9, atol=1e-11)


RESIDUAL_CASES = {
    "sign": (SignResidual(0.3), lambda X, R, Q, u, low: Q @ u + 0.3 * R.sign()),
    "scaled": (
        ScaledResidual(growth=0.0),
        lambda X, R, Q, u, low: Q @ u + R * (u.norm(dim=0) / (low.norm(dim=0) + 1e-8)),
    ),
    "channel": (ChannelResidual(), lambda X, R, Q, u, low: X * (u.norm(dim=0) / (low.norm(dim=0) + 1e-8))),
    "tensor": (ChannelResidual("tensor"), lambda X, R, Q, u, low: X * (u.norm() / (low.norm() + 1e-8))),
}


@pytest.mark.parametrize("name", RESIDUAL_CASES)
def test_residuals(name: str) -> None:
    part, formula = RESIDUAL_CASES[name]
    given = gradients(6, 10)
    W, rule = start(6, 10), NaiveAdam()
    for G in given:
        U = torch.linalg.svd(G).U[:, :2]
        Q = U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
        low = Q.T @ G
        W = W - LR * formula(G, G - Q @ low, Q, rule(low), low)
    found = trained((6, 10), given, subspace=SVD(rank=2, every=1), residual=part)
    torch.testing.assert_close(found, W, rtol=1e-8, atol=1e-10)


def test_the_scaled_residual_grows_slowly() -> None:
    given = [G * 10.0**t for t, G in enumerate(gradients(6, 10, steps=3))]
    p = torch.nn.Parameter(start(6, 10))
    optimizer = Subspace(
        [p], LR, rule="momentum", momentum=0.0, subspace=SVD(rank=2), residual=ScaledResidual(growth=1.5)
    )
    sizes = []
    for G in given:
        p.grad = G.clone()
        optimizer.step()
        sizes.append(float(optimizer.state[p]["residual_norm"]))
    assert sizes[1] == pytest.approx(1.5 * sizes[0])
    assert sizes[2] == pytest.approx(1.5 * sizes[1])


def test_guards() -> None:
    (G,) = gradients(6, 10, steps=1)
    W = start(6, 10)
    plain = {"rule": "momentum", "momentum": 0.0}

    def step(**options: object) -> Tensor:
        return (W - trained((6, 10), [G], **plain, **options)) / LR

    torch.testing.assert_close(step(guards=()), G, rtol=1e-10, atol=1e-10)
    clipped = step(guards=Clip(0.5))
    bound = G.abs().flatten().sort().values[29]
    torch.testing.assert_close(clipped, G.clamp(-bound, bound), rtol=1e-9, atol=1e-9)
    assert step(guards=Rms(0.2)).square().mean().sqrt() == pytest.approx(0.2)
    by_row = step(guards=Radial(delta=1e9))
    torch.testing.assert_close((by_row * W).sum(1), torch.zeros(6).double(), rtol=0, atol=1e-6)
    assert torch.equal(step(guards=Radial(delta=0.0)), step(guards=()))
    given = gradients(6, 10, steps=2)
    first = trained((6, 10), given[:1], **plain, guards=Growth(1.01))
    second = trained((6, 10), [given[0], 7 * given[1]], **plain, guards=Growth(1.01))
    assert (second - first).norm() == pytest.approx(1.01 * float((first - W).norm()))


def test_radial_takes_a_tenth_of_the_weight_decay_where_it_projects() -> None:
    G = torch.zeros(6, 10, dtype=torch.float64)
    kept = trained((6, 10), [G], rule="momentum", guards=Radial(delta=1.0), weight_decay=0.5)
    torch.testing.assert_close(kept, start(6, 10) * (1 - LR * 0.5 * 0.1))


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_finite_at_zero_and_never_write_into_the_gradient(rule: str) -> None:
    (G,) = gradients(4, 6, steps=1)
    p = torch.nn.Parameter(start(4, 6))
    optimizer = Subspace([p], LR, rule=rule)
    for given in (torch.zeros_like(G), G):
        p.grad = given.clone()
        optimizer.step()
        assert torch.equal(p.grad, given)
        assert p.isfinite().all()


def test_auon_is_normalised_momentum_with_a_brake() -> None:
    (G,) = gradients(6, 10, steps=1)
    M = G + 0.95 * G
    X = M / M.norm()
    expected = X / torch.cosh(1.5 * X).square().mean().sqrt()
    found = (start(6, 10) - trained((6, 10), [G], rule="auon")) / LR
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_diffgrad_slows_where_gradients_repeat() -> None:
    (G,) = gradients(4, 6, steps=1)
    W, rule, previous = start(4, 6), NaiveAdam(), torch.zeros_like(G)
    for given in (G, G, -G):
        W = W - LR * torch.sigmoid((previous - given).abs()) * rule(given)
        previous = given
    torch.testing.assert_close(trained((4, 6), [G, G, -G], rule="diffgrad"), W, rtol=1e-10, atol=1e-12)


def test_newton_schulz_orthogonalises_the_momentum() -> None:
    (G,) = gradients(5, 9, steps=1)
    U = (start(5, 9) - trained((5, 9), [G], rule="newton_schulz", scale="longest")) / LR / 3.0
    values = torch.linalg.svdvals(U)
    assert values.max() < 1.3
    assert values.min() > 0.6


@pytest.mark.parametrize("rank", [0.5, 3])
def test_gaussian_is_drawn_again_from_its_seed(rank: float) -> None:
    given = gradients(6, 10)
    a = trained((6, 10), given, subspace="gaussian", rank=rank, every=2)
    assert torch.equal(a, trained((6, 10), given, subspace="gaussian", rank=rank, every=2))
    assert not torch.equal(a, trained((6, 10), given, subspace="gaussian", rank=rank, every=2, seed=1))


def test_randomized_captures_nearly_what_svd_does() -> None:
    G = start(40, 60) @ torch.diag(torch.linspace(2, 0.1, 60, dtype=torch.float64) ** 3)
    best = math.sqrt(float(torch.linalg.svdvals(G)[:5].square().sum()))
    p = torch.nn.Parameter(start(40, 60))
    optimizer = Subspace([p], LR, subspace="randomized", rank=5)
    p.grad = G.clone()
    optimizer.step()
    Q = optimizer.state[p]["basis"][0]
    assert float((Q.T @ G).norm()) > 0.98 * best


def test_views_of_stacks_convolutions_splits_and_transposes() -> None:
    stack = gradients(3, 6, 8)
    conv = [G.reshape(6, 2, 2, 2) for G in gradients(6, 8)]
    whole = trained((3, 6, 8), stack, subspace="svd", rank=2)
    for e in range(3):
        p = torch.nn.Parameter(start(3, 6, 8)[e].clone())
        optimizer = Subspace([p], LR, subspace="svd", rank=2)
        for G in stack:
            p.grad = G[e].clone()
            optimizer.step()
        torch.testing.assert_close(p.detach(), whole[e], rtol=1e-9, atol=1e-11)

    q = torch.nn.Parameter(start(6, 8).reshape(6, 2, 2, 2).to(memory_format=torch.channels_last))
    optimizer = Subspace([q], LR, subspace="svd", rank=2)
    for G in conv:
        q.grad = G.clone(memory_format=torch.channels_last)
        optimizer.step()
    flat = trained((6, 8), [G.reshape(6, 8) for G in conv], subspace="svd", rank=2)
    torch.testing.assert_close(q.detach().reshape(6, 8), flat, rtol=1e-9, atol=1e-11)

    given = gradients(9, 8)
    for transposed in (False, True):
        W = start(9, 8)
        p = torch.nn.Parameter((W.T if transposed else W).clone(memory_format=torch.contiguous_format))
        split = {"params": [p], "split": [4, 5], "transposed": transposed}
        optimizer = Subspace([split], LR, rule="newton_schulz")
        for G in given:
            p.grad = (G.T if transposed else G).contiguous()
            optimizer.step()
        found = p.detach().T if transposed else p.detach()
        for rows in (slice(0, 4), slice(4, 9)):
            q = torch.nn.Parameter(W[rows].clone())
            other = Subspace([q], LR, rule="newton_schulz")
            for G in given:
                q.grad = G[rows].clone()
                other.step()
            torch.testing.assert_close(found[rows], q.detach(), rtol=1e-9, atol=1e-11)
    assert [piece.suffix for piece in pieces((9, 8), "auto", (4, 5), False)] == [".0", ".1"]


def test_stacked_and_single_matrices_agree() -> None:
    given = gradients(2, 6, 10)
    ps = [torch.nn.Parameter(start(2, 6, 10)[i].clone()) for i in range(2)]
    options = {"subspace": "power", "rank": 2, "every": 1, "feedback": "fp32", "guards": ("growth",)}
    optimizer = Subspace(ps, LR, **options)  # type: ignore[arg-type]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    # A seed for each matrix: what is second here has to be second there.
    others = [Subspace([alone[0]], LR, **options), Subspace([alone[1]], LR, **options)]  # type: ignore[arg-type]
    for t, G in enumerate(given):
        for i in range(2):
            ps[i].grad, alone[i].grad = G[i].clone(), G[i].clone()
        if t == 0:
            optimizer.step()
            for i in range(2):  # the same basis from here on
                groups = others[i].state_dict()["param_groups"]
                others[i].load_state_dict({"state": {0: optimizer.state[ps[i]]}, "param_groups": groups})
                alone[i].data.copy_(ps[i].data)
            continue
        optimizer.step()
        for other in others:
            other.step()
    for a, b in zip(ps, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_adam_by_name_and_as_object() -> None:
    given = gradients(4, 6)
    a = trained((4, 6), given, rule=Adam(betas=(0.8, 0.99)), subspace="rows", rank=2)
    b = trained((4, 6), given, rule="adam", betas=(0.8, 0.99), subspace="rows", rank=2)
    assert torch.equal(a, b)
