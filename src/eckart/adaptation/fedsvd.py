r"""FedSVD: clients train one factor, the server makes the other orthonormal again.

*What it does.* LoRA among clients that share no data: each trains B alone, so that what they send can be averaged
exactly and noise for privacy enters once. After each round :func:`server_round` averages, and splits the product anew.

*Formula.* ΔW = B A with A fixed, A Aᵀ = I, B = 0 at the start. Server: B̄ = Σ p_c B_c; U S Vᵀ = SVD(B̄ A); A ← Vᵀ, B ←
U S. The product is the same, and orthonormal rows of A bound ‖∂L/∂B‖ ≤ ‖∂L/∂W‖.

*Cost.* r · out numbers to train, r · in saved beside them. The server: two thin QR and an r × r SVD for each layer
(:func:`eckart.linalg.product_svd`), O((out + in) r²), instead of the SVD of a dense out × in matrix.

*When it does not help.* As a way to new directions. B̄ A has the row space of A, so Vᵀ = Q A with an r × r rotation Q:
after the first round nothing but the basis changes, for ever. SGD, clipping by norm and Gaussian noise do not see a
rotation of B, so under them the whole procedure is LoRA with a fixed orthonormal A, step for step; see the claim, whose
two figures agree. What remains is that A is orthonormal; optimisers that treat entries one by one, as Adam, see a
little more. To change the row space, A has to be trained too. The claim does not hold on its problem: held-out losses
are 1.905 nats (FedSVD), 1.907 (the fixed orthonormal A: the same procedure under other draws of the noise), 1.904
(LoRA's fixed A) and 1.908 (both factors), all within the spread of the noise.

*Departs from the paper in.* A is orthonormal from the first round on, not only after it. The SVD is taken of small
matrices; the released code forms B A. Layers of any kind, not only linear ones. Everything else that clients trained (a
head) is averaged along.

*Reference.* S. Lee, S. Park, D. B. Lee, D. Wagner, H. Seong, T. Bocklet, J. Lee, S. J. Hwang, “FedSVD: Adaptive
Orthogonalization for Private Federated Learning with LoRA”, 2025, https://arxiv.org/abs/2505.12805.

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> A = torch.linalg.qr(torch.randn(20, 3, generator=generator)).Q.T
>>> clients = [{"up.B": torch.randn(30, 3, generator=generator), "up.A": A} for _ in range(4)]
>>> new = server_round(clients, weights=[10, 10, 20, 60])
>>> mean = sum(p * client["up.B"] for p, client in zip([0.1, 0.1, 0.2, 0.6], clients))
>>> bool(torch.allclose(new["up.B"] @ new["up.A"], mean @ A, atol=1e-5))
True

With Flower, ``server_round`` is what a strategy's ``aggregate_fit`` returns: ``parameters_to_ndarrays`` of each client
gives the values of its mapping, in the order of its keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from eckart.adaptation.method import AdaptMethod, Delta, Layout, Source
from eckart.adaptation.trial import MAPS, held_out, text_windows
from eckart.errors import InputError, problems
from eckart.evidence import learned_problem
from eckart.evidence.network import CONTEXT, forward
from eckart.linalg import product_svd
from eckart.records import Claim, Paper, Verdict

PAIRS = (("B", "A"), ("lora_B.weight", "lora_A.weight"))
"""Ends of the names of B and A: of this method's adapters, and of PEFT's LoRA on linear layers."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """None: the server has no numbers to choose but the weights of clients."""


class FedsvdDelta(Delta):
    """ΔW = B A, A fixed with orthonormal rows."""

    B: Tensor
    A: Tensor

    def __init__(self, layout: Layout, rank: int, options: Options) -> None:
        super().__init__(layout, rank, options)
        self.trained("B", layout.slices, layout.out_features, rank)
        self.fixed("A", layout.slices, rank, layout.in_features)

    def start(self, source: Source) -> None:
        s, r, n = self.A.shape
        draw = torch.randn(s, n, r, generator=source.generator(), dtype=torch.float64)
        self.fill(A=torch.linalg.qr(draw).Q.mT)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B, self.A


def reorthogonalised(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """B' = U S and A' = Vᵀ of B A = U S Vᵀ, for B (…, out, r) and A (…, r, in); the same product and dtypes.

    A' has orthonormal rows. Raises InputError for shapes that do not fit, or a rank above out or in; NotFiniteError for
    NaN or Inf.
    """
    fits = B.ndim >= 2 and A.ndim >= 2 and B.shape[:-2] == A.shape[:-2] and B.shape[-1] == A.shape[-2]
    if not fits or B.shape[-1] > min(B.shape[-2], A.shape[-1]):
        raise InputError(
            "reorthogonalised: expected B (…, out, r) and A (…, r, in) with r at most out and in; got "
            f"{tuple(B.shape)} and {tuple(A.shape)}."
        )
    pairs = zip(B.reshape(-1, *B.shape[-2:]), A.reshape(-1, *A.shape[-2:]), strict=True)
    found = [product_svd(b, a) for b, a in pairs]
    new_B = torch.stack([f.U * f.S for f in found]).reshape(B.shape)
    new_A = torch.stack([f.Vh for f in found]).reshape(A.shape)
    return new_B.to(B.device, B.dtype), new_A.to(A.device, A.dtype)


def server_round(clients: Sequence[Mapping[str, Any]], *, weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """One round of the server: the adapter that all clients go on from.

    ``clients``: for each its adapter by name, as ``peft.get_peft_model_state_dict`` gives it, tensors or NumPy arrays;
    ``weights``: how much each counts, such as its number of samples (default: equally). Floating point tensors are
    averaged, then each pair of B and A is split anew so that A has orthonormal rows; other tensors are passed on as
    they are. Cost: O((out + in) r²) per layer.

    Raises InputError, with everything that is wrong, for clients of different names or shapes, weights that are
    negative or sum to zero, factors A that differ between clients (each trains B alone, or the average is not that of
    the products), and where there is no pair of B and A.
    """
    tensors = [{name: torch.as_tensor(value) for name, value in client.items()} for client in clients]
    shares = [1.0] * len(tensors) if weights is None else [float(w) for w in weights]
    if wrong := _faults(tensors, shares):
        raise InputError(problems("server_round", wrong))
    total = sum(shares)
    mean = {}
    for name, first in tensors[0].items():
        mean[name] = first
        if first.is_floating_point() and _partner(name, tensors[0]) is None:
            terms = [share / total * client[name].double() for share, client in zip(shares, tensors, strict=True)]
            mean[name] = torch.stack(terms).sum(0).to(first.dtype)
    for name in mean:
        for end, other in PAIRS:
            if _ends(name, end) and (partner := name.removesuffix(end) + other) in mean:
                mean[name], mean[partner] = reorthogonalised(mean[name], mean[partner])
    return mean


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _partner(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The B that belongs to an A of this name, where it is one."""
    for left, right in PAIRS:
        if _ends(name, right) and (partner := name.removesuffix(right) + left) in tensors:
            return partner
    return None


def _faults(tensors: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> list[str]:
    if not tensors:
        return ["no client; give at least one"]
    found = []
    if len(shares) != len(tensors):
        found.append(f"expected one weight for each of {len(tensors)} clients; got {len(shares)}")
    if not all(0 <= share < float("inf") for share in shares) or not sum(shares) > 0:
        found.append(f"weights are at least 0 and not all 0; got {list(shares)}")
    first = tensors[0]
    if not any(_partner(name, first) for name in first):
        found.append("no pair of factors; their names end in .B and .A, or in lora_B.weight and lora_A.weight")
    for i, client in enumerate(tensors[1:], 1):
        if client.keys() != first.keys():
            found.append(f"client {i} has other names than client 0: {sorted(client.keys() ^ first.keys())[:5]}")
            continue
        shapes = [name for name in first if client[name].shape != first[name].shape]
        found += [
            f"client {i}: {name} is {tuple(client[name].shape)}, of client 0 {tuple(first[name].shape)}"
            for name in shapes
        ]
        found += [
            f"client {i}: {name} differs from client 0's; clients train B alone"
            for name in first
            if name not in shapes and _partner(name, first) and not torch.equal(client[name], first[name])
        ]
    return found


Protocol = Literal["FedSVD", "orthonormal A", "LoRA's A", "both factors"]
CLIENTS, PRESENT, ROUNDS, LOCAL = 6, 3, 12, 5
RANK, BATCH, CLIP, NOISE = 8, 64, 2.0, 1.0
"""Samples a client draws per step; norm to which each sample's gradient is clipped; noise in units of that norm."""


def _private_step(
    base: Mapping[str, Tensor], B: dict[str, Tensor], A: dict[str, Tensor], sample: Tensor, both: bool, noise: Any
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss and clipped, noisy mean gradients of B, and of A if ``both``.

    A map is used once per sample, so that its gradient is the outer product of δ = ∂L/∂y and x, that of B δ (A x)ᵀ,
    that of A (Bᵀδ) xᵀ, and their norms are products of norms.
    """
    weights = {**base, **{f"{n}.weight": (base[f"{n}.weight"] + B[n] @ A[n]).requires_grad_() for n in B}}
    tape: dict[str, tuple[Tensor, Tensor]] = {}
    loss = cross_entropy(forward(weights, sample[:, :CONTEXT], tape), sample[:, CONTEXT], reduction="sum")
    gradients = torch.autograd.grad(loss, [tape[n][1] for n in B])
    parts_B, parts_A, squares = {}, {}, torch.zeros(len(sample))
    for name, delta in zip(B, gradients, strict=True):
        x = tape[name][0].detach()
        parts_B[name] = (delta, x @ A[name].T)
        if both:
            parts_A[name] = (delta @ B[name], x)
    for left, right in [*parts_B.values(), *parts_A.values()]:
        squares += left.square().sum(1) * right.square().sum(1)
    clip = (CLIP / squares.sqrt().clamp(min=1e-12)).clamp(max=1.0)

    def mean(left: Tensor, right: Tensor) -> Tensor:
        total = (left * clip[:, None]).T @ right
        return (total + NOISE * CLIP * torch.randn(total.shape, generator=noise)) / len(sample)

    return (
        float(loss.detach()) / len(sample),
        {name: mean(*part) for name, part in parts_B.items()},
        {name: mean(*part) for name, part in parts_A.items()},
    )


def _federated(protocol: Protocol, rate: float, seed: int) -> tuple[float, float]:
    """Training loss of the last two rounds and held-out loss, after rounds of private SGD on text of unlike modules."""
    base = dict(learned_problem().parameters)
    shards = text_windows("calibration").chunk(CLIENTS)  # in the order of the modules: clients differ
    draw, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)
    B = {site.name: torch.zeros(site.out_features, RANK) for site in MAPS}
    A = {}
    for site in MAPS:
        bound = site.in_features**-0.5
        random = (2 * torch.rand(RANK, site.in_features, generator=draw) - 1) * bound
        A[site.name] = random if protocol in ("LoRA's A", "both factors") else torch.linalg.qr(random.T).Q.T
    both, losses = protocol == "both factors", []
    for _ in range(ROUNDS):
        results = []
        for client in torch.randperm(CLIENTS, generator=draw)[:PRESENT].tolist():
            own_B, own_A = {n: b.clone() for n, b in B.items()}, {n: a.clone() for n, a in A.items()}
            for _ in range(LOCAL):
                picked = torch.randint(0, len(shards[client]), (BATCH,), generator=draw)
                loss, step_B, step_A = _private_step(base, own_B, own_A, shards[client][picked].long(), both, noise)
                losses.append(loss)
                for own, step in ((own_B, step_B), (own_A, step_A)):
                    for name, gradient in step.items():
                        own[name] -= rate * gradient
            results.append({f"{n}.B": b for n, b in own_B.items()} | {f"{n}.A": a for n, a in own_A.items()})
        if protocol == "FedSVD":
            new = server_round(results)
        else:
            new = {name: torch.stack([result[name] for result in results]).mean(0) for name in results[0]}
        B, A = {n: new[f"{n}.B"] for n in B}, {n: new[f"{n}.A"] for n in A}
    weights = {**base, **{f"{n}.weight": base[f"{n}.weight"] + B[n] @ A[n] for n in B}}
    last = losses[-2 * PRESENT * LOCAL :]
    return sum(last) / len(last), held_out(lambda contexts: forward(weights, contexts))


def _run_claim() -> Verdict:
    rates, seeds = (0.1, 0.3, 1.0), range(2)
    figures, after = {}, {}
    protocols: tuple[Protocol, ...] = ("FedSVD", "orthonormal A", "LoRA's A", "both factors")
    for protocol in protocols:
        runs = [min(_federated(protocol, rate, seed) for rate in rates) for seed in seeds]
        after[protocol] = sum(held for _, held in runs) / len(runs)
        figures[f"{protocol}: training loss"] = sum(train for train, _ in runs) / len(runs)
        figures[f"{protocol}: held-out loss"] = after[protocol]
    return Verdict(
        held=after["FedSVD"] < min(after["LoRA's A"], after["both factors"]),
        figures=figures,
        note=f"nats per byte; {CLIENTS} clients with text of different modules, {PRESENT} a round, {ROUNDS} rounds of "
        f"{LOCAL} private SGD steps, clip {CLIP}, noise {NOISE}; best of {len(rates)} rates by training loss, mean of "
        f"{len(seeds)} seeds",
    )


METHOD = AdaptMethod(
    name="fedsvd",
    summary="one trained factor, the other orthonormal and renewed by a server between rounds (exact LoRA)",
    paper=Paper(
        authors="S. Lee, S. Park, D. B. Lee, D. Wagner, H. Seong, T. Bocklet, J. Lee, S. J. Hwang",
        title="FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA",
        year=2025,
        link="https://arxiv.org/abs/2505.12805",
    ),
    options=Options,
    delta=FedsvdDelta,
    exact=True,
    claim=Claim(
        statement="Under private training the held-out loss is lower than with LoRA's fixed A and with both factors "
        "trained.",
        source="abstract: outperforms relevant baselines under private and non-private regimes",
        run=_run_claim,
    ),
)
